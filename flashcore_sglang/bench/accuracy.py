"""How far an output is from fp64, on samples: whole tensors of the measured sizes would not fit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Error(NamedTuple):
    """Distance to fp64: the largest difference, and the root of the mean square, which does not hang on one number."""

    largest: float
    rms: float


def distance(out: torch.Tensor, truth: torch.Tensor) -> Error:
    """Of two tensors of one shape; NaN is infinite."""
    off = (out.double() - truth).nan_to_num(math.inf, math.inf, -math.inf)
    return Error(off.abs().max().item(), off.square().mean().sqrt().item())


@dataclass(frozen=True)
class Truth:
    """What the output of some query tokens should be."""

    tokens: list[int]
    out: torch.Tensor  # fp64 [tokens, heads, head_dim]

    @classmethod
    def of(cls, outputs: Iterable[tuple[int, torch.Tensor]]) -> Truth:
        """From a token and its `token_truth` each."""
        tokens, truths = zip(*outputs, strict=True)
        return cls(list(tokens), torch.stack(truths))

    def error(self, out: torch.Tensor) -> Error:
        """Of a whole output ``[all tokens, heads, head_dim]``."""
        return distance(out[self.tokens], self.out)


def sample(count: int, most: int) -> list[int]:
    """At most `most` indices below `count`, evenly spread, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, most)).long().tolist()


def token_truth(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, pages: torch.Tensor, visible: int
) -> torch.Tensor:
    """The output of one query token in fp64, ``[heads, head_dim]``.

    Args:
        q: ``[heads, head_dim]``.
        k_cache, v_cache: ``[pages, page_size, kv_heads, head_dim]``.
        pages: ids of the token's pages.
        visible: keys that the token sees.
    """
    keys, values = (x[pages.long()].flatten(0, 1)[:visible].double().transpose(0, 1) for x in (k_cache, v_cache))
    queries = q.double().view(keys.shape[0], -1, q.shape[-1])
    weights = torch.softmax(queries @ keys.transpose(1, 2) * q.shape[-1] ** -0.5, -1)
    return (weights @ values).view(q.shape)
