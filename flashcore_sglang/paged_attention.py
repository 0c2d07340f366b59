"""`PagedAttention`: plan once, run for every layer, in FlashInfer's conventions, outside of any server."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from flashcore_sglang import config, cublaslt, ops, variants
from flashcore_sglang.kernel import Kernel
from flashcore_sglang.planner import (
    Capacity,
    Planner,
    PlannerOptions,
    Policy,
    Summaries,
    SummaryKind,
    SummarySpec,
    make_planner,
)

MIN_SIZE = 16  # of buffers that grow by doubling


@dataclass(frozen=True)
class _Layout:
    """What the buffers are sized for and a captured run has fixed."""

    num_qo_heads: int
    head_dim: int
    dtype: torch.dtype
    options: PlannerOptions
    capacity: Capacity
    choice: variants.Choice


@dataclass(frozen=True)
class _Settings:
    """What a run passes to the kernel besides tensors."""

    num_tokens: int
    decode: bool
    causal: bool
    sm_scale: float
    window_left: int
    logits_soft_cap: float
    runs: tuple[cublaslt.Run, ...] = ()  # of variant cublaslt, which plans with lengths known to the host


class PagedAttention:
    """Attention of a batch over a paged KV cache.

    ``plan`` lays out the work of a batch; ``run`` computes it, for as many layers as share the page table. Page tables
    are FlashInfer's: CSR on the CPU or on the device (on the CPU they save a wait for the device).

    With ``max_batch``, ``max_tokens`` and ``max_pages`` every buffer is allocated once: a new plan is written in place,
    and a captured ``run`` follows it, for the same number of query tokens. Without them buffers grow.

    Args:
        device: of the tensors; None: CUDA where torch finds it, else the CPU.
        max_batch: requests of a plan at most.
        max_tokens: query tokens of a plan at most.
        max_pages: entries of ``kv_indices`` at most, and pages of the cache.

    Raises:
        ConfigError: the configuration (`FLASHCORE_CONFIG`, `FLASHCORE_<FIELD>`) is wrong.
    """

    def __init__(
        self,
        *,
        device: torch.device | str | None = None,
        max_batch: int | None = None,
        max_tokens: int | None = None,
        max_pages: int | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._config = config.load()
        self._limits = {"max_batch": max_batch, "max_tokens": max_tokens, "max_pages": max_pages}
        self._layout: _Layout | None = None
        self._settings: _Settings | None = None
        self._captured = False
        self._planner: Planner
        self._workspace: cublaslt.Workspace
        self._num_pages = 0

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.bfloat16,
        kv_data_type: torch.dtype | None = None,
        variant: str = "auto",
        policy: str = "exact",
    ) -> None:
        """Lays out the work of a batch.

        Args:
            qo_indptr: int32 ``[batch + 1]`` query tokens of each request, the last ones of its sequence.
            kv_indptr: int32 ``[batch + 1]`` pages of each request.
            kv_indices: int32 page ids, ``kv_indptr[batch]`` of them.
            kv_last_page_len: int32 ``[batch]`` keys in the last page of each request, 1..page_size.
            num_qo_heads, num_kv_heads: heads of q and of the cache.
            head_dim: channels of a head.
            page_size: keys in a page.
            causal: a query token sees keys up to its own position.
            sm_scale: factor of the logits; None: 1 / sqrt(head_dim).
            window_left: keys before its own position that a token sees; negative: all.
            logits_soft_cap: cap * tanh(logit / cap); None or 0: off.
            q_data_type: dtype of q and of the output.
            kv_data_type: dtype of the cache; None: as q.
            variant: a kernel by name, or "auto".
            policy: "exact"; "window" or "topk", which apply to batches of one query token each (sizes in the
                configuration). topk reads the whole K cache of the batch in each run to summarise its pages.

        Raises:
            UnsupportedError: no kernel, or not the chosen one, for these shapes on this device.
            ValueError: an index tensor or a size is wrong or exceeds the capacity, or a captured run cannot follow.
        """
        if kv_data_type not in (None, q_data_type):
            raise ValueError(f"kv_data_type: expected {q_data_type} as q_data_type, got {kv_data_type}; cast the cache")
        if q_data_type not in ops.DTYPES:
            raise ValueError(
                f"q_data_type: expected one of {list(ops.DTYPES)}, got {q_data_type}; cast q and the cache"
            )
        if policy.upper() not in Policy.__members__:
            raise ValueError(f"policy: expected exact, window or topk, got {policy!r}")
        if page_size < 1:
            raise ValueError(f"page_size: expected at least 1, got {page_size}; pass the number of keys in a page")
        batch = _check_shapes(qo_indptr, kv_indptr, kv_indices, kv_last_page_len)
        query_begins, page_begins = qo_indptr.cpu(), kv_indptr.cpu()
        last_page_len = kv_last_page_len.cpu()
        ops.check_indptr("qo_indptr", query_begins)
        ops.check_lengths(page_begins, kv_indices.numel(), last_page_len, page_size)
        decode = bool((query_begins.diff() == 1).all())
        pages = kv_indices[: int(page_begins[-1])]
        low, high = (int(bound) for bound in pages.aminmax()) if pages.numel() else (0, -1)
        if low < 0:
            raise ValueError(f"kv_indices: expected page ids of at least 0, got {low}; rebuild the page table")
        settings = _Settings(
            num_tokens=int(query_begins[-1]),
            decode=decode,
            causal=causal,
            sm_scale=head_dim**-0.5 if sm_scale is None else sm_scale,
            window_left=max(window_left, -1),
            logits_soft_cap=logits_soft_cap or 0.0,
        )
        shape = variants.Shape(
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            page_size=page_size,
            dtype=ops.DTYPES[q_data_type],
            phase="decode" if decode else "prefill",
            batch=batch,
            features=_features(settings),
        )
        layout = self._lay_out(
            shape,
            variant,
            q_data_type,
            Policy[policy.upper()],
            num_tokens=settings.num_tokens,
            pages=pages.numel(),
            num_pages=high + 1,
        )
        if layout.choice.variant.name == "cublaslt" and settings.num_tokens > 0:
            heads = num_qo_heads, num_kv_heads, head_dim
            like = cublaslt.layer_shape(*heads, q_data_type, causal=causal, scores=self._config.cublaslt_scores)
            kv_lens = _kv_lens(page_begins, last_page_len, page_size)
            settings = replace(settings, runs=cublaslt.split(query_begins.diff().tolist(), kv_lens, like))
        if self._captured and (layout, settings) != (self._layout, self._settings):
            raise ValueError(
                "plan: expected the shapes, masks and number of query tokens that a captured run has fixed, got "
                f"{layout}, {settings} after {self._layout}, {self._settings}; use another PagedAttention, with "
                "max_batch, max_tokens and max_pages"
            )
        if layout != self._layout:
            self._allocate(layout)
        for run in settings.runs:
            self._workspace.plan(run.shape)
            self._workspace.plan(run.shape._replace(fp32_scores=True))  # should a run ask for the LSE
        self._settings, self._num_pages = settings, high + 1
        self._planner.begin_csr(
            None if decode else qo_indptr,
            kv_indptr,
            pages,
            kv_last_page_len,
            num_tokens=settings.num_tokens,
            causal=causal,
            window_left=settings.window_left,
        )

    def run(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        *,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention as planned. It allocates nothing and can be captured in a CUDA graph.

        Args:
            q: ``[tokens, num_qo_heads, head_dim]``.
            kv_cache: ``(k_cache, v_cache)`` each ``[pages, page_size, num_kv_heads, head_dim]``, or both in one:
                ``[pages, 2, page_size, num_kv_heads, head_dim]``.
            out: contiguous, like q; None: a buffer of this object, which the next run overwrites.
            lse: fp32 ``[tokens, num_qo_heads]``; None: likewise.
            return_lse: return the LSE too, in base 2.

        Returns:
            ``out``, or ``(out, lse)``. A query that sees no key has out 0 and lse -inf.

        Raises:
            RuntimeError: there is no plan yet, or ``out``, ``lse`` or a stride does not fit it.
            ValueError: q or a cache disagrees with the plan.
        """
        layout, settings = self._layout, self._settings
        if layout is None or settings is None:
            raise RuntimeError("PagedAttention.run: expected a plan, got none; call plan() first")
        k_cache, v_cache = _key_and_value(kv_cache)
        n, capacity = settings.num_tokens, layout.capacity
        self._check("q", q, layout.dtype, (n, layout.num_qo_heads, layout.head_dim))
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            shape = (k_cache.shape[0], capacity.page_size, capacity.num_kv_heads, layout.head_dim)
            self._check(name, cache, layout.dtype, shape)
            if cache.shape[0] < self._num_pages:
                raise ValueError(
                    f"{name}: expected at least the {self._num_pages} pages that the plan's kv_indices name, got "
                    f"{cache.shape[0]}; pass the cache that the page table was made for"
                )
        out = self._out[:n] if out is None else out
        lse = self._lse[:n] if lse is None and return_lse else lse
        self._captured = self._captured or (q.is_cuda and torch.cuda.is_current_stream_capturing())
        if layout.options.policy is Policy.TOPK:
            self._planner.after_store(0, k_cache, self._first_page[: self._planner.plan.batch])
        plan = self._planner.plan_of(0)
        parts = self._workspace.calls(plan.tensors(), settings.runs, lse is not None) if settings.runs else None
        self._kernel.attend(
            plan,
            q,
            k_cache,
            v_cache,
            out,
            lse,
            sm_scale=settings.sm_scale,
            causal=settings.causal,
            window_left=settings.window_left,
            logits_soft_cap=settings.logits_soft_cap,
            decode=settings.decode,
            parts=parts,
            selection=self._planner.selection_of(0),
        )
        if not return_lse:
            return out
        assert lse is not None
        return out, lse

    def _lay_out(
        self,
        shape: variants.Shape,
        variant: str,
        dtype: torch.dtype,
        policy: Policy,
        *,
        num_tokens: int,
        pages: int,
        num_pages: int,
    ) -> _Layout:
        """The kernel for a shape; buffers for so many query tokens, page ids, and pages of the cache."""
        entries = self._size("max_pages", pages, "pages")
        options = replace(PlannerOptions.from_config(self._config, shape.page_size, entries), policy=policy)
        choice = variants.choose(shape, variants.device_of(self.device, self._config.cpu_threads), variant)
        batch = self._size("max_batch", shape.batch, "batch")
        capacity = Capacity(
            batch=batch,
            tokens=self._size("max_tokens", num_tokens, "tokens"),
            pages=entries,
            num_pages=self._size("max_pages", num_pages, "num_pages"),
            num_kv_heads=shape.num_kv_heads,
            group=shape.group,
            sparse_pages=options.sparse_pages(batch, shape.num_kv_heads),
            share=options.share,
            page_size=shape.page_size,
            split_keys=options.split_keys,
            **choice.plan_sizes,
        )
        return _Layout(shape.num_qo_heads, shape.head_dim, dtype, options, capacity, choice)

    def _size(self, limit_name: str, needed: int, field: str) -> int:
        """The capacity for ``needed``: the limit that was given, or what there is, doubled until it is enough."""
        limit = self._limits[limit_name]
        if limit is None:
            size: int = MIN_SIZE if self._layout is None else getattr(self._layout.capacity, field)
            while size < needed:
                size *= 2
            return size
        if needed > limit:
            raise ValueError(
                f"{limit_name}: expected at most {limit}, got {needed}; make a PagedAttention of that size"
            )
        return limit

    def _allocate(self, layout: _Layout) -> None:
        capacity, device = layout.capacity, self.device
        summaries = None
        if layout.options.policy is Policy.TOPK:
            spec = SummarySpec(
                layers=[0],
                head_dim=layout.head_dim,
                dtype=layout.dtype,
                max_columns=capacity.pages,
                kind=SummaryKind[self._config.summary_kind.upper()],
                fp8=self._config.summary_dtype == "fp8",
            )
            summaries = Summaries(spec, capacity.num_pages, capacity.num_kv_heads, device)
        self._planner = make_planner(layout.options, capacity, device, summaries)
        self._first_page = torch.zeros(capacity.batch, dtype=torch.int32, device=device)
        self._kernel = Kernel(layout.choice, capacity, layout.head_dim, device)
        heads = (capacity.tokens, layout.num_qo_heads)
        self._out = torch.empty((*heads, layout.head_dim), dtype=layout.dtype, device=device)
        self._lse = torch.empty(heads, dtype=torch.float32, device=device)
        if layout.choice.variant.name == "cublaslt":
            self._workspace = cublaslt.Workspace(device, self._config.cublaslt_ws_mb)
        self._layout = layout

    def _check(self, name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        for what, expected, got in (
            ("device", self.device, tensor.device),
            ("dtype", dtype, tensor.dtype),
            ("shape", shape, tuple(tensor.shape)),
        ):
            if got != expected:
                raise ValueError(
                    f"{name}: expected {what} {expected} as planned, got {got}; plan for it or pass another"
                )


def _key_and_value(kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The two caches, from one tensor or a pair."""
    if not isinstance(kv_cache, torch.Tensor):
        if len(kv_cache) == 2:
            return kv_cache
        came = f"{len(kv_cache)} tensors"
    elif kv_cache.dim() == 5 and kv_cache.shape[1] == 2:
        k_cache, v_cache = kv_cache.unbind(1)
        return k_cache, v_cache
    else:
        came = f"one of shape {list(kv_cache.shape)}"
    raise ValueError(
        f"kv_cache: expected (k_cache, v_cache) or one tensor [pages, 2, page_size, kv_heads, head_dim], got {came}; "
        "pass a pair"
    )


def _check_shapes(
    qo_indptr: torch.Tensor, kv_indptr: torch.Tensor, kv_indices: torch.Tensor, kv_last_page_len: torch.Tensor
) -> int:
    """The batch size, when the index tensors agree on one."""
    batch = kv_last_page_len.numel()
    tensors = {
        "qo_indptr": (qo_indptr, batch + 1),
        "kv_indptr": (kv_indptr, batch + 1),
        "kv_indices": (kv_indices, kv_indices.numel()),
        "kv_last_page_len": (kv_last_page_len, batch),
    }
    for name, (tensor, size) in tensors.items():
        if tensor.dtype != torch.int32 or tensor.shape != (size,):
            raise ValueError(
                f"{name}: expected int32 [{size}] beside kv_last_page_len [{batch}], got {tensor.dtype} "
                f"{list(tensor.shape)}; rebuild the page table"
            )
    return batch


def _kv_lens(kv_indptr: torch.Tensor, last_page_len: torch.Tensor, page_size: int) -> list[int]:
    """Keys of each request."""
    pages = kv_indptr.diff()
    keys: list[int] = (pages.sub(1).mul(page_size) + last_page_len).where(pages > 0, 0).tolist()
    return keys


def _features(settings: _Settings) -> tuple[str, ...]:
    """Of ``variants.FEATURES``, what the run needs."""
    used = {
        "causal": settings.causal,
        "window_left": settings.window_left >= 0,
        "logits_soft_cap": settings.logits_soft_cap > 0,
        "lse": True,
    }
    return tuple(name for name in variants.FEATURES if used[name])
