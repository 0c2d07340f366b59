"""Policy topk: a decode step reads, for each KV head, the pages that its queries score highest, within a budget.

After Quest (arXiv 2406.10774), with mean and standard deviation of K in place of its minimum and maximum unless the
configuration says otherwise. How many pages a row reads is known when the batch is planned, so tiles are cut once;
which pages, the select op writes before a layer attends. Sinks and recent pages are always in.

Pages that requests share are scored for all of them at once: the plan says which (``Plan.stretches``), and the scores
are those that each request would get by itself, to the bit.

With top-p (after Twilight, arXiv 2502.02770) a KV head whose softmax is concentrated reads fewer: select ends the tiles
of its row early. The plan is cut for whole budgets, so that it is bytes that this saves, and time where all heads do.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from flashcore_sglang import ops
from flashcore_sglang.planner.plan import Capacity, Plan, Policy
from flashcore_sglang.planner.planner import Planner, PlannerOptions
from flashcore_sglang.planner.summaries import Summaries


class Topk(Planner):
    """Selects pages by the summaries before the layers attend that have them."""

    def __init__(
        self, options: PlannerOptions, capacity: Capacity, device: torch.device | str, summaries: Summaries
    ) -> None:
        super().__init__(options, capacity, device)
        self.summaries = summaries
        self.plan.selections = len(summaries.spec.selecting)
        self.scores = torch.empty(
            (capacity.batch * capacity.num_kv_heads, summaries.spec.max_columns), dtype=torch.float32, device=device
        )
        # Dense layers read everything: the same page table under a plan of its own.
        self.dense_plan = self.plan
        if any(layer not in summaries.sparse for layer in summaries.spec.layers):
            dense = Plan.allocate(replace(capacity, sparse_pages=0), device)
            self.dense_plan = replace(
                dense,
                qo_indptr=self.plan.qo_indptr,
                kv_indptr=self.plan.kv_indptr,
                kv_indices=self.plan.kv_indices,
                last_page_len=self.plan.last_page_len,
            )
        self._sparse = False

    def after_store(self, layer_id: int, k_cache: torch.Tensor, first_page: torch.Tensor | None = None) -> None:
        self.summaries.update(self.plan, layer_id, k_cache, first_page)

    def plan_of(self, layer_id: int) -> Plan:
        if self._sparse and layer_id not in self.summaries.sparse:
            return self.dense_plan
        return self.plan

    def selection_of(self, layer_id: int) -> ops.Selection | None:
        if not self._sparse or layer_id not in self.summaries.of_layer:
            return None
        o, spec = self.options, self.summaries.spec
        return ops.Selection(
            self.summaries.of_layer[layer_id],
            self.scores,
            max_columns=spec.max_columns,
            summary_kind=int(spec.kind),
            group_reduction=int(o.group_reduction),
            std_weight=o.std_weight,
            mass_share=o.mass_share,
            sparse=o.sparse_rows(self.capacity.pages),
        )

    def layer_plans(self) -> list[tuple[Plan, int]]:
        if not self._sparse:
            return super().layer_plans()
        sparse = sum(layer in self.summaries.sparse for layer in self.summaries.spec.layers)
        return [(self.plan, sparse), (self.dense_plan, len(self.summaries.spec.layers) - sparse)]

    def _make(self, num_tokens: int, *, decode: bool, causal: bool, window_left: int) -> None:
        super()._make(num_tokens, decode=decode, causal=causal, window_left=window_left)
        self._sparse = decode and window_left < 0
        self.plan.selects_tiles = self.options.top_p < 1
        if self._sparse and self.dense_plan is not self.plan:
            self.dense_plan.batch = self.plan.batch
            self._run_plan(self.dense_plan, Policy.EXACT, num_tokens, decode, causal, window_left, beside=True)
