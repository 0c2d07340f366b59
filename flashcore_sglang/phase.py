"""One kind of batch (decode, or extend): its kernel, and the planners and buffers it works in.

A model mixes layers of different sliding windows, and a plan depends on the window. So a phase holds one planner for
each window, all of one capacity, over one workspace.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from flashcore_sglang import ops
from flashcore_sglang.cublaslt import Matmuls
from flashcore_sglang.kernel import Kernel
from flashcore_sglang.planner import Capacity, Planner, PlannerOptions, Policy, Summaries, make_planner
from flashcore_sglang.variants import Choice
from flashcore_sglang.variants import Phase as PhaseName

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """A forward's requests, as SGLang holds them on the device.

    Attributes:
        req_to_token: int32 ``[requests, context]`` slots of each request's tokens.
        req_pool_indices: int64 ``[batch]`` rows of ``req_to_token``.
        seq_lens: int64 ``[batch]`` keys of each request, the new ones included.
        num_tokens: query tokens of all requests.
        num_pages: at least the pages that the requests hold, all together.
        qo_indptr: int32 ``[batch + 1]`` query tokens of each request; None: one each.
        qo_lens, kv_lens: query tokens and keys of each request, where the host knows them; for variant cublaslt.
    """

    req_to_token: torch.Tensor
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    num_tokens: int
    num_pages: int
    qo_indptr: torch.Tensor | None = None
    qo_lens: Sequence[int] | None = None
    kv_lens: Sequence[int] | None = None

    @property
    def size(self) -> int:
        """Requests."""
        return self.seq_lens.shape[0]


class Phase:
    """Plans batches of one kind.

    Args:
        name: ``decode`` (one query token a request) or ``prefill``.
        choice: the kernel.
        options: of the planners. Policies other than exact are for decode over layers without a window.
        capacity: for the first batches; ``reserve`` grows it.
        head_dim: channels of a head.
        device: of all buffers.
        summaries: for policy topk.
        matmuls: for variant cublaslt.

    Attributes:
        decode: whether every request has one query token.
        kernel: what attends over the plans.
    """

    def __init__(
        self,
        name: PhaseName,
        choice: Choice,
        options: PlannerOptions,
        capacity: Capacity,
        head_dim: int,
        device: torch.device | str,
        summaries: Summaries | None = None,
        matmuls: Matmuls | None = None,
    ) -> None:
        self.decode = name == "decode"
        self._choice = choice
        self._name = name
        self._options = options if self.decode else replace(options, policy=Policy.EXACT, share=False)
        self._head_dim = head_dim
        self._device = device
        self._summaries = summaries
        self._matmuls = matmuls
        self._batch: Batch | None = None
        self._new: ops.NewTokens | None = None  # of the layer that attends next: it stores them
        self._allocate(replace(capacity, share=self._options.share))

    @property
    def num_tokens(self) -> int:
        """Query tokens of the present batch."""
        return 0 if self._batch is None else self._batch.num_tokens

    def reserve(self, batch: Batch) -> None:
        """Grows every buffer that ``batch`` does not fit in, by doubling. Not for a phase that a graph has captured."""
        have = self.capacity
        want = replace(
            have,
            batch=_grown(have.batch, batch.size),
            tokens=_grown(have.tokens, batch.num_tokens),
            pages=_grown(have.pages, batch.num_pages),
        )
        if want != have:
            logger.info(
                "flashcore_sparse: %s buffers grow to %d requests, %d tokens, %d pages",
                self._name,
                want.batch,
                want.tokens,
                want.pages,
            )
            self._allocate(want)

    def begin(self, batch: Batch, windows: Iterable[int]) -> None:
        """Plans ``batch`` in place for layers of each of ``windows`` (keys to the left of a query; -1: all).

        And for those that ``planner`` was asked for in an earlier forward, whose plans would else stay behind.
        """
        self._batch = batch
        if self._matmuls is not None:
            self._matmuls.begin(batch.qo_lens, batch.kv_lens)
        for window in dict.fromkeys((*windows, *self._planners)):
            self._plan(batch, window)

    def planner(self, window: int) -> Planner:
        """The planner for layers of ``window``, which has planned the present batch.

        Raises:
            RuntimeError: a layer of a new window while a CUDA graph is captured: its plan would not be renewed.
        """
        if window not in self._planners:
            if self._batch is None or (self.kernel.partial_o.is_cuda and torch.cuda.is_current_stream_capturing()):
                raise RuntimeError(
                    f"flashcore_sparse: expected the windows {sorted(self._planners)} found in the model, got a layer "
                    f"with window {window} in a captured graph: serve with --disable-cuda-graph"
                )
            self._plan(self._batch, window)
        return self._planners[window]

    def store(
        self,
        window: int,
        layer_id: int,
        k: torch.Tensor,
        v: torch.Tensor,
        slots: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> bool:
        """Stores the new K and V of a layer that has summaries and brings these up to date; False: it has none.

        In a decode step ``attend`` does, for which they must stay as they are.

        Args:
            k, v: ``[tokens, kv_heads, head_dim]``, at least the batch's tokens.
            slots: int64, where each of them belongs in ``k_cache`` and ``v_cache`` ``[pages, page_size, ...]``.
        """
        if self._summaries is None or window >= 0:
            return False
        planner, used = self.planner(window), self.num_tokens
        new = ops.NewTokens(k[:used], v[:used], slots[:used])
        if planner.selection_of(layer_id) is not None:
            self._new = new
            return True
        return self._summaries.store(planner.plan, layer_id, *new, k_cache, v_cache, self._changed_from())

    def after_store(self, window: int, layer_id: int, k_cache: torch.Tensor) -> None:
        """Brings the summaries of a layer up to date whose new K is in ``k_cache`` already."""
        if self._summaries is not None and window < 0:
            self._summaries.update(self.planner(window).plan, layer_id, k_cache, self._changed_from())

    def _changed_from(self) -> torch.Tensor | None:
        """The page column from which on K changed.

        A decode step changes the last page of each request (None). An extend may have been given pages that held other
        keys before, or have got its prefix from the radix cache: all pages of its requests have.
        """
        return None if self.decode or self._batch is None else self._first_pages[: self._batch.size]

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        *,
        layer_id: int,
        window: int,
        sm_scale: float,
        logits_soft_cap: float,
    ) -> None:
        """Causal attention of a layer, as planned. q and out ``[num_tokens, heads, head_dim]``, out is contiguous."""
        planner = self.planner(window)
        plan = planner.plan_of(layer_id)
        new, self._new = self._new, None
        self.kernel.attend(
            plan,
            q,
            k_cache,
            v_cache,
            out,
            sm_scale=sm_scale,
            causal=True,
            window_left=window,
            logits_soft_cap=logits_soft_cap,
            decode=self.decode,
            parts=None if self._matmuls is None else self._matmuls.calls(plan.tensors()),
            selection=planner.selection_of(layer_id),
            new=new,
            early=new is not None,  # a step is planned, and the layers before are over, ahead of what makes K and V
        )

    def _plan(self, batch: Batch, window: int) -> None:
        if window not in self._planners:
            self._planners[window] = self._make_planner(window)
        self._planners[window].begin(
            batch.req_to_token,
            batch.req_pool_indices,
            batch.seq_lens,
            qo_indptr=batch.qo_indptr,
            num_tokens=batch.num_tokens,
            window_left=window,
        )

    def _make_planner(self, window: int) -> Planner:
        options = self._options if window < 0 else replace(self._options, policy=Policy.EXACT)
        lists = options.sparse_pages(self.capacity.batch, self.capacity.num_kv_heads)
        return make_planner(options, replace(self.capacity, sparse_pages=lists), self._device, self._summaries)

    def _allocate(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self._planners: dict[int, Planner] = {}
        self.kernel = Kernel(self._choice, capacity, self._head_dim, self._device)
        self._first_pages = torch.zeros(capacity.batch, dtype=torch.int32, device=self._device)


def _grown(have: int, need: int) -> int:
    while have < need:
        have *= 2
    return have
