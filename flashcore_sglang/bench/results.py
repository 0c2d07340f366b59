"""Result files: one JSON a run, rows of case, backend, metric, value and spread; tables made from them."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measured figure."""

    case: str
    backend: str
    metric: str
    value: float
    spread: float = 0.0


def host() -> str:
    """GPU, driver and torch of this machine, in words."""
    import torch

    if not torch.cuda.is_available():
        return f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, torch {torch.__version__}"


@dataclass
class Results:
    """The rows of one run and what made them."""

    rows: list[Row] = field(default_factory=list)
    command: str = field(default_factory=lambda: shlex.join(["flashcore", *sys.argv[1:]]))

    def add(self, case: str, backend: str, metric: str, value: float, spread: float = 0.0) -> None:
        self.rows.append(Row(case, backend, metric, round(value, 5), round(spread, 5)))

    def save(self, path: Path) -> None:
        record = {
            "command": self.command,
            "host": host(),
            "date": datetime.date.today().isoformat(),
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


def markdown(rows: Iterable[Row], metric: str, digits: int = 1, reference: str = "fa3") -> str:
    """A table of one metric: a line a case, a column a backend, and flashcore's ratio to the reference if there."""
    table = pivot(rows, metric)
    backends = list(dict.fromkeys(name for cells in table.values() for name in cells))
    ratios = reference in backends
    columns = ["case", *backends, *([f"flashcore / {reference}"] if ratios else [])]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for case, cells in table.items():
        shown = [f"{cells[name].value:.{digits}f}" if name in cells else "-" for name in backends]
        if ratios:
            ours, peer = cells.get("flashcore"), cells.get(reference)
            shown.append(f"{ours.value / peer.value:.2f}" if ours and peer and peer.value else "-")
        lines.append(f"| {case} | {' | '.join(shown)} |")
    return "\n".join(lines)


def show(rows: Iterable[Row], metric: str, digits: int = 1) -> None:
    """Prints the table of one metric."""
    from rich.console import Console
    from rich.table import Table

    pivoted = pivot(rows, metric)
    backends = list(dict.fromkeys(name for cells in pivoted.values() for name in cells))
    table = Table("case", *backends, title=metric)
    for case, cells in pivoted.items():
        table.add_row(
            case,
            *(f"{cells[b].value:.{digits}f} ±{cells[b].spread:.{digits}f}" if b in cells else "-" for b in backends),
        )
    Console(width=160).print(table)
