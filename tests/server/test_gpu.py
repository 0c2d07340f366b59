"""On a GPU: the server with all its graphs on, in bf16, against FA3."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from server.harness import Server, deviations, random_prompts, spread

pytestmark = [pytest.mark.server, pytest.mark.gpu]

FLAGS = "--max-total-tokens 100032 --mem-fraction-static 0.3 --cuda-graph-max-bs 32 --chunked-prefill-size 256"


def start(model: Path, logs: Path, backend: str, flags: str = "", **environment: str) -> Server:
    return Server(model, backend, logs, *FLAGS.split(), *flags.split(), device="cuda", environment=environment)


@pytest.fixture(scope="module")
def fa3(model: Path, logs: Path) -> Iterator[Server]:
    server = start(model, logs, "fa3")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def fa3_spread(fa3: Server) -> float:
    return 2 * spread(fa3)


@pytest.fixture(
    scope="module",
    params=[
        ("", {}),
        ("--enable-mixed-chunk", {"FLASHCORE_VARIANT": "wmma_sm80"}),
        ("", {"FLASHCORE_VARIANT": "cublaslt"}),
        ("", {"FLASHCORE_POLICY": "topk"}),
        ("--enable-deterministic-inference", {}),
        ("--prefill-attention-backend fa3 --decode-attention-backend flashcore_sparse", {}),
    ],
    ids=["default", "wmma-mixed", "cublaslt", "topk", "deterministic", "decode-only"],
)
def server(request: pytest.FixtureRequest, model: Path, logs: Path, fa3: Server) -> Iterator[Server]:
    flags, environment = request.param
    server = start(model, logs, "flashcore_sparse", flags, **environment)
    yield server
    server.stop()


def test_streams_of_replayed_graphs(server: Server, fa3: Server, fa3_spread: float) -> None:
    """Nineteen streams are padded to the next captured batch; as they end the batch shrinks through other graphs."""
    results = [
        result
        for new_tokens, seed in ((64, 1), (17, 2))
        for result in server.generate_all(random_prompts(range(5, 385, 20), seed), new_tokens)
    ]
    assert max(deviations(results, fa3)) <= fa3_spread
    assert re.search(r"Decode batch.*cuda graph: True", server.log.read_text(errors="replace"))


def test_shared_prefix(server: Server, fa3: Server, fa3_spread: float) -> None:
    prefix = random_prompts((3600,), seed=3)[0]
    server.generate(prefix, new_tokens=1)
    results = server.generate_all(random_prompts(range(1, 241, 10), 4, prefix), new_tokens=48, start=len(prefix))
    assert max(deviations(results, fa3)) <= fa3_spread


def test_server_answers_after_hang_ups(server: Server) -> None:
    for prompt in random_prompts(range(20, 180, 20), seed=5):
        assert server.break_off(prompt, 3) == 3
    server.flush()
    assert len(server.generate([1, 2, 3], new_tokens=4).tokens) == 4
