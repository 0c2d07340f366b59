"""A second of numbers: small paged attention through the package, against the same attention in fp64."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flashcore_sglang.paged_attention import PagedAttention
from flashcore_sglang.planner.plan import Count

HEADS, KV_HEADS, HEAD_DIM, PAGE = 8, 2, 64, 16
SHARED_PAGES, POOL_PAGES = 256, 264  # 4096 shared keys: enough for packing to pay


@dataclass(frozen=True)
class Result:
    """One case on one device.

    Attributes:
        variant: the kernel that ran.
        error, bound: largest difference to fp64, and twice that of plain attention in the case's own dtype.
        ms: wall time of plan and run.
        pages_read, pages_dense: what one KV head read, and what reading each request by itself would read; 0 where
            sharing does not apply.
    """

    name: str
    variant: str
    error: float
    bound: float
    ms: float
    pages_read: int = 0
    pages_dense: int = 0


@dataclass(frozen=True)
class Batch:
    """A batch over one pool of pages: query tokens of each request, and its pages and keys."""

    name: str
    queries: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]
    keys: tuple[int, ...]


def batches() -> tuple[Batch, ...]:
    """Requests over a common prefix with private tails, decoding; and two prefills, one over a cached prefix."""
    shared = tuple(range(SHARED_PAGES))
    tails = range(POOL_PAGES - SHARED_PAGES)
    return (
        Batch(
            "decode",
            queries=(1,) * len(tails),
            pages=tuple((*shared, SHARED_PAGES + r) for r in tails),
            keys=tuple(SHARED_PAGES * PAGE + 1 + r for r in tails),
        ),
        Batch("prefill", (33, 20), ((7, 3, 11), (2, 9, 5, 4)), (33, 57)),
    )


def run(device: str) -> Iterator[Result]:
    """Runs each batch on ``device``: fp32 on a CPU, bf16 on a GPU."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(POOL_PAGES, PAGE, KV_HEADS, HEAD_DIM, generator=generator).to(dtype) for _ in range(2))
    attention = PagedAttention(device=device)
    for batch in batches():
        q = torch.randn(sum(batch.queries), HEADS, HEAD_DIM, generator=generator).to(dtype)
        on_device = [x.to(device) for x in (q, k, v)]
        start = time.perf_counter()
        attention.plan(
            _indptr(batch.queries),
            _indptr([len(pages) for pages in batch.pages]),
            torch.tensor([page for pages in batch.pages for page in pages], dtype=torch.int32),
            torch.tensor([(keys - 1) % PAGE + 1 for keys in batch.keys], dtype=torch.int32),
            HEADS,
            KV_HEADS,
            HEAD_DIM,
            PAGE,
            causal=True,
            q_data_type=dtype,
        )
        out = torch.empty_like(on_device[0])
        attention.run(on_device[0], (on_device[1], on_device[2]), out=out)
        out = out.cpu().double()
        ms = 1e3 * (time.perf_counter() - start)
        exact = plain(batch, q.double(), k.double(), v.double())
        rounded = plain(batch, q, k, v).double()
        layout, counts = attention._layout, attention._planner.plan.counts.tolist()
        assert layout is not None  # a plan was made
        shares = batch.name == "decode" and layout.options.share
        yield Result(
            name=batch.name,
            variant=layout.choice.variant.name,
            error=float((out - exact).abs().nan_to_num(torch.inf).max()),
            bound=2 * float((rounded - exact).abs().max()),
            ms=ms,
            pages_read=counts[Count.PAGES_READ] if shares else 0,
            pages_dense=counts[Count.PAGES_DENSE] if shares else 0,
        )


def plain(batch: Batch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of one request after the other in the dtype of the inputs; ``[tokens, heads, head_dim]``."""
    group = HEADS // KV_HEADS
    outs = []
    for queries, pages, keys, q_request in zip(
        batch.queries, batch.pages, batch.keys, q.split(batch.queries), strict=True
    ):
        k_request, v_request = (
            x[list(pages)].flatten(0, 1)[:keys].repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v)
        )
        logits = q_request.transpose(0, 1) @ k_request.transpose(1, 2) * HEAD_DIM**-0.5
        position = torch.arange(keys - queries, keys)
        logits = logits.masked_fill(torch.arange(keys) > position[:, None], -torch.inf)
        outs.append((logits.softmax(-1) @ v_request).transpose(0, 1))
    return torch.cat(outs)


def _indptr(lengths: tuple[int, ...] | list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
