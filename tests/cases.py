"""Attention problems as data, and the tensors they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """One attention problem.

    Attributes:
        name: what the case is about.
        q_lens, kv_lens: query tokens and keys of each request; the queries are the last tokens of their sequence.
        sm_scale: factor of the logits; None: 1 / sqrt(head_dim).
        shared_pages: full pages at the front that all requests have in common.
        seed: of the values and of the order of the pages.
    """

    name: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    window_left: int = -1
    logits_soft_cap: float = 0.0
    sm_scale: float | None = None
    shared_pages: int = 0
    seed: int = 0

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def decode(self) -> bool:
        return all(n == 1 for n in self.q_lens)

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


@dataclass(frozen=True)
class Problem:
    """The tensors of a case on one device; ``masks`` and the scale are the keyword arguments of the reference."""

    case: Case
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    last_page_len: torch.Tensor

    @property
    def table(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.qo_indptr, self.kv_indptr, self.kv_indices, self.last_page_len

    @property
    def masks(self) -> dict[str, float | None]:
        names = ("causal", "window_left", "logits_soft_cap", "sm_scale")
        return {name: getattr(self.case, name) for name in names}


def indptr(lengths: Sequence[int]) -> torch.Tensor:
    """``[0, l0, l0 + l1, ...]`` int32."""
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int32).cumsum(0).tolist()], dtype=torch.int32)


def make(case: Case, device: torch.device | str = "cpu") -> Problem:
    """Random values; pages in random order, some of the pool unused and full of NaN, which no kernel may read."""
    random = torch.Generator().manual_seed(case.seed)
    columns = [-(-n // case.page_size) for n in case.kv_lens]
    own = [max(n - case.shared_pages, 0) for n in columns]
    num_pages = case.shared_pages + sum(own) + 3
    order = torch.randperm(num_pages, generator=random).to(torch.int32)
    shared, rest = order[: case.shared_pages], list(order[case.shared_pages :].split([*own, 3]))
    tables = [torch.cat([shared[:n], pages]) for n, pages in zip(columns, rest[:-1], strict=True)]

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(case.dtype)

    cache_shape = (num_pages, case.page_size, case.num_kv_heads, case.head_dim)
    k_cache, v_cache = values(*cache_shape), values(*cache_shape)
    for unused in rest[-1].tolist():
        k_cache[unused], v_cache[unused] = torch.nan, torch.nan
    tensors = {
        "q": values(sum(case.q_lens), case.num_heads, case.head_dim),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "qo_indptr": indptr(case.q_lens),
        "kv_indptr": indptr(columns),
        "kv_indices": torch.cat([torch.empty(0, dtype=torch.int32), *tables]),
        "last_page_len": torch.tensor(
            [n - (c - 1) * case.page_size if c else 0 for n, c in zip(case.kv_lens, columns, strict=True)],
            dtype=torch.int32,
        ),
    }
    return Problem(case, **{name: tensor.to(device) for name, tensor in tensors.items()})


def decode(name: str, *kv_lens: int, **fields: object) -> Case:
    return Case(name, (1,) * len(kv_lens), kv_lens, **fields)  # type: ignore[arg-type]


def extend(name: str, *lens: tuple[int, int], **fields: object) -> Case:
    """``lens``: (query tokens, keys) of each request."""
    return Case(name, tuple(q for q, _ in lens), tuple(kv for _, kv in lens), **fields)  # type: ignore[arg-type]


CASES = [
    decode("empty batch"),
    decode("one key", 1),
    decode("no keys", 0, 5, 0),
    decode("only requests without keys", 0, 0),
    decode("around a page", 15, 16, 17),
    decode("around a block", 63, 64, 65, 127, 128, 129),
    decode("ragged", 1, 700, 17, 333, 64, 0, 9, 250),
    decode("long", 3000, 11),
    decode("shared prefix", 70, 64, 65, 200, shared_pages=4),
    decode("shared prefix of many", *range(130, 146), shared_pages=8),
    decode("shared but for one", 5, 150, 149, shared_pages=8),
    *(decode(f"page size {n}", 1, n - 1, n, n + 1, 3 * n + 2, page_size=n) for n in (1, 5, 8, 16, 64, 128)),
    *(decode(f"group {g}", 100, 33, num_heads=2 * g) for g in range(1, 17)),
    *(decode(f"head size {d}", 100, 33, 128, head_dim=d) for d in (64, 96, 128, 256)),
    decode("fp16", 100, 33, dtype=torch.float16),
    decode("multi-query", 100, 33, num_heads=16, num_kv_heads=1),
    decode("window", 400, 100, 65, 64, 3, window_left=64),
    decode("window of the key itself", 400, 3, window_left=0),
    decode("soft cap", 400, 33, logits_soft_cap=2.0),
    *(decode(f"scale, head size {d}", 400, 33, head_dim=d, sm_scale=0.3) for d in (64, 96, 128, 256)),
    decode("scale and soft cap", 400, 33, sm_scale=0.3, logits_soft_cap=2.0),
    extend("prefill", (40, 40), (7, 7), (1, 1)),
    extend("prefill over a cached prefix", (18, 192), (16, 16), (30, 77)),
    extend("mixed with decode", (18, 192), (1, 201), (1, 33), (0, 0), (50, 50)),
    extend("more queries than keys", (8, 3), (2, 0), (4, 4)),
    extend("longer than a tile", (150, 150), (70, 300)),
    extend("not causal", (40, 100), (70, 70), causal=False),
    extend("not causal window", (40, 100), (70, 70), causal=False, window_left=20),
    extend("extend window", (30, 100), (100, 400), (33, 33), window_left=17),
    extend("extend soft cap", (30, 100), (20, 20), logits_soft_cap=2.0),
    *(
        extend(f"extend scale, head size {d}", (30, 100), (20, 20), head_dim=d, sm_scale=0.3)
        for d in (64, 96, 128, 256)
    ),
    extend("extend scale and soft cap", (30, 100), (20, 20), sm_scale=0.3, logits_soft_cap=2.0),
    extend("extend shared prefix", (20, 100), (30, 94), shared_pages=4),
    extend("extend fp16", (30, 100), (20, 20), dtype=torch.float16),
    extend("extend multi-query", (30, 100), num_heads=16, num_kv_heads=1),
    *(extend(f"extend page size {n}", (5, n + 1), (9, 3 * n + 9), page_size=n) for n in (1, 5, 8, 64, 128)),
    *(extend(f"extend group {g}", (30, 70), (3, 65), num_heads=2 * g) for g in (1, 2, 3, 5, 6, 7, 8, 16)),
    *(extend(f"extend head size {d}", (30, 70), (65, 65), head_dim=d) for d in (96, 128, 256)),
]
