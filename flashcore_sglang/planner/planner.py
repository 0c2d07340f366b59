"""What every policy shares: the buffers, and the way from a batch to a plan in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flashcore_sglang import ops
from flashcore_sglang.planner.plan import UNCUT, Capacity, Plan, Policy
from flashcore_sglang.planner.summaries import GroupReduction

if TYPE_CHECKING:
    from flashcore_sglang.config import Config


@dataclass(frozen=True)
class PlannerOptions:
    """What a policy needs to know besides sizes.

    Attributes:
        policy: how rows are made.
        page_size: keys in a page.
        sink_pages, recent_pages: always read by window and topk, at the start and at the end of a request.
        budget_pages: pages that topk reads in all; shorter requests are read whole.
        budget_fraction: fraction of a request's pages that topk reads where that is more.
        max_columns: pages of a request at most; needed with ``budget_fraction``.
        std_weight: topk: weight of |q|.std beside q.mean in a page's score.
        group_reduction: topk: one score of a KV head's query heads.
        top_p: topk: of the pages of the budget so many of the best are read as have this share of the softmax, by the
            scores of all pages to choose from; 1: all of them.
        share: read pages that requests share once; topk: score them once.
        split_keys: 0, or the fixed length of a tile in keys: results then do not depend on the rest of the batch.
    """

    policy: Policy = Policy.EXACT
    page_size: int = 64
    sink_pages: int = 0
    recent_pages: int = 1
    budget_pages: int = 0
    budget_fraction: float = 0.0
    max_columns: int = 0
    std_weight: float = 1.0
    group_reduction: GroupReduction = GroupReduction.MAX
    top_p: float = 1.0
    share: bool = True
    split_keys: int = 0

    @classmethod
    def from_config(
        cls, config: Config, page_size: int, max_columns: int = 0, *, may_share: bool = True
    ) -> PlannerOptions:
        """``config`` counts tokens; pages are rounded up. Requests have ``max_columns`` pages at most.

        ``may_share``: whether two requests can have a page in common at all. Looking for some takes time.
        """
        sink, recent, budget = config.pages(page_size)
        return cls(
            policy=Policy[config.policy.upper()],
            page_size=page_size,
            sink_pages=sink,
            recent_pages=recent,
            budget_pages=budget,
            budget_fraction=config.budget_fraction or 0.0,
            max_columns=max_columns,
            std_weight=config.std_weight,
            group_reduction=GroupReduction[config.group_reduction.upper()],
            top_p=config.top_p,
            share=config.share_prefixes and may_share and not config.deterministic,
            split_keys=config.split_keys if config.deterministic else 0,
        )

    @property
    def budget_share(self) -> int:
        """``budget_fraction`` in 65536ths, as the ops take it."""
        return round(self.budget_fraction * 65536)

    @property
    def mass_share(self) -> int:
        """``top_p`` in 65536ths, as the ops take it."""
        return max(round(self.top_p * 65536), 1)

    @property
    def list_pages(self) -> int:
        """Entries of a sparse row's page list: what the longest request reads."""
        if self.policy is Policy.WINDOW:
            return self.sink_pages + self.recent_pages
        if self.policy is Policy.TOPK:
            return max(self.budget_pages, -(-self.max_columns * self.budget_share // 65536))
        return 0

    def sparse_rows(self, begin: int) -> ops.SparseRows:
        """As the ops take it; page lists start at entry ``begin`` of ``kv_indices``."""
        return ops.SparseRows(
            self.sink_pages, self.recent_pages, self.budget_pages, self.budget_share, self.list_pages, begin
        )

    def sparse_pages(self, batch: int, num_kv_heads: int) -> int:
        """Entries of the page lists of ``batch`` sparse rows: ``Capacity.sparse_pages``."""
        return batch * self.list_pages * (num_kv_heads if self.policy is Policy.TOPK else 1)


class Planner:
    """Plans batches into buffers that are allocated once; a captured graph over them follows every new plan.

    The flow of a forward: ``begin`` (outside of a captured graph), then for each layer ``after_store`` once K is in
    the cache; the layer attends over ``plan_of``, by way of ``selection_of``. Nothing here waits for the device.
    """

    def __init__(self, options: PlannerOptions, capacity: Capacity, device: torch.device | str) -> None:
        needed = options.sparse_pages(capacity.batch, capacity.num_kv_heads)
        if capacity.sparse_pages < needed:
            raise ValueError(
                f"capacity.sparse_pages: expected at least {needed} for policy {options.policy.name.lower()}, got "
                f"{capacity.sparse_pages}; use PlannerOptions.sparse_pages"
            )
        if (capacity.page_size, capacity.split_keys) != (options.page_size, options.split_keys):
            raise ValueError(
                f"capacity: expected the options' page_size {options.page_size} and split_keys {options.split_keys}, "
                f"got {capacity.page_size} and {capacity.split_keys}; make both from the same settings"
            )
        if options.policy is not Policy.EXACT and options.recent_pages < 1:
            raise ValueError(
                f"recent_pages: expected at least 1, got {options.recent_pages}; a token reads its own page"
            )
        if options.policy is Policy.TOPK and options.budget_pages <= options.sink_pages + options.recent_pages:
            raise ValueError(
                f"budget_pages: expected more than sink_pages + recent_pages = "
                f"{options.sink_pages + options.recent_pages}, got {options.budget_pages}"
            )
        self.options = options
        self.capacity = capacity
        self.plan = Plan.allocate(capacity, device)
        self._one_token_each = torch.arange(capacity.batch + 1, dtype=torch.int32, device=device)
        self._holds_one_token_each = False  # whether that is what plan.qo_indptr holds

    def begin(
        self,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        qo_indptr: torch.Tensor | None = None,
        num_tokens: int | None = None,
        causal: bool = True,
        window_left: int = -1,
    ) -> None:
        """Plans a batch of SGLang.

        Args:
            req_to_token: int32 ``[requests, context]`` slots of each request's tokens.
            req_pool_indices: int64 ``[batch]`` rows of ``req_to_token``.
            seq_lens: int64 ``[batch]`` keys of each request, its new tokens included.
            qo_indptr: int32 ``[batch + 1]`` query tokens of each request; None: decode, one each.
            num_tokens: ``qo_indptr[batch]``, needed with it.
            causal: a query token sees keys up to its own position.
            window_left: keys before its own position that a token sees; negative: all.

        Raises:
            ValueError: the batch is larger than the capacity.
        """
        batch = req_pool_indices.shape[0]
        num_tokens = self._start(batch, qo_indptr, num_tokens)
        plan = self.plan
        ops.page_table(
            req_to_token,
            req_pool_indices,
            seq_lens,
            self.options.page_size,
            plan.kv_indptr[: batch + 1],
            plan.kv_indices[: self.capacity.pages],
            plan.last_page_len[:batch],
        )
        self._make(num_tokens, decode=qo_indptr is None, causal=causal, window_left=window_left)

    def begin_csr(
        self,
        qo_indptr: torch.Tensor | None,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        last_page_len: torch.Tensor,
        *,
        num_tokens: int | None = None,
        causal: bool = True,
        window_left: int = -1,
    ) -> None:
        """Plans a batch from a CSR page table on any device; it is copied into the plan's buffers.

        Args:
            qo_indptr: ``[batch + 1]`` query tokens of each request; None: decode, one each.
            kv_indptr: ``[batch + 1]`` pages of each request.
            kv_indices: page ids, ``kv_indptr[batch]`` or more.
            last_page_len: ``[batch]`` keys in the last page of each request.
            num_tokens: ``qo_indptr[batch]``, needed with it.
            causal: a query token sees keys up to its own position.
            window_left: keys before its own position that a token sees; negative: all.

        Raises:
            ValueError: the batch is larger than the capacity.
        """
        batch = kv_indptr.shape[0] - 1
        pages = kv_indices.shape[0]
        if pages > self.capacity.pages:
            raise ValueError(
                f"kv_indices: expected at most {self.capacity.pages} pages, got {pages}; plan for more pages"
            )
        num_tokens = self._start(batch, qo_indptr, num_tokens)
        plan = self.plan
        plan.kv_indptr[: batch + 1].copy_(kv_indptr, non_blocking=True)
        plan.kv_indices[:pages].copy_(kv_indices, non_blocking=True)
        plan.last_page_len[:batch].copy_(last_page_len, non_blocking=True)
        self._make(num_tokens, decode=qo_indptr is None, causal=causal, window_left=window_left)

    def after_store(self, layer_id: int, k_cache: torch.Tensor, first_page: torch.Tensor | None = None) -> None:
        """To be called when a layer's new K is in ``k_cache`` ``[num_pages, page_size, num_kv_heads, head_dim]``.

        Args:
            layer_id: the layer.
            k_cache: its K pages.
            first_page: int32 ``[batch]`` page column of each request from which on K changed; None: the batch's own
                tokens only, one of each request.
        """

    def plan_of(self, layer_id: int) -> Plan:
        """The plan that a layer attends over."""
        return self.plan

    def selection_of(self, layer_id: int) -> ops.Selection | None:
        """How a layer selects the pages that its plan reads; None: it does not."""
        return None

    def for_layer(self, layer_id: int, q: torch.Tensor, k_cache: torch.Tensor, sm_scale: float | None = None) -> Plan:
        """``plan_of``, the pages that the layer selects written: for who does not attend by ``select_attend``.

        Args:
            layer_id: the layer.
            q: ``[num_tokens, num_qo_heads, head_dim]``.
            k_cache: its K pages, as in ``after_store``.
            sm_scale: factor of its logits; None: 1 / sqrt(head_dim).
        """
        plan, selection = self.plan_of(layer_id), self.selection_of(layer_id)
        if selection is not None:
            scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
            ops.select(q, k_cache, plan.tensors(), selection, sm_scale=scale)
        return plan

    def layer_plans(self) -> list[tuple[Plan, int]]:
        """Each plan of the present batch, and how many layers attend over it (1 where they all do)."""
        return [(self.plan, 1)]

    def _start(self, batch: int, qo_indptr: torch.Tensor | None, num_tokens: int | None) -> int:
        if batch > self.capacity.batch:
            raise ValueError(
                f"batch: expected at most {self.capacity.batch} requests, got {batch}; plan for a larger batch"
            )
        if qo_indptr is None:
            num_tokens = batch
        if num_tokens is None:
            raise ValueError("num_tokens: expected qo_indptr[batch] as an int beside qo_indptr, got None; pass it")
        if num_tokens > self.capacity.tokens:
            raise ValueError(
                f"num_tokens: expected at most {self.capacity.tokens}, got {num_tokens}; plan for more tokens"
            )
        self.plan.batch = batch
        if qo_indptr is not None:
            self.plan.qo_indptr[: batch + 1].copy_(qo_indptr, non_blocking=True)
        elif not self._holds_one_token_each:  # else decode steps follow each other, and nothing is to be written
            self.plan.qo_indptr.copy_(self._one_token_each)
        self._holds_one_token_each = qo_indptr is None
        return num_tokens

    def _make(self, num_tokens: int, *, decode: bool, causal: bool, window_left: int) -> None:
        """Fills ``self.plan`` from its page table. Only whole decode batches are sparse or shared."""
        policy = self.options.policy if decode and window_left < 0 else Policy.EXACT
        self._run_plan(self.plan, policy, num_tokens, decode, causal, window_left)

    def _run_plan(
        self,
        plan: Plan,
        policy: Policy,
        num_tokens: int,
        decode: bool,
        causal: bool,
        window_left: int,
        beside: bool = False,
    ) -> None:
        c, o = plan.capacity, self.options
        plan.cut = decode or o.split_keys > 0 or not c.needs_no_cuts(num_tokens)
        ops.plan(
            plan.tensors(),
            plan.scratch,
            num_tokens=num_tokens,
            num_kv_heads=c.num_kv_heads,
            group=c.group,
            page_size=o.page_size,
            num_pages=c.num_pages,
            rows_per_tile=c.rows_per_tile,
            max_partials=plan.max_partials,
            causal=causal,
            window_left=window_left,
            policy=int(policy),
            sparse=o.sparse_rows(c.pages),
            share=decode and o.share and c.packs,
            pack_keys=c.pack_keys,
            split_keys=o.split_keys if plan.cut else UNCUT,
            beside=beside,
        )
