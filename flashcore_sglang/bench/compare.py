"""What `flashcore bench decode` and `prefill` do with a case: ours beside the peers, correctness before timing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch

from .accuracy import Error
from .cases import DecodeCase, PrefillCase
from .peers import Call
from .results import OURS, Results, is_ours
from .timing import Time

Case = TypeVar("Case", DecodeCase, PrefillCase)


def backend(variant: str) -> str:
    """The name of ours by a variant; ``auto`` is the chooser's."""
    return OURS if variant == "auto" else f"{OURS}:{variant}"


def unmeasured(results: Results, cases: Iterable[Case], variants: list[str]) -> Iterator[Case]:
    """The cases that `results` lacks for a variant, with what it has of them forgotten, each from an empty GPU."""
    for case in cases:
        if not all(results.has(case.name, backend(variant)) for variant in variants):
            results.drop(case.name)
            torch.manual_seed(0)
            yield case
            torch.cuda.empty_cache()


def compare(
    results: Results,
    case: str,
    calls: Mapping[str, Call | None],
    *,
    error: Callable[[torch.Tensor], Error],
    allowed: Callable[[list[float]], float],
    time: Callable[[Mapping[str, Call]], Mapping[str, Time]],
    metric: str,
    work: float,
) -> list[str]:
    """Checks and times one case and saves its rows.

    Args:
        results: where the rows go.
        case: its name.
        calls: by backend; None for a peer that is missing or cannot.
        error: distance to fp64 of a call's output ``[tokens, heads, head_dim]``.
        allowed: the largest difference of ours that is right beside those of the peers, of which there may be none.
        time: microseconds of calls.
        metric: ``tb_s`` or ``tflops``, a row beside ``time_us``.
        work: bytes or operations, for it.

    Returns:
        What was not timed, a line each: a result of ours whose error is larger than allowed.
    """
    present = {name: call for name, call in calls.items() if call is not None}
    errors = {name: error(call()) for name, call in present.items()}
    limit = allowed([value.largest for name, value in errors.items() if not is_ours(name)])
    wrong = [name for name in present if is_ours(name) and errors[name].largest > limit]
    failures = [f"{case}: {name} is off fp64 by {errors[name].largest:.2e}, allowed are {limit:.2e}" for name in wrong]
    for failure in failures:
        print(failure, flush=True)
    shown = {}
    for name, taken in time({name: call for name, call in present.items() if name not in wrong}).items():
        speed = work / taken.median / 1e6
        results.add(case, name, "time_us", *taken)
        results.add(case, name, metric, speed)
        results.add(case, name, "max_error", errors[name].largest)
        results.add(case, name, "rms_error", errors[name].rms)
        shown[name] = f"{taken.median:.1f} us, {speed:.4g} {metric}"
    results.flush()
    print(case, shown, flush=True)
    return failures
