"""Models that ask other things of attention than a Llama: servers of ours against torch_native's of the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from server.harness import Server, beside_torch_native, deviations, random_prompts, spread
from server.random_models import make_random_model

pytestmark = pytest.mark.server

WINDOW = 100  # no multiple of a page
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}


@dataclass(frozen=True)
class Architecture:
    name: str
    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)


ARCHITECTURES = (
    Architecture("biases", "qwen2"),
    Architecture("normed-heads-experts", "qwen3_moe", EXPERTS),
    Architecture("one-kv-head-of-256", "gemma", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256}),
    Architecture("five-windows-to-one", "gemma3_text", {"sliding_window": WINDOW, "num_hidden_layers": 6}),
    Architecture("scale-of-its-own", "granite", {"attention_multiplier": 0.1}),
    Architecture("all-heads-on-one", "gpt_bigcode", {"n_embd": 512, "n_head": 8, "n_layer": 3, "n_positions": 4096}),
)


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda architecture: architecture.name)
def servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, logs: Path
) -> Iterator[dict[str, Server]]:
    architecture: Architecture = request.param
    folder = make_random_model(
        tmp_path_factory.mktemp(architecture.model_type), architecture.model_type, **architecture.changes
    )
    with beside_torch_native(folder, logs, own_flags=("--chunked-prefill-size", "128")) as servers:
        yield servers


def test_streams_over_a_cached_prefix(servers: dict[str, Server]) -> None:
    server, reference = servers["flashcore_sparse"], servers["torch_native"]
    prefix = random_prompts((200,), seed=50)[0]
    server.generate(prefix, new_tokens=1)
    results = server.generate_all(random_prompts((1, 40, 57, 90, 300), 51, prefix), new_tokens=24)
    assert max(deviations(results, reference)) <= 2 * spread(reference)
