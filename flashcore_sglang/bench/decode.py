"""`flashcore bench decode`: one decode step against its peers, correctness before timing."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch

from .. import PagedAttention
from . import peers
from .accuracy import Truth, sample, token_truth
from .cases import DecodeCase
from .compare import backend, compare, unmeasured
from .results import Results
from .timing import Method, measure_all

_CHECKED = 16  # requests compared with fp64
_ERROR_SLACK = 1e-4  # absolute: one bf16 ulp of values below 0.03, which outputs over thousands of random keys are


def flashcore_call(
    case: DecodeCase,
    variant: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    lens: torch.Tensor,
    share: bool = True,
) -> peers.Call:
    """Plans the case and returns the run, which can be captured; arguments as those of ``peers.DECODE``.

    ``share``: requests are looked through for pages that they share, as by default.
    """
    attention = PagedAttention(device=q.device)
    if not share:
        attention._config = attention._config.model_copy(update={"share_prefixes": False})
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
    return lambda: attention.run(q, (k, v), out=out)


def truth_of(
    case: DecodeCase, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, lens: torch.Tensor
) -> Truth:
    """The output of some requests in fp64."""
    return Truth.of(
        (row, token_truth(q[row], k, v, table[row, : -(-int(lens[row]) // case.page_size)], int(lens[row])))
        for row in sample(case.batch, _CHECKED)
    )


def run(
    results: Results,
    cases: list[DecodeCase],
    variants: list[str],
    peer_names: Collection[str],
    repeats: int,
    method: Method,
) -> list[str]:
    """Measures every case that `results` does not have, saving rows as they come.

    Returns:
        What was not timed, a line each: a result of ours whose error exceeds the peers'.
    """
    failures: list[str] = []
    for case in unmeasured(results, cases, variants):
        failures += _run(results, case, variants, peer_names, repeats, method)
    return failures


def _run(
    results: Results, case: DecodeCase, variants: list[str], peer_names: Collection[str], repeats: int, method: Method
) -> list[str]:
    table, lens, num_pages = case.page_table("cuda")
    h = case.heads
    k = torch.randn(num_pages, case.page_size, h.kv, h.dim, device="cuda", dtype=torch.bfloat16)
    v = torch.randn_like(k)
    q = torch.randn(case.batch, h.qo, h.dim, device="cuda", dtype=torch.bfloat16)
    calls: dict[str, peers.Call | None] = {
        name: make(case, q, k, v, table, lens) for name, make in peers.DECODE.items() if name in peer_names
    }
    for variant in variants:
        calls[backend(variant)] = flashcore_call(case, variant, q, k, v, table, lens)
    if "auto" in variants and case.batch > 1:
        # What reading shared pages once saves; or, where nothing is shared, what it saves to know that.
        calls[backend("unshared")] = flashcore_call(case, "auto", q, k, v, table, lens, share=False)
    return compare(
        results,
        case.name,
        calls,
        error=truth_of(case, q, k, v, table, lens).error,
        allowed=lambda of_peers: max(of_peers, default=math.inf) + _ERROR_SLACK,
        time=lambda present: measure_all(present, repeats, method=method),
        metric="tb_s",
        work=case.unique_bytes,
    )
