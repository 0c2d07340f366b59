"""Prometheus metrics of what the planner saves, without ever waiting for the device.

The counts of a plan are written on the device. :class:`PlanMetrics` copies them to pinned memory behind the plan, on
its stream, and adds them up in a later step, once that copy is done. SGLang's ``/metrics`` merges the files that every
process writes under ``PROMETHEUS_MULTIPROC_DIR``; the server sets it before ``prometheus_client`` may be imported.
"""

from __future__ import annotations

from collections import deque
from functools import cache
from types import SimpleNamespace

import torch

from flashcore_sglang.planner.plan import Count, Plan


class PlanMetrics:
    """Adds the counts of each step's plan to the process's metrics; does nothing unless ``enabled``.

    Pages are those that one KV head of one layer reads. Enable it on one rank of a tensor-parallel group (every rank
    plans the same batch) and observe decode steps: a long prefill reads a page once for each tile of queries, so that
    nothing is saved there.

    Raises:
        ImportError: ``enabled`` where ``prometheus_client`` is not installed.
    """

    def __init__(self, enabled: bool) -> None:
        self._metrics = _metrics() if enabled else None
        self._pending: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
        self._free: list[torch.Tensor] = []

    def observe(self, plan: Plan) -> None:
        """Queues the counts of ``plan``, just written on the current stream, and adds those that have arrived."""
        if self._metrics is None:
            return
        if not plan.counts.is_cuda:
            self._add(plan.counts)
            return
        self.collect()
        if torch.cuda.is_current_stream_capturing():
            return  # a replay would write to the same buffer behind our back
        copy = self._free.pop() if self._free else torch.empty(Count.NUM_COUNTS, dtype=torch.int32, pin_memory=True)
        copy.copy_(plan.counts, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._pending.append((copy, arrived))

    def collect(self) -> None:
        """Adds the counts that have arrived; never waits."""
        while self._pending and self._pending[0][1].query():
            copy, _ = self._pending.popleft()
            self._add(copy)
            self._free.append(copy)

    def _add(self, counts: torch.Tensor) -> None:
        assert self._metrics is not None
        values = counts.tolist()
        read, dense = values[Count.PAGES_READ], values[Count.PAGES_DENSE]
        self._metrics.pages_read.inc(read)
        self._metrics.pages_saved.inc(max(dense - read, 0))
        self._metrics.rows_packed.inc(values[Count.ROWS_PACKED])
        if dense:
            self._metrics.kv_read_ratio.set(read / dense)


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
