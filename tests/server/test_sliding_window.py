"""A Gemma 2, whose layers take turns with a sliding window and the whole context, over one KV pool."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from server.harness import Server, beside_torch_native, deviations, random_prompts, spread
from server.random_models import make_random_model

pytestmark = pytest.mark.server

WINDOW = 100  # keys that a query sees, itself included: no multiple of a page


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(
        tmp_path_factory.mktemp("gemma"),
        "gemma2",
        hidden_size=256,
        num_hidden_layers=4,
        hidden_act="gelu_pytorch_tanh",
        query_pre_attn_scalar=64,
        sliding_window=WINDOW,
        attn_logit_softcapping=0.0,  # torch_native ignores it
        final_logit_softcapping=None,
    )


@pytest.fixture(scope="module")
def servers(gemma: Path, logs: Path) -> Iterator[dict[str, Server]]:
    with beside_torch_native(gemma, logs, own_flags=("--chunked-prefill-size", "128")) as servers:
        yield servers


@pytest.fixture(scope="module")
def gemma_tolerance(servers: dict[str, Server]) -> float:
    return 2 * spread(servers["torch_native"])


def test_streams_in_and_beyond_the_window(servers: dict[str, Server], gemma_tolerance: float) -> None:
    prompts = random_prompts((1, 64, 95, 99, 100, 101, 164, 500), seed=40)
    results = servers["flashcore_sparse"].generate_all(prompts, new_tokens=32)
    assert max(deviations(results, servers["torch_native"])) <= gemma_tolerance


def test_cached_prefix(servers: dict[str, Server], gemma_tolerance: float) -> None:
    server = servers["flashcore_sparse"]
    prefix = random_prompts((400,), seed=41)[0]
    server.generate(prefix, new_tokens=1)
    results = server.generate_all(random_prompts((1, 40, 90), 42, prefix), new_tokens=16, start=len(prefix))
    assert all(result.cached_tokens >= 384 for result in results)
    assert max(deviations(results, servers["torch_native"])) <= gemma_tolerance


@pytest.fixture(scope="module")
def wrapped(gemma: Path, logs: Path) -> Iterator[dict[str, Server]]:
    """SGLang's wrapper around the model of Transformers keeps its layers where `modules()` does not look."""
    with beside_torch_native(gemma, logs, "--model-impl", "transformers") as servers:
        yield servers


def test_around_a_model_of_transformers(wrapped: dict[str, Server]) -> None:
    tolerance = 2 * spread(wrapped["torch_native"])
    for seed in (43, 44):
        prompts = random_prompts((20, 99, 164, 300), seed)
        results = wrapped["flashcore_sparse"].generate_all(prompts, new_tokens=32)
        assert max(deviations(results, wrapped["torch_native"])) <= tolerance
