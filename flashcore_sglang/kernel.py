"""A chosen kernel with the buffers it works in: attention over a plan."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from flashcore_sglang import ops
from flashcore_sglang.planner import Capacity, Plan
from flashcore_sglang.variants import Choice

# Plan tensors of some of the batch's requests, and what more `ops.attend` takes for them.
Part = tuple[list[torch.Tensor], dict[str, Any]]


class Kernel:
    """Runs a variant over plans of one capacity.

    Args:
        choice: the variant; its tiling is that of the plans.
        capacity: of the plans.
        head_dim: channels of a head.
        device: of all tensors.

    Attributes:
        choice: as given.
        partial_o: fp32 ``[max_partials, head_dim]``, partial_lse: fp32 ``[max_partials]``: what tiles write whose
            queries have keys in other tiles.
    """

    def __init__(self, choice: Choice, capacity: Capacity, head_dim: int, device: torch.device | str) -> None:
        rows = capacity.max_partials
        self.choice = choice
        self.partial_o = torch.empty((rows, head_dim), dtype=torch.float32, device=device)
        self.partial_lse = torch.empty(rows, dtype=torch.float32, device=device)

    def attend(
        self,
        plan: Plan,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        *,
        sm_scale: float,
        causal: bool,
        window_left: int,
        logits_soft_cap: float,
        decode: bool,
        parts: Iterable[Part] | None = None,
        selection: ops.Selection | None = None,
        new: ops.NewTokens | None = None,
        early: bool = False,
    ) -> None:
        """``ops.attend`` over ``plan``, or over its ``parts`` one after the other where some are given.

        With a ``selection`` it is ``ops.select_attend``, of a decode batch without a window; ``new`` and ``early`` are
        for that.
        """
        partials = self.partial_o[: plan.max_partials], self.partial_lse[: plan.max_partials]
        if selection is not None:
            ops.select_attend(
                q,
                k_cache,
                v_cache,
                plan.tensors(),
                *partials,
                out,
                lse,
                selection=selection,
                rows_per_tile=self.choice.tiling.rows_per_tile,
                sm_scale=sm_scale,
                logits_soft_cap=logits_soft_cap,
                variant=self.choice.variant.name,
                free_cuts=plan.free_cuts,
                new=new,
                early=early,
            )
            return
        for tensors, more in [(plan.tensors(), {})] if parts is None else parts:
            ops.attend(
                q,
                k_cache,
                v_cache,
                tensors,
                *partials,
                out,
                lse,
                rows_per_tile=self.choice.tiling.rows_per_tile,
                sm_scale=sm_scale,
                causal=causal,
                window_left=window_left,
                logits_soft_cap=logits_soft_cap,
                decode=decode,
                variant=self.choice.variant.name,
                free_cuts=plan.free_cuts,
                **more,
            )
