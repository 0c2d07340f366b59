"""Page summaries: what stands for the keys of a page when policy topk scores it.

They are never older than the keys they are used for:

- A step of one token a request changes the last page of each request, which is always read and not scored. The op that
  stores a token which fills it writes its summary, before the page can be scored.
- In any other forward that op rewrites the summaries of all pages that its requests hold: whatever the pages held
  before, and whoever wrote their keys.

Where a model stores its keys by itself, the same kernel brings the summaries up to date behind it.

What would change keys between a request's forwards (KV transfers, host caches) is refused when the server starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from flashcore_sglang import ops
from flashcore_sglang.planner.plan import Plan


class SummaryKind(IntEnum):
    """What is kept of each channel; the values of ``enum class SummaryKind`` in csrc/params.h."""

    MEAN_STD = 0
    MIN_MAX = 1
    MEAN = 2

    @property
    def vectors(self) -> int:
        """Vectors of ``head_dim`` numbers for each page and KV head."""
        return 1 if self is SummaryKind.MEAN else 2


class GroupReduction(IntEnum):
    """One score of a KV head's query heads; the values of ``enum class GroupReduction`` in csrc/params.h."""

    MAX = 0
    MEAN = 1
    LOGSUMEXP = 2


@dataclass(frozen=True)
class SummarySpec:
    """The K cache to be summarised, and how.

    Attributes:
        layers: layer ids of this rank, in order.
        head_dim: channels of a head.
        dtype: dtype of the cache.
        max_columns: pages of a request at most.
        dense_layers: layers below this id read everything and have no summaries.
        reuse_layers: of so many layers in a row the first one selects; the others read the same pages.
        kind: what is kept.
        fp8: as float8_e4m3fn instead of ``dtype``; numbers beyond 448 become 448.
    """

    layers: Sequence[int]
    head_dim: int
    dtype: torch.dtype
    max_columns: int
    dense_layers: int = 0
    reuse_layers: int = 1
    kind: SummaryKind = SummaryKind.MEAN_STD
    fp8: bool = False

    @property
    def sparse(self) -> list[int]:
        """Layers that read a part of the pages."""
        return [layer for layer in self.layers if layer >= self.dense_layers]

    @property
    def selecting(self) -> list[int]:
        """Those of them that choose it."""
        return self.sparse[:: self.reuse_layers]

    def num_bytes(self, num_pages: int, num_kv_heads: int) -> int:
        """Memory of the summaries of all layers."""
        size = torch.float8_e4m3fn.itemsize if self.fp8 else self.dtype.itemsize
        return len(self.selecting) * num_pages * num_kv_heads * self.kind.vectors * self.head_dim * size


class Summaries:
    """Those of a KV pool: ``{layer: [num_pages, num_kv_heads, vectors, head_dim]}`` of the layers that select.

    They belong to the pool and not to a planner: every planner over the pool must see what any of them has written.
    """

    def __init__(self, spec: SummarySpec, num_pages: int, num_kv_heads: int, device: torch.device | str) -> None:
        self.spec = spec
        shape = (num_pages, num_kv_heads, spec.kind.vectors, spec.head_dim)
        dtype = torch.float8_e4m3fn if spec.fp8 else spec.dtype
        self.of_layer = {layer: torch.zeros(shape, dtype=dtype, device=device) for layer in spec.selecting}
        self.sparse = frozenset(spec.sparse)

    def update(self, plan: Plan, layer_id: int, k_cache: torch.Tensor, first_page: torch.Tensor | None) -> None:
        """Rewrites the summaries of the batch in ``plan``.

        Args:
            plan: holds the batch's page table.
            layer_id: the layer; one that does not select has none.
            k_cache: its K pages ``[num_pages, page_size, num_kv_heads, head_dim]``.
            first_page: int32 ``[batch]`` page column of each request from which on K changed; None: a step of one token
                each has changed the last one.
        """
        if layer_id in self.of_layer:
            table = self._table(plan)
            ops.summarize(k_cache, *table, first_page, self.of_layer[layer_id], **self._sizes)

    def store(
        self,
        plan: Plan,
        layer_id: int,
        k: torch.Tensor,
        v: torch.Tensor,
        slots: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        first_page: torch.Tensor | None,
    ) -> bool:
        """Stores new tokens and rewrites the summaries, in one launch; False: the layer has none, nothing is done.

        Args:
            k, v: ``[num_tokens, num_kv_heads, head_dim]`` of the batch's tokens.
            slots: int64 ``[num_tokens]`` where they belong.
            plan, layer_id, k_cache, first_page: as in ``update``.
            v_cache: as ``k_cache``.
        """
        if layer_id not in self.of_layer:
            return False
        qo_indptr = None if first_page is None else plan.qo_indptr[: plan.batch + 1]
        caches, table = (k_cache, v_cache), self._table(plan)
        ops.store(k, v, slots, qo_indptr, *caches, *table, first_page, self.of_layer[layer_id], **self._sizes)
        return True

    @property
    def _sizes(self) -> dict[str, int]:
        return {"max_columns": self.spec.max_columns, "summary_kind": int(self.spec.kind)}

    def _table(self, plan: Plan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return plan.kv_indptr[: plan.batch + 1], plan.kv_indices, plan.last_page_len[: plan.batch]
