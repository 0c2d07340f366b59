"""What attention tests share: plans, runs of the op, and the comparison with the truth.

Kernels run before the truth is computed, so that memory which is used again cannot hold the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from cases import Case, Problem

from flashcore_sglang import cublaslt, ops, reference
from flashcore_sglang.planner import Capacity, Plan, PlannerOptions, make_planner
from flashcore_sglang.planner.plan import ROW_FIELDS, STRETCH_FIELDS, TILE_FIELDS, Count


def make_plan(
    problem: Problem,
    *,
    rows_per_tile: int = 32,
    num_ctas: int = 3,
    share: bool = True,
    split_keys: int = 0,
    pairs_per_cta: int = 0,
) -> Plan:
    """The planner's plan of policy exact, on the device of the problem."""
    case = problem.case
    options = PlannerOptions(page_size=case.page_size, share=share, split_keys=split_keys)
    capacity = Capacity(
        batch=len(case.q_lens),
        tokens=sum(case.q_lens),
        pages=problem.kv_indices.numel(),
        num_pages=problem.k_cache.shape[0],
        num_kv_heads=case.num_kv_heads,
        group=case.group,
        rows_per_tile=rows_per_tile,
        num_ctas=num_ctas,
        share=share,
        page_size=case.page_size,
        split_keys=split_keys,
        pairs_per_cta=pairs_per_cta,
    )
    planner = make_planner(options, capacity, problem.q.device)
    qo_indptr = None if case.decode else problem.qo_indptr
    planner.begin_csr(
        qo_indptr,
        *problem.table[1:],
        num_tokens=sum(case.q_lens),
        causal=case.causal,
        window_left=case.window_left,
    )
    return planner.plan


def make_untrimmed_plan(
    problem: Problem, *, tokens_per_row: int, keys_per_tile: int, num_ctas: int = 2
) -> list[torch.Tensor]:
    """A plan by hand that leaves no key out: tiles may hold no visible key for some of their queries, or for all."""
    case = problem.case
    rows: list[list[int]] = []
    tiles: list[list[int]] = []
    pair_tiles: list[list[int]] = []
    merge_indptr, merge_rows, partials = [0], [], 0
    positions: list[int] = []
    kv_indptr, qo_indptr = problem.kv_indptr.tolist(), problem.qo_indptr.tolist()
    for request, (q_len, kv_len) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
        positions += range(kv_len - q_len, kv_len)
        for begin in range(0, q_len, tokens_per_row):
            count = min(tokens_per_row, q_len - begin)
            merge_rows += [[len(rows), i] for i in range(count)]
            rows.append([qo_indptr[request] + begin, count, 0, kv_indptr[request], 0, kv_len, 0, request])
            for kv_head in range(case.num_kv_heads):
                pair = (len(rows) - 1) * case.num_kv_heads + kv_head
                first_tile = len(tiles)
                for kv_begin in range(0, max(kv_len, 1), keys_per_tile):
                    kv_end = min(kv_begin + keys_per_tile, kv_len)
                    row = [kv_indptr[request], qo_indptr[request] + begin, count, 0]
                    tiles.append([pair, kv_begin, kv_end, partials, *row])
                    partials += count * case.group
                pair_tiles.append([first_tile, len(tiles)])
    merge_indptr += range(1, len(merge_rows) + 1)
    cta_indptr = [len(tiles) * c // num_ctas for c in range(num_ctas + 1)]

    def ints(values: Sequence[object], *shape: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=problem.q.device).reshape(shape or (-1,))

    return [
        problem.qo_indptr,
        problem.kv_indptr,
        problem.kv_indices,
        problem.last_page_len,
        ints(positions),
        ints(rows, -1, ROW_FIELDS) if rows else ints([], 0, ROW_FIELDS),
        ints([0]),
        ints(tiles, -1, TILE_FIELDS) if tiles else ints([], 0, TILE_FIELDS),
        ints(pair_tiles, -1, 2) if pair_tiles else ints([], 0, 2),
        ints(cta_indptr),
        ints(merge_indptr),
        ints(merge_rows, -1, 2) if merge_rows else ints([], 0, 2),
        ints([0] * STRETCH_FIELDS, 1, STRETCH_FIELDS),
        ints([len(rows), len(tiles), partials] + [0] * (Count.NUM_COUNTS - Count.PAGES_READ)),
    ]


def attend(
    problem: Problem,
    plan: Plan | list[torch.Tensor],
    *,
    variant: str,
    rows_per_tile: int = 32,
    workspace: torch.Tensor | None = None,
    fp32_scores: bool = True,
    free_cuts: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` of the op, from buffers full of NaN: what it does not write shows.

    Variant cublaslt plans its matmuls here, unless it is given a workspace.
    """
    case, q = problem.case, problem.q
    if variant == "cublaslt" and workspace is None and q.numel():
        scratch = cublaslt.Workspace(q.device, 32, cublaslt.Algorithms(None))
        scratch.plan(matmuls(case))
        workspace = scratch.tensor
    tensors = plan.tensors() if isinstance(plan, Plan) else plan
    max_partials = plan.max_partials if isinstance(plan, Plan) else int(plan[-1][2])
    floats = {"dtype": torch.float32, "device": q.device}
    out = torch.full_like(q, torch.nan)
    lse = torch.full(q.shape[:2], torch.nan, **floats)
    ops.attend(
        q,
        problem.k_cache,
        problem.v_cache,
        tensors,
        torch.full((max_partials, case.head_dim), torch.nan, **floats),
        torch.full((max_partials,), torch.nan, **floats),
        out,
        lse,
        rows_per_tile=rows_per_tile,
        sm_scale=case.head_dim**-0.5 if case.sm_scale is None else case.sm_scale,
        causal=case.causal,
        window_left=case.window_left,
        logits_soft_cap=case.logits_soft_cap,
        decode=case.decode,
        variant=variant,
        workspace=workspace,
        max_qo_len=max(case.q_lens, default=0),
        max_kv_len=max(case.kv_lens, default=0),
        fp32_scores=fp32_scores,
        free_cuts=isinstance(plan, Plan) and plan.free_cuts if free_cuts is None else free_cuts,
    )
    return out, lse


def plan_and_attend(
    problem: Problem, *, variant: str, rows_per_tile: int, num_ctas: int = 3, split_keys: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` of the op over the planner's plan."""
    plan = make_plan(problem, rows_per_tile=rows_per_tile, num_ctas=num_ctas, split_keys=split_keys)
    return attend(problem, plan, variant=variant, rows_per_tile=rows_per_tile)


def matmuls(case: Case) -> ops.CublasLtShape:
    """What variant cublaslt plans for a case."""
    return ops.CublasLtShape(
        batch=len(case.q_lens),
        max_qo_len=max(case.q_lens),
        max_kv_len=max(case.kv_lens),
        num_kv_heads=case.num_kv_heads,
        group=case.group,
        head_dim=case.head_dim,
        fp16=case.dtype == torch.float16,
        causal=case.causal,
        fp32_scores=True,
    )


def check(problem: Problem, out: torch.Tensor, lse: torch.Tensor) -> None:
    """``out`` and ``lse`` against fp64, at most twice the error of the same computation in plain PyTorch.

    PyTorch computes the output in the dtype of the case, and the LSE, which every kernel keeps in fp32, in fp32.
    """
    true_lse = check_out(problem, out)
    inputs = (problem.q, problem.k_cache, problem.v_cache)
    _, plain_lse = reference.paged_attention(*inputs, *problem.table, **problem.masks, dtype=torch.float32)
    assert_close("lse", lse, true_lse, plain_lse, problem.case, terms=problem.case.head_dim)


def check_out(problem: Problem, out: torch.Tensor) -> torch.Tensor:
    """As `check`, of the output alone; returns the true LSE."""
    inputs = (problem.q, problem.k_cache, problem.v_cache)
    q, k, v = (tensor.double() for tensor in inputs)
    true_out, true_lse = reference.paged_attention(q, k, v, *problem.table, **problem.masks)
    plain_out, _ = reference.paged_attention(*inputs, *problem.table, **problem.masks, dtype=problem.q.dtype)
    assert_close("out", out, true_out, plain_out, problem.case)
    return true_lse


def assert_close(
    name: str, actual: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor, case: object, terms: int = 1
) -> None:
    """NaN and infinity in the same places, then ``|actual - truth| <= 2 max|plain - truth| + atol``.

    Args:
        name: of the result, for the message.
        actual: what is tested.
        truth: fp64.
        plain: the same computation in plain low-precision PyTorch.
        case: printed on failure.
        terms: length of the longest sum whose order is free. ``atol`` is what rounding of so many terms may add:
            ``terms`` units in the last place of the largest value.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}\n{case!r}"
    if truth.numel() == 0:
        return
    actual64 = actual.double()
    for kind, mask in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = mask(actual64) != mask(truth)
        assert not differs.any(), f"{name}: {kind} in the wrong places, first {differs.nonzero()[0].tolist()}\n{case!r}"
    finite = torch.isfinite(truth)
    error = torch.where(finite, (actual64 - truth).abs(), 0)
    plain_error = torch.where(finite, (plain.double() - truth).abs(), 0).max().item()
    largest = torch.where(finite, truth.abs(), 0).max().item()
    tolerance = 2 * plain_error + terms * torch.finfo(actual.dtype).eps * max(largest, 1e-3)
    worst = error.max().item()
    at = torch.unravel_index(error.argmax(), error.shape)
    where = [int(i) for i in at]
    assert worst <= tolerance, (
        f"{name}{where}: got {actual64[at].item()}, expected {truth[at].item()}; error {worst:.3g}, "
        f"allowed {tolerance:.3g} (plain PyTorch is off by {plain_error:.3g})\n{case!r}"
    )
