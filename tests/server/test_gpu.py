"""On a GPU: the server with all its graphs on, in bf16, against FA3."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from make_model import SHAPES, make_model
from server.harness import Result, Server, come_and_go, deviations, random_prompts, spread

pytestmark = [pytest.mark.server, pytest.mark.gpu]

FLAGS = "--max-total-tokens 100032 --mem-fraction-static 0.3 --cuda-graph-max-bs 32 --chunked-prefill-size 256"
CONFIGURATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "default": ("", {}),
    "wmma-mixed": ("--enable-mixed-chunk --page-size 16", {"FLASHCORE_VARIANT": "wmma_sm80"}),
    "cublaslt": ("", {"FLASHCORE_VARIANT": "cublaslt"}),
    "topk": ("", {"FLASHCORE_POLICY": "topk"}),  # by its default budget, which holds all keys
    "deterministic": ("--enable-deterministic-inference", {}),
    "decode-only": ("--prefill-attention-backend fa3 --decode-attention-backend flashcore_sparse", {}),
    "prefill-only": ("--prefill-attention-backend flashcore_sparse --decode-attention-backend fa3", {}),
    # The other servers are on the first GPU alone, and SGLang would take that for a mistake.
    "tensor-parallel": ("--tp-size 2", {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "false"}),
}
# The scheduler expects answers of 8 tokens: it takes in as many prompts as fit, and has to send some back.
TINY_POOL = (
    "--page-size 1 --max-total-tokens 900 --chunked-prefill-size 96 --schedule-conservativeness 0.05",
    {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8"},
)
# Two GPUs round the sums of each layer otherwise than one does: FA3 is to do so, too.
FA3: dict[str, tuple[str, dict[str, str]]] = {
    "fa3": ("", {}),
    "fa3-tensor-parallel": CONFIGURATIONS["tensor-parallel"],
}
NEEDED_GPUS = {"tensor-parallel": 2, "fa3-tensor-parallel": 2}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, logs: Path) -> Iterator[dict[str, Server]]:
    """All of them at once: a start takes longer than its tests."""
    shape = replace(SHAPES["small"], hidden_size=1024, num_key_value_heads=2, head_dim=128)
    model = make_model(tmp_path_factory.mktemp("model-d128"), shape, std=0.05)
    servers = {
        name: Server(
            model,
            "fa3" if name in FA3 else "flashcore_sparse",
            logs,
            *FLAGS.split(),
            *flags.split(),
            device="cuda",
            environment=environment,
        )
        for name, (flags, environment) in {**FA3, "tiny-pool": TINY_POOL, **CONFIGURATIONS}.items()
        if NEEDED_GPUS.get(name, 1) <= torch.cuda.device_count()
    }
    yield servers
    for server in servers.values():
        server.stop()


@dataclass(frozen=True)
class Peer:
    """FA3, and how far from it a server may be: twice as far as it is from itself, in batches of other compositions."""

    server: Server
    limit: float

    def check(self, results: list[Result]) -> None:
        assert max(deviations(results, self.server)) <= self.limit


@pytest.fixture(scope="module")
def peer_of(servers: dict[str, Server]) -> Callable[[str], Peer]:
    @cache
    def find(name: str) -> Peer:
        return Peer(servers[name], 2 * spread(servers[name]))

    return lambda name: find(f"fa3-{name}" if f"fa3-{name}" in FA3 else "fa3")


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def name(request: pytest.FixtureRequest, servers: dict[str, Server]) -> str:
    if request.param not in servers:
        pytest.skip(f"needs {NEEDED_GPUS[request.param]} GPUs")
    return str(request.param)


@pytest.fixture(scope="module")
def server(name: str, servers: dict[str, Server]) -> Server:
    return servers[name]


@pytest.fixture(scope="module")
def fa3(name: str, peer_of: Callable[[str], Peer]) -> Peer:
    return peer_of(name)


def test_streams_of_replayed_graphs(server: Server, fa3: Peer) -> None:
    """Nineteen streams are padded to the next captured batch; as they end the batch shrinks through other graphs."""
    results = [
        result
        for new_tokens, seed in ((64, 1), (17, 2))
        for result in server.generate_all(random_prompts(range(5, 385, 20), seed), new_tokens)
    ]
    fa3.check(results)
    assert re.search(r"Decode batch.*cuda graph: True", server.log.read_text(errors="replace"))


def test_prompt_of_many_chunks(server: Server, fa3: Peer) -> None:
    results = [server.generate(prompt, new_tokens=16) for prompt in random_prompts((3000,), seed=3)]
    fa3.check(results)


def test_prefixes_that_come_and_go(server: Server, fa3: Peer) -> None:
    """Long enough that the decode steps of the streams are planned with shared rows."""
    for _ in range(2):
        results = come_and_go(server, seed=4, prefix_length=3600, new_tokens=48)
        assert any(result.cached_tokens >= 3584 for result in results)
        fa3.check(results)
        server.flush()  # no page is lost; what comes next lies in other pages
    assert len(server.generate([1, 2, 3], new_tokens=4).tokens) == 4


def test_retraction_under_a_tiny_pool_of_single_tokens(
    servers: dict[str, Server], peer_of: Callable[[str], Peer]
) -> None:
    server = servers["tiny-pool"]
    results = server.generate_all(random_prompts(range(25, 345, 20), seed=5), new_tokens=96)
    assert any(result.retractions for result in results)
    peer_of("tiny-pool").check(results)
    server.flush()
    assert len(server.generate([1, 2, 3], new_tokens=4).tokens) == 4


def test_prefill_replays_breakable_graphs(servers: dict[str, Server]) -> None:
    servers["default"].generate([1, 2, 3], new_tokens=1)
    assert re.search(r"Prefill batch.*cuda graph: True", servers["default"].log.read_text(errors="replace"))


def test_a_result_does_not_depend_on_the_batch(servers: dict[str, Server]) -> None:
    server = servers["deterministic"]
    prompts = random_prompts(range(100, 180, 5), seed=6)
    server.flush()
    together = server.generate_all(prompts, new_tokens=32)
    server.flush()
    assert server.generate(prompts[3], new_tokens=32) == together[3]
