"""Page summaries and page selection against plain torch, and CUDA against the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from plan_oracle import Batch, check_plan
from test_plan import private

from flashcore_sglang import ops
from flashcore_sglang.planner import Plan, PlannerOptions, Policy, Summaries, SummarySpec, make_planner

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@dataclass(frozen=True)
class Case:
    kv_lens: tuple[int, ...]
    page_size: int = 16
    num_kv_heads: int = 2
    group: int = 4
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    sink_pages: int = 1
    recent_pages: int = 2
    budget_pages: int = 5
    ties: bool = False  # few distinct keys: many pages score alike

    def batch(self) -> Batch:
        return private(
            list(self.kv_lens),
            self.page_size,
            num_kv_heads=self.num_kv_heads,
            group=self.group,
            policy=Policy.TOPK,
            sink_pages=self.sink_pages,
            recent_pages=self.recent_pages,
            budget_pages=self.budget_pages,
        )

    def cache(self, num_pages: int) -> torch.Tensor:
        """K pages with a mean of their own each, as a strided view of an interleaved cache."""
        shape = (num_pages, 2, self.page_size, self.num_kv_heads, self.head_dim)
        values = torch.randn(shape) + 2 * torch.randn(num_pages, 1, 1, self.num_kv_heads, self.head_dim)
        if self.ties:
            values = (torch.arange(num_pages) % 2).view(-1, 1, 1, 1, 1).expand(shape)
        return values.to(self.dtype)[:, 0]

    def query(self, batch: int) -> torch.Tensor:
        return torch.randn(batch, self.num_kv_heads * self.group, self.head_dim).to(self.dtype)


CASES = {
    "bf16": Case((30, 80, 81, 300, 1000)),
    "fp16": Case((300, 95), dtype=torch.float16),
    "head size 64": Case((300, 1000), head_dim=64),
    "head size 96": Case((300, 1000), head_dim=96),
    "head size 256, group 1": Case((300,), head_dim=256, group=1),
    "group 7": Case((500, 1), group=7),
    "page 1": Case((40, 5, 6), page_size=1),
    "page 64, long": Case((8192, 5000), page_size=64, budget_pages=40, recent_pages=8),
    "no sinks": Case((300, 81), sink_pages=0, recent_pages=1, budget_pages=2),
    "ties": Case((700, 333), ties=True),
    "within the budget": Case((80, 1, 0)),
}


def summarize(case: Case, batch: Batch, k_cache: torch.Tensor, plan: Plan, first: list[int] | None) -> torch.Tensor:
    device = k_cache.device
    summaries = torch.full(
        (k_cache.shape[0], 2, case.num_kv_heads, case.head_dim), 7.0, dtype=case.dtype, device=device
    )
    first_page = None if first is None else torch.tensor(first, dtype=torch.int32, device=device)
    columns = max(map(len, batch.tables))
    ops.summarize(k_cache, plan.kv_indptr, plan.kv_indices, plan.last_page_len, first_page, columns, summaries)
    return summaries


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_summaries(name: str, device: str) -> None:
    case = CASES[name]
    batch = case.batch()
    plan = batch.plan(device)
    k_cache = case.cache(batch.num_pages).to(device)
    k_cache[0] = float("nan")  # a page of nobody
    summaries = summarize(case, batch, k_cache, plan, [0] * batch.size).double().cpu()
    half_ulp = torch.finfo(case.dtype).eps / 2
    for table, kv_len in zip(batch.tables, batch.kv_lens, strict=True):
        for column, page in enumerate(table):
            keys = k_cache[page, : min(case.page_size, kv_len - column * case.page_size)].double().cpu()
            # One rounding of the result, and sums of at most 64 terms in fp32 before it.
            allowed = (half_ulp + 64 * 2**-23) * keys.abs().amax(0) + 1e-6
            assert ((summaries[page, 0] - keys.mean(0)).abs() <= allowed).all()
            assert ((summaries[page, 1] - keys.std(0, correction=0)).abs() <= allowed).all()
    untouched = set(range(batch.num_pages)) - {page for table in batch.tables for page in table}
    assert all((summaries[page] == 7).all() for page in untouched)


@pytest.mark.parametrize("device", DEVICES)
def test_summaries_of_changed_pages_only(device: str) -> None:
    case = CASES["bf16"]
    batch = case.batch()
    k_cache = case.cache(batch.num_pages).to(device)
    plan = batch.plan(device)
    everything = summarize(case, batch, k_cache, plan, [0] * batch.size)
    first = [len(table) // 2 for table in batch.tables]
    for changed, begins in ((None, [len(table) - 1 for table in batch.tables]), (first, first)):
        summaries = summarize(case, batch, k_cache, plan, changed)
        for table, begin in zip(batch.tables, begins, strict=True):
            assert (summaries[table[:begin]] == 7).all()
            assert torch.equal(summaries[table[begin:]], everything[table[begin:]])


def select(case: Case, batch: Batch, q: torch.Tensor, summaries: torch.Tensor, std_weight: float) -> torch.Tensor:
    """Page lists [batch, kv_heads, budget] after the plan and select ops on q's device."""
    plan = batch.plan(q.device.type)
    columns = max(map(len, batch.tables))
    scores = torch.full((batch.size * case.num_kv_heads, columns), torch.nan, device=q.device)
    ops.select(
        q,
        summaries,
        plan.tensors(),
        scores,
        page_size=case.page_size,
        max_columns=columns,
        sink_pages=case.sink_pages,
        recent_pages=case.recent_pages,
        budget_pages=case.budget_pages,
        sparse_begin=plan.capacity.pages,
        std_weight=std_weight,
    )
    check_plan(plan, batch)
    lists = plan.kv_indices[plan.capacity.pages :]
    return lists.view(batch.size, case.num_kv_heads, case.budget_pages).cpu()


@pytest.mark.parametrize("std_weight", [0.0, 1.0])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_selection(name: str, device: str, std_weight: float) -> None:
    case = CASES[name]
    batch = case.batch()
    summaries = summarize(case, batch, case.cache(batch.num_pages), batch.plan(), [0] * batch.size)
    q = case.query(batch.size)
    lists = select(case, batch, q.to(device), summaries.to(device), std_weight)
    heads = q.double().view(batch.size, case.num_kv_heads, case.group, case.head_dim)
    for r, table in enumerate(batch.tables):
        if len(table) <= case.budget_pages:
            assert (lists[r] == 0).all(), "a request within the budget has no list"
            continue
        mean, deviation = summaries[table].double().unbind(1)  # [columns, kv_heads, head_dim]
        scores = torch.einsum("hgd,chd->chg", heads[r], mean)
        scores += std_weight * torch.einsum("hgd,chd->chg", heads[r].abs(), deviation)
        # Sums of 2 head_dim products in fp32, in any order.
        terms = torch.einsum("hgd,chd->chg", heads[r].abs(), mean.abs() + std_weight * deviation.abs())
        error = 2 * case.head_dim * 2**-24 * terms.amax(-1)
        scores = scores.amax(-1)
        for h in range(case.num_kv_heads):
            chosen = [table.index(page) for page in lists[r, h].tolist()]
            assert chosen == sorted(set(chosen)), "the order of the sequence, each page once"
            recent = len(table) - case.recent_pages
            assert chosen[: case.sink_pages] == list(range(case.sink_pages))
            assert chosen[len(chosen) - case.recent_pages :] == list(range(recent, len(table)))
            middle = chosen[case.sink_pages : len(chosen) - case.recent_pages]
            left = [c for c in range(case.sink_pages, recent) if c not in middle]
            worst = scores[middle, h] + error[middle, h]
            best = scores[left, h] - error[left, h]
            assert worst.min() >= best.max(), "no page left out scores higher"
            if case.ties:
                by_score = sorted(middle + left, key=lambda c: (-scores[c, h].item(), c))
                assert middle == sorted(by_score[: len(middle)]), "ties go to the lower column"


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_cuda_and_cpu_agree_to_the_bit(name: str) -> None:
    case = CASES[name]
    batch = case.batch()
    k_cache, q = case.cache(batch.num_pages), case.query(batch.size)
    on_gpu = summarize(case, batch, k_cache.cuda(), batch.plan("cuda"), [0] * batch.size)
    on_cpu = summarize(case, batch, k_cache, batch.plan(), [0] * batch.size)
    assert torch.equal(on_gpu.cpu().view(torch.int16), on_cpu.view(torch.int16))
    assert torch.equal(select(case, batch, q.cuda(), on_gpu, 1.0), select(case, batch, q, on_cpu, 1.0))


@pytest.mark.parametrize("device", DEVICES)
def test_planner_selects_behind_its_dense_layers(device: str) -> None:
    case = CASES["bf16"]
    batch = case.batch()
    options = PlannerOptions(
        policy=Policy.TOPK, page_size=16, sink_pages=1, recent_pages=2, budget_pages=5, dense_layers=1
    )
    spec = SummarySpec(range(3), case.head_dim, case.dtype, max_columns=64)
    pool = Summaries(spec, batch.num_pages, case.num_kv_heads, options.dense_layers, device)
    planner = make_planner(options, batch.capacity(), device, pool)
    table = batch.plan(device)
    planner.begin_csr(None, table.kv_indptr, table.kv_indices[: sum(map(len, batch.tables))], table.last_page_len)
    k_cache, q = case.cache(batch.num_pages).to(device), case.query(batch.size).to(device)
    zeros = torch.zeros(batch.size, dtype=torch.int32, device=device)
    for layer in range(3):
        planner.after_store(layer, k_cache, zeros)
    check_plan(planner.for_layer(0, q, k_cache), Batch(batch.tables, batch.kv_lens))
    check_plan(planner.for_layer(1, q, k_cache), batch)
    dense = sum(map(len, batch.tables))
    lists = planner.plan.kv_indices[dense:].view(batch.size, case.num_kv_heads, -1).cpu()
    assert torch.equal(lists, select(case, batch, q, pool.of_layer[1], options.std_weight))
