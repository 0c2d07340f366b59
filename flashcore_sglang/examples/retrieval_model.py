#!/usr/bin/env python3
"""Makes a small Llama checkpoint that answers the tasks of `flashcore eval` by attention over up to 128K tokens.

    python -m flashcore_sglang.examples.retrieval_model retrieval-model

Its weights are constructed, not trained: an induction circuit (Olsson et al. 2022, arXiv 2209.11895) in three layers.
SGLang and transformers load it as any LlamaForCausalLM; it takes a second to make and 14 MB.

- Layer 0: three heads write the words 1, 2 and 3 tokens back into the residual stream. They find them by position, in
  the RoPE channels that turn fast.
- Layer 1: nothing. Policy topk reads the first two layers whole by default; what it may get wrong is in the next one.
- Layer 2: seven heads in two KV groups match the last three words with the words before every token, in the channels
  that RoPE leaves almost unturned, and copy the token they find. Where nothing matches they rest on the first token,
  and are silent. An eighth head attends equally to all coded words and so writes how frequent each is.
- The output layer adds what follows a word by grammar (an animal: "are"), and takes back coded words said already.

A word's key is a sparse random vector. It is longer for the words that needles are made of than for those of the prose
around them, and every key is the sum of three words': a page's mean key says little about a single token in it.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from flashcore_sglang.eval import tasks, words
from flashcore_sglang.examples.checkpoint import SPECIAL_TOKENS, write_llama

MAX_POSITIONS = 131072 + 1024

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 576, 64, 3, 8, 2, 128
GROUP = HEADS // KV_HEADS
# So large a base that 14 pairs of channels turn within 128K tokens, and 50 as good as not.
ROPE_THETA = 1e30
TURNING = 14

CODE, CODED = 64, 48  # channels of a word's code; of a coded word's, which are orthonormal
ACTIVE = 4  # of the channels of a code
OFFSETS = (1, 2, 3)  # words back that are matched

CONSTANT = 16.0  # a residual channel, so large that RMSNorm divides by nearly the same everywhere
POSITION_LOGIT = 24.0  # of each turning pair in layer 0
MATCH_LOGIT = 24.0  # of a word of salience 1 that matches
SHARPNESS = (1.0, 0.95, 0.9, 0.85)  # of the heads of a group
LINK = 0.35  # of MATCH_LOGIT, for a link that matches
REST = 1.26  # of MATCH_LOGIT: less than two words of a needle or a variable and a link, more than either alone
COUNT_LOGIT, COUNT_REST = 40.0, 20.0

LINKS = ("are", "=")  # match as classes of their own
# Length of a word's code. What needles are made of stands out from prose, as it does in trained models.
SALIENCE = {
    "adjective": 0.85,
    "animal": 0.85,
    "value": 0.85,
    "number": 0.85,
    "variable": 1.05,
    "end": 0.4,
    "prose": 0.3,
}
# Class of the current word -> the word that follows it by grammar.
GRAMMAR = {"animal": "are", "variable": "=", "order": ":", "end": "</s>"}


def vocabulary() -> dict[str, str]:
    """word -> class, in the order of token ids; the special tokens come last."""
    classes = {
        "adjective": words.ADJECTIVES,
        "animal": words.ANIMALS,
        "value": words.VALUES,
        "number": words.NUMBERS,
        "variable": words.VARIABLES,
        "coded": words.CODED,
        "end": ["."],
        "link": LINKS,
        "order": ["order"],
        "count": [":"],
        "prose": [
            *(words.PEOPLE + words.VERBS + words.THINGS + words.PLACES + words.TIMES + words.PREPOSITIONS),
            *tasks.SENTENCES,
        ],
        "special": SPECIAL_TOKENS,
    }
    known: dict[str, str] = {}
    for name, members in classes.items():
        for word in members:
            known.setdefault(word, name)
    return known


@dataclass(frozen=True)
class Stream:
    """Where things stand in the residual stream: the first channel of each."""

    own: int = 0  # code of the current token
    own_coded: int = CODE
    own_link: int = CODE + CODED
    width: int = CODE + CODED + 1  # of what layer 0 copies from other tokens
    out: int = 4 * (CODE + CODED + 1)  # code of what is copied, and of what is counted
    flags: int = 4 * (CODE + CODED + 1) + CODE + CODED  # constant, first token, coded word, counting; then GRAMMAR

    def back(self, offset: int) -> int:
        """First channel of the token `offset` back: its code, coded word's code and link."""
        return offset * self.width


STREAM = Stream()
FLAG_CONSTANT, FLAG_FIRST, FLAG_CODED, FLAG_COUNTING = (STREAM.flags + i for i in range(4))
FLAG_GRAMMAR = STREAM.flags + 4


def unit_codes(count: int, generator: torch.Generator) -> torch.Tensor:
    """``[count, CODE]``: unit vectors of ACTIVE entries at random places, no two with more than two alike."""
    codes = torch.zeros(count, CODE)
    for i in range(count):
        while True:
            code = torch.zeros(CODE)
            signs = torch.randint(2, (ACTIVE,), generator=generator) * 2.0 - 1.0
            code[torch.randperm(CODE, generator=generator)[:ACTIVE]] = signs / math.sqrt(ACTIVE)
            if i == 0 or (codes[:i] @ code).max() <= 2.0 / ACTIVE:
                break
        codes[i] = code
    return codes


def make_embedding(vocab: dict[str, str], codes: torch.Tensor) -> torch.Tensor:
    """``[tokens, HIDDEN]``: a word's code in its length, and the flags of its class."""
    embedding = torch.zeros(len(vocab), HIDDEN)
    embedding[:, FLAG_CONSTANT] = CONSTANT
    followed = list(GRAMMAR)
    coded = 0
    for i, (word, kind) in enumerate(vocab.items()):
        if kind in SALIENCE:
            embedding[i, STREAM.own : STREAM.own + CODE] = SALIENCE[kind] * codes[i]
        if kind == "link":
            embedding[i, STREAM.own_link] = 1.0
        if kind == "coded":
            embedding[i, STREAM.own_coded + coded] = 1.0
            coded += 1
        embedding[i, FLAG_FIRST] = float(word == "<s>")
        embedding[i, FLAG_CODED] = float(kind == "coded")
        embedding[i, FLAG_COUNTING] = float(kind in ("coded", "count"))
        if kind in followed:
            embedding[i, FLAG_GRAMMAR + followed.index(kind)] = 1.0
    return embedding


class Layer:
    """The attention weights of a layer, in the units of the residual stream: RMSNorm is undone, logits are as given."""

    def __init__(self) -> None:
        self.q = torch.zeros(HEADS, HEAD_DIM, HIDDEN)
        self.k = torch.zeros(KV_HEADS, HEAD_DIM, HIDDEN)
        self.v = torch.zeros(KV_HEADS, HEAD_DIM, HIDDEN)
        self.o = torch.zeros(HIDDEN, HEADS, HEAD_DIM)

    def weights(self) -> dict[str, torch.Tensor]:
        norm = CONSTANT / math.sqrt(HIDDEN)  # what RMSNorm divides by
        scale = HEAD_DIM**0.25 * norm  # half of the softmax's scale for q, half for k
        return {
            "q_proj": (self.q * scale).flatten(0, 1),
            "k_proj": (self.k * scale).flatten(0, 1),
            "v_proj": (self.v * norm).flatten(0, 1),
            "o_proj": self.o.flatten(1, 2),
        }


def look_back() -> Layer:
    """Layer 0: head i copies the token OFFSETS[i] back; the logit is highest where the turning pairs are in phase."""
    layer = Layer()
    half = HEAD_DIM // 2
    size = math.sqrt(POSITION_LOGIT) / CONSTANT
    channels = [*range(STREAM.own, STREAM.own + STREAM.width)]
    for pair in range(TURNING):
        layer.k[0, pair, FLAG_CONSTANT] = size
        for head, offset in enumerate(OFFSETS):
            angle = -offset * ROPE_THETA ** (-pair / half)
            layer.q[head, pair, FLAG_CONSTANT] = size * math.cos(angle)
            layer.q[head, pair + half, FLAG_CONSTANT] = size * math.sin(angle)
    layer.v[0, range(len(channels)), channels] = 1.0
    for head, offset in enumerate(OFFSETS):
        layer.o[range(STREAM.back(offset), STREAM.back(offset) + len(channels)), head, range(len(channels))] = 1.0
    return layer


def match_and_count(generator: torch.Generator) -> Layer:
    """Layer 2: the heads that match and copy, and the last one, which counts."""
    layer = Layer()
    half = HEAD_DIM // 2
    still = [*range(TURNING, half), *range(half + TURNING, HEAD_DIM)]
    first, link, coded = still[:3]
    content = [channel for channel in still if channel % half >= TURNING + 3]
    counter = HEADS - 1
    for group in range(KV_HEADS):
        # Each group spreads the words 1, 2 and 3 back over the channels in a way of its own.
        for offset in OFFSETS:
            places = torch.tensor(content)[torch.randperm(len(content), generator=generator)[:CODE]]
            signs = torch.randn(CODE, generator=generator).sign()
            before, now = STREAM.back(offset), STREAM.back(offset - 1)
            layer.k[group, places, range(before, before + CODE)] = signs
            for head in range(group * GROUP, (group + 1) * GROUP):
                if head == counter:
                    continue
                sharp = MATCH_LOGIT * SHARPNESS[head % GROUP]
                layer.q[head, places, range(now, now + CODE)] = sharp * signs
                layer.q[head, first, FLAG_CONSTANT] = sharp * REST / CONSTANT
                layer.q[head, link, STREAM.own_link] = sharp * LINK
        layer.k[group, link, STREAM.back(1) + STREAM.own_link] = 1.0
        layer.k[group, first, FLAG_FIRST] = 1.0
        layer.k[group, coded, FLAG_CODED] = 1.0
        layer.v[group, range(CODE + CODED), range(CODE + CODED)] = 1.0
    layer.q[counter, coded, FLAG_COUNTING] = COUNT_LOGIT
    layer.q[counter, first, FLAG_CONSTANT] = COUNT_REST / CONSTANT
    for head in range(HEADS):
        kept = range(CODE, CODE + CODED) if head == counter else range(CODE)
        layer.o[[STREAM.out + i for i in kept], head, kept] = 1.0 if head == counter else 1.0 / counter
    return layer


def make_output(vocab: dict[str, str], codes: torch.Tensor) -> torch.Tensor:
    """``[tokens, HIDDEN]``: a word's logit is how much of it was copied or counted, or that grammar wants it."""
    output = torch.zeros(len(vocab), HIDDEN)
    ids = {word: i for i, word in enumerate(vocab)}
    coded = 0
    for i, kind in enumerate(vocab.values()):
        if kind in SALIENCE:
            output[i, STREAM.out : STREAM.out + CODE] = codes[i] / SALIENCE[kind] ** 0.5
        if kind == "coded":
            output[i, STREAM.out + CODE + coded] = 8.0  # logits are bf16: far apart, so that their order is kept
            output[i, FLAG_COUNTING] = 2.0
            for offset in (0, 1, 2):
                output[i, STREAM.back(offset) + CODE + coded] = -16.0
            coded += 1
    for i, word in enumerate(GRAMMAR.values()):
        output[ids[word], FLAG_GRAMMAR + i] = 2.0
    return output


def make_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Every weight of LlamaForCausalLM, bf16."""
    generator = torch.Generator().manual_seed(seed)
    vocab = vocabulary()
    codes = unit_codes(len(vocab), generator)
    weights = {
        "model.embed_tokens.weight": make_embedding(vocab, codes),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": make_output(vocab, codes),
    }
    for i, layer in enumerate((look_back(), Layer(), match_and_count(generator))):
        prefix = f"model.layers.{i}"
        weights |= {f"{prefix}.self_attn.{name}.weight": weight for name, weight in layer.weights().items()}
        weights[f"{prefix}.mlp.gate_proj.weight"] = torch.zeros(INNER, HIDDEN)
        weights[f"{prefix}.mlp.up_proj.weight"] = torch.zeros(INNER, HIDDEN)
        weights[f"{prefix}.mlp.down_proj.weight"] = torch.zeros(HIDDEN, INNER)
        weights[f"{prefix}.input_layernorm.weight"] = torch.ones(HIDDEN)
        weights[f"{prefix}.post_attention_layernorm.weight"] = torch.ones(HIDDEN)
    return {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}


def make_tokenizer() -> Tokenizer:
    """A word or a punctuation mark a token, in lower case; the first token of a prompt is <s>."""
    ids = {word: i for i, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    return tokenizer


def make_model(folder: Path) -> Path:
    """Writes the checkpoint into `folder` and returns it."""
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": len(vocabulary()),
        "max_position_embeddings": MAX_POSITIONS,
        "rope_theta": ROPE_THETA,
    }
    return write_llama(folder, sizes, "bfloat16", make_tokenizer(), make_weights())


def main() -> None:
    """Makes the checkpoint in the folder of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoint is written")
    print(make_model(parser.parse_args().folder))


if __name__ == "__main__":
    main()
