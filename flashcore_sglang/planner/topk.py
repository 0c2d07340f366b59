"""Policy topk: a decode step reads, for each KV head, the pages that its queries score highest, within a budget.

After Quest (arXiv 2406.10774) with mean and standard deviation of K in place of its minimum and maximum. A page's
summary is per layer and KV head and written when K is stored. How many pages a row reads is known when the batch is
planned, so tiles are cut once; which pages, the select op writes before each layer attends. Sinks and recent pages are
always in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from flashcore_sglang import ops
from flashcore_sglang.planner.plan import Capacity, Plan, Policy
from flashcore_sglang.planner.planner import Planner, PlannerOptions


@dataclass(frozen=True)
class SummarySpec:
    """The K cache to be summarised.

    Attributes:
        layers: layer ids of this rank.
        head_dim: channels of a head.
        dtype: dtype of the cache and of the summaries.
        max_columns: pages of a request at most.
    """

    layers: Sequence[int]
    head_dim: int
    dtype: torch.dtype
    max_columns: int

    def num_bytes(self, num_pages: int, num_kv_heads: int) -> int:
        """Memory of the summaries of all layers."""
        return len(self.layers) * num_pages * 2 * num_kv_heads * self.head_dim * self.dtype.itemsize


class Summaries:
    """The page summaries of a KV pool: ``{layer: [num_pages, 2, num_kv_heads, head_dim]}`` of the layers that select.

    They belong to the pool and not to a planner: every planner over the pool must see what any of them has written.
    """

    def __init__(
        self, spec: SummarySpec, num_pages: int, num_kv_heads: int, dense_layers: int, device: torch.device | str
    ) -> None:
        self.spec = spec
        shape = (num_pages, 2, num_kv_heads, spec.head_dim)
        self.of_layer = {
            layer: torch.zeros(shape, dtype=spec.dtype, device=device) for layer in spec.layers if layer >= dense_layers
        }

    def update(self, plan: Plan, layer_id: int, k_cache: torch.Tensor, first_page: torch.Tensor | None) -> None:
        """Rewrites the summaries of the batch in ``plan``; arguments as in ``Planner.after_store``."""
        if layer_id not in self.of_layer:
            return
        n = plan.batch
        ops.summarize(
            k_cache,
            plan.kv_indptr[: n + 1],
            plan.kv_indices,
            plan.last_page_len[:n],
            first_page,
            self.spec.max_columns,
            self.of_layer[layer_id],
        )


class Topk(Planner):
    """Selects pages by the summaries before each layer attends."""

    def __init__(
        self, options: PlannerOptions, capacity: Capacity, device: torch.device | str, summaries: Summaries
    ) -> None:
        super().__init__(options, capacity, device)
        self.summaries = summaries
        self.max_columns = summaries.spec.max_columns
        self.scores = torch.empty(
            (capacity.batch * capacity.num_kv_heads, self.max_columns), dtype=torch.float32, device=device
        )
        # The first layers read everything: the same page table under a plan of its own.
        self.dense_plan = self.plan
        if any(layer < options.dense_layers for layer in summaries.spec.layers):
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

    def for_layer(self, layer_id: int, q: torch.Tensor, k_cache: torch.Tensor) -> Plan:
        if not self._sparse:
            return self.plan
        if layer_id not in self.summaries.of_layer:
            return self.dense_plan
        o = self.options
        ops.select(
            q,
            self.summaries.of_layer[layer_id],
            self.plan.tensors(),
            self.scores,
            page_size=o.page_size,
            max_columns=self.max_columns,
            sink_pages=o.sink_pages,
            recent_pages=o.recent_pages,
            budget_pages=o.budget_pages,
            sparse_begin=self.capacity.pages,
            std_weight=o.std_weight,
        )
        return self.plan

    def _make(self, num_tokens: int, *, decode: bool, causal: bool, window_left: int) -> None:
        super()._make(num_tokens, decode=decode, causal=causal, window_left=window_left)
        self._sparse = decode and window_left < 0
        if self._sparse and self.dense_plan is not self.plan:
            self.dense_plan.batch = self.plan.batch
            self._run_plan(self.dense_plan, Policy.EXACT, num_tokens, decode, causal, window_left)
