"""Prometheus metrics of what the planner saves, without ever waiting for the device.

The counts of a plan are written on the device, before the captured graph that reads the plan is replayed.
:class:`PlanMetrics` copies them to pinned memory behind the plan, on its stream, and adds them up in a later step, once
that copy is done. SGLang's ``/metrics`` merges the files that every process writes under ``PROMETHEUS_MULTIPROC_DIR``;
the server sets it before ``prometheus_client`` may be imported.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import torch

from flashcore_sglang.planner.plan import Count, Plan


@dataclass
class _Copy:
    """Counts on their way to the host.

    Attributes:
        counts: int32 ``[plans, NUM_COUNTS]``, pinned.
        arrived: recorded behind the copy.
        plans: whose counts they are, and the layers of each.
    """

    counts: torch.Tensor
    arrived: torch.cuda.Event
    plans: list[tuple[Plan, int]]


@dataclass
class _Step:
    """What one step of decode reads: means over the layers; and PAGES_DROPPED of each plan before it."""

    read: float
    dense: float
    packed: float
    dropped: list[int]


class PlanMetrics:
    """Adds the counts of each step's plans to the process's metrics.

    Pages are those that one KV head reads, in the mean over the layers where they read different ones (policy topk with
    dense layers). Page summaries are not counted. With top-p a step is added when the next one of its plan is observed:
    layers choose behind the plan, and what they left out stands in the counts of the next one. Enable it on one rank of
    a tensor-parallel group (every rank plans the same batch) and observe decode steps: a long prefill reads a page once
    for each tile of queries, so that nothing is saved there. A request that pads a batch to the size of a captured
    graph counts as one of one page.

    Args:
        enabled: what callers ask before they observe; without it nothing is imported, either.

    Raises:
        ImportError: ``enabled`` where ``prometheus_client`` is not installed.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._metrics = _metrics() if enabled else None
        self._pending: deque[_Copy] = deque()
        self._free: list[_Copy] = []
        self._open: WeakKeyDictionary[Plan, _Step] = WeakKeyDictionary()  # steps of which top-p leaves out more

    def observe(self, layer_plans: Sequence[tuple[Plan, int]]) -> None:
        """Queues the counts of a step's plans, just written on the current stream, and adds those that have arrived.

        Args:
            layer_plans: ``Planner.layer_plans()``.
        """
        if self._metrics is None:
            return
        used = [(plan, layers) for plan, layers in layer_plans if layers]
        if not used[0][0].counts.is_cuda:
            self._add([plan.counts.tolist() for plan, _ in used], used)
            return
        self.collect()
        if torch.cuda.is_current_stream_capturing():
            return  # a replay would write to the same buffer behind our back
        copy = self._buffer(len(used))
        for row, (plan, _) in enumerate(used):
            copy.counts[row].copy_(plan.counts, non_blocking=True)
        copy.plans = used
        copy.arrived.record()
        self._pending.append(copy)

    def collect(self) -> None:
        """Adds the counts that have arrived; never waits."""
        while self._pending and self._pending[0].arrived.query():
            copy = self._pending.popleft()
            self._add(copy.counts.tolist(), copy.plans)
            self._free.append(copy)

    def _buffer(self, plans: int) -> _Copy:
        for index, copy in enumerate(self._free):
            if len(copy.counts) == plans:
                return self._free.pop(index)
        return _Copy(torch.empty(plans, Count.NUM_COUNTS, dtype=torch.int32, pin_memory=True), torch.cuda.Event(), [])

    def _add(self, counts: list[list[int]], plans: list[tuple[Plan, int]]) -> None:
        assert self._metrics is not None
        layers = [layers for _, layers in plans]

        def mean(values: Iterable[float]) -> float:
            return sum(value * n for value, n in zip(values, layers, strict=True)) / sum(layers)

        step = _Step(
            read=mean(of_plan[Count.PAGES_READ] for of_plan in counts),
            dense=mean(of_plan[Count.PAGES_DENSE] for of_plan in counts),
            packed=mean(of_plan[Count.ROWS_PACKED] for of_plan in counts),
            dropped=[of_plan[Count.PAGES_DROPPED] for of_plan in counts],
        )
        chooses = next((plan for plan, _ in plans if plan.selects_tiles), None)
        if chooses is None:
            self._publish(step)
            return
        before = self._open.get(chooses)
        self._open[chooses] = step
        if before is not None:
            before.read -= mean(
                _newly_dropped(plan, *seen)
                for (plan, _), *seen in zip(plans, before.dropped, step.dropped, strict=True)
            )
            self._publish(before)

    def _publish(self, step: _Step) -> None:
        assert self._metrics is not None
        self._metrics.pages_read.inc(step.read)
        self._metrics.pages_saved.inc(max(step.dense - step.read, 0))
        self._metrics.rows_packed.inc(step.packed)
        if step.dense:
            self._metrics.kv_read_ratio.set(step.read / step.dense)


def _newly_dropped(plan: Plan, before: int, now: int) -> float:
    """Pages that one KV head of one layer has left out between two values of PAGES_DROPPED."""
    new = (now - before) % 2**32  # an int32 that is never reset goes round
    return new / (plan.selections * plan.capacity.num_kv_heads) if new else 0.0


@cache
def _metrics() -> SimpleNamespace:
    """The metrics of this process; the registry takes each name once."""
    try:
        from prometheus_client import Counter, Gauge
    except ImportError as error:
        raise ImportError(
            "metrics are on but prometheus_client is not installed: pip install prometheus-client, "
            "or turn them off with FLASHCORE_METRICS=false"
        ) from error
    return SimpleNamespace(
        pages_read=Counter("flashcore:pages_read", "KV pages read by one KV head of one layer."),
        pages_saved=Counter("flashcore:pages_saved", "KV pages that sharing and sparsity did not read."),
        rows_packed=Counter("flashcore:rows_packed", "Work rows in which several requests read shared pages together."),
        kv_read_ratio=Gauge(
            "flashcore:kv_read_ratio",
            "Pages read in the latest observed step over the pages its requests hold.",
            multiprocess_mode="mostrecent",
        ),
    )
