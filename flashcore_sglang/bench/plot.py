"""`flashcore bench plot`: one picture of a kind of result file, with the limits of the machine drawn in.

decode: time against unique KV bytes. prefill: a roofline. sparse (with eval): time and accuracy against the budget.
Everything comes from the rows' names and values, so that a picture can be made again from a committed file anywhere.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .cases import DECODE_SUITES, PREFILL_SUITES, DecodeCase, PrefillCase
from .results import OURS, Row, is_ours, load, pivot

MEMORY_TB_S = 4.2  # what one H200 copies at, bytes read and written counted
TENSOR_TFLOPS = 750  # bf16 matmuls of one H200 at its power limit

_COLORS = {
    "flashcore": "#d62728",
    "fa3": "#1f77b4",
    "fa3_paged": "#17becf",
    "flashinfer": "#2ca02c",
    "flashinfer_cascade": "#9467bd",
    "cudnn": "#8c564b",
    "fa2": "#7f7f7f",
    "flashcore:wmma_sm80": "#ff9896",
    "flashcore:cublaslt": "#e377c2",
}
_STYLE = {
    "font.size": 9,
    "axes.grid": True,
    "axes.grid.which": "both",
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "flashcore",
}


def draw(files: Iterable[Path], picture: Path) -> None:
    """Draws the picture of one kind of results.

    Args:
        files: result files; rows of one kind, or of sparse and eval together.
        picture: its suffix names the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the rows are of no kind that has a picture, or of several.
    """
    files = list(files)
    rows = [row for file in files for row in load(file)]
    drawer = _drawer(rows)
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"pictures need matplotlib ({error}): pip install 'flashcore-sglang[bench]'") from error
    picture.parent.mkdir(parents=True, exist_ok=True)
    # No date, so that the same rows make the same file; the files it was made of, so that a stale one is found.
    made_of = {"Date": None, "Creator": None, "Source": source(files)} if picture.suffix == ".svg" else None
    with matplotlib.rc_context(_STYLE):
        figure = drawer(rows, lambda *size: Figure(figsize=size, layout="constrained"))
        figure.savefig(picture, dpi=150, bbox_inches="tight", metadata=made_of)


def source(files: Iterable[Path]) -> str:
    """Result files by name and content, as an SVG made of them says."""
    return ", ".join(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}" for file in files)


NewFigure = Callable[[float, float], Any]


def _drawer(rows: list[Row]) -> Callable[[list[Row], NewFigure], Any]:
    kinds = frozenset(row.case.split("/")[0] for row in rows)
    if kinds == {"decode"}:
        return _decode
    if kinds == {"prefill"}:
        return _prefill
    if kinds - {"e2e"} and kinds <= {"sparse", "eval", "e2e"}:  # servers, of which there is no picture
        return _sparse
    got = ", ".join(sorted(kinds)) or "none"
    raise ValueError(f"expected rows of decode, of prefill, or of sparse and eval, got those of {got}")


def _order(backends: Iterable[str]) -> list[str]:
    """Peers first, ours last and so on top."""
    return sorted(dict.fromkeys(backends), key=lambda name: (is_ours(name), name == OURS))


def _decode(rows: list[Row], new_figure: NewFigure) -> Any:
    cases: dict[str, DecodeCase] = _known(rows, DECODE_SUITES)
    times = pivot(rows, "time_us")
    figure = new_figure(8, 7)
    time, ratio = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    sizes = [cases[name].unique_bytes for name in times]
    ends = [min(sizes) / 1.3, max(sizes) * 1.3]
    time.plot(ends, [_limit_us(size) for size in ends], "k--", lw=1, label=f"{MEMORY_TB_S} TB/s")
    ratio.axhline(1, color="k", ls="--", lw=1)
    shared_seen = False
    for backend in _order(row.backend for row in rows):
        for shared in (False, True):
            points = [
                (cases[name].unique_bytes, cells[backend].value)
                for name, cells in times.items()
                if backend in cells and bool(cases[name].shared) == shared
            ]
            if not points:
                continue
            shared_seen |= shared
            look = {
                "color": _COLORS.get(backend),
                "marker": "*" if shared else "o",
                "s": 90 if shared else 14,
                "linewidths": 0,
                "alpha": 0.85,
            }
            x, y = zip(*points, strict=True)
            label = None if shared and any(c.get_label() == backend for c in time.collections) else backend
            time.scatter(x, y, label=label, **look)
            ratio.scatter(x, [value / _limit_us(size) for size, value in points], **look)
    if shared_seen:
        time.scatter([], [], color="0.4", marker="*", s=90, linewidths=0, label="requests share a prefix")
    time.set(xscale="log", yscale="log", ylabel="time, us", xlim=ends, title="Decode: one step of one layer")
    time.set_ylim(bottom=min(cell.value for cells in times.values() for cell in cells.values()) / 3)
    time.legend(loc="upper left")
    ratio.set(yscale="log", xlabel="unique KV bytes of the step", ylabel=f"time / ({MEMORY_TB_S} TB/s)")
    ratio.set_yticks([1, 2, 4, 8, 16], labels=["1", "2", "4", "8", "16"])
    ratio.minorticks_off()
    ticks = [2**power for power in range(22, 36, 2) if ends[0] < 2**power < ends[1]]
    ratio.set_xticks(ticks, labels=[_bytes(tick) for tick in ticks])
    return figure


def _prefill(rows: list[Row], new_figure: NewFigure) -> Any:
    cases: dict[str, PrefillCase] = _known(rows, PREFILL_SUITES)
    speeds = pivot(rows, "tflops")
    figure = new_figure(9, 6)
    figure.suptitle("Prefill")
    axes = figure.subplots()
    roof = [100, TENSOR_TFLOPS / MEMORY_TB_S, 60000]
    axes.plot(roof, [min(MEMORY_TB_S * x, TENSOR_TFLOPS) for x in roof], "k--", lw=1)
    axes.text(roof[0] * 1.25, roof[0] * MEMORY_TB_S * 1.1, f"{MEMORY_TB_S} TB/s")
    axes.text(roof[1], TENSOR_TFLOPS * 1.02, f"{TENSOR_TFLOPS} TFLOPS")
    for backend in _order(row.backend for row in rows):
        points = [(cases[name].intensity, cells[backend].value) for name, cells in speeds.items() if backend in cells]
        if points:
            ours = backend == OURS
            x, y = zip(*points, strict=True)
            axes.scatter(
                x, y, color=_COLORS.get(backend), s=42 if ours else 22, marker="D" if ours else "o", label=backend
            )
    labels: dict[float, str] = {}
    for name in speeds:  # cases of one intensity share a line
        intensity = round(cases[name].intensity, -1)
        labels[intensity] = "\n".join(filter(None, [labels.get(intensity), _short(cases[name])]))
    for intensity, label in labels.items():
        axes.axvline(intensity, color="0.85", lw=0.8, zorder=0)
        axes.text(intensity, 1.01, label, transform=axes.get_xaxis_transform(), rotation=60, fontsize=8, va="bottom")
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(roof[0], roof[-1]),
        ylim=(100, 900),
        xlabel="arithmetic intensity, FLOP a byte of Q, K, V and O",
        ylabel="TFLOPS",
    )
    axes.set_yticks([100, 200, 300, 400, 500, 600, 750], labels=["100", "200", "300", "400", "500", "600", "750"])
    axes.minorticks_off()
    axes.legend(loc="lower left")
    return figure


_SPARSE = re.compile(r"sparse/b(?P<batch>\d+)/ctx(?P<context>\d+)/budget(?P<budget>\d+)(?P<percent>%?)(?:/|$)")
_EVAL = re.compile(r"eval/(?P<task>[^/]+)/ctx(?P<context>\d+)(?:/budget(?P<budget>\d+))?$")


def _sparse(rows: list[Row], new_figure: NewFigure) -> Any:
    """Cases: sparse/b8/ctx131072/budget4096 (or 30%), eval/TASK/ctx131072/budget4096 by flashcore:exact, ..."""
    drawn = {"time_us": _sparse_time, "accuracy": _sparse_quality}
    metrics = [metric for metric in drawn if any(row.metric == metric for row in rows)]
    figure = new_figure(5.5 * len(metrics), 4.5)
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        budgets = drawn[metric](rows, axes)
        axes.set(xscale="log", xlabel="budget, tokens that a request reads")
        apart = [b for i, b in enumerate(budgets) if i == 0 or b > 1.3 * budgets[i - 1]]
        axes.set_xticks(apart, labels=[f"{budget / 1024:.3g}K" for budget in apart])
        axes.minorticks_off()
        beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}  # too many series to stand among the curves
        axes.legend(fontsize=8, **(beside if metric == "accuracy" else {}))
    return figure


def _sparse_time(rows: list[Row], axes: Any) -> list[int]:
    """Selection and attention of ours, FA3 over all keys as a level, for each batch and context; the budgets."""
    series: dict[tuple[int, int], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for case, cells in pivot(rows, "time_us").items():
        found = _SPARSE.match(case)
        if found:
            batch, context, budget = (int(found[name]) for name in ("batch", "context", "budget"))
            tokens = budget * context // 100 if found["percent"] else budget
            for backend in {"fa3", OURS} & set(cells):
                series[context, batch][backend][tokens] = cells[backend].value
    for index, ((context, batch), backends) in enumerate(sorted(series.items())):
        for backend, times in backends.items():
            points = zip(*sorted(times.items()), strict=True)
            ours = {"ls": "-", "marker": "o", "ms": 4, "label": f"{batch} x {_tokens(context)}"}
            level = {"ls": "--", "marker": "_", "ms": 14}  # the marker shows where there is one budget
            axes.plot(*points, color=f"C{index}", **(ours if backend == OURS else level))
    axes.plot([], [], "_--", color="0.4", ms=14, label="fa3, all keys")
    axes.set(yscale="log", ylabel="time, us", title="Selection and attention of one layer")
    return sorted({budget for backends in series.values() for times in backends.values() for budget in times})


def _sparse_quality(rows: list[Row], axes: Any) -> list[int]:
    """Mean over the tasks and the worst task for each context and policy, exact attention as a level; the budgets."""
    series: dict[tuple[int, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    exact: dict[int, list[float]] = defaultdict(list)
    for case, cells in pivot(rows, "accuracy").items():
        found = _EVAL.match(case)
        if not found or found["task"] in ("average", "worst"):  # made of the tasks, as here
            continue
        context = int(found["context"])
        for backend, row in cells.items():
            policy = backend.removeprefix(f"{OURS}:")
            if policy == "exact":
                exact[context].append(row.value)
            elif found["budget"]:
                series[context, policy][int(found["budget"])].append(row.value)
    contexts = sorted({*exact, *(context for context, _ in series)})
    for context, scores in exact.items():
        axes.axhline(sum(scores) / len(scores), color=f"C{contexts.index(context)}", ls=":")
    for number, (context, policy) in enumerate(sorted(series)):
        by_budget = series[context, policy]
        look = {"color": f"C{contexts.index(context)}", "ms": 4, "alpha": 1 - 0.15 * (number % 4)}
        label = f"{_tokens(context)}, {policy}"
        axes.plot(*_curve(by_budget, lambda scores: sum(scores) / len(scores)), "o-", label=label, **look)
        axes.plot(*_curve(by_budget, min), "v--", **look)
    axes.plot([], [], "v--", color="0.4", label="worst task")
    axes.plot([], [], ":", color="0.4", label="exact attention")
    axes.set(ylim=(0, 1.05), ylabel="accuracy", title="Retrieval, mean of the tasks")
    return sorted({budget for by_budget in series.values() for budget in by_budget})


def _curve(by_budget: dict[int, list[float]], of: Callable[[list[float]], float]) -> tuple[list[int], list[float]]:
    return sorted(by_budget), [of(by_budget[budget]) for budget in sorted(by_budget)]


def _known(rows: list[Row], suites: dict[str, list[Any]]) -> dict[str, Any]:
    """name -> case, of every case in `rows`."""
    cases = {case.name: case for suite in suites.values() for case in suite}
    for row in rows:
        if row.case not in cases:
            raise ValueError(
                f"{row.case}: expected a case of the suites {', '.join(suites)}; it was renamed or removed"
            )
    return cases


def _short(case: PrefillCase) -> str:
    heads = case.heads
    usual = (heads.qo, heads.kv, heads.dim) == (32, 8, 128)
    return (
        f"{case.batch} x {_tokens(case.new)}"
        + (f" on {_tokens(case.prefix)}" if case.prefix else "")
        + ("" if usual else f", {heads.qo} heads of {heads.dim}")
        + ("" if case.causal else ", full")
    )


def _tokens(count: int) -> str:
    return f"{count / 1024:g}K" if count >= 1024 else str(count)


def _limit_us(size: float) -> float:
    return size / MEMORY_TB_S / 1e6


def _bytes(size: int) -> str:
    power = (size.bit_length() - 1) // 10
    return f"{size >> 10 * power} {' KMG'[power]}iB"
