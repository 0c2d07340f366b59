"""Random decode batches of requests that share pages, and attention over their plans against the truth.

A batch is drawn from a seed alone. Prefixes are short and their requests many, so that packing pays in small tensors;
tables are then changed at random, because plans have to be right for those that are no prefix tree, too.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from random import Random

import torch
from plan_oracle import Batch, check_plan

from flashcore_sglang.planner import Count

POOL_KEYS = 2048  # unique keys of a batch, about


@dataclass(frozen=True)
class Attended:
    """A batch, and the size of the heads that attend over it."""

    batch: Batch
    head_dim: int


def draw(seed: int, rows_per_tile: tuple[int, ...] = (16, 32, 64, 128)) -> Attended:
    """The case of a seed; ``rows_per_tile`` are the tiles to choose from."""
    rng = Random(seed)
    page_size = rng.choice([1, 5, 16, 16, 32, 64, 64])
    num_kv_heads = rng.choice([1, 2, 4, 8, 8])
    requests = rng.choice([2, 5, 9] if page_size < 16 else [5, 9, 14] if page_size > 16 else [5, 9, 14, 40])
    # Below, at and above what makes the planner pack (kStartKeys in csrc/plan/share.h).
    prefix_keys = min(rng.uniform(0.7, 1.8) * 24576 / num_kv_heads / requests, POOL_KEYS / 2)
    tables: list[list[int]] = []
    kv_lens: list[int] = []
    pages = 0

    def take(count: int) -> list[int]:
        nonlocal pages
        pages += count
        return list(range(pages - count, pages))

    def grow(prefix: list[int], depth: int, members: int) -> None:
        """``members`` requests behind a prefix, in branches of their own as long as there is depth left."""
        prefix = prefix + take(round(rng.uniform(0.5, 1) * prefix_keys / page_size))
        while depth and members > 1:
            branch = rng.randrange(1, members + 1)
            members -= branch
            grow(prefix, depth - 1, branch)
        for _ in range(members):
            tables.append(prefix + take(rng.choice([0, 0, 1] if page_size > 16 else [0, 1, 1, 2])))
            # A request may end anywhere, in the shared part as well; mostly in its last page.
            end = len(tables[-1]) * page_size
            short = rng.randrange(end + 1) if rng.random() < 0.1 else rng.randrange(page_size)
            kv_lens.append(max(end - short, 0))

    grow([], rng.randrange(3), requests)
    if rng.random() < 0.3:
        for _ in range(rng.randrange(1, 6)):
            if table := rng.choice(tables):
                table[rng.randrange(len(table))] = rng.randrange(pages)
    ids = rng.sample(range(pages + 1), pages)
    order = rng.sample(range(requests), requests)
    tile = rng.choice(rows_per_tile)
    batch = Batch(
        [[ids[page] for page in tables[r][: -(-kv_lens[r] // page_size)]] for r in order],
        [kv_lens[r] for r in order],
        page_size=page_size,
        num_kv_heads=num_kv_heads,
        group=rng.choice([1, 1, 1, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8]),
        rows_per_tile=tile,
        num_ctas=rng.choice([1, 7, 20]),
    )
    return Attended(batch, rng.choice([64, 64, 64, 64, 96, 128]))


@functools.cache
def values(device: str, tensor: int) -> torch.Tensor:
    """Random numbers for every q (0), K (1) and V (2) there can be; bf16, 1-D."""
    generator = torch.Generator().manual_seed(tensor)
    return torch.randn(4 * POOL_KEYS * 8 * 128, generator=generator).bfloat16().to(device)


def tensors(case: Attended, device: str) -> list[torch.Tensor]:
    """q ``[batch, heads, head_dim]`` and K, V ``[pages, page_size, kv_heads, head_dim]``."""
    b = case.batch
    cache = (b.num_pages, b.page_size, b.num_kv_heads, case.head_dim)
    shapes = [(b.size, b.num_kv_heads * b.group, case.head_dim), cache, cache]
    return [values(device, i)[: torch.Size(shape).numel()].view(shape) for i, shape in enumerate(shapes)]


def truth(case: Attended, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, the sum of p |v|, and the LSE in base 2: of all queries over all pages at once, in fp32.

    A decoded token sees each of its keys, in whatever order: all that a table says is how often it holds a key.
    """
    b, dim = case.batch, case.head_dim
    q, k, v = (tensor.float() for tensor in tensors(case, device))
    times = torch.zeros(b.size, b.num_pages, b.page_size)
    for r, (table, length) in enumerate(zip(b.tables, b.kv_lens, strict=True)):
        full, last = divmod(length, b.page_size)
        times[r].index_put_((torch.tensor(table[:full], dtype=torch.long),), torch.ones(()), accumulate=True)
        if last:
            times[r, table[full], :last] += 1
    heads_first = q.view(b.size, b.num_kv_heads, b.group * dim).transpose(0, 1).reshape(b.num_kv_heads, -1, dim)
    p = torch.bmm(heads_first, k.flatten(0, 1).permute(1, 2, 0))  # [kv_heads, batch x group, keys of the pool]
    p *= dim**-0.5
    largest = p.amax(-1, keepdim=True)
    p.sub_(largest).exp_()
    p.view(b.num_kv_heads, b.size, b.group, -1).mul_(times.view(b.size, 1, -1).to(device))
    total = p.sum(-1, keepdim=True)
    both = torch.bmm(p, torch.cat([v, v.abs()], -1).flatten(0, 1).transpose(0, 1)) / total.clamp(min=2**-100)
    out, spread = both.view(b.num_kv_heads, b.size, -1, 2 * dim).transpose(0, 1).reshape(*q.shape[:2], -1).chunk(2, -1)
    lse = (largest + total.log()) / math.log(2)
    return out, spread, lse.view(b.num_kv_heads, b.size, -1).transpose(0, 1).reshape(q.shape[:2])


def check(case: Attended, variant: str, device: str) -> bool:
    """Raises AssertionError where the plan breaks a law or attention over it is wrong; whether rows were packed."""
    plan = case.batch.plan(device)
    check_plan(plan, case.batch)
    out, lse = case.batch.attend(plan, *tensors(case, device), variant)
    expected, spread, expected_lse = truth(case, device)
    # P and out are rounded to bf16, by 2^-8 of them at most; the rest is fp32.
    wrong = (out.float() - expected).abs() > (2**-7 + 2**-14) * spread
    assert not wrong.any(), f"out differs from the truth, or is NaN, at {wrong.nonzero()[:4].tolist()}"
    assert not out.isnan().any(), f"out is not written at {out.isnan().nonzero()[:4].tolist()}"
    torch.testing.assert_close(lse, expected_lse, rtol=2**-16, atol=2**-16 * case.head_dim**0.5)
    return bool(plan.counts[Count.ROWS_PACKED])
