"""How far an output is from fp64, on samples: whole tensors of the measured sizes would not fit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch


class Error(NamedTuple):
    """Distance to fp64: the largest difference, and the root of the mean square, which does not hang on one number."""

    largest: float
    rms: float


def overall(errors: Iterable[Error]) -> Error:
    """Of several outputs of one size."""
    known = list(errors)
    return Error(max(e.largest for e in known), math.sqrt(sum(e.rms**2 for e in known) / len(known)))


def sample(count: int, most: int) -> list[int]:
    """At most `most` indices below `count`, evenly spread, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, most)).long().tolist()


def token_error(
    out: torch.Tensor, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, pages: torch.Tensor, visible: int
) -> Error:
    """Of one query token; NaN is infinite.

    Args:
        out, q: ``[heads, head_dim]``.
        k_cache, v_cache: ``[pages, page_size, kv_heads, head_dim]``.
        pages: ids of the token's pages.
        visible: keys that the token sees.
    """
    keys, values = (x[pages.long()].flatten(0, 1)[:visible].double().transpose(0, 1) for x in (k_cache, v_cache))
    queries = q.double().view(keys.shape[0], -1, q.shape[-1])
    weights = torch.softmax(queries @ keys.transpose(1, 2) * q.shape[-1] ** -0.5, -1)
    off = (out.double() - (weights @ values).view(q.shape)).nan_to_num(math.inf, math.inf, -math.inf)
    return Error(off.abs().max().item(), off.square().mean().sqrt().item())
