"""One server for each way of running that another file does not have: page sizes, ranks, phases, a tiny KV pool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pytest
from server.harness import Server, come_and_go, deviations, random_prompts

pytestmark = pytest.mark.server


@dataclass(frozen=True)
class Configuration:
    name: str
    flags: str
    environment: dict[str, str] = field(default_factory=dict)
    retracts: bool = False  # the KV pool is too small for the traffic


# What SGLang's own allocator takes without a GPU: 0.5.17 powers of two only.
ODD_PAGE = 8 if version("sglang").startswith("0.5.17") else 5

CONFIGURATIONS = (
    # The scheduler expects answers of 8 tokens: it takes in as many prompts as fit, and has to send some back.
    Configuration(
        "page-1-tiny-pool",
        "--page-size 1 --max-total-tokens 900 --chunked-prefill-size 96 --schedule-conservativeness 0.05",
        {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8"},
        retracts=True,
    ),
    Configuration(
        f"page-{ODD_PAGE}-prefill-only",
        "--prefill-attention-backend flashcore_sparse --decode-attention-backend torch_native "
        f"--max-total-tokens 20000 --page-size {ODD_PAGE} --chunked-prefill-size {12 * ODD_PAGE}",
    ),
    Configuration(
        "page-16-topk-two-ranks",  # topk by its default budget, which holds all keys
        "--page-size 16 --max-total-tokens 20000 --chunked-prefill-size 128 --tp-size 2",
        # 0.5.17 would use NCCL between ranks wherever it finds the library.
        {"FLASHCORE_POLICY": "topk", "SGLANG_CPU_OMP_THREADS_BIND": "0|1", "SGLANG_NCCL_SO_PATH": "none"},
    ),
    Configuration(
        "deterministic-decode-only",
        "--prefill-attention-backend torch_native --decode-attention-backend flashcore_sparse "
        "--max-total-tokens 20032 --page-size 16",
        {"FLASHCORE_DETERMINISTIC": "true", "FLASHCORE_SPLIT_KEYS": "64"},
    ),
)


@pytest.fixture(scope="module", params=CONFIGURATIONS, ids=lambda configuration: configuration.name)
def configuration(request: pytest.FixtureRequest) -> Configuration:
    return request.param


@pytest.fixture(scope="module")
def server(configuration: Configuration, model: Path, logs: Path, reference: Server) -> Iterator[Server]:
    flags = ("--dtype", "float32", *configuration.flags.split())
    server = Server(model, "flashcore_sparse", logs, *flags, environment=configuration.environment)
    yield server
    server.stop()


def test_sixteen_streams(configuration: Configuration, server: Server, reference: Server, tolerance: float) -> None:
    # Long enough that the requests which were let in outgrow a pool that is to overflow, however they arrive.
    new_tokens = 96 if configuration.retracts else 32
    results = server.generate_all(random_prompts(range(25, 345, 20), seed=3), new_tokens)
    assert max(deviations(results, reference)) <= tolerance
    assert any(result.retractions for result in results) == configuration.retracts


def test_prefixes_that_come_and_go(
    configuration: Configuration, server: Server, reference: Server, tolerance: float
) -> None:
    results = come_and_go(server, seed=30, prefix_length=200, new_tokens=64 if configuration.retracts else 24)
    assert max(deviations(results, reference)) <= tolerance
    assert any(result.retractions for result in results) == configuration.retracts
    assert any(result.cached_tokens >= 192 for result in results)
    server.flush()  # no page is lost, and the server answers
    assert len(server.generate([1, 2, 3], new_tokens=4).tokens) == 4
