"""Where a server's decode step goes on the GPU, by kind of kernel, from a trace of SGLang's profiler.

While the batch that is of interest decodes:
curl -X POST localhost:30000/start_profile -H 'Content-Type: application/json' \
    -d '{"output_dir": "profile", "num_steps": 6, "activities": ["GPU"]}'
python scripts/bench/step_profile.py profile/*.trace.json.gz

Steps begin with flashcore's planner. Kernels of a kind that run beside each other count once.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

STEP = re.compile("plan_kernel")
# The first that matches; else it is `other`.
KINDS = {
    "attention": re.compile("attend|prefill_kernel|merge_(decode|many_items)_kernel"),
    "plan": re.compile("(page_table|trace|walk|plan|score|score_few|select)_kernel"),
    "matmul": re.compile("gemm|nvjet|cutlass|xmma", re.IGNORECASE),
    "quantise": re.compile("quant"),
    "norm/rope/act": re.compile("norm|rope|act_and", re.IGNORECASE),
    "store": re.compile("store_(kvcache|step_kernel|pages_kernel)"),
}


class Span(NamedTuple):
    """A kernel on the GPU, in microseconds."""

    begin: float
    end: float
    name: str


def spans_of(trace: Path) -> list[Span]:
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    on_gpu = (event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"))
    return sorted(Span(event["ts"], event["ts"] + event["dur"], event["name"]) for event in on_gpu)


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), "other")


def covered(spans: list[Span]) -> float:
    """Microseconds in which at least one of them runs; they are in the order of their begin."""
    total, until = 0.0, float("-inf")
    for span in spans:
        total += max(span.end - max(span.begin, until), 0.0)
        until = max(until, span.end)
    return total


def report(trace: Path, kernels: int) -> str:
    spans = spans_of(trace)
    begins = [span.begin for span in spans if STEP.search(span.name)]
    if len(begins) < 2:
        raise SystemExit(f"{trace}: expected two steps that flashcore has planned, found {len(begins)}; profile more")
    steps = len(begins) - 1
    whole = [span for span in spans if begins[0] <= span.begin < begins[-1]]
    kinds: dict[str, list[Span]] = defaultdict(list)
    names: Counter[str] = Counter()
    for span in whole:
        kinds[kind_of(span.name)].append(span)
        names[span.name] += span.end - span.begin
    length = (begins[-1] - begins[0]) / steps / 1e3
    each = ", ".join(f"{(end - begin) / 1e3:.2f}" for begin, end in pairwise(begins))
    lines = [f"{steps} steps of {length:.3f} ms, {each}", f"{length - covered(whole) / steps / 1e3:8.3f}  idle"]
    for kind, of_kind in sorted(kinds.items(), key=lambda item: -covered(item[1])):
        lines.append(f"{covered(of_kind) / steps / 1e3:8.3f}  {kind}")
    lines.append("the kernels, ms a step, whatever runs beside them:")
    lines += [f"{us / steps / 1e3:8.3f}  {kind_of(name)}: {name[:110]}" for name, us in names.most_common(kernels)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path, help="*.trace.json.gz")
    parser.add_argument("--kernels", type=int, default=20, help="how many of them to name")
    args = parser.parse_args()
    for trace in args.traces:
        print(f"{trace.name}\n{report(trace, args.kernels)}")


if __name__ == "__main__":
    main()
