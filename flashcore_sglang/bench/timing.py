"""Device time of a captured call: cold L2, CUDA-graph replay, median and spread.

The L2 is filled with other lines by reading them, as the weights do that a server reads between two attentions. Filling
it by writing, as most published benchmarks do, leaves tens of megabytes of dirty lines, whose write-back runs under the
next kernel and is charged to it: there for a comparison with such figures.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch

Flush = Literal["read", "write"]
_FLUSH_BYTES = 256 << 20  # several times the 50 to 60 MB of a Hopper L2


class Time(NamedTuple):
    """Microseconds; the spread is the distance between the quartiles."""

    median: float
    spread: float


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.zeros(_FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")


def flush_l2(by: Flush = "read") -> None:
    """Leaves nothing in the L2 that the measured call reads; ``read`` leaves nothing to write back, either."""
    if by == "read":
        torch.sum(_flush_buffer())
    else:
        _flush_buffer().zero_()


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """Captures `call` in a CUDA graph and returns its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure_in_turns(
    calls: Mapping[str, Callable[[], object]], repeats: int = 20, graph: bool = True, flush: Flush = "read"
) -> dict[str, Time]:
    """Times calls on the device, with the L2 flushed before every run.

    They take turns: a GPU at its power limit slows down over the first hundreds of milliseconds, and a call that is
    timed before the others would be timed at a higher clock.
    """
    replays = {name: captured(call) if graph else call for name, call in calls.items()}
    for replay in replays.values():
        for _ in range(2):
            replay()
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(repeats):
        for name, replay in replays.items():
            flush_l2(flush)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3)
    quartiles = {name: statistics.quantiles(taken, n=4) for name, taken in times.items()}
    return {name: Time(statistics.median(times[name]), q[2] - q[0]) for name, q in quartiles.items()}


def measure(call: Callable[[], object], repeats: int = 20, graph: bool = True, flush: Flush = "read") -> Time:
    """Times one call as ``measure_in_turns`` does."""
    return measure_in_turns({"": call}, repeats, graph, flush)[""]
