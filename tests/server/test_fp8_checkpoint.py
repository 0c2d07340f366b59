"""A checkpoint that brings scales for an FP8 KV cache, served with a cache of the model's dtype."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from server.harness import Server, random_prompts

pytestmark = pytest.mark.server

FLAGS = ("--dtype", "bfloat16", "--max-total-tokens", "4096")
LINEAR = (*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")))


@pytest.fixture
def scaled(model: Path, tmp_path: Path) -> Path:
    """``model`` with scales of K and V in every layer. Its weights stay as they are: FP8 products take a GPU."""
    folder = tmp_path / "scaled"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    layers = [f"model.layers.{i}" for i in range(config["num_hidden_layers"])]
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "ignored_layers": [f"{layer}.{name}" for layer in layers for name in LINEAR],
        "kv_cache_scheme": "static",
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for i, layer in enumerate(layers):
        weights[f"{layer}.self_attn.k_scale"] = torch.tensor([0.02 * (i + 1)])
        weights[f"{layer}.self_attn.v_scale"] = torch.tensor([0.05 * (i + 1)])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_scales_of_an_fp8_cache_change_nothing(model: Path, scaled: Path, logs: Path) -> None:
    servers = [Server(folder, "flashcore_sparse", logs, *FLAGS) for folder in (model, scaled)]
    try:
        for prompt in random_prompts((1, 65, 300), seed=50):
            plain, same = (server.generate(prompt, new_tokens=16) for server in servers)
            assert same == plain
    finally:
        for server in servers:
            server.stop()
