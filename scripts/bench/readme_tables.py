#!/usr/bin/env python3
"""Writes the README's tables from the result files under scripts/bench/results/.

A table stands between `<!-- table: FILE METRIC [CASES] -->` and `<!-- end -->`; everything between is replaced.
CASES is a regular expression that the names of the cases must match.
`--check` changes nothing and exits 1 where the README differs from what its files say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from flashcore_sglang.bench import results

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "scripts" / "bench" / "results"
BLOCK = re.compile(r"(<!-- table: (\S+) (\S+)(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)
DIGITS = {"time_us": 1, "tflops": 0, "tb_s": 2, "output_tok_s": 0, "steady_tok_s": 0, "itl_ms": 1, "accuracy": 3}


def table(file: str, metric: str, cases: str | None) -> str:
    """The table of one metric of one result file, and the command that made it."""
    path = RESULTS / file
    record = json.loads(path.read_text())
    rows = [row for row in results.load(path) if re.search(cases or "", row.case)]
    made = f"`{record['command']}` on {record['host']}, {record['date']}"
    return f"{results.markdown(rows, metric, DIGITS.get(metric, 2))}\n\n{made}\n"


def render(text: str) -> str:
    """The README with every table made anew."""
    return BLOCK.sub(lambda m: f"{m[1]}{table(m[2], m[3], m[4])}{m[5]}", text)


def main() -> int:
    """Exit status: 1 when `--check` finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    old = README.read_text()
    new = render(old)
    if args.check:
        return int(old != new)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
