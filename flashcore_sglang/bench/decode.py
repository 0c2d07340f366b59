"""`flashcore bench decode`: one decode step against its peers, correctness before timing."""

from __future__ import annotations

import torch

from .. import PagedAttention
from . import peers
from .accuracy import sample, token_error
from .cases import DECODE_SUITES, DecodeCase
from .results import Results
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


def run(results: Results, cases: list[DecodeCase], variants: list[str], with_peers: bool, repeats: int) -> None:
    """Measures every case, adding rows as they come; raises when flashcore's error exceeds the peers'."""
    for case in cases:
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
            calls["flashcore" if variant == "auto" else f"flashcore:{variant}"] = call
        errors = {name: max_error(case, call(), q, k, v, table, lens) for name, call in calls.items()}
        peer_error = max((e for name, e in errors.items() if not name.startswith("flashcore")), default=float("inf"))
        for name, call in calls.items():
            if name.startswith("flashcore") and errors[name] > peer_error + _ERROR_SLACK:
                raise AssertionError(
                    f"{case.name}: {name} is off fp64 by {errors[name]:.2e}, peers by {peer_error:.2e}"
                )
            time = measure(call, repeats)
            results.add(case.name, name, "time_us", *time)
            results.add(case.name, name, "tb_s", case.unique_bytes / time.median / 1e6)
            results.add(case.name, name, "max_error", errors[name])
        times = {r.backend: r.value for r in results.rows if r.case == case.name and r.metric == "time_us"}
        print(case.name, {name: round(t, 1) for name, t in times.items()}, flush=True)
        del k, v, calls, attentions
        torch.cuda.empty_cache()


def plot(results: Results, path: str) -> None:
    """Time against unique bytes, a point a case and backend, with the memory limit drawn in."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = {case.name: case.unique_bytes for suite in DECODE_SUITES.values() for case in suite}
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for backend in dict.fromkeys(r.backend for r in results.rows):
        points = [(sizes[r.case], r.value) for r in results.rows if r.backend == backend and r.metric == "time_us"]
        axes.scatter(*zip(*points, strict=True), s=18, label=backend)
    low, high = min(sizes.values()), max(sizes.values())
    axes.plot([low, high], [low / 4.2e6, high / 4.2e6], "k--", label="4.2 TB/s")
    axes.set(xscale="log", yscale="log", xlabel="unique KV bytes of the step", ylabel="time, us")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
