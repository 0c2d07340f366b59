"""Page summaries and page selection against plain torch, and CUDA against the CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from plan_oracle import Batch, check_plan, pages_listed
from test_plan import private

from flashcore_sglang import ops
from flashcore_sglang.planner import (
    Count,
    GroupReduction,
    Plan,
    PlannerOptions,
    Policy,
    Summaries,
    SummaryKind,
    SummarySpec,
    make_planner,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FP8 = torch.float8_e4m3fn


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
    budget_share: int = 0
    kind: SummaryKind = SummaryKind.MEAN_STD
    fp8: bool = False
    reduction: GroupReduction = GroupReduction.MAX
    std_weight: float = 1.0
    ties: bool = False  # few distinct keys: many pages score alike

    @property
    def summary_dtype(self) -> torch.dtype:
        return FP8 if self.fp8 else self.dtype

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
            budget_share=self.budget_share,
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
    "means alone": Case((30, 80, 81, 300, 1000), std_weight=0.0),
    "min and max": Case((30, 80, 81, 300, 1000), kind=SummaryKind.MIN_MAX),
    "one mean": Case((30, 80, 81, 300, 1000), kind=SummaryKind.MEAN),
    "fp8": Case((30, 80, 81, 300, 1000), fp8=True),
    "fp8 of fp16, min and max": Case((300, 95), dtype=torch.float16, fp8=True, kind=SummaryKind.MIN_MAX),
    "fp8, one mean, head size 64": Case((900,), fp8=True, kind=SummaryKind.MEAN, head_dim=64),
    "mean of the group": Case((300, 1000), reduction=GroupReduction.MEAN),
    "logsumexp of the group": Case((300, 1000), reduction=GroupReduction.LOGSUMEXP),
    "head size 64": Case((300, 1000), head_dim=64),
    "head size 96": Case((300, 1000), head_dim=96),
    "head size 256, group 1": Case((300,), head_dim=256, group=1),
    "head size 256, group 8": Case((300,), head_dim=256, group=8),
    "head size 256, one mean": Case((700,), head_dim=256, kind=SummaryKind.MEAN),
    "group 7": Case((500, 1), group=7),
    "group 12, logsumexp": Case((500, 1), group=12, reduction=GroupReduction.LOGSUMEXP),
    "page 1": Case((40, 5, 6), page_size=1),
    "page 64, long": Case((8192, 5000), page_size=64, budget_pages=40, recent_pages=8),
    "one KV head, more pages than are staged": Case((70000,), num_kv_heads=1, budget_pages=700, recent_pages=8),
    "a third of the context": Case((500, 8000, 95, 3000), budget_share=65536 // 3),
    "many requests": Case(tuple(40 + 37 * i % 500 for i in range(70)), num_kv_heads=1, head_dim=64),
    "no sinks": Case((300, 81), sink_pages=0, recent_pages=1, budget_pages=2),
    "ties": Case((700, 333), ties=True),
    "within the budget": Case((80, 1, 0)),
}


def summarize(case: Case, batch: Batch, k_cache: torch.Tensor, plan: Plan, first: list[int]) -> torch.Tensor:
    shape = (k_cache.shape[0], case.num_kv_heads, case.kind.vectors, case.head_dim)
    summaries = torch.full(shape, 7.0, dtype=case.dtype, device=k_cache.device).to(case.summary_dtype)
    first_page = torch.tensor(first, dtype=torch.int32, device=k_cache.device)
    columns = max(map(len, batch.tables))
    table = plan.kv_indptr, plan.kv_indices, plan.last_page_len
    ops.summarize(k_cache, *table, first_page, summaries, max_columns=columns, summary_kind=int(case.kind))
    return summaries


def expected_summary(kind: SummaryKind, keys: torch.Tensor) -> torch.Tensor:
    """``[kv_heads, vectors, head_dim]`` of ``[tokens, kv_heads, head_dim]``."""
    vectors = {
        SummaryKind.MEAN_STD: lambda: (keys.mean(0), keys.std(0, correction=0)),
        SummaryKind.MIN_MAX: lambda: (keys.amin(0), keys.amax(0)),
        SummaryKind.MEAN: lambda: (keys.mean(0),),
    }[kind]()
    return torch.stack(vectors, 1)


def allowed_error(case: Case, keys: torch.Tensor) -> torch.Tensor:
    """One rounding of the result, and sums of at most 64 terms in fp32 before it."""
    rounding = torch.finfo(case.summary_dtype).eps / 2
    largest = keys.abs().amax(0)[:, None]
    return (rounding + 64 * 2**-23) * largest + (2**-10 if case.fp8 else 1e-6)  # e4m3 has no steps below 2^-9


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_summaries(name: str, device: str) -> None:
    case = CASES[name]
    batch = case.batch()
    plan = batch.plan(device)
    k_cache = case.cache(batch.num_pages).to(device)
    k_cache[0] = float("nan")  # a page of nobody
    summaries = summarize(case, batch, k_cache, plan, [0] * batch.size).double().cpu()
    for table, kv_len in zip(batch.tables, batch.kv_lens, strict=True):
        for column, page in enumerate(table):
            keys = k_cache[page, : min(case.page_size, kv_len - column * case.page_size)].double().cpu()
            error = (summaries[page] - expected_summary(case.kind, keys)).abs()
            assert (error <= allowed_error(case, keys)).all(), f"column {column} of {kv_len} keys"
    untouched = set(range(batch.num_pages)) - {page for table in batch.tables for page in table}
    assert all((summaries[page] == 7).all() for page in untouched)


def test_summaries_take_what_the_readme_says_of_the_kv_cache() -> None:
    pages, heads, dim = 1000, 8, 128
    kv_bytes = 2 * pages * 64 * heads * dim * 2
    spec = SummarySpec([0], dim, torch.bfloat16, 1000)
    assert spec.num_bytes(pages, heads) <= 0.016 * kv_bytes
    assert replace(spec, fp8=True).num_bytes(pages, heads) <= 0.008 * kv_bytes
    of_layer = Summaries(spec, pages, heads, "cpu").of_layer
    assert sum(tensor.nbytes for tensor in of_layer.values()) == spec.num_bytes(pages, heads)


@pytest.mark.parametrize("device", DEVICES)
def test_fp8_summaries_end_at_the_largest_value(device: str) -> None:
    case = Case((32,), fp8=True, kind=SummaryKind.MIN_MAX)
    batch = case.batch()
    k_cache = case.cache(batch.num_pages) * 1000
    summaries = summarize(case, batch, k_cache.to(device), batch.plan(device), [0]).float().cpu()
    for page in batch.tables[0]:
        expected = expected_summary(case.kind, k_cache[page].float()).clamp(-448, 448)
        assert torch.equal(summaries[page], expected.to(FP8).float())
    assert (summaries.abs() == 448).any()


@pytest.mark.parametrize("device", DEVICES)
def test_summaries_of_changed_pages_only(device: str) -> None:
    case = CASES["bf16"]
    batch = case.batch()
    k_cache = case.cache(batch.num_pages).to(device)
    plan = batch.plan(device)
    everything = summarize(case, batch, k_cache, plan, [0] * batch.size)
    begins = [len(table) // 2 for table in batch.tables]
    summaries = summarize(case, batch, k_cache, plan, begins)
    for table, begin in zip(batch.tables, begins, strict=True):
        assert (summaries[table[:begin]] == 7).all()
        assert torch.equal(summaries[table[begin:]], everything[table[begin:]])


def run_select(
    case: Case,
    plan: Plan,
    batch: Batch,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    summaries: torch.Tensor,
    mass_share: int = 65536,
    columns: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Page lists [batch, kv_heads, list_pages] and scores [batch, kv_heads, columns] after the select op on a plan."""
    columns = columns or max(map(len, batch.tables))
    scores = torch.full((batch.size * case.num_kv_heads, columns), torch.nan, device=q.device)
    selection = ops.Selection(
        summaries,
        scores,
        max_columns=columns,
        summary_kind=int(case.kind),
        group_reduction=int(case.reduction),
        std_weight=case.std_weight,
        mass_share=mass_share,
        sparse=batch.sparse_rows(plan.capacity.pages),
    )
    ops.select(q, k_cache, plan.tensors(), selection, sm_scale=case.head_dim**-0.5)
    lists = plan.kv_indices[plan.capacity.pages :].view(batch.size, case.num_kv_heads, batch.list_pages)
    return lists.cpu(), scores.view(batch.size, case.num_kv_heads, columns).cpu()


def many_columns(batch: Batch, device: str) -> int:
    """As many as a captured graph may have room for: CUDA then scores by the kernel for batches that fill a GPU."""
    columns = max(map(len, batch.tables))
    if device == "cpu":
        return columns
    one_unit_each = 4 * 4 * torch.cuda.get_device_properties(device).multi_processor_count  # csrc/summary/score.cuh
    return max(columns, 16 * (one_unit_each // (batch.size * batch.num_kv_heads) + 1))


def select(case: Case, batch: Batch, q: torch.Tensor, k_cache: torch.Tensor, summaries: torch.Tensor) -> torch.Tensor:
    """Page lists after the plan and select ops on q's device."""
    plan = batch.plan(q.device.type)
    lists, _ = run_select(case, plan, batch, q, k_cache, summaries)
    check_plan(plan, batch)
    return lists


def head_scores(case: Case, q: torch.Tensor, summaries: torch.Tensor) -> torch.Tensor:
    """``[columns, kv_heads, group]`` of ``q [kv_heads, group, head_dim]`` by ``[columns, kv_heads, vectors, dim]``."""
    first, second = summaries[:, :, 0], summaries[:, :, -1]
    a, b, weight = {
        SummaryKind.MEAN_STD: (q, q.abs(), case.std_weight),
        SummaryKind.MIN_MAX: (q.clamp(max=0), q.clamp(min=0), 1.0),
        SummaryKind.MEAN: (q, q, 0.0),
    }[case.kind]
    return torch.einsum("hgd,chd->chg", a, first) + weight * torch.einsum("hgd,chd->chg", b, second)


def reduced(case: Case, scores: torch.Tensor) -> torch.Tensor:
    """A score for each page, up to what all of them share."""
    if case.reduction is GroupReduction.LOGSUMEXP:
        return (scores * case.head_dim**-0.5).logsumexp(-1)
    return scores.amax(-1) if case.reduction is GroupReduction.MAX else scores.sum(-1)


def score_error(case: Case, q: torch.Tensor, summaries: torch.Tensor, device: str) -> torch.Tensor:
    """How far a score may lie from the one in fp64: ``[columns, kv_heads]``; arguments as of ``head_scores``.

    Sums of 2 head_dim products in fp32, in any order, each of them rounded (CPU) or cut off (tensor cores), and 1e-6
    for each step of the logarithm's approximation.
    """
    terms = head_scores(case, q.abs(), summaries.abs()) + head_scores(case, -q.abs(), -summaries.abs())
    unit = 2**-24 if device == "cpu" else 2**-23
    return 2 * case.head_dim * unit * terms.sum(-1) + 1e-6 * case.group


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_selection(name: str, device: str) -> None:
    case = CASES[name]
    batch = case.batch()
    k_cache = case.cache(batch.num_pages)
    summaries = summarize(case, batch, k_cache, batch.plan(), [0] * batch.size)
    q = case.query(batch.size)
    lists = select(case, batch, q.to(device), k_cache.to(device), summaries.to(device))
    heads = q.double().view(batch.size, case.num_kv_heads, case.group, case.head_dim)
    for r, table in enumerate(batch.tables):
        budget = batch.sparse(r)
        if not budget:
            assert (lists[r] == 0).all(), "a request within the budget has no list"
            continue
        of_pages = summaries[table].double()
        scores = reduced(case, head_scores(case, heads[r], of_pages))
        error = score_error(case, heads[r], of_pages, device)
        for h in range(case.num_kv_heads):
            chosen = [table.index(page) for page in lists[r, h, :budget].tolist()]
            assert chosen == sorted(set(chosen)), "the order of the sequence, each page once"
            recent = len(table) - case.recent_pages
            assert chosen[: case.sink_pages] == list(range(case.sink_pages))
            assert chosen[len(chosen) - case.recent_pages :] == list(range(recent, len(table)))
            middle = chosen[case.sink_pages : len(chosen) - case.recent_pages]
            left = [c for c in range(case.sink_pages, recent) if c not in set(middle)]
            worst = scores[middle, h] + error[middle, h]
            best = scores[left, h] - error[left, h]
            assert worst.min() >= best.max(), "no page left out scores higher"
            if case.ties:
                first = by_score(scores[case.sink_pages : recent, h])[: len(middle)]
                assert middle == sorted(case.sink_pages + c for c in first), "ties go to the lower column"


def by_score(scores: torch.Tensor) -> list[int]:
    """Indices of the scores, the best first; ties go to the lower one."""
    return sorted(range(len(scores)), key=lambda c: (-scores[c].item(), c))


def listed_pages(case: Case, table: list[int], chosen: list[int]) -> list[int]:
    """The list of a KV head that has chosen these columns, counted from the sinks: in the order of the sequence."""
    recent = range(len(table) - case.recent_pages, len(table))
    columns = [*range(case.sink_pages), *sorted(case.sink_pages + c for c in chosen), *recent]
    return [table[c] for c in columns]


def dot_in_order(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sums over the last dimension in the order that csrc/summary/rules.h defines."""
    a, b = (x.unflatten(-1, (-1, 8)) for x in (a, b))
    sums = torch.zeros(torch.broadcast_shapes(a.shape, b.shape)[:-1])
    for channel in range(8):
        sums = sums + a[..., channel] * b[..., channel]
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


@pytest.mark.parametrize("reduction", [GroupReduction.MAX, GroupReduction.MEAN])
@pytest.mark.parametrize("kind", list(SummaryKind))
def test_fp32_selections_are_plain_torch_to_the_bit(kind: SummaryKind, reduction: GroupReduction) -> None:
    case = Case((5000, 900), dtype=torch.float32, kind=kind, reduction=reduction, budget_pages=40, std_weight=0.7)
    batch = case.batch()
    k_cache, q = case.cache(batch.num_pages), case.query(batch.size)
    summaries = summarize(case, batch, k_cache, batch.plan(), [0] * batch.size)
    lists = select(case, batch, q, k_cache, summaries)
    heads = q.view(batch.size, case.num_kv_heads, case.group, case.head_dim)
    for r, table in enumerate(batch.tables):
        first, second = summaries[table][:, :, None, 0], summaries[table][:, :, None, -1]
        a, b, weight = {
            SummaryKind.MEAN_STD: (heads[r], heads[r].abs(), torch.tensor(0.7)),
            SummaryKind.MIN_MAX: (heads[r].clamp(max=0), heads[r].clamp(min=0), torch.tensor(1.0)),
            SummaryKind.MEAN: (heads[r], heads[r], None),
        }[kind]
        scores = dot_in_order(a, first)
        if weight is not None:
            scores = scores + weight * dot_in_order(b, second)
        score = scores[..., 0]
        for g in range(1, case.group):
            score = torch.maximum(score, scores[..., g]) if reduction is GroupReduction.MAX else score + scores[..., g]
        recent = len(table) - case.recent_pages
        for h in range(case.num_kv_heads):
            best = by_score(score[case.sink_pages : recent, h])[: case.budget_pages - 3]
            assert lists[r, h].tolist() == listed_pages(case, table, best)


def masses(case: Case, scores: torch.Tensor) -> torch.Tensor:
    """int64 masses of the scores of one KV head's pages, in the fp32 arithmetic of csrc/summary/rules.h."""
    log2e, sm_scale = torch.tensor(1.44269504), torch.tensor(case.head_dim**-0.5)
    scale = {
        GroupReduction.MAX: sm_scale * log2e,
        GroupReduction.MEAN: sm_scale * log2e / case.group,
        GroupReduction.LOGSUMEXP: log2e,
    }[case.reduction]
    t = (scores.max() - scores) * scale
    whole = t.clamp(max=31).int()
    power = torch.tensor(-9.4755366e-4)
    for coefficient in (9.2108757e-3, -5.5299606e-2, 0.24017949, -0.69314322, 1.0):
        power = power * (t - whole) + torch.tensor(coefficient)
    bits = 30 - len(scores).bit_length()
    return torch.where(t < 31, (torch.ldexp(power, bits - whole)).long(), 0).clamp(min=1)


TOP_P = ["bf16", "fp16", "mean of the group", "logsumexp of the group", "group 12, logsumexp", "ties", "no sinks"]
TOP_P += ["page 64, long", "one KV head, more pages than are staged", "a third of the context", "fp8", "many requests"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TOP_P)
def test_top_p_reads_the_fewest_of_the_best_pages_that_have_the_mass(name: str, device: str) -> None:
    case = CASES[name]
    batch = case.batch()
    k_cache, q = case.cache(batch.num_pages), case.query(batch.size)
    summaries = summarize(case, batch, k_cache, batch.plan(), [0] * batch.size).to(device)
    whole = select(case, batch, q.to(device), k_cache.to(device), summaries)
    plan = batch.plan(device)
    dropped = 0
    for share in (1, 20000, 62259, 30000, 65535, 65536):  # the same plan: tiles grow again, too
        lists, scores = run_select(case, plan, batch, q.to(device), k_cache.to(device), summaries, share)
        for r, table in enumerate(batch.tables):
            budget = batch.sparse(r)
            if not budget:
                continue
            recent = len(table) - case.recent_pages
            room = budget - case.sink_pages - case.recent_pages
            if share == 65536:
                assert torch.equal(lists[r, :, :budget], whole[r, :, :budget])
                continue
            for h, listed in enumerate(pages_listed(plan, r, batch.kv_lens[r])):
                mass = masses(case, scores[r, h, case.sink_pages : recent])
                enough = -(-int(mass.sum()) * share // 65536)
                best = by_score(scores[r, h, case.sink_pages : recent])
                count = 0
                while count < room and sum(mass[best[:count]].tolist()) < enough:
                    count += 1
                pages = listed_pages(case, table, best[:count])
                assert listed == len(pages)
                assert lists[r, h, :listed].tolist() == pages
                dropped += room - count
    assert plan.counts[Count.PAGES_DROPPED] == dropped


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_cuda_chooses_as_the_cpu_does_from_its_own_scores(name: str) -> None:
    """Summaries are the CPU's to the bit, scores but for the order of sums, and what is chosen from scores is again."""
    case = CASES[name]
    batch = case.batch()
    k_cache, q = case.cache(batch.num_pages), case.query(batch.size)
    plan = batch.plan("cuda")
    on_gpu = summarize(case, batch, k_cache.cuda(), plan, [0] * batch.size)
    on_cpu = summarize(case, batch, k_cache, batch.plan(), [0] * batch.size)
    bits = torch.int8 if case.fp8 else torch.int16
    assert torch.equal(on_gpu.cpu().view(bits), on_cpu.view(bits))
    few = run_select(case, plan, batch, q.cuda(), k_cache.cuda(), on_gpu)
    many = run_select(case, plan, batch, q.cuda(), k_cache.cuda(), on_gpu, columns=many_columns(batch, "cuda"))
    lists, scores = few
    assert torch.equal(lists, many[0])
    assert torch.equal(scores.view(torch.int32), many[1][:, :, : scores.shape[2]].view(torch.int32))  # NaN, too
    _, expected = run_select(case, batch.plan(), batch, q, k_cache, on_cpu)
    heads = q.double().view(batch.size, case.num_kv_heads, case.group, case.head_dim)
    for r, table in enumerate(batch.tables):
        budget = batch.sparse(r)
        if not budget:
            continue
        recent = len(table) - case.recent_pages
        error = score_error(case, heads[r], on_cpu[table].double(), "cuda")
        for h in range(case.num_kv_heads):
            middle = slice(case.sink_pages, recent)
            difference = (scores[r, h, middle].double() - expected[r, h, middle].double()).abs()
            assert (difference <= 1.5 * error[middle, h]).all()
            best = by_score(scores[r, h, middle])[: budget - case.sink_pages - case.recent_pages]
            assert lists[r, h, :budget].tolist() == listed_pages(case, table, best)


def make_topk(case: Case, batch: Batch, device: str, **spec: int) -> tuple[PlannerOptions, Summaries]:
    options = PlannerOptions(policy=Policy.TOPK, page_size=16, sink_pages=1, recent_pages=2, budget_pages=5)
    layers = SummarySpec(range(6), case.head_dim, case.dtype, max_columns=64, **spec)  # type: ignore[arg-type]
    return options, Summaries(layers, batch.num_pages, case.num_kv_heads, device)


@pytest.mark.parametrize("device", DEVICES)
def test_planner_selects_behind_its_dense_layers(device: str) -> None:
    case = CASES["bf16"]
    batch = case.batch()
    options, pool = make_topk(case, batch, device, dense_layers=1, reuse_layers=2)
    assert sorted(pool.of_layer) == [1, 3, 5]
    planner = make_planner(options, batch.capacity(), device, pool)
    table = batch.plan(device)
    dense = sum(map(len, batch.tables))
    planner.begin_csr(None, table.kv_indptr, table.kv_indices[:dense], table.last_page_len)
    k_cache, q = case.cache(batch.num_pages).to(device), case.query(batch.size).to(device)
    zeros = torch.zeros(batch.size, dtype=torch.int32, device=device)
    for layer in range(6):
        planner.after_store(layer, k_cache, zeros)
    check_plan(planner.for_layer(0, q, k_cache), Batch(batch.tables, batch.kv_lens))
    check_plan(planner.for_layer(1, q, k_cache), batch)
    expected = select(case, batch, q, k_cache, pool.of_layer[1])

    def lists() -> torch.Tensor:
        return planner.plan.kv_indices[dense:].view(batch.size, case.num_kv_heads, -1).cpu()

    assert torch.equal(lists(), expected)
    # Layer 2 reads what layer 1 chose, layer 3 chooses anew.
    planner.for_layer(2, -q, k_cache)
    assert torch.equal(lists(), expected)
    planner.for_layer(3, -q, k_cache)
    assert not torch.equal(lists(), expected)


def test_attention_is_told_of_a_selection() -> None:
    case = CASES["bf16"]
    batch = case.batch()
    options, pool = make_topk(case, batch, "cpu", dense_layers=1, reuse_layers=2)
    planner = make_planner(options, batch.capacity(), "cpu", pool)
    table = batch.plan("cpu")
    dense = sum(map(len, batch.tables))
    for num_tokens in (None, batch.size):  # a decode step, then an extend, which reads everything
        qo_indptr = None if num_tokens is None else torch.arange(batch.size + 1)
        planner.begin_csr(
            qo_indptr, table.kv_indptr, table.kv_indices[:dense], table.last_page_len, num_tokens=num_tokens
        )
        selections = [planner.selection_of(layer) for layer in range(4)]
        begins = [selection.sparse.begin if selection else 0 for selection in selections]
        assert begins == ([0, dense, 0, dense] if num_tokens is None else [0] * 4)


@pytest.mark.parametrize("device", DEVICES)
def test_logsumexp_is_of_the_logits_that_the_layer_has(device: str) -> None:
    """Queries four times as long under a quarter of the scale have the same logits: the same pages, to the bit."""
    case = replace(CASES["bf16"], reduction=GroupReduction.LOGSUMEXP)
    batch = case.batch()
    options, pool = make_topk(case, batch, device, dense_layers=0)
    options = replace(options, group_reduction=GroupReduction.LOGSUMEXP)
    planner = make_planner(options, batch.capacity(), device, pool)
    table = batch.plan(device)
    dense = sum(map(len, batch.tables))
    planner.begin_csr(None, table.kv_indptr, table.kv_indices[:dense], table.last_page_len)
    k_cache, q = case.cache(batch.num_pages).to(device), case.query(batch.size).to(device)
    planner.after_store(0, k_cache, torch.zeros(batch.size, dtype=torch.int32, device=device))

    def lists(q: torch.Tensor, sm_scale: float | None) -> torch.Tensor:
        plan = planner.for_layer(0, q, k_cache, sm_scale)
        return plan.kv_indices[dense:].view(batch.size, case.num_kv_heads, -1).cpu()

    expected = select(case, batch, q, k_cache, pool.of_layer[0])
    assert torch.equal(lists(4 * q, case.head_dim**-0.5 / 4), expected)
    assert torch.equal(lists(q, None), expected)
    assert not torch.equal(lists(4 * q, None), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", list(SummaryKind))
def test_a_page_gets_its_summary_in_the_step_that_fills_it(kind: SummaryKind, device: str) -> None:
    case = Case((300, 1000, 48, 0), kind=kind)
    batch = case.batch()
    k_cache = case.cache(batch.num_pages).to(device)
    summaries = summarize(case, batch, k_cache, batch.plan(device), [0] * batch.size)
    # Every page changes, but this step has filled only the last one of request 2: 48 keys on pages of 16.
    changed = case.cache(batch.num_pages).to(device)
    before = summaries.clone()
    plan = batch.plan(device)
    table = plan.kv_indptr, plan.kv_indices, plan.last_page_len
    columns = max(map(len, batch.tables))
    ops.summarize(changed, *table, None, summaries, max_columns=columns, summary_kind=int(kind))
    fresh = summarize(case, batch, changed, batch.plan(device), [0] * batch.size)
    filled = batch.tables[2][-1]
    assert torch.equal(summaries[filled], fresh[filled])
    rest = [page for page in range(batch.num_pages) if page != filled]
    assert torch.equal(summaries[rest], before[rest])


STORE_FAULTS = {
    "k: expected a token of each of 2 requests, got 1": {"k": torch.zeros(1, 2, 64), "v": torch.zeros(1, 2, 64)},
    "qo_indptr: expected it beside first_page": {"first_page": torch.zeros(2, dtype=torch.int32)},
    "slots: expected int64, got int32": {"slots": torch.zeros(2, dtype=torch.int32)},
    "slots: expected at least 2 entries, got 1": {"slots": torch.zeros(1, dtype=torch.int64)},
    r"v: expected shape \[2, 2, 64\] \(as k\), got \[2, 1, 64\]": {"v": torch.zeros(2, 1, 64)},
    "v: expected float32, got bfloat16": {"v": torch.zeros(2, 2, 64, dtype=torch.bfloat16)},
    r"v_cache: expected shape \[4, 16, 2, 64\] \(as k_cache\)": {"v_cache": torch.zeros(4, 8, 2, 64)},
    r"summaries: expected shape": {"summaries": torch.zeros(4, 2, 1, 64)},
}


@pytest.mark.parametrize("message", STORE_FAULTS)
def test_store_says_what_is_wrong_and_writes_nothing(message: str) -> None:
    given = {
        "k": torch.ones(2, 2, 64),
        "v": torch.ones(2, 2, 64),
        "slots": torch.tensor([16, 63]),
        "qo_indptr": None,
        "k_cache": torch.zeros(4, 16, 2, 64),
        "v_cache": torch.zeros(4, 16, 2, 64),
        "kv_indptr": torch.tensor([0, 1, 2], dtype=torch.int32),
        "kv_indices": torch.tensor([1, 3], dtype=torch.int32),
        "last_page_len": torch.tensor([1, 16], dtype=torch.int32),
        "first_page": None,
        "summaries": torch.zeros(4, 2, 2, 64),
    }
    ops.store(**given, max_columns=1, summary_kind=0)  # type: ignore[arg-type]
    assert given["k_cache"].sum() == given["v_cache"].sum() == 2 * 2 * 64  # type: ignore[union-attr]
    given |= STORE_FAULTS[message]
    given["k_cache"].zero_()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=f"flashcore.store: {message}.*; "):
        ops.store(**given, max_columns=1, summary_kind=0)  # type: ignore[arg-type]
    assert not given["k_cache"].any()  # type: ignore[union-attr]
