#!/usr/bin/env python3
"""Makes a Llama checkpoint with random weights, and a tokenizer, that SGLang and transformers load offline.

The weights are normal with a small standard deviation, as of a model before training. (SGLang's own dummy weights are
so small that every softmax is uniform, which hides most errors of an attention kernel.) Token i is the word "t<i>" and
words are split at spaces, so token ids survive the way through text and back.

    scripts/make_model.py model                                         # small, runs on a CPU
    scripts/make_model.py shape --shape llama-3.1-8b --no-weights       # for `--load-format dummy`
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from flashcore_sglang.examples.checkpoint import SPECIAL_TOKENS, write_llama

CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %} {{ message['content'] }}{% endfor %}"

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model; names as in its config.json."""

    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    vocab_size: int = 10240
    max_position_embeddings: int = 32768
    rope_theta: float = 500000.0

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.vocab_size <= len(SPECIAL_TOKENS):
            raise ValueError(f"vocab_size={self.vocab_size} must be more than the {len(SPECIAL_TOKENS)} special tokens")


SHAPES = {
    "small": Shape(),
    "llama-3.1-8b": Shape(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=131072,
    ),
}


def special_ids(vocab_size: int) -> dict[str, int]:
    """Token id of each special token: the last ones, so that "t<i>" is token i for every other id."""
    first = vocab_size - len(SPECIAL_TOKENS)
    return {token: first + i for i, token in enumerate(SPECIAL_TOKENS)}


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """One word a token; decoding joins the words with spaces."""
    ids = special_ids(vocab_size)
    vocab = {f"t{i}": i for i in range(vocab_size - len(SPECIAL_TOKENS))} | ids
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ids])
    return tokenizer


def weight_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight of LlamaForCausalLM; vectors are norms."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    q_size = shape.num_attention_heads * shape.head_dim
    kv_size = shape.num_key_value_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (q_size, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (kv_size, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (kv_size, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, q_size)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape.vocab_size, hidden)


def make_weights(shape: Shape, dtype: torch.dtype, std: float, seed: int) -> dict[str, torch.Tensor]:
    """Matrices from N(0, std^2), norms of one; the same for the same seed on every machine."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, size in weight_shapes(shape):
        weight = torch.ones(size) if len(size) == 1 else torch.empty(size).normal_(0.0, std, generator=generator)
        weights[name] = weight.to(dtype)
    return weights


def make_model(
    folder: Path, shape: Shape, *, dtype: str = "bfloat16", weights: bool = True, std: float = 0.02, seed: int = 0
) -> Path:
    """Writes the checkpoint into `folder` and returns it."""
    tensors = make_weights(shape, DTYPES[dtype], std, seed) if weights else None
    return write_llama(folder, asdict(shape), dtype, make_tokenizer(shape.vocab_size), tensors, CHAT_TEMPLATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoint is written")
    parser.add_argument("--shape", choices=SHAPES, default="small", help="the sizes to start from (default: small)")
    for field in fields(Shape):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), metavar="N", help="instead of the shape's")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--std", type=float, default=0.02, help="standard deviation of the weights (default: 0.02)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-weights", action="store_true", help="config and tokenizer only")
    args = parser.parse_args()
    given = {field.name: getattr(args, field.name) for field in fields(Shape)}
    try:
        shape = replace(SHAPES[args.shape], **{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        parser.error(str(error))
    make_model(args.folder, shape, dtype=args.dtype, weights=not args.no_weights, std=args.std, seed=args.seed)
    print(args.folder)


if __name__ == "__main__":
    main()
