"""One server for each way of running that another file does not have: page sizes, policies, ranks, a tiny KV pool.

Below the budget of policies window and topk every request reads all its pages, so that these servers too have to
agree with the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from server.harness import Server, deviations, random_prompts

pytestmark = pytest.mark.server


@dataclass(frozen=True)
class Configuration:
    name: str
    flags: str
    environment: dict[str, str] = field(default_factory=dict)
    retracts: bool = False  # the KV pool is too small for the traffic


CONFIGURATIONS = (
    # The scheduler expects answers of 8 tokens: it takes in as many prompts as fit, and has to send some back.
    Configuration(
        "page-1-tiny-pool",
        "--page-size 1 --max-total-tokens 900 --chunked-prefill-size 96 --schedule-conservativeness 0.05",
        {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8"},
        retracts=True,
    ),
    Configuration(
        "page-8-window",  # SGLang 0.5.17 allocates pages of powers of two only
        "--page-size 8 --max-total-tokens 20000 --chunked-prefill-size 96",
        {"FLASHCORE_POLICY": "window", "FLASHCORE_SINK_TOKENS": "20", "FLASHCORE_RECENT_TOKENS": "4000"},
    ),
    Configuration(
        "page-16-topk-two-ranks",
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


def test_cached_prefix(server: Server, reference: Server, tolerance: float) -> None:
    prefix = random_prompts((200,), seed=4)[0]
    server.generate(prefix, new_tokens=1)
    results = server.generate_all(random_prompts((1, 40, 64), 5, prefix), new_tokens=8, start=len(prefix))
    assert all(result.cached_tokens >= 192 for result in results)
    assert max(deviations(results, reference)) <= tolerance
