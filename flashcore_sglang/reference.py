"""The truth: attention over CSR page tables, and over plans, in plain PyTorch.

Everything is computed in fp32 (fp64 when q is fp64) unless asked otherwise, one request after the other. Speed is not a
goal; being obviously right is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from flashcore_sglang.planner.plan import Plan

PACKED = 1  # Row.flags; kPacked in csrc/params.h


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    last_page_len: torch.Tensor,
    *,
    causal: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each request's query tokens over its pages.

    Args:
        q: ``[tokens, heads, head_dim]``.
        k_cache, v_cache: ``[pages, page_size, kv_heads, head_dim]``.
        qo_indptr: ``[batch + 1]`` query tokens of each request; they are the last ones of its sequence.
        kv_indptr: ``[batch + 1]`` pages of each request.
        kv_indices: page ids.
        last_page_len: ``[batch]`` keys in the last page of each request.
        causal: a query token sees keys up to its own position.
        sm_scale: factor of the logits; None: 1 / sqrt(head_dim).
        window_left: keys before its own position that a token sees; negative: all.
        logits_soft_cap: cap * tanh(logit / cap); 0: off.
        dtype: of the computation; None: fp64 when q is fp64, else fp32.

    Returns:
        ``out`` like q and ``lse`` ``[tokens, heads]`` in base 2, of that dtype. A query that sees no key has out 0 and
        lse -inf.
    """
    dtype = dtype or _exact_dtype(q)
    page_size = k_cache.shape[1]
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:2], -math.inf, dtype=dtype, device=q.device)
    for i, last in enumerate(last_page_len.tolist()):
        tokens = slice(int(qo_indptr[i]), int(qo_indptr[i + 1]))
        pages = kv_indices[int(kv_indptr[i]) : int(kv_indptr[i + 1])].long()
        kv_len = (len(pages) - 1) * page_size + last if len(pages) else 0
        keys = torch.arange(kv_len, device=q.device)
        positions = kv_len - (tokens.stop - tokens.start) + torch.arange(tokens.stop - tokens.start, device=q.device)
        out[tokens], lse[tokens] = attention(
            q[tokens].to(dtype),
            k_cache[pages].flatten(0, 1)[:kv_len].to(dtype),
            v_cache[pages].flatten(0, 1)[:kv_len].to(dtype),
            visible(positions, keys, causal=causal, window_left=window_left),
            sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap,
        )
    return out, lse


def _exact_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def visible(positions: torch.Tensor, keys: torch.Tensor, *, causal: bool, window_left: int) -> torch.Tensor:
    """Mask ``[queries, keys]``: which key positions ``keys`` the queries at ``positions`` see."""
    distance = positions[:, None] - keys[None, :]
    mask = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        mask &= distance >= 0
    if window_left >= 0:
        mask &= distance <= window_left
    return mask


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    *,
    sm_scale: float | None = None,
    logits_soft_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in the dtype of its arguments.

    Args:
        q: ``[queries, heads, head_dim]``.
        k, v: ``[keys, kv_heads, head_dim]``.
        mask: bool ``[queries, keys]``.
        sm_scale, logits_soft_cap: as in :func:`paged_attention`.

    Returns:
        ``(out, lse)``: like q, and ``[queries, heads]`` in base 2.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    logits = torch.einsum("qhd,khd->qhk", q, k) * (q.shape[-1] ** -0.5 if sm_scale is None else sm_scale)
    if logits_soft_cap > 0:
        logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
    logits = logits.masked_fill(~mask[:, None, :], -math.inf)
    lse = torch.logsumexp(logits, dim=-1)
    # Where no key is visible the softmax would be 0 / 0; the result is defined as zero.
    weights = torch.where(lse[..., None] > -math.inf, torch.exp(logits - lse[..., None]), 0)
    return torch.einsum("qhk,khd->qhd", weights, v), lse / math.log(2)


def attend_plan(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: Plan | Sequence[torch.Tensor],
    *,
    causal: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Executes a plan literally: the tiles of each CTA, direct results, partial results, the merge.

    Independent of :func:`paged_attention` in all that a planner decides: what it leaves out or does twice shows.

    Args:
        q, k_cache, v_cache, causal, sm_scale, window_left, logits_soft_cap: as in :func:`paged_attention`.
        plan: a plan, or its ``tensors()``.

    Returns:
        ``(out, lse)`` as :func:`paged_attention`; NaN where no tile of the plan wrote.
    """
    tensors = plan.tensors() if isinstance(plan, Plan) else plan
    kv_indices = tensors[2].long()
    positions, rows, row_tokens, tiles, pair_tiles, cta_indptr, merge_indptr, merge_rows = (
        tensor.tolist() for tensor in tensors[4:12]
    )
    dtype = _exact_dtype(q)
    num_tokens, num_heads, _ = q.shape
    num_kv_heads, page_size = k_cache.shape[2], k_cache.shape[1]
    group = num_heads // num_kv_heads
    out = torch.full(q.shape, math.nan, dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:2], math.nan, dtype=dtype, device=q.device)
    partials: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    for pair, kv_begin, kv_end, partial, *_ in tiles[: cta_indptr[-1]]:
        q_begin, q_count, flags, page_begin, head_stride, _, kv_pos, _ = rows[pair // num_kv_heads]
        kv_head = pair % num_kv_heads
        heads = slice(kv_head * group, (kv_head + 1) * group)
        span = range(q_begin, q_begin + q_count)
        tokens = [row_tokens[i] for i in span] if flags & PACKED else list(span)
        keys = torch.arange(kv_begin, kv_end, device=q.device)
        pages = kv_indices[page_begin + kv_head * head_stride + keys // page_size]
        position = torch.tensor([positions[t] for t in tokens], device=q.device)
        tile_out, tile_lse = attention(
            q[tokens, heads].to(dtype),
            k_cache[pages, keys % page_size, kv_head, None].to(dtype),
            v_cache[pages, keys % page_size, kv_head, None].to(dtype),
            visible(position, kv_pos + keys, causal=causal, window_left=window_left),
            sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap,
        )
        if partial < 0:
            out[tokens, heads], lse[tokens, heads] = tile_out, tile_lse
        else:
            for m, result in enumerate(zip(tile_out.flatten(0, 1), tile_lse.flatten(), strict=True)):
                partials[partial + m] = result

    for token in range(num_tokens):
        for head in range(num_heads):
            parts = [
                partials[tiles[tile][3] + index * group + head % group]
                for row, index in merge_rows[merge_indptr[token] : merge_indptr[token + 1]]
                for pair in [row * num_kv_heads + head // group]
                for tile in range(*pair_tiles[pair])
                if tiles[tile][3] >= 0
            ]
            if parts:
                out[token, head], lse[token, head] = merge(parts)
    return out, lse


def merge(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """One ``(out [head_dim], lse [])`` from those of disjoint keys: lse = log2(sum 2^lse_i), out the weighted mean."""
    outs, lses = (torch.stack(column) for column in zip(*parts, strict=True))
    lse = torch.logsumexp(lses * math.log(2), dim=0) / math.log(2)
    weights = torch.exp2(lses - lse) if lse > -math.inf else torch.zeros_like(lses)
    return (weights[:, None] * outs).sum(dim=0), lse
