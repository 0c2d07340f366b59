"""select_attend gives what select and attend do one after the other, to the bit, in however many launches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from flashcore_sglang import ops, variants
from flashcore_sglang.kernel import Kernel
from flashcore_sglang.planner import (
    Capacity,
    GroupReduction,
    Planner,
    PlannerOptions,
    Policy,
    Summaries,
    SummaryKind,
    SummarySpec,
    make_planner,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BUDGET, SINKS, RECENT = 12, 1, 2


@dataclass(frozen=True)
class Case:
    kv_lens: tuple[int, ...]
    num_kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    page_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    kind: SummaryKind = SummaryKind.MEAN_STD
    reduction: GroupReduction = GroupReduction.MAX
    fp8: bool = False
    cap: float = 0.0
    top_p: float = 1.0
    split_keys: int = 0
    alike: int = 1  # pages in a row that score alike
    budget: int = BUDGET
    run: int = 1  # pages that follow each other in the pool

    @property
    def pages(self) -> list[int]:
        return [-(-keys // self.page_size) for keys in self.kv_lens]

    def table(self) -> torch.Tensor:
        """Page ids of all requests: runs in random order."""
        total = sum(self.pages)
        runs = torch.randperm(-(-total // self.run))
        ids = (runs[:, None] * self.run + torch.arange(self.run)).flatten()
        return ids[ids < total].int()


CASES = {
    "one request": Case((9000,)),
    "one request, its page is full": Case((8960,)),
    "one request, its page is new": Case((8961,)),
    "one request on as many pages as a cluster chooses from": Case(((2048 + 3) * 64 - 1,)),
    "... and one more": Case(((2048 + 3) * 64 + 1,)),
    "just above the budget": Case((12 * 64 + 1,)),
    "just the budget": Case((12 * 64,)),
    "within the budget": Case((300,)),
    "one key": Case((1,)),
    "no key": Case((0,)),
    "group of 8": Case((5000,), group=8),
    "group of 7": Case((5000,), group=7),
    "group of 1": Case((5000,), group=1),
    "group of 10": Case((5000,), group=10),
    "head size 64, fp16": Case((5000,), head_dim=64, dtype=torch.float16),
    "4 KV heads": Case((5000,), num_kv_heads=4),
    "fp8 summaries": Case((5000,), fp8=True),
    "min_max": Case((5000,), kind=SummaryKind.MIN_MAX),
    "mean, logsumexp": Case((5000,), kind=SummaryKind.MEAN, reduction=GroupReduction.LOGSUMEXP),
    "mean of the group": Case((5000,), reduction=GroupReduction.MEAN),
    "pages of 16": Case((5000,), page_size=16),
    "pages of 128": Case((5000,), page_size=128),
    "a soft cap": Case((5000,), cap=20.0),
    "top-p": Case((5000,), top_p=0.4),
    "deterministic": Case((5000,), split_keys=256),
    "all pages alike": Case((9000,), alike=1000),
    "pairs of pages alike": Case((9000,), alike=2),
    "pages in a row": Case((9000,), run=1000),
    "some pages in a row": Case((20000,), run=40),
    "fp8 summaries of pages in a row": Case((20000,), run=1000, fp8=True),
    "summaries of 128 bytes": Case((20000,), head_dim=64, kind=SummaryKind.MEAN, run=40),
    "summaries of 64 bytes": Case((5000,), head_dim=64, kind=SummaryKind.MEAN, fp8=True),
    "a large budget": Case((16000,), budget=120),
    "two requests": Case((9000, 100)),
    "nine requests": Case((9000, 100, 3000, 64, 1, 800, 769, 6400, 5)),
}


class Layer:
    """A layer of a case: its caches, poisoned where nothing is to be read, its planner and its kernel."""

    def __init__(self, case: Case, device: str) -> None:
        heads = case.num_kv_heads * case.group
        dtype = ops.DTYPES[case.dtype]
        shape = variants.Shape(heads, case.num_kv_heads, case.head_dim, case.page_size, dtype, "decode")
        choice = variants.choose(shape, variants.device_of(device))
        columns, total = max(case.pages, default=1) or 1, sum(case.pages)
        options = PlannerOptions(
            policy=Policy.TOPK,
            page_size=case.page_size,
            sink_pages=SINKS,
            recent_pages=RECENT,
            budget_pages=case.budget,
            group_reduction=case.reduction,
            top_p=case.top_p,
            split_keys=case.split_keys,
            max_columns=columns,
        )
        batch = len(case.kv_lens)
        capacity = Capacity(
            batch=batch,
            tokens=batch,
            pages=max(total, 1),
            num_pages=total + 1,
            num_kv_heads=case.num_kv_heads,
            group=case.group,
            sparse_pages=options.sparse_pages(batch, case.num_kv_heads),
            page_size=case.page_size,
            split_keys=case.split_keys,
            **choice.plan_sizes,
        )
        torch.manual_seed(len(case.kv_lens) + case.kv_lens[0])
        cache = (2, total // case.alike + 1, case.page_size, case.num_kv_heads, case.head_dim)
        pages = torch.randn(cache).repeat_interleave(case.alike, dim=1)[:, : total + 1]
        self.k, self.v = pages.to(case.dtype).to(device)
        self.q = torch.randn(batch, heads, case.head_dim).to(case.dtype).to(device)
        spec = SummarySpec([0], case.head_dim, case.dtype, columns, kind=case.kind, fp8=case.fp8)
        self.summaries = Summaries(spec, total + 1, case.num_kv_heads, device)
        self.planner: Planner = make_planner(options, capacity, device, self.summaries)
        self.kernel = Kernel(choice, capacity, case.head_dim, device)
        indptr = torch.tensor([0, *case.pages]).cumsum(0).int()
        table = case.table()
        last = torch.tensor(
            [keys - max(n - 1, 0) * case.page_size for keys, n in zip(case.kv_lens, case.pages, strict=True)]
        ).int()
        self.planner.begin_csr(None, indptr, table, last)
        self.planner.after_store(0, self.k, torch.zeros(batch, dtype=torch.int32, device=device))
        for end, keys in zip(indptr[1:].tolist(), last.tolist(), strict=True):
            if 0 < keys < case.page_size:
                self.k[table[end - 1], keys:] = self.v[table[end - 1], keys:] = torch.nan
        self.settings = {
            "sm_scale": case.head_dim**-0.5,
            "causal": True,
            "window_left": -1,
            "logits_soft_cap": case.cap,
            "decode": True,
        }

    def attend(
        self, together: bool, new: ops.NewTokens | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output, LSE and page lists."""
        out = torch.full_like(self.q, torch.nan)
        lse = torch.full(self.q.shape[:2], torch.nan, device=self.q.device)
        lists = self.planner.plan.kv_indices[self.planner.capacity.pages :]
        lists.fill_(-1)
        inputs = self.q, self.k, self.v, out, lse
        if together:
            plan, selection = self.planner.plan_of(0), self.planner.selection_of(0)
            self.kernel.attend(plan, *inputs, selection=selection, new=new, **self.settings)
        else:
            self.kernel.attend(self.planner.for_layer(0, self.q, self.k), *inputs, **self.settings)
        return out, lse, lists.clone()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_it_gives_what_select_and_attend_give(name: str, device: str) -> None:
    case = CASES[name]
    if device == "cpu":
        case = replace(case, kv_lens=tuple(min(keys, 9000) for keys in case.kv_lens))
    layer = Layer(case, device)
    together = layer.attend(together=True)
    # A plan's tiles are shortened by the first selection under top-p, the second one finds them so.
    apart = layer.attend(together=False)
    again = layer.attend(together=True)
    for what, ours, expected, second in zip(("out", "lse", "lists"), together, apart, again, strict=True):
        assert not ours.isnan().any(), f"{name}: {what} was not written"
        assert torch.equal(ours, expected), f"{name}: {what} differs from select and attend"
        assert torch.equal(ours, second), f"{name}: {what} differs from run to run"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 3, 5, 8, 9, 20])
def test_within_the_budget_it_is_exact(batch: int, device: str) -> None:
    """To the bit: whatever kernel policy exact takes, topk's is of the same cuts."""
    layer = Layer(Case(tuple(400 + 13 * i for i in range(batch))), device)
    out, lse, _ = layer.attend(together=True)
    topk = layer.planner
    exact = make_planner(
        replace(topk.options, policy=Policy.EXACT), replace(topk.capacity, sparse_pages=0), device, layer.summaries
    )
    plan = topk.plan
    pages = int(plan.kv_indptr[batch])
    exact.begin_csr(None, plan.kv_indptr[: batch + 1], plan.kv_indices[:pages], plan.last_page_len[:batch])
    expected, expected_lse = torch.empty_like(out), torch.empty_like(lse)
    layer.kernel.attend(exact.plan, layer.q, layer.k, layer.v, expected, expected_lse, **layer.settings)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@pytest.mark.gpu
def test_a_captured_step_follows_its_plan() -> None:
    """Within the budget, above it and back: the same graph."""
    case = CASES["one request"]
    long = Layer(case, "cuda")
    out = torch.empty_like(long.q)
    stream = torch.cuda.Stream()
    selection = long.planner.selection_of(0)

    def step() -> None:
        long.kernel.attend(long.planner.plan_of(0), long.q, long.k, long.v, out, selection=selection, **long.settings)

    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    table = torch.randperm(sum(case.pages)).int()
    for keys in (700, 9000, 64, 8961):
        pages = -(-keys // case.page_size)
        lens = torch.tensor([keys - (pages - 1) * case.page_size]).int()
        long.k.nan_to_num_()
        long.v.nan_to_num_()
        long.planner.begin_csr(None, torch.tensor([0, pages]).int(), table[:pages], lens)
        long.planner.after_store(0, long.k, torch.zeros(1, dtype=torch.int32, device="cuda"))
        graph.replay()
        captured = out.clone()
        expected, _, _ = long.attend(together=False)
        assert torch.equal(captured, expected), keys


def new_tokens(layer: Layer, case: Case) -> ops.NewTokens:
    """Keys and values as a projection leaves them, and where the last ones of the requests belong."""
    plan = layer.planner.plan
    tokens = torch.randn(len(case.kv_lens), 2 * case.num_kv_heads, case.head_dim).to(layer.k)
    pages = plan.kv_indices[plan.kv_indptr[1 : plan.batch + 1].long() - 1].long()
    slots = pages * case.page_size + plan.last_page_len[: plan.batch] - 1
    return ops.NewTokens(tokens[:, : case.num_kv_heads], tokens[:, case.num_kv_heads :], slots)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if min(case.kv_lens) > 0])
def test_it_stores_new_tokens_as_store_does(name: str, device: str) -> None:
    case = CASES[name]
    if device == "cpu":
        case = replace(case, kv_lens=tuple(min(keys, 9000) for keys in case.kv_lens))
    layers = Layer(case, device), Layer(case, device)
    new = new_tokens(layers[0], case)
    layers[0].summaries.store(layers[0].planner.plan, 0, *new, layers[0].k, layers[0].v, None)
    results = layers[0].attend(together=True), layers[1].attend(together=True, new=new)
    for what, expected, ours in zip(("out", "lse", "lists"), *results, strict=True):
        assert torch.equal(ours, expected), f"{name}: {what} differs"
    for what, expected, ours in (
        ("k", layers[0].k, layers[1].k),
        ("v", layers[0].v, layers[1].v),
        ("summaries", layers[0].summaries.of_layer[0], layers[1].summaries.of_layer[0]),
    ):
        assert torch.equal(ours.view(torch.uint8), expected.view(torch.uint8)), f"{name}: {what} differ"


def test_new_tokens_are_one_of_each_request() -> None:
    case = Case((300, 200))
    layer = Layer(case, "cpu")
    k, v, slots = new_tokens(layer, case)
    before = layer.k.clone(), layer.v.clone()
    for new, message in (
        (ops.NewTokens(k[:1], v[:1], slots[:1]), "k: expected a token of each of 2 requests, got 1"),
        (ops.NewTokens(k, v, slots[:1]), "slots: expected"),
        (ops.NewTokens(k, v[:, :1], slots), "v: expected shape"),
        (ops.NewTokens(k.float(), v, slots), "k_cache: expected"),
    ):
        with pytest.raises(RuntimeError, match=f"flashcore.select_attend: {message}.*; "):
            layer.attend(together=True, new=new)
    for cache, was in zip((layer.k, layer.v), before, strict=True):
        assert torch.equal(cache.view(torch.uint8), was.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [700, 768, 8961, 8960])
def test_it_may_begin_beside_what_makes_the_queries_and_the_new_token(keys: int) -> None:
    case = replace(CASES["one request"], kv_lens=(keys,))
    layer = Layer(case, "cuda")
    plan, selection = layer.planner.plan, layer.planner.selection_of(0)
    new = new_tokens(layer, case)
    torch.cuda.synchronize()  # the plan and the summaries are ready
    for _ in range(50):
        # Both are made just before, by a launch that takes longer than one begins to run.
        made = torch.randn(1, (case.num_kv_heads * (case.group + 2)) * case.head_dim, device="cuda").to(case.dtype)
        q, k, v = made.view(1, -1, case.head_dim).split(
            [case.num_kv_heads * case.group, case.num_kv_heads, case.num_kv_heads], 1
        )
        outs = [torch.empty_like(layer.q) for _ in range(2)]
        for out, early in zip(outs, (True, False), strict=True):
            # So that neither finds what the other one has left.
            layer.k.view(-1, case.num_kv_heads, case.head_dim)[new.slots] = torch.nan
            layer.v.view(-1, case.num_kv_heads, case.head_dim)[new.slots] = torch.nan
            tokens = ops.NewTokens(torch.empty_like(k).copy_(k), torch.empty_like(v).copy_(v), new.slots)
            queries = torch.empty_like(q).copy_(q)
            if not early:
                torch.cuda.synchronize()
            inputs = queries, layer.k, layer.v, out
            layer.kernel.attend(plan, *inputs, selection=selection, new=tokens, early=early, **layer.settings)
        assert torch.equal(*outs)
