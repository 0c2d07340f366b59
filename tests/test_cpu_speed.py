"""The C++ kernels are worth having: a decode step against the same step in plain PyTorch, on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from flashcore_sglang import PagedAttention, reference

BATCH, CONTEXT, PAGE_SIZE, QO_HEADS, KV_HEADS, HEAD_DIM = 8, 2048, 64, 8, 2, 64


def best_of(call: Callable[[], object], runs: int) -> float:
    """Seconds of the fastest run: what other processes take away is not the kernel's."""
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def test_decode_is_at_least_twice_as_fast_as_the_reference() -> None:
    columns = CONTEXT // PAGE_SIZE
    qo_indptr = torch.arange(BATCH + 1, dtype=torch.int32)
    kv_indptr = qo_indptr * columns
    kv_indices = torch.randperm(BATCH * columns).int()
    last_page_len = torch.full((BATCH,), PAGE_SIZE, dtype=torch.int32)
    q = torch.randn(BATCH, QO_HEADS, HEAD_DIM).bfloat16()
    k, v = (torch.randn(BATCH * columns, PAGE_SIZE, KV_HEADS, HEAD_DIM).bfloat16() for _ in range(2))
    attention = PagedAttention(device="cpu")
    attention.plan(
        qo_indptr, kv_indptr, kv_indices, last_page_len, QO_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, causal=True
    )

    ours = best_of(lambda: attention.run(q, (k, v)), runs=20)
    plain = best_of(
        lambda: reference.paged_attention(
            q, k, v, qo_indptr, kv_indptr, kv_indices, last_page_len, causal=True, sm_scale=HEAD_DIM**-0.5
        ),
        runs=5,
    )
    assert plain >= 2 * ours, f"reference {plain * 1e3:.2f} ms, cpu variant {ours * 1e3:.2f} ms"
    print(f"reference {plain * 1e3:.2f} ms, cpu variant {ours * 1e3:.2f} ms: {plain / ours:.0f}x")
