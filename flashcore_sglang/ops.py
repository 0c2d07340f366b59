"""Typed functions over ``torch.ops.flashcore``.

Every op fills tensors that the caller owns: none but `cublaslt_plan` allocates or waits for the device, so the others
can be captured in a CUDA graph. They check shapes, dtypes, devices and strides and raise RuntimeError with what was
expected, what came and what to do. What they cannot check without waiting for the device is whether page ids are in
range: see `check_page_table`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from flashcore_sglang._load import load_library

NAMES = ("page_table", "plan", "attend", "summarize", "store", "select", "select_attend")
# of q, k and v, as variants.Shape names them
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@cache
def library() -> Any:
    """``torch.ops.flashcore``, loaded on the first call.

    Raises:
        LibraryError: the compiled library is missing or does not load; the message says what to do.
    """
    load_library()
    for name in NAMES:
        torch.library.register_fake(f"flashcore::{name}", _fills_its_arguments)
    return torch.ops.flashcore


def _fills_its_arguments(*args: object, **kwargs: object) -> None:
    """The fake of every op: nothing is returned, so there is no shape to tell."""


class SparseRows(NamedTuple):
    """What the rows of policies window and topk read, in the order of the ops' arguments.

    Attributes:
        sink_pages, recent_pages: always read, at the start and at the end of a request.
        budget_pages: topk: pages in all; shorter requests are read whole.
        budget_share: topk: 65536ths of a request's pages to read where that is more than ``budget_pages``.
        list_pages: entries of a row's page list.
        begin: where the page lists start in ``kv_indices``.
    """

    sink_pages: int
    recent_pages: int
    budget_pages: int
    budget_share: int
    list_pages: int
    begin: int


class Selection(NamedTuple):
    """How a layer selects its pages, in the order of the ops' arguments.

    Attributes:
        summaries: ``[pages, kv_heads, vectors, head_dim]`` of ``summarize``.
        scores: scratch, fp32, at least ``batch * kv_heads * max_columns``.
        max_columns: bound on the pages of a request.
        summary_kind: what ``summaries`` were made with, a ``SummaryKind``.
        group_reduction: a ``GroupReduction`` of the scores of a KV head's query heads.
        std_weight: of kind mean_std: q.mean + std_weight * |q|.std.
        mass_share: 65536ths of the softmax, as the scores have it, whose pages are enough within the budget (top-p);
            65536: the whole budget is read.
        sparse: what the plan was made with.
    """

    summaries: torch.Tensor
    scores: torch.Tensor
    max_columns: int
    summary_kind: int
    group_reduction: int
    std_weight: float
    mass_share: int
    sparse: SparseRows


class NewTokens(NamedTuple):
    """One new token of each request of a decode step, in the order of the op's arguments.

    Attributes:
        k, v: ``[batch, kv_heads, head_dim]``.
        slots: int64 ``[batch]`` page * page_size + offset of each: the last one of its request.
    """

    k: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor


class CublasLtShape(NamedTuple):
    """Requests as variant cublaslt plans them, in the order of the ops' arguments.

    Attributes:
        batch: requests.
        max_qo_len, max_kv_len: at least the query tokens and keys of the longest ones.
        num_kv_heads, group, head_dim: KV heads, query heads of each, channels.
        fp16: else bf16.
        causal: blocks above the diagonal are left out.
        fp32_scores: S = Q K^T in fp32; else in fp16.
    """

    batch: int
    max_qo_len: int
    max_kv_len: int
    num_kv_heads: int
    group: int
    head_dim: int
    fp16: bool
    causal: bool
    fp32_scores: bool


def page_table(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    page_size: int,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    last_page_len: torch.Tensor,
) -> None:
    """Writes the CSR page table of a batch from SGLang's table of token slots.

    Args:
        req_to_token: int32 ``[requests, context]`` slot of each token; page id = slot // page_size.
        req_pool_indices: int64 ``[batch]`` rows of ``req_to_token``.
        seq_lens: int64 ``[batch]`` keys of each request.
        page_size: keys in a page.
        kv_indptr: out, int32 ``[batch + 1]``.
        kv_indices: out, int32, at least as many as the batch has pages.
        last_page_len: out, int32 ``[batch]``: 1..page_size, 0 for a request without keys.
    """
    library().page_table(req_to_token, req_pool_indices, seq_lens, page_size, kv_indptr, kv_indices, last_page_len)


def plan(
    plan: Sequence[torch.Tensor],
    scratch: torch.Tensor,
    *,
    num_tokens: int,
    num_kv_heads: int,
    group: int,
    page_size: int,
    num_pages: int,
    rows_per_tile: int,
    max_partials: int,
    causal: bool,
    window_left: int,
    policy: int,
    sparse: SparseRows,
    share: bool,
    pack_keys: int = 0,
    split_keys: int,
    beside: bool = False,
) -> None:
    """Writes rows, tiles, CTA ranges and merge lists from the CSR page table in ``plan``.

    Args:
        plan: ``Plan.tensors()``; the batch is ``len(plan[0]) - 1``.
        scratch: int32 ``[Capacity.scratch_size]``, written anew by every plan.
        num_tokens: query tokens of the batch.
        num_kv_heads, group: KV heads, query heads of each.
        page_size, num_pages: keys in a page, pages of the pool.
        rows_per_tile: packed queries of a tile.
        max_partials: rows of the partial buffers that ``attend`` will be given.
        causal, window_left: masks; ``window_left`` in keys, negative: off.
        policy: a ``Policy``.
        sparse: what the rows of policies window and topk read.
        share: pack requests that share pages; topk: find pages that can be scored for several requests at once.
        pack_keys: packed rows save so many keys of a KV head for each query of one, and 48 more, or there are none.
        split_keys: 0, or the fixed length of a tile in keys.
        beside: the launch before is another plan of the same page table; they may be made at the same time.
    """
    library().plan(
        plan,
        scratch,
        num_tokens,
        num_kv_heads,
        group,
        page_size,
        num_pages,
        rows_per_tile,
        max_partials,
        causal,
        window_left,
        policy,
        *sparse,
        share,
        pack_keys,
        split_keys,
        beside,
    )


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: Sequence[torch.Tensor],
    partial_o: torch.Tensor,
    partial_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    rows_per_tile: int,
    sm_scale: float,
    causal: bool,
    window_left: int,
    logits_soft_cap: float,
    decode: bool,
    variant: str,
    workspace: torch.Tensor | None = None,
    max_qo_len: int = 0,
    max_kv_len: int = 0,
    fp32_scores: bool = True,
    free_cuts: bool = False,
) -> None:
    """Attention over a plan, then the merge of its partial results.

    Args:
        q: ``[tokens, heads, head_dim]`` bf16, fp16 or (CPU) fp32, last dimension contiguous.
        k_cache, v_cache: ``[pages, page_size, kv_heads, head_dim]``, dtype of q, last dimension contiguous.
        plan: ``Plan.tensors()`` as the plan op left them.
        partial_o: scratch, fp32 ``[max_partials, head_dim]``; with no rows, for a plan without cuts, nothing is merged.
        partial_lse: scratch, fp32 ``[max_partials]``.
        out: as q, contiguous; zero where a query sees no key.
        lse: fp32 ``[tokens, heads]`` base 2, -inf where a query sees no key; or None.
        rows_per_tile: what the plan was made with.
        sm_scale: factor of the logits.
        causal, window_left: what the plan was made with.
        logits_soft_cap: cap * tanh(logit / cap); 0: off.
        decode: every request has one query token.
        variant: a name of ``variants.VARIANTS``.
        workspace: variant cublaslt: ``cublaslt.Workspace.tensor``, planned for these lengths.
        max_qo_len, max_kv_len: variant cublaslt: query tokens and keys of the longest requests.
        fp32_scores: variant cublaslt: scores in fp32, as an LSE asks for; else in fp16.
        free_cuts: a kernel may cut rows otherwise than into the plan's tiles, see ``Plan.free_cuts``.
    """
    library().attend(
        q,
        k_cache,
        v_cache,
        plan,
        partial_o,
        partial_lse,
        out,
        lse,
        rows_per_tile,
        sm_scale,
        causal,
        window_left,
        logits_soft_cap,
        decode,
        variant,
        workspace,
        max_qo_len,
        max_kv_len,
        fp32_scores,
        free_cuts,
    )


def summarize(
    k_cache: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    last_page_len: torch.Tensor,
    first_page: torch.Tensor | None,
    summaries: torch.Tensor,
    *,
    max_columns: int,
    summary_kind: int,
) -> None:
    """Writes what stands for the keys of each changed page, per KV head and channel.

    Args:
        k_cache: ``[pages, page_size, kv_heads, head_dim]``.
        kv_indptr, kv_indices, last_page_len: the CSR page table of the batch, int32.
        first_page: int32 ``[batch]`` page column of each request from which on pages changed. None: the last one, where
            it is full, as after a step of one token each.
        summaries: out, ``[pages, kv_heads, vectors, head_dim]`` of the dtype of ``k_cache`` or float8_e4m3fn.
        max_columns: bound on the pages of a request.
        summary_kind: a ``SummaryKind``; mean has one vector, the others two.
    """
    library().summarize(k_cache, kv_indptr, kv_indices, last_page_len, first_page, max_columns, summary_kind, summaries)


def store(
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    qo_indptr: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    last_page_len: torch.Tensor,
    first_page: torch.Tensor | None,
    summaries: torch.Tensor,
    *,
    max_columns: int,
    summary_kind: int,
) -> None:
    """Writes new keys and values to their slots and, in the same launch, what `summarize` would behind it.

    Args:
        k, v: ``[tokens, kv_heads, head_dim]`` of the new tokens, the last ones of their requests' sequences.
        slots: int64 ``[tokens]`` page * page_size + offset of each.
        qo_indptr: int32 ``[batch + 1]`` new tokens of each request; None, with ``first_page``: one each.
        k_cache, v_cache: out, ``[pages, page_size, kv_heads, head_dim]``.
        kv_indptr, kv_indices, last_page_len: the CSR page table of the batch, int32, the new tokens included.
        first_page, summaries, max_columns, summary_kind: as in `summarize`. New tokens lie in no page before
            ``first_page``.
    """
    library().store(
        k,
        v,
        slots,
        qo_indptr,
        k_cache,
        v_cache,
        kv_indptr,
        kv_indices,
        last_page_len,
        first_page,
        max_columns,
        summary_kind,
        summaries,
    )


def select(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    plan: Sequence[torch.Tensor],
    selection: Selection,
    *,
    sm_scale: float,
) -> None:
    """Writes the pages that each sparse request and KV head reads into the sparse part of ``kv_indices``.

    The last page of a request is always read, whether it has a summary or not. Where less than the whole softmax mass
    is asked for (``selection.mass_share``), tiles of the plan end where the list of their KV head does, and
    ``Count.PAGES_DROPPED`` grows by what is left out.

    Args:
        q: ``[batch, heads, head_dim]``, one token of each request.
        k_cache: ``[pages, page_size, kv_heads, head_dim]`` with the keys of these tokens.
        plan: ``Plan.tensors()`` of policy topk.
        selection: how; its ``sparse`` is what the plan was made with.
        sm_scale: of the logits, for logsumexp and ``mass_share``.
    """
    summaries, scores, max_columns, kind, reduction, std_weight, mass_share, sparse = selection
    library().select(
        q,
        k_cache,
        plan,
        summaries,
        scores,
        max_columns,
        kind,
        reduction,
        std_weight,
        sm_scale,
        mass_share,
        *sparse,
    )


def select_attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: Sequence[torch.Tensor],
    partial_o: torch.Tensor,
    partial_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    *,
    selection: Selection,
    rows_per_tile: int,
    sm_scale: float,
    logits_soft_cap: float,
    variant: str,
    free_cuts: bool,
    new: NewTokens | None = None,
    early: bool = False,
) -> None:
    """``store``, ``select`` and causal ``attend`` of a decode batch: of one launch where the variant has such a kernel.

    Args:
        q, k_cache, v_cache, plan, partial_o, partial_lse, out, lse, rows_per_tile, sm_scale, logits_soft_cap, variant,
            free_cuts: as in ``attend``.
        selection: as in ``select``.
        new: the step's tokens, which are stored first, as by ``store``; None: they are in the caches.
        early: whether all that this op reads but ``q`` and ``new`` was ready before the launch ahead of it in the
            stream began. It may then begin beside that.
    """
    library().select_attend(
        q,
        k_cache,
        v_cache,
        plan,
        partial_o,
        partial_lse,
        out,
        lse,
        rows_per_tile,
        sm_scale,
        logits_soft_cap,
        variant,
        free_cuts,
        *selection[:-1],
        *selection.sparse,
        *(new or (None, None, None)),
        early,
    )


def cublaslt_workspace(shape: CublasLtShape, matmul_bytes: int) -> int:
    """Bytes of scratch that variant cublaslt needs for a shape, ``matmul_bytes`` of each lane included."""
    return int(library().cublaslt_workspace(*shape, matmul_bytes))


def cublaslt_plan(
    workspace: torch.Tensor, shape: CublasLtShape, matmul_bytes: int, *, known: str, measure: bool
) -> str:
    """Finds an algorithm for each matmul of a shape, before ``attend`` runs it.

    Args:
        workspace: uint8, of at least ``cublaslt_workspace`` bytes.
        shape: of the batch.
        matmul_bytes: what cuBLASLt may use of the workspace in each lane.
        known: ``matmul=algorithm`` lines of earlier calls.
        measure: time the candidates of what is not known, which overwrites the workspace and waits for the device;
            else take the one that cuBLASLt would.

    Returns:
        The lines of this shape that are known or measured.
    """
    return str(library().cublaslt_plan(workspace, *shape, matmul_bytes, known, measure))


def build_info() -> str:
    """What the library holds, as JSON.

    ``cuda``, ``nvcc``, ``archs``, ``cudart``; the version of ``cublaslt`` (0: none); the compiled ``variants``; of
    those that lack something on this machine, what (``missing``).
    """
    return str(library().build_info())


def check_page_table(
    kv_indptr: torch.Tensor, kv_indices: torch.Tensor, last_page_len: torch.Tensor, page_size: int, num_pages: int
) -> None:
    """What ``FLASHCORE_CHECK=1`` adds to a plan: a page table that no kernel would read outside of the pool with.

    It waits for the device.

    Args:
        kv_indptr: ``[batch + 1]`` pages of each request.
        kv_indices: page ids, ``kv_indptr[batch]`` or more.
        last_page_len: ``[batch]`` keys in the last page of each request.
        page_size: keys in a page.
        num_pages: pages of the pool.

    Raises:
        ValueError: with the first wrong entry, what was expected and what to do.
    """
    begins = kv_indptr.cpu()
    check_lengths(begins, kv_indices.numel(), last_page_len.cpu(), page_size)
    pages = kv_indices[: int(begins[-1])].cpu()
    wrong = ((pages < 0) | (pages >= num_pages)).nonzero()
    if wrong.numel():
        at = int(wrong[0])
        raise ValueError(
            f"kv_indices[{at}]: expected a page id in 0..{num_pages - 1}, got {int(pages[at])}; "
            "pass the cache that the page table was made for"
        )


def check_indptr(name: str, indptr: torch.Tensor) -> None:
    """Raises ValueError where ``indptr`` ``[batch + 1]`` on the host does not begin with 0, or falls."""
    if indptr[0] != 0 or bool((indptr.diff() < 0).any()):
        raise ValueError(f"{name}: expected 0, then numbers that never fall, got {indptr.tolist()}; rebuild it")


def check_lengths(kv_indptr: torch.Tensor, num_indices: int, last_page_len: torch.Tensor, page_size: int) -> None:
    """What ``check_page_table`` asks of a page table besides its page ids; the tensors are on the host."""
    check_indptr("kv_indptr", kv_indptr)
    if kv_indptr[-1] > num_indices:
        raise ValueError(
            f"kv_indices: expected at least kv_indptr[-1] = {int(kv_indptr[-1])} page ids, got {num_indices}; "
            "rebuild it"
        )
    # A request without pages has no keys, however it spells the length of its last page.
    wrong = ((kv_indptr.diff() > 0) & ((last_page_len < 1) | (last_page_len > page_size))).nonzero()
    if wrong.numel():
        at = int(wrong[0])
        raise ValueError(
            f"last_page_len[{at}]: expected 1..{page_size} keys, got {int(last_page_len[at])}; rebuild the table"
        )
