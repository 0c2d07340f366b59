"""Checkpoints of any architecture of Transformers, with random weights and the tokenizer of scripts/make_model.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from make_model import SHAPES, make_tokenizer, special_ids

VOCABULARY = SHAPES["small"].vocab_size


def make_random_model(folder: Path, model_type: str, **changes: Any) -> Path:
    """Writes a small model of ``model_type`` into ``folder`` and returns it; ``changes`` are of its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    ids = special_ids(VOCABULARY)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "initializer_range": 0.05,  # so that attention is far from uniform
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["</s>"],
        "pad_token_id": ids["<pad>"],
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes | changes)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(VOCABULARY)).save_pretrained(folder)
    return folder
