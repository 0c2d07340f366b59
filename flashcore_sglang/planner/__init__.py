"""From a batch to its plan: one file a policy.

``make_planner`` builds the planner of a policy; ``Planner.begin`` or ``begin_csr`` plans a batch, all on the device.
"""

from __future__ import annotations

import torch

from flashcore_sglang.planner.exact import Exact
from flashcore_sglang.planner.plan import Capacity, Count, Plan, Policy
from flashcore_sglang.planner.planner import Planner, PlannerOptions
from flashcore_sglang.planner.summaries import GroupReduction, Summaries, SummaryKind, SummarySpec
from flashcore_sglang.planner.topk import Topk
from flashcore_sglang.planner.window import Window

__all__ = [
    "Capacity",
    "Count",
    "GroupReduction",
    "Plan",
    "Planner",
    "PlannerOptions",
    "Policy",
    "Summaries",
    "SummaryKind",
    "SummarySpec",
    "make_planner",
]


def make_planner(
    options: PlannerOptions,
    capacity: Capacity,
    device: torch.device | str,
    summaries: Summaries | None = None,
) -> Planner:
    """The planner of ``options.policy`` with its buffers on ``device``; ``summaries`` is needed by topk alone.

    Raises:
        ValueError: ``capacity`` has too little room for the policy's page lists, or topk came without ``summaries``.
    """
    if options.policy is Policy.EXACT:
        return Exact(options, capacity, device)
    if options.policy is Policy.WINDOW:
        return Window(options, capacity, device)
    if summaries is None:
        raise ValueError("summaries: policy topk needs those of the KV pool, got None; pass Summaries")
    return Topk(options, capacity, device, summaries)
