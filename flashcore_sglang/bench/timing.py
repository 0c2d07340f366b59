"""Device time of a call: cold L2, CUDA-graph replay where it can be captured, median and spread.

The L2 is filled with other lines by reading them, as the weights do that a server reads between two attentions. Filling
it by writing, as most published benchmarks do, leaves tens of megabytes of dirty lines, whose write-back runs under the
next kernel and is charged to it. Calls of a case take turns, as a layer's kernels do in a server: their instructions,
too, come from memory, and all see the same clocks. Having the runs of a call one after the other, as most published
benchmarks do, keeps its instructions at hand. Both of the latter are there for a comparison with such figures.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch

Flush = Literal["read", "write"]
Order = Literal["turns", "runs"]
_FLUSH_BYTES = 256 << 20  # several times the 50 to 60 MB of a Hopper L2
# Before an eager call: 0.5 ms of device time, so that the host has launched all of it before its time begins to count.
_FLUSHES_AHEAD = 8


class Method(NamedTuple):
    """How calls are timed, see above."""

    flush: Flush = "read"
    order: Order = "turns"

    @property
    def words(self) -> dict[str, str]:
        """What a result file says of it."""
        return {"l2_flush": self.flush, "order": self.order}


AS_IN_A_SERVER = Method()


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


def measure_all(
    calls: Mapping[str, Callable[[], object]], repeats: int = 20, graph: bool = True, method: Method = AS_IN_A_SERVER
) -> dict[str, Time]:
    """Times calls on the device, with the L2 flushed before every run.

    In turns, since a GPU at its power limit slows down over the first hundreds of milliseconds, and a call that is
    timed before the others is timed at a higher clock.
    """
    replays = {name: captured(call) if graph else call for name, call in calls.items()}
    for replay in replays.values():
        for _ in range(2):
            replay()
    times: dict[str, list[float]] = {name: [] for name in replays}
    turns = [name for _ in range(repeats) for name in replays]
    for name in turns if method.order == "turns" else sorted(turns, key=list(replays).index):
        for _ in range(1 if graph else _FLUSHES_AHEAD):
            flush_l2(method.flush)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        replays[name]()
        end.record()
        end.synchronize()
        times[name].append(begin.elapsed_time(end) * 1e3)
    quartiles = {name: statistics.quantiles(taken, n=4) for name, taken in times.items()}
    return {name: Time(statistics.median(times[name]), q[2] - q[0]) for name, q in quartiles.items()}


def measure(call: Callable[[], object], repeats: int = 20) -> Time:
    """Times one captured call as ``measure_all`` does."""
    return measure_all({"": call}, repeats)[""]
