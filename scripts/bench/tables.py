#!/usr/bin/env python3
"""Writes the tables of the README and of RESULTS.md from the result files under scripts/bench/results/.

A table stands between `<!-- table: FILE METRIC [CASES [OURS/REFERENCE]] -->` and `<!-- end -->`, and is replaced.
CASES is a regular expression that the names of the cases must match. OURS/REFERENCE (flashcore/fa3 unless given) is the
ratio of the last column; the reference `best` is each case's best peer.
`--check` changes nothing and exits 1 where a document differs from what its files say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from flashcore_sglang.bench import results

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "bench"
DOCUMENTS = ROOT / "README.md", BENCH / "RESULTS.md"
RESULTS = BENCH / "results"
BLOCK = re.compile(r"(<!-- table: (\S+) (\S+)(?: (\S+)(?: (\S+)/(\S+))?)? -->\n).*?(<!-- end -->)", re.DOTALL)


def table(file: str, metric: str, cases: str | None, ours: str | None, reference: str | None) -> str:
    """The table of one metric of one result file, what its errors are, and the command that made it."""
    ours, reference = ours or results.OURS, reference or "fa3"
    path = RESULTS / file
    record = json.loads(path.read_text())
    rows = [row for row in results.load(path) if re.search(cases or "", row.case)]
    made = f"`{record['command']}` on {record['host']}, {record['date']}"
    errors = results.error_line(rows, ours) if metric in ("time_us", "tflops") else ""
    return "\n\n".join(filter(None, [results.markdown(rows, metric, ours, reference), errors, made])) + "\n"


def render(text: str) -> str:
    """A document with every table made anew."""
    return BLOCK.sub(lambda m: f"{m[1]}{table(*m.groups()[1:6])}{m[7]}", text)


def main() -> int:
    """Exit status: 1 when `--check` finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    differ = False
    for document in DOCUMENTS:
        old = document.read_text()
        new = render(old)
        differ |= old != new
        if not args.check:
            document.write_text(new)
    return int(args.check and differ)


if __name__ == "__main__":
    sys.exit(main())
