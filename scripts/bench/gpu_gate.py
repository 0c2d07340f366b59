"""A correctness gate: the whole output of prefill beside PyTorch's SDPA, in fp16.

python scripts/bench/gpu_gate.py --json scripts/bench/results/gate.json
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from flashcore_sglang.bench.cases import GATE
from flashcore_sglang.bench.prefill import sdpa_difference
from flashcore_sglang.bench.results import Results
from flashcore_sglang.variants import VARIANTS, device_of, unavailable

LIMIT = 2e-3


def main() -> int:
    """Exit status: 1 where a difference is LIMIT or more, or a number is not finite."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    results = Results(command=shlex.join(["python", *sys.argv]))
    here = device_of("cuda")
    for case in GATE:
        for variant in VARIANTS:
            if unavailable(variant, here):
                continue
            difference = sdpa_difference(case, variant.name)
            print(f"{case.name}  {variant.name:10}  {difference:.1e}", flush=True)
            results.add(case.name, f"flashcore:{variant.name}", "sdpa_difference", difference)
    if options.json:
        results.save(options.json)
    return int(any(row.value >= LIMIT for row in results.rows))


if __name__ == "__main__":
    sys.exit(main())
