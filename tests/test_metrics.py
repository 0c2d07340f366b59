"""Metrics: what a plan's counts become, and that they reach a `/metrics` endpoint from another process."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashcore_sglang.metrics import PlanMetrics, _metrics
from flashcore_sglang.planner import Planner, PlannerOptions
from flashcore_sglang.planner.plan import Capacity, Count, Plan

NAMES = (
    "flashcore:pages_read_total",
    "flashcore:pages_saved_total",
    "flashcore:rows_packed_total",
    "flashcore:kv_read_ratio",
)


def plan_of(read: int, dense: int, packed: int, device: str = "cpu") -> Plan:
    capacity = Capacity(
        batch=2, tokens=2, pages=8, num_pages=8, num_kv_heads=1, group=1, rows_per_tile=64, num_ctas=1, share=False
    )
    plan = Plan.allocate(capacity, device)
    counts = torch.zeros(Count.NUM_COUNTS, dtype=torch.int32)
    counts[Count.PAGES_READ], counts[Count.PAGES_DENSE], counts[Count.ROWS_PACKED] = read, dense, packed
    plan.counts.copy_(counts)
    return plan


def step(read: int, dense: int, packed: int) -> list[tuple[Plan, int]]:
    return [(plan_of(read, dense, packed), 1)]


@pytest.fixture
def values():  # type: ignore[no-untyped-def]
    prometheus = pytest.importorskip("prometheus_client")
    PlanMetrics(enabled=True)

    def read() -> tuple[float, ...]:
        return tuple(prometheus.REGISTRY.get_sample_value(name) for name in NAMES)

    return read


def test_counts_add_up_and_the_ratio_is_the_latest(values) -> None:  # type: ignore[no-untyped-def]
    metrics = PlanMetrics(enabled=True)
    before = values()
    metrics.observe(step(read=30, dense=100, packed=3))
    metrics.observe(step(read=50, dense=100, packed=1))
    added = tuple(after - start for after, start in zip(values()[:3], before[:3], strict=True))
    assert added == (80, 120, 4)
    assert values()[3] == 0.5


def test_prefill_reads_a_page_for_each_tile_and_saves_nothing(values) -> None:  # type: ignore[no-untyped-def]
    before = values()
    PlanMetrics(enabled=True).observe(step(read=12, dense=8, packed=0))
    assert [after - start for after, start in zip(values()[:3], before[:3], strict=True)] == [12, 0, 0]


def test_empty_plan_keeps_the_ratio(values) -> None:  # type: ignore[no-untyped-def]
    metrics = PlanMetrics(enabled=True)
    metrics.observe(step(read=1, dense=4, packed=0))
    metrics.observe(step(read=0, dense=0, packed=0))
    assert values()[3] == 0.25


def test_two_backends_share_the_metrics(values) -> None:  # type: ignore[no-untyped-def]
    assert PlanMetrics(enabled=True)._metrics is PlanMetrics(enabled=True)._metrics is _metrics()


def python(code: str, **env: str) -> str:
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


OBSERVE = """
import sys, torch
from flashcore_sglang.metrics import PlanMetrics
from flashcore_sglang.planner.plan import Capacity, Count, Plan
capacity = Capacity(batch=1, tokens=1, pages=1, num_pages=1, num_kv_heads=1, group=1, rows_per_tile=64, num_ctas=1)
plan = Plan.allocate(capacity, "cpu")
plan.counts[Count.PAGES_READ], plan.counts[Count.PAGES_DENSE], plan.counts[Count.ROWS_PACKED] = 30, 120, 2
"""


def test_disabled_never_imports_prometheus() -> None:
    out = python(OBSERVE + "PlanMetrics(enabled=False).observe([(plan, 1)]); print('prometheus_client' in sys.modules)")
    assert out.strip() == "False"


def test_missing_prometheus_says_what_to_do() -> None:
    out = python(
        OBSERVE
        + """
sys.modules["prometheus_client"] = None
try:
    PlanMetrics(enabled=True)
except ImportError as error:
    print(error)
"""
    )
    assert "pip install prometheus-client, or turn them off with FLASHCORE_METRICS=false" in out


def test_values_reach_the_servers_endpoint(tmp_path: Path) -> None:
    # As SGLang does: schedulers write files, the HTTP process merges them with a MultiProcessCollector.
    pytest.importorskip("prometheus_client")
    folder = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for _ in range(2):
        python(OBSERVE + "PlanMetrics(enabled=True).observe([(plan, 1)])", **folder)
    text = python(
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess\n"
        "registry = CollectorRegistry(); multiprocess.MultiProcessCollector(registry)\n"
        "print(generate_latest(registry).decode())",
        **folder,
    )
    lines = dict(line.split(" ") for line in text.splitlines() if line and not line.startswith("#"))
    assert [float(lines[name]) for name in NAMES] == [60, 180, 4, 0.25]


def prefix_batch(device: str) -> tuple[Planner, tuple[torch.Tensor, ...]]:
    """A planner, and a decode batch of 8 requests that share 256 pages of 16 and have one of their own."""
    shared, requests = 256, 8
    options = PlannerOptions(page_size=16)
    pages = requests * (shared + 1)
    capacity = Capacity(
        batch=requests,
        tokens=requests,
        pages=pages,
        num_pages=pages,
        num_kv_heads=2,
        group=4,
        rows_per_tile=64,
        num_ctas=4,
        page_size=16,
    )
    table = torch.arange(shared).expand(requests, shared)
    own = shared + torch.arange(requests)[:, None]
    indices = torch.cat([table, own], 1).flatten().int().to(device)
    indptr = torch.arange(0, pages + 1, shared + 1, dtype=torch.int32, device=device)
    last = torch.full((requests,), 5, dtype=torch.int32, device=device)
    return Planner(options, capacity, device), (indptr, indices, last)


def test_a_real_plan_counts_shared_pages_once(values) -> None:  # type: ignore[no-untyped-def]
    planner, batch = prefix_batch("cpu")
    before = values()
    planner.begin_csr(None, *batch)
    PlanMetrics(enabled=True).observe(planner.layer_plans())
    assert [after - start for after, start in zip(values()[:3], before[:3], strict=True)] == [256 + 8, 7 * 256, 1]
    assert values()[3] == pytest.approx((256 + 8) / (8 * 257))


def test_dense_layers_count_for_what_they_read(values) -> None:  # type: ignore[no-untyped-def]
    before = values()
    PlanMetrics(enabled=True).observe([(plan_of(10, 100, 0), 30), (plan_of(100, 100, 0), 2), (plan_of(1, 9, 9), 0)])
    read = (30 * 10 + 2 * 100) / 32
    assert [after - start for after, start in zip(values()[:3], before[:3], strict=True)] == [read, 100 - read, 0]
    assert values()[3] == pytest.approx(read / 100)


def plan_of_top_p(read: int, dense: int) -> Plan:
    plan = plan_of(read, dense, 0)
    plan.capacity, plan.selections, plan.selects_tiles = replace(plan.capacity, num_kv_heads=2), 3, True
    return plan


def test_pages_that_top_p_dropped_since_the_last_step_are_not_read(values) -> None:  # type: ignore[no-untyped-def]
    metrics, plan = PlanMetrics(enabled=True), plan_of_top_p(40, 100)
    before = values()
    for dropped in (600, 660, 660, 672):  # of 2 heads and 3 layers; the first by what was not observed
        plan.counts[Count.PAGES_DROPPED] = dropped
        metrics.observe([(plan, 6), (plan_of(100, 100, 0), 2)])
    read = (6 * 40 + 2 * 100) / 8
    of_layers = 6 / 8 / (2 * 3)
    added = [after - start for after, start in zip(values()[:2], before[:2], strict=True)]
    assert added == pytest.approx([3 * read - 72 * of_layers, 3 * (100 - read) + 72 * of_layers])
    assert values()[3] == pytest.approx((read - 12 * of_layers) / 100)


def test_pages_that_a_long_step_dropped_are_not_taken_from_a_short_one(values) -> None:  # type: ignore[no-untyped-def]
    metrics, plan = PlanMetrics(enabled=True), plan_of_top_p(read=60, dense=100)
    before = values()
    for dropped, read in ((0, 60), (6 * 50, 4), (6 * 50, 4)):
        plan.counts[Count.PAGES_DROPPED], plan.counts[Count.PAGES_READ] = dropped, read
        metrics.observe([(plan, 1)])
    assert values()[0] - before[0] == (60 - 50) + 4


def test_dropped_pages_are_counted_across_the_end_of_int32(values) -> None:  # type: ignore[no-untyped-def]
    metrics, plan = PlanMetrics(enabled=True), plan_of_top_p(read=60, dense=100)
    before = values()
    for dropped in (2**31 - 2, -(2**31) + 4):
        plan.counts[Count.PAGES_DROPPED] = dropped
        metrics.observe([(plan, 1)])
    assert values()[0] - before[0] == 60 - 6 / (2 * 3)


@pytest.mark.gpu
def test_steps_of_a_captured_graph_are_counted_without_a_wait(values) -> None:  # type: ignore[no-untyped-def]
    planner, batch = prefix_batch("cuda")
    metrics, read = PlanMetrics(enabled=True), torch.zeros_like(planner.plan.counts)
    planner.begin_csr(None, *batch)
    metrics.observe(planner.layer_plans())  # allocates pinned memory, once
    torch.cuda.synchronize()
    metrics.collect()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        read.copy_(planner.plan.counts)
    before = values()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            planner.begin_csr(None, *batch)
            metrics.observe(planner.layer_plans())
            graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    metrics.collect()
    added = [after - start for after, start in zip(values()[:3], before[:3], strict=True)]
    assert added == [3 * (256 + 8), 3 * 7 * 256, 3]
    assert read[Count.PAGES_READ] == 256 + 8


@pytest.mark.gpu
def test_device_counts_arrive_without_a_wait(values) -> None:  # type: ignore[no-untyped-def]
    metrics = PlanMetrics(enabled=True)
    plan = plan_of(read=30, dense=100, packed=3, device="cuda")
    torch.cuda.synchronize()
    before = values()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # cycles: the copy stands behind 0.1 s of work
        metrics.observe([(plan, 1)])
        assert values() == before
        metrics.observe([(plan, 1)])
        assert values() == before
    torch.cuda.synchronize()
    metrics.collect()
    assert [after - start for after, start in zip(values()[:3], before[:3], strict=True)] == [60, 140, 6]
