"""Result files: one JSON a run, rows of case, backend, metric, value and spread; tables made from them."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

OURS = "flashcore"  # backends are this or flashcore:<variant or preset>; every other name is a peer's
BEST = "best"  # as a reference: the best peer of each case
FORMATS = {
    "time_us": ".1f",
    "tflops": ".0f",
    "tb_s": ".2f",
    "input_tok_s": ".0f",
    "output_tok_s": ".0f",
    "steady_tok_s": ".0f",
    "accuracy": ".3f",
    "kv_read": ".3f",
    "max_error": ".1e",
    "sdpa_difference": ".1e",
    "rms_error": ".1e",
}  # of a metric's values; .2f else


@dataclass(frozen=True)
class Row:
    """One measured figure."""

    case: str
    backend: str
    metric: str
    value: float
    spread: float = 0.0


def is_ours(backend: str) -> bool:
    """Whether the name is this project's and not a peer's."""
    return backend.split(":")[0] == OURS


def host() -> str:
    """GPU, CUDA and torch of this machine, in words; in brackets what tells two machines of a kind apart."""
    import torch

    if not torch.cuda.is_available():
        return f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    gpu = torch.cuda.get_device_properties(0)
    boot = Path("/proc/sys/kernel/random/boot_id")
    identity = f"{gpu.uuid} {boot.read_text() if boot.exists() else ''}"
    machine = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return f"{gpu.name} ({machine}), CUDA {torch.version.cuda}, torch {torch.__version__}"


@dataclass
class Results:
    """The rows of one run and what made them.

    Attributes:
        path: where ``flush`` writes; None: nowhere.
        method: how kernels were timed, in the words of ``timing.Method``; empty where no kernel is timed by itself.
    """

    rows: list[Row] = field(default_factory=list)
    command: str = field(default_factory=lambda: shlex.join(["flashcore", *sys.argv[1:]]))
    path: Path | None = None
    method: dict[str, str] = field(default_factory=dict)

    def resume(self) -> None:
        """Takes over the rows that ``path`` has, if it is there: one run in several calls.

        Raises:
            ValueError: they were measured on another machine, with another torch, or by another method.
        """
        if self.path is None or not self.path.exists():
            return
        record = json.loads(self.path.read_text())
        if record["host"] != host():
            raise ValueError(
                f"{self.path}: expected rows of this machine, {host()}, got those of {record['host']}; figures of two "
                "machines are not compared: name another file"
            )
        method = {word: record[word] for word in ("l2_flush", "order") if word in record}
        if method != self.method:
            raise ValueError(
                f"{self.path}: expected rows measured with {self.method}, got those with {method}; figures of the two "
                "are not compared: name another file"
            )
        self.rows = load(self.path)
        commands = record["command"].split(" && ")
        self.command = " && ".join(dict.fromkeys([*commands, self.command]))

    def has(self, case: str, backend: str) -> bool:
        return any((row.case, row.backend) == (case, backend) for row in self.rows)

    def drop(self, case: str) -> None:
        """Forgets a case, so that it can be measured anew."""
        self.rows = [row for row in self.rows if row.case != case]

    def add(self, case: str, backend: str, metric: str, value: float, spread: float = 0.0) -> None:
        self.rows.append(Row(case, backend, metric, float(f"{value:.6g}"), float(f"{spread:.6g}")))

    def flush(self) -> None:
        """Writes what there is, so that a run that is cut off loses only what it was measuring."""
        if self.path is not None:
            self.save(self.path)

    def save(self, path: Path) -> None:
        record = {
            "command": self.command,
            "host": host(),
            "date": datetime.date.today().isoformat(),
            **self.method,
            "rows": [asdict(row) for row in self.rows],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


def load(path: Path) -> list[Row]:
    """The rows of a result file."""
    return [Row(**row) for row in json.loads(path.read_text())["rows"]]


def pivot(rows: Iterable[Row], metric: str) -> dict[str, dict[str, Row]]:
    """case -> backend -> row of one metric, in the order of the file."""
    table: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.metric == metric:
            table.setdefault(row.case, {})[row.backend] = row
    return table


def best_peer(cells: dict[str, Row], metric: str) -> Row | None:
    """The peer's row that a user would want; None without peers."""
    peers = [row for name, row in cells.items() if not is_ours(name)]
    lower_is_better = metric.endswith(("_us", "_ms", "_error"))
    pick = min if lower_is_better else max
    return pick(peers, key=lambda row: row.value, default=None)


def markdown(rows: Iterable[Row], metric: str, ours: str = OURS, reference: str = "fa3") -> str:
    """A table of one metric: a line a case, a column a backend, and the ratio of `ours` to the reference if there.

    Args:
        rows: of any cases and metrics.
        metric: the one to show.
        ours: backend above the line of the ratio.
        reference: backend below it, or ``best``: each case's best peer.
    """
    table = pivot(rows, metric)
    spec = FORMATS.get(metric, ".2f")
    backends = list(dict.fromkeys(name for cells in table.values() for name in cells))
    ratios = reference in (*backends, BEST)
    columns = ["case", *backends, *([f"{ours} / {reference}{' peer' * (reference == BEST)}"] if ratios else [])]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for case, cells in table.items():
        shown = [f"{cells[name].value:{spec}}" if name in cells else "-" for name in backends]
        if ratios:
            mine = cells.get(ours)
            peer = best_peer(cells, metric) if reference == BEST else cells.get(reference)
            shown.append(f"{mine.value / peer.value:.2f}" if mine and peer and peer.value else "-")
        lines.append(f"| {case} | {' | '.join(shown)} |")
    return "\n".join(lines)


def error_line(rows: Iterable[Row], ours: str = OURS) -> str:
    """What the distance to fp64 is beside FA3's, on the cases that have both; empty where none has."""
    known = list(rows)
    largest, rms = (_beside_fa3(known, metric, ours) for metric in ("max_error", "rms_error"))
    if not largest:
        return ""
    ratios = []
    for name, pairs in (("it", largest), ("its root mean square", rms)):
        if pairs:
            mine, theirs, case = max(pairs, key=lambda pair: pair[0] / pair[1])
            ratios.append(f"{name} is at most {mine / theirs:.2f} times FA3's ({case})")
    return (
        f"Largest difference to fp64 on these cases: {ours} {max(p[0] for p in largest):.1e}, FA3 "
        f"{max(p[1] for p in largest):.1e}; {', '.join(ratios)}."
    )


def _beside_fa3(rows: Iterable[Row], metric: str, ours: str) -> list[tuple[float, float, str]]:
    """Ours, FA3's and the name of each case that has both."""
    pairs = []
    for case, cells in pivot(rows, metric).items():
        theirs = cells.get("fa3") or cells.get("fa3_paged")
        if ours in cells and theirs:
            pairs.append((cells[ours].value, theirs.value, case))
    return pairs


def show(rows: Iterable[Row], metric: str) -> None:
    """Prints the table of one metric, if there are rows of it."""
    from rich.console import Console
    from rich.table import Table

    pivoted = pivot(rows, metric)
    if not pivoted:
        return
    spec = FORMATS.get(metric, ".2f")
    backends = list(dict.fromkeys(name for cells in pivoted.values() for name in cells))
    table = Table("case", *backends, title=metric)
    for case, cells in pivoted.items():
        shown = (f"{cells[b].value:{spec}} ±{cells[b].spread:{spec}}" if b in cells else "-" for b in backends)
        table.add_row(case, *shown)
    Console(width=160).print(table)
