"""Policies window and topk: below the budget exact bit for bit, beyond it something is left out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from server.conftest import FLAGS
from server.harness import Server, random_prompts

pytestmark = pytest.mark.server

BUDGET = 512
POLICIES = {
    "window": {"FLASHCORE_SINK_TOKENS": "64", "FLASHCORE_RECENT_TOKENS": str(BUDGET - 64)},
    "topk": {
        "FLASHCORE_SINK_TOKENS": "64",
        "FLASHCORE_RECENT_TOKENS": "128",
        "FLASHCORE_BUDGET_TOKENS": str(BUDGET),
    },
}


@pytest.fixture(scope="module", params=POLICIES)
def sparse(request: pytest.FixtureRequest, model: Path, logs: Path) -> Iterator[Server]:
    environment = {"FLASHCORE_POLICY": request.param, **POLICIES[request.param]}
    server = Server(model, "flashcore_sparse", logs, *FLAGS, environment=environment)
    yield server
    server.stop()


@pytest.mark.parametrize("length", [1, 63, 64, 200, BUDGET - 64])
def test_below_the_budget(length: int, sparse: Server, exact: Server) -> None:
    """One at a time, as other batches round differently; the second time the prompt comes out of the radix cache."""
    prompt = random_prompts((length,), seed=20)[0]
    for server in (sparse, exact):
        server.flush()
    for _ in range(2):
        assert sparse.generate(prompt, new_tokens=40) == exact.generate(prompt, new_tokens=40)


def test_beyond_the_budget(sparse: Server, exact: Server) -> None:
    """Prefill is dense, so that only what follows the first new token differs."""
    prompt = random_prompts((3 * BUDGET,), seed=21)[0]
    found, dense = (server.generate(prompt, new_tokens=40) for server in (sparse, exact))
    assert found.prompt_logprobs == dense.prompt_logprobs
    assert found.token_logprobs[0] == dense.token_logprobs[0]
    assert found.token_logprobs != dense.token_logprobs
    assert all(math.isfinite(logprob) for logprob in found.token_logprobs)
