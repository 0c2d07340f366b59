"""The kernels a user would pick instead, behind one call each; a peer that is missing is left out, with a line."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from .cases import DecodeCase, PrefillCase

Call = Callable[[], torch.Tensor]  # returns what attention puts out, [tokens, heads, head_dim]
_WORKSPACE_BYTES = 512 << 20


def available(module: str) -> Any | None:
    """The peer's module, or None with one printed line."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        print(f"peer {module} left out: {error}")
        return None


@functools.cache
def _workspace() -> torch.Tensor:
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")


def decode_fa3(case: DecodeCase, q: Any, k: Any, v: Any, table: Any, lens: Any) -> Call | None:
    """FlashAttention 3 over a paged cache."""
    module = available("sgl_kernel.flash_attn")
    if module is None:
        return None
    return lambda: module.flash_attn_with_kvcache(
        q.unsqueeze(1), k, v, page_table=table, cache_seqlens=lens, causal=True
    ).squeeze(1)


def decode_flashinfer(case: DecodeCase, q: Any, k: Any, v: Any, table: Any, lens: Any) -> Call | None:
    """FlashInfer's batch decode wrapper on tensor cores."""
    module = available("flashinfer")
    if module is None:
        return None
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(_workspace(), "NHD", use_tensor_cores=True)
    indptr, indices, last = case.csr(table, lens)
    h = case.heads
    types = {"q_data_type": q.dtype, "kv_data_type": k.dtype}
    wrapper.plan(indptr.cpu(), indices.cpu(), last.cpu(), h.qo, h.kv, h.dim, case.page_size, **types)
    return lambda: wrapper.run(q, (k, v))


def decode_flashinfer_cascade(case: DecodeCase, q: Any, k: Any, v: Any, table: Any, lens: Any) -> Call | None:
    """FlashInfer's MultiLevelCascadeAttentionWrapper, given the tree that the case was made from."""
    module = available("flashinfer")
    if module is None or not case.shared:
        return None
    depth, batch, device = len(case.levels), case.batch, table.device
    qo, kv, ids, last = [], [], [], []
    nodes, column = 1, 0
    for children, tokens in case.levels:
        nodes *= children
        count = -(-tokens // case.page_size)
        members = batch // nodes
        qo.append(torch.arange(0, batch + 1, members, dtype=torch.int32, device=device))
        kv.append(torch.arange(0, nodes * count + 1, count, dtype=torch.int32, device=device))
        ids.append(table[::members, column : column + count].flatten().contiguous())
        last.append(torch.full((nodes,), tokens - (count - 1) * case.page_size, dtype=torch.int32, device=device))
        column += count
    wrapper = module.MultiLevelCascadeAttentionWrapper(depth, _workspace(), "NHD")
    h = case.heads
    wrapper.plan(qo, kv, ids, last, h.qo, h.kv, h.dim, case.page_size, q_data_type=q.dtype)
    return lambda: wrapper.run(q, (k, v))


# Each takes a case, q [batch, heads, head_dim], k and v [pages, page_size, kv_heads, head_dim], and the page table and
# lengths of `DecodeCase.page_table`.
DECODE: dict[str, Callable[..., Call | None]] = {
    "fa3": decode_fa3,
    "flashinfer": decode_flashinfer,
    "flashinfer_cascade": decode_flashinfer_cascade,
}


def prefill_fa3(case: PrefillCase, q: Any, k: Any, v: Any, cache: Any) -> Call | None:
    """FlashAttention 3 over contiguous K and V; left out where there is a cached prefix."""
    module = available("sgl_kernel.flash_attn")
    if module is None or case.prefix:
        return None
    cu = torch.arange(0, (case.batch + 1) * case.new, case.new, device="cuda", dtype=torch.int32)
    return lambda: module.flash_attn_varlen_func(q, k, v, cu, cu, case.new, case.new, causal=case.causal)


def prefill_fa3_paged(case: PrefillCase, q: Any, k: Any, v: Any, cache: Any) -> Call | None:
    """FlashAttention 3 over the pages."""
    module = available("sgl_kernel.flash_attn")
    if module is None:
        return None
    k_cache, v_cache, table, lens = cache
    cu = torch.arange(0, (case.batch + 1) * case.new, case.new, device="cuda", dtype=torch.int32)
    return lambda: module.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        page_table=table,
        cache_seqlens=lens,
        cu_seqlens_q=cu,
        max_seqlen_q=case.new,
        causal=case.causal,
    )


def prefill_flashinfer(case: PrefillCase, q: Any, k: Any, v: Any, cache: Any) -> Call | None:
    """FlashInfer's batch prefill wrapper over the pages."""
    module = available("flashinfer")
    if module is None:
        return None
    k_cache, v_cache, table, lens = cache
    wrapper = module.BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD")
    pages = table.shape[1]
    last = lens - (pages - 1) * case.page_size
    h = case.heads
    wrapper.plan(
        torch.arange(0, (case.batch + 1) * case.new, case.new, dtype=torch.int32),
        torch.arange(0, (case.batch + 1) * pages, pages, dtype=torch.int32),
        table.flatten().cpu(),
        last.int().cpu(),
        h.qo,
        h.kv,
        h.dim,
        case.page_size,
        causal=case.causal,
        q_data_type=q.dtype,
        kv_data_type=q.dtype,
    )
    return lambda: wrapper.run(q, (k_cache, v_cache))


def _sdpa(backend: str, case: PrefillCase, q: Any, k: Any, v: Any) -> Call | None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if case.prefix:
        return None
    shape = (case.batch, case.new, -1, case.heads.dim)
    heads_first = [x.view(shape).transpose(1, 2) for x in (q, k, v)]
    grouped = case.heads.qo != case.heads.kv

    def call() -> torch.Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            out = torch.nn.functional.scaled_dot_product_attention(
                *heads_first, is_causal=case.causal, enable_gqa=grouped
            )
        return out.transpose(1, 2).reshape(q.shape)

    return call


def prefill_cudnn(case: PrefillCase, q: Any, k: Any, v: Any, cache: Any) -> Call | None:
    """cuDNN through torch."""
    return _sdpa("CUDNN_ATTENTION", case, q, k, v)


def prefill_fa2(case: PrefillCase, q: Any, k: Any, v: Any, cache: Any) -> Call | None:
    """FlashAttention 2 (mma.sync) through torch."""
    return _sdpa("FLASH_ATTENTION", case, q, k, v)


# Each takes a case, q, k and v of the new tokens [tokens, heads, head_dim], and the cache that holds them, too: k and v
# [pages, page_size, kv_heads, head_dim], page table [batch, pages of a request] and lengths [batch], int32.
PREFILL: dict[str, Callable[..., Call | None]] = {
    "fa3": prefill_fa3,
    "fa3_paged": prefill_fa3_paged,
    "flashinfer": prefill_flashinfer,
    "cudnn": prefill_cudnn,
    "fa2": prefill_fa2,
}
