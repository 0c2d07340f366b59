"""The files of a Llama checkpoint, as SGLang and transformers load them offline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

SPECIAL_TOKENS = ("<unk>", "<pad>", "<s>", "</s>")


def write_llama(
    folder: Path,
    sizes: Mapping[str, int | float],
    dtype: str,
    tokenizer: Tokenizer,
    weights: Mapping[str, torch.Tensor] | None,
    chat_template: str | None = None,
) -> Path:
    """Writes the checkpoint into `folder` and returns it; config.json comes last and so marks a complete one.

    Args:
        folder: made if it is not there.
        sizes: of the model; names as in config.json, `max_position_embeddings` among them.
        dtype: of the weights, as in config.json.
        tokenizer: knows SPECIAL_TOKENS.
        weights: of LlamaForCausalLM by their names; None: none are written, for `--load-format dummy`.
        chat_template: of the tokenizer; None: it has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(sizes["max_position_embeddings"], chat_template))
    if weights is not None:
        save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(sizes, dtype, tokenizer))
    return folder


def _config(sizes: Mapping[str, int | float], dtype: str, tokenizer: Tokenizer) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.token_to_id("<s>"),
        "eos_token_id": tokenizer.token_to_id("</s>"),
        "pad_token_id": tokenizer.token_to_id("<pad>"),
        "torch_dtype": dtype,
        "transformers_version": "5.0.0",  # whose file format this is
    }


def _tokenizer_config(max_length: int | float, chat_template: str | None) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **({} if chat_template is None else {"chat_template": chat_template}),
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
