"""Device time of planning one decode step: page table and plan, with the CPU's plan as the check.

python scripts/bench/gpu_plan.py --json scripts/bench/results/plan.json
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from flashcore_sglang.bench.results import Results
from flashcore_sglang.bench.timing import Method, measure
from flashcore_sglang.planner import Capacity, Count, Plan, Planner, PlannerOptions, make_planner

PAGE_SIZE = 64
# As Plan.tensors() has them.
BUFFERS = [field.name for field in fields(Plan) if field.type == "torch.Tensor" and field.name != "scratch"]


@dataclass(frozen=True)
class Case:
    batch: int
    context: int
    groups: int = 0  # of requests that share their first `shared` keys; 0: nothing is shared
    shared: int = 0

    def __str__(self) -> str:
        sharing = f"/{self.groups}x{self.shared}" if self.groups else ""
        return f"plan/b{self.batch}/ctx{self.context}{sharing}/h32kv8/p{PAGE_SIZE}"

    @property
    def columns(self) -> int:
        return -(-self.context // PAGE_SIZE)

    def pages(self) -> torch.Tensor:
        """Page ids [batch, columns], scattered over the pool."""
        shared = self.shared // PAGE_SIZE
        table = torch.arange(self.batch * self.columns).view(self.batch, self.columns)
        if self.groups:
            members = torch.arange(self.batch) * self.groups // self.batch
            table[:, :shared] = table[(members * self.batch).div(self.groups, rounding_mode="floor"), :shared]
        return torch.randperm(self.batch * self.columns, generator=torch.Generator().manual_seed(0))[table]


CASES = [
    Case(1, 8192),
    Case(64, 8192),
    Case(256, 131072),
    Case(512, 131072),
    Case(512, 1280),
    Case(256, 131072, 1, 122880),
    Case(512, 131072, 1, 122880),
    Case(512, 8448, 4, 8192),
    Case(64, 65792, 1, 65536),
]


def planner_of(case: Case, share: bool, device: str) -> Planner:
    pages = case.batch * case.columns
    capacity = Capacity(
        batch=case.batch,
        tokens=case.batch,
        pages=pages,
        num_pages=pages,
        num_kv_heads=8,
        group=4,
        rows_per_tile=128,
        num_ctas=264,
        share=share,
        page_size=PAGE_SIZE,
    )
    return make_planner(PlannerOptions(page_size=PAGE_SIZE, share=share), capacity, device)


def check(case: Case, share: bool, on_gpu: Planner, tensors: list[torch.Tensor]) -> None:
    on_cpu = planner_of(case, share, "cpu")
    on_cpu.begin(*tensors)
    for name, a, b in zip(BUFFERS, on_gpu.plan.tensors(), on_cpu.plan.tensors(), strict=True):
        if not torch.equal(a.cpu(), b):
            raise SystemExit(f"{case}: {name} differs between CUDA and CPU at {(a.cpu() != b).nonzero()[:4].tolist()}")


def run(case: Case, repeats: int, results: Results) -> None:
    pages = case.pages()
    keys = case.columns * PAGE_SIZE
    slots = torch.zeros(case.batch, keys + 4, dtype=torch.int32)  # SGLang's rows are 4 longer than the context
    slots[:, :keys] = (pages.repeat_interleave(PAGE_SIZE, 1) * PAGE_SIZE).int()
    slots[:, :keys] += torch.arange(PAGE_SIZE, dtype=torch.int32).repeat(case.columns)
    tensors = [slots, torch.arange(case.batch), torch.full((case.batch,), case.context)]
    on_device = [tensor.cuda() for tensor in tensors]
    for share in (False, True):
        planner = planner_of(case, share, "cuda")
        step = measure(lambda planner=planner: planner.begin(*on_device), repeats)  # type: ignore[misc]
        check(case, share, planner, tensors)
        csr = [tensor.clone() for tensor in planner.plan.tensors()[1:4]]
        csr[1] = csr[1][: case.batch * case.columns]
        alone = measure(lambda planner=planner, csr=csr: planner.begin_csr(None, *csr), repeats)  # type: ignore[misc]
        counts = planner.plan.counts.tolist()
        print(
            f"{case}  share={share!s:5}  step {step.median:6.1f} us  from a CSR {alone.median:6.1f} us  "
            f"rows {counts[Count.NUM_ROWS]} tiles {counts[Count.NUM_TILES]} "
            f"pages {counts[Count.PAGES_READ]}/{counts[Count.PAGES_DENSE]}",
            flush=True,
        )
        name = f"{case}/{'share' if share else 'noshare'}"
        results.add(name, "flashcore", "time_us", step.median, step.spread)
        results.add(f"{name}/from_csr", "flashcore", "time_us", alone.median, alone.spread)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    results = Results(command=shlex.join(["python", *sys.argv]), method=Method("read", "runs").words)
    for case in CASES:
        run(case, options.repeats, results)
    if options.json:
        results.save(options.json)


if __name__ == "__main__":
    main()
