"""Metrics: what a plan's counts become, and that they reach a `/metrics` endpoint from another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashcore_sglang.metrics import PlanMetrics, _metrics
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
    metrics.observe(plan_of(read=30, dense=100, packed=3))
    metrics.observe(plan_of(read=50, dense=100, packed=1))
    added = tuple(after - start for after, start in zip(values()[:3], before[:3], strict=True))
    assert added == (80, 120, 4)
    assert values()[3] == 0.5


def test_prefill_reads_a_page_for_each_tile_and_saves_nothing(values) -> None:  # type: ignore[no-untyped-def]
    before = values()
    PlanMetrics(enabled=True).observe(plan_of(read=12, dense=8, packed=0))
    assert [after - start for after, start in zip(values()[:3], before[:3], strict=True)] == [12, 0, 0]


def test_empty_plan_keeps_the_ratio(values) -> None:  # type: ignore[no-untyped-def]
    metrics = PlanMetrics(enabled=True)
    metrics.observe(plan_of(read=1, dense=4, packed=0))
    metrics.observe(plan_of(read=0, dense=0, packed=0))
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
    out = python(OBSERVE + "PlanMetrics(enabled=False).observe(plan); print('prometheus_client' in sys.modules)")
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
        python(OBSERVE + "PlanMetrics(enabled=True).observe(plan)", **folder)
    text = python(
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess\n"
        "registry = CollectorRegistry(); multiprocess.MultiProcessCollector(registry)\n"
        "print(generate_latest(registry).decode())",
        **folder,
    )
    lines = dict(line.split(" ") for line in text.splitlines() if line and not line.startswith("#"))
    assert [float(lines[name]) for name in NAMES] == [60, 180, 4, 0.25]


@pytest.mark.gpu
def test_device_counts_arrive_without_a_wait(values) -> None:  # type: ignore[no-untyped-def]
    metrics = PlanMetrics(enabled=True)
    plan = plan_of(read=30, dense=100, packed=3, device="cuda")
    torch.cuda.synchronize()
    before = values()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # cycles: the copy stands behind 0.1 s of work
        metrics.observe(plan)
        assert values() == before
        metrics.observe(plan)
        assert values() == before
    torch.cuda.synchronize()
    metrics.collect()
    assert [after - start for after, start in zip(values()[:3], before[:3], strict=True)] == [60, 140, 6]
