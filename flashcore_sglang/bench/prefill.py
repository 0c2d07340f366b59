"""`flashcore bench prefill`: whole and chunked prefill against its peers, correctness before timing."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch

from .. import PagedAttention
from . import peers
from .accuracy import Truth, sample, token_truth
from .cases import Heads, PrefillCase
from .compare import backend, compare, unmeasured
from .results import Results, Row
from .timing import Method, Time, measure_all

_CHECKED = 256  # query tokens compared with fp64
_COPY_TB_S = 4.2  # read and written by a device-to-device copy on an H200
_PER_HEAD = PrefillCase(16, 4096, Heads(96, 96), causal=False, dtype=torch.float16)  # reported in us a head, too
_MAX_REPEATS_US = 4e5  # of device time spent on one cell


def _inputs(case: PrefillCase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """What ``peers.PREFILL`` takes beside a case: q, k, v, cache."""
    h, page = case.heads, case.page_size
    tokens, columns = case.batch * case.new, (case.prefix + case.new) // page
    shared = case.prefix // page if case.shared_prefix else 0
    total = shared + case.batch * (columns - shared)
    ids = torch.randperm(total, device="cuda").int()
    table = torch.empty(case.batch, columns, dtype=torch.int32, device="cuda")
    table[:, :shared] = ids[:shared]
    table[:, shared:] = ids[shared:].view(case.batch, -1)
    k_cache = torch.randn(total, page, h.kv, h.dim, device="cuda", dtype=case.dtype)
    v_cache = torch.randn_like(k_cache)
    own = table[:, case.prefix // page :].long()
    k, v = (x[own].view(tokens, h.kv, h.dim) for x in (k_cache, v_cache))
    q = torch.randn(tokens, h.qo, h.dim, device="cuda", dtype=case.dtype)
    lens = torch.full((case.batch,), case.prefix + case.new, dtype=torch.int32, device="cuda")
    return q, k, v, (k_cache, v_cache, table, lens)


def flashcore_call(case: PrefillCase, variant: str, q: torch.Tensor, cache: tuple[torch.Tensor, ...]) -> peers.Call:
    """Plans the case over its pages and returns the run; q and cache as those of ``peers.PREFILL``."""
    k_cache, v_cache, table, lens = cache
    attention = PagedAttention(device=q.device)
    columns, h = table.shape[1], case.heads
    attention.plan(
        torch.arange(0, (case.batch + 1) * case.new, case.new, dtype=torch.int32),
        torch.arange(0, (case.batch + 1) * columns, columns, dtype=torch.int32),
        table.flatten(),
        (lens - (columns - 1) * case.page_size).int(),
        h.qo,
        h.kv,
        h.dim,
        case.page_size,
        causal=case.causal,
        q_data_type=case.dtype,
        variant=variant,
    )
    out = torch.full_like(q, float("nan"))
    return lambda: attention.run(q, (k_cache, v_cache), out=out)


def truth_of(case: PrefillCase, q: torch.Tensor, cache: tuple[torch.Tensor, ...]) -> Truth:
    """The output of some query tokens in fp64; q and cache as those of ``peers.PREFILL``."""
    k_cache, v_cache, table, _ = cache

    def truth(token: int) -> torch.Tensor:
        request, index = divmod(token, case.new)
        visible = case.prefix + (index + 1 if case.causal else case.new)
        pages = table[request, : -(-visible // case.page_size)]
        return token_truth(q[token], k_cache, v_cache, pages, visible)

    return Truth.of((token, truth(token)) for token in sample(q.shape[0], _CHECKED))


def sdpa_difference(case: PrefillCase, variant: str) -> float:
    """Largest difference of the whole output to PyTorch's SDPA; infinite where a number is not finite."""
    q, k, v, cache = _inputs(case)
    expected = peers.prefill_fa2(case, q, k, v, cache)
    assert expected is not None, f"{case.name}: SDPA reads no cached prefix"
    difference = flashcore_call(case, variant, q, cache)().double() - expected().double()
    return difference.abs().nan_to_num(math.inf).max().item()


def per_head(case: PrefillCase, rows: list[Row]) -> str:
    """A line: microseconds a head of all requests, by backend, beside what reading q, k and v and writing out takes."""
    heads = case.heads.qo
    times = {row.backend: row.value / heads for row in rows if (row.case, row.metric) == (case.name, "time_us")}
    floor = case.unique_bytes / heads / _COPY_TB_S / 1e6
    figures = ", ".join(f"{name} {time:.1f}" for name, time in times.items())
    return f"{case.name}, us a head: {figures}; memory alone takes {floor:.1f} at {_COPY_TB_S} TB/s"


def run(
    results: Results,
    cases: list[PrefillCase],
    variants: list[str],
    peer_names: Collection[str],
    repeats: int,
    method: Method,
) -> list[str]:
    """Measures every case that `results` does not have, saving rows as they come.

    Returns:
        What was not timed, a line each: a result of ours whose error exceeds twice the best peer's.
    """
    failures: list[str] = []
    for case in unmeasured(results, cases, variants):
        failures += _run(results, case, variants, peer_names, repeats, method)
        if case == _PER_HEAD:
            print(per_head(case, results.rows), flush=True)
    return failures


def _run(
    results: Results, case: PrefillCase, variants: list[str], peer_names: Collection[str], repeats: int, method: Method
) -> list[str]:
    q, k, v, cache = _inputs(case)
    calls: dict[str, peers.Call | None] = {
        name: make(case, q, k, v, cache) for name, make in peers.PREFILL.items() if name in peer_names
    }
    for variant in variants:
        calls[backend(variant)] = flashcore_call(case, variant, q, cache)
    return compare(
        results,
        case.name,
        calls,
        error=truth_of(case, q, cache).error,
        allowed=lambda of_peers: 2 * min(of_peers, default=math.inf),
        time=lambda present: _time(present, repeats, method),
        metric="tflops",
        work=case.flops,
    )


def _time(calls: Mapping[str, peers.Call], repeats: int, method: Method) -> dict[str, Time]:
    """Eager: prefill is not captured. Long calls are repeated less."""
    slowest = max(time.median for time in measure_all(calls, 2, graph=False).values())
    return measure_all(calls, int(max(3, min(repeats, _MAX_REPEATS_US / slowest))), graph=False, method=method)
