"""Small cases of every CUDA kernel for test_sanitizer.py, which runs this file under compute-sanitizer.

The tools take a hundred times as long as the kernels, so there is one case for each way through a kernel: each variant
and head size, ragged requests, rows of every height that shared prefixes give, split rows, and policy topk.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import kit
import test_select_attend
from cases import Case, decode, extend, make

from flashcore_sglang import PagedAttention, variants
from flashcore_sglang.planner import Count

NUM_CTAS = 6  # few enough for one of them to have several tiles, enough for rows to be cut
PAGE = 64
# Packed queries of the row of the common pages, 4 heads a group: one and two teams of 16 (steps of few queries), then
# one and two blocks of 64, full and not. And how many pages make packing them pay.
SHARED_PAGES = {16: 96, 28: 48, 36: 32, 64: 32, 68: 32, 128: 32}


def cases(variant: str) -> Iterator[tuple[Case, int]]:
    """Cases that ``variant`` has kernels for, with the height of the tallest row."""
    entry = variants.BY_NAME[variant]
    for head_dim in sorted(entry.decode):
        yield decode(f"ragged decode {head_dim}", 1, 65, 300, 0, head_dim=head_dim, page_size=PAGE), 4
        yield decode(f"ragged decode of many {head_dim}", *range(1, 360, 40), head_dim=head_dim, page_size=PAGE), 4
    for height, pages in SHARED_PAGES.items():
        if height > entry.decode[128].rows_per_tile:
            continue
        keys = range(pages * PAGE + 1, pages * PAGE + 1 + height // 4)
        yield decode(f"row of {height}", *keys, head_dim=128, page_size=PAGE, shared_pages=pages), height
    heads = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": PAGE}  # a cluster a KV head, on Hopper
    yield decode("8 KV heads", 700, 0, 65, 1, **heads), 4
    yield decode("8 KV heads, row of 8", 3300, 3201, shared_pages=50, **heads), 8
    yield decode("8 KV heads, row of 16", 1700, 1666, 1665, 1800, shared_pages=26, **heads), 16
    if entry.decode[128].rows_per_tile > 65:  # packed rows have a kernel of their own
        yield decode("packed rows apart", *range(513, 513 + 129), shared_pages=8, **{**heads, "num_heads": 8}), 65
    for head_dim in sorted(entry.prefill):
        yield extend(f"prefill {head_dim}", (150, 150), (33, 120), (1, 65), head_dim=head_dim, page_size=PAGE), 0


def run_exact(variant: str) -> None:
    for case, height in cases(variant):
        problem = make(case, "cuda")
        entry = variants.BY_NAME[variant]
        tiling = (entry.decode if case.decode else entry.prefill)[case.head_dim]
        plan = kit.make_plan(problem, rows_per_tile=tiling.rows_per_tile, num_ctas=NUM_CTAS)
        out, lse = kit.attend(problem, plan, variant=variant, rows_per_tile=tiling.rows_per_tile)
        kit.check(make(case), out.cpu(), lse.cpu())  # on the CPU: cuBLAS fails under racecheck
        tallest = int(plan.rows[: int(plan.counts[0]), 1].max()) * case.group
        assert height in (0, tallest), f"{case}: expected a row of {height} packed queries, got {tallest}"
        most = int(plan.cta_indptr[: NUM_CTAS + 1].diff().max())
        assert most >= 2, f"{case}: expected a CTA of several tiles, whose buffers are used again, got {most}"
        print(case, flush=True)


def run_topk() -> None:
    """Summaries and selection, twice: a second step changes the last page. Few requests, and many that share pages."""
    os.environ |= {f"FLASHCORE_{name}_TOKENS": str(n) for name, n in (("SINK", 64), ("RECENT", 64), ("BUDGET", 256))}
    for case in (
        decode("topk", 900, 130, 70, head_dim=128, page_size=PAGE),
        decode("topk of a cluster a KV head", 900, num_heads=32, num_kv_heads=8, head_dim=128, page_size=PAGE),
        decode("topk shared", *range(1200, 1236), head_dim=128, page_size=PAGE, shared_pages=16),
    ):
        problem = make(case, "cuda")
        attention = PagedAttention(device="cuda")
        for _ in range(2):
            attention.plan(
                *problem.table, case.num_heads, case.num_kv_heads, case.head_dim, PAGE, causal=True, policy="topk"
            )
            out = attention.run(problem.q, (problem.k_cache, problem.v_cache))
        assert bool(out.isfinite().all())
        shares = int(attention._planner.plan.counts[Count.NUM_STRETCHES]) > 0
        assert shares == (case.shared_pages > 0)


def run_storing(device: str = "cuda") -> None:
    """One request's step that stores its token, within the budget and above it; in both it fills a page."""
    for keys in (5 * PAGE, 20 * PAGE):
        case = test_select_attend.Case((keys,))
        layer = test_select_attend.Layer(case, device)
        out, _, _ = layer.attend(together=True, new=test_select_attend.new_tokens(layer, case))
        assert bool(out.isfinite().all())


if __name__ == "__main__":
    for subject in sys.argv[1:]:
        if subject == "topk":
            run_topk()
            run_storing()
        else:
            run_exact(subject)
        print(f"{subject} ran", flush=True)
