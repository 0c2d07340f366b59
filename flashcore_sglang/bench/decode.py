"""`flashcore bench decode`: one decode step against its peers, correctness before timing."""

from __future__ import annotations

import torch

from .. import PagedAttention
from . import peers
from .accuracy import sample, token_error
from .cases import DecodeCase
from .results import OURS, Results, is_ours
from .timing import measure

_CHECKED = 4  # requests compared with fp64
_ERROR_SLACK = 1e-4  # absolute: one bf16 ulp of values below 0.03, which outputs over thousands of random keys are


def flashcore_call(
    case: DecodeCase,
    variant: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    lens: torch.Tensor,
) -> tuple[PagedAttention, peers.Call]:
    """Plans the case and returns the attention and its captured-ready run."""
    attention = PagedAttention(device=q.device)
    indptr, indices, last = case.csr(table, lens)
    h = case.heads
    qo_indptr = torch.arange(case.batch + 1, dtype=torch.int32, device=q.device)
    attention.plan(
        qo_indptr,
        indptr,
        indices,
        last,
        h.qo,
        h.kv,
        h.dim,
        case.page_size,
        causal=True,
        q_data_type=q.dtype,
        variant=variant,
    )
    out = torch.full_like(q, float("nan"))
    return attention, lambda: attention.run(q, (k, v), out=out)


def max_error(
    case: DecodeCase,
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    lens: torch.Tensor,
) -> float:
    """Largest absolute difference to fp64 over a few requests; NaN is infinite."""
    return max(
        token_error(out[row], q[row], k, v, table[row, : -(-int(lens[row]) // case.page_size)], int(lens[row]))
        for row in sample(case.batch, _CHECKED)
    )


def run(results: Results, cases: list[DecodeCase], variants: list[str], with_peers: bool, repeats: int) -> list[str]:
    """Measures every case that `results` does not have, saving rows as they come.

    Returns:
        What was not timed, a line each: a result of ours whose error exceeds the peers'.
    """
    names = {variant: OURS if variant == "auto" else f"{OURS}:{variant}" for variant in variants}
    failures: list[str] = []
    for case in cases:
        if all(results.has(case.name, name) for name in names.values()):
            continue
        results.drop(case.name)
        torch.manual_seed(0)
        table, lens, num_pages = case.page_table("cuda")
        h = case.heads
        k = torch.randn(num_pages, case.page_size, h.kv, h.dim, device="cuda", dtype=torch.bfloat16)
        v = torch.randn_like(k)
        q = torch.randn(case.batch, h.qo, h.dim, device="cuda", dtype=torch.bfloat16)
        calls: dict[str, peers.Call] = {}
        if with_peers:
            for name, make in peers.DECODE.items():
                call = make(case, q, k, v, table, lens)
                if call is not None:
                    calls[name] = call
        attentions = []
        for variant in variants:
            attention, call = flashcore_call(case, variant, q, k, v, table, lens)
            attentions.append(attention)
            calls[names[variant]] = call
        errors = {name: max_error(case, call(), q, k, v, table, lens) for name, call in calls.items()}
        peer_error = max((e for name, e in errors.items() if not is_ours(name)), default=float("inf"))
        for name, call in calls.items():
            if is_ours(name) and errors[name] > peer_error + _ERROR_SLACK:
                failures.append(f"{case.name}: {name} is off fp64 by {errors[name]:.2e}, peers by {peer_error:.2e}")
                print(failures[-1], flush=True)
                continue
            time = measure(call, repeats)
            results.add(case.name, name, "time_us", *time)
            results.add(case.name, name, "tb_s", case.unique_bytes / time.median / 1e6)
            results.add(case.name, name, "max_error", errors[name])
        results.flush()
        times = {r.backend: r.value for r in results.rows if r.case == case.name and r.metric == "time_us"}
        print(case.name, {name: round(t, 1) for name, t in times.items()}, flush=True)
        del k, v, calls, attentions
        torch.cuda.empty_cache()
    return failures
