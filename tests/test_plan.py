"""The planner without sharing: what every plan obeys, fixed cuts, page lists, bad sizes, and CUDA against the CPU."""

from __future__ import annotations

import itertools
from dataclasses import replace

import plan_oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan_oracle import Batch, PlanView, check_plan

from flashcore_sglang import config, ops
from flashcore_sglang.planner import Capacity, Count, Plan, PlannerOptions, Policy, make_planner


def private(kv_lens: list[int], page_size: int = 16, **fields: object) -> Batch:
    """Requests of these lengths on pages of their own, in no order of the pool."""
    columns = [-(-length // page_size) for length in kv_lens]
    pages = (1 + torch.randperm(sum(columns), generator=torch.Generator().manual_seed(len(kv_lens)))).tolist()
    begins = plan_oracle.cumulative(columns)
    tables = [pages[begin:end] for begin, end in itertools.pairwise(begins)]
    return Batch(tables, kv_lens, page_size=page_size, **fields)  # type: ignore[arg-type]


CASES: dict[str, Batch] = {
    "empty batch": private([]),
    "one key": private([1]),
    "no keys": private([0, 5, 0]),
    "around a page": private([15, 16, 17]),
    "around a unit": private([63, 64, 65, 127, 128, 129]),
    "page 1": private([1, 7, 64], page_size=1),
    "page 5": private([1, 7, 64, 333], page_size=5),
    "one long request": private([5000], num_ctas=132),
    "ragged": private([1, 3000, 17, 700, 64, 0, 9, 250], num_ctas=24),
    "many small": private([16] * 64, num_ctas=7),
    "tiny work": private([64], num_ctas=132, num_kv_heads=8),
    "padded graph": Batch([[0], [3, 4], [0], [0]], [1, 20, 1, 1]),
    "padded graph of page 1": Batch([[0], [3, 4], [0], [0]], [1, 2, 1, 1], page_size=1),
    "extend": private([40, 100, 7], q_lens=[40, 30, 7]),
    "extend mixed with decode": private([192, 16, 201, 0, 33], q_lens=[18, 16, 1, 0, 1]),
    "extend of an empty request": private([0, 50, 0], q_lens=[0, 50, 0]),
    "extend, whole tiles": private([400, 128], q_lens=[64, 128], rows_per_tile=64),
    "extend, not causal": private([100, 40], q_lens=[30, 40], causal=False),
    "more queries than keys": private([3, 0], q_lens=[8, 2]),
    "window left": private([100, 400, 33], q_lens=[30, 100, 33], window_left=17),
    "window left of decode": private([100, 400, 3], window_left=64),
    "window left, not causal": private([100, 400], q_lens=[50, 9], window_left=20, causal=False),
    "group 7": private([300, 40], q_lens=[50, 1], group=7),
    "group fills the tile": private([300, 40], q_lens=[5, 1], group=16),
    "heavy tiles": private([900, 300], q_lens=[90, 300], rows_per_tile=256, num_ctas=50),
    "long, a line for each head": private([1500, 0, 900, 3000, 64], num_kv_heads=8, num_ctas=16),
    "long, two heads in turn": private([1500, 900, 70, 3000], num_kv_heads=8, num_ctas=12),
    "long, five lines, and a CTA more": private([1500, 900, 3000], num_kv_heads=10, num_ctas=15),
    "long, equal pieces": private([2000] * 3, num_kv_heads=6, num_ctas=60),
    "long, whole pairs": private([1000] * 9, num_kv_heads=4, num_ctas=20),
    "long, page lists": private([900] * 6, policy=Policy.TOPK, budget_pages=40, num_kv_heads=4, num_ctas=8),
    "long, one head": private([5000, 100], num_kv_heads=1, num_ctas=8),
    "long, no two lines": private([5000, 100, 0], num_kv_heads=4, num_ctas=9),
    "fixed cuts": private([1000, 128, 129, 5, 0], split_keys=128),
    "fixed cuts with extend": private([1000, 128, 129], q_lens=[20, 1, 129], split_keys=128),
    "window policy": private([30, 48, 49, 64, 500, 0], policy=Policy.WINDOW),
    "window policy, no sinks": private([30, 17, 500], policy=Policy.WINDOW, sink_pages=0, recent_pages=1),
    "topk policy": private([30, 80, 81, 64, 500], policy=Policy.TOPK),
    "topk policy of a fraction": private([30, 80, 81, 500, 3000], policy=Policy.TOPK, budget_share=20000),
}


@pytest.mark.parametrize("name", CASES)
def test_laws(name: str) -> None:
    check_plan(CASES[name].plan(), CASES[name])


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    page_size = draw(st.sampled_from([1, 3, 16, 64]))
    lengths = st.one_of(st.integers(0, 2 * page_size + 1), st.integers(0, 40 * page_size))
    kv_lens = draw(st.lists(lengths, min_size=1, max_size=6))
    group = draw(st.integers(1, 8))
    decode = draw(st.booleans())
    return private(
        kv_lens,
        page_size,
        q_lens=[1] * len(kv_lens) if decode else [draw(st.integers(0, min(n, 40))) for n in kv_lens],
        num_kv_heads=draw(st.integers(1, 4)),
        group=group,
        rows_per_tile=draw(st.sampled_from([r for r in (8, 16, 64, 128) if r >= group])),
        num_ctas=draw(st.integers(1, 40)),
        causal=draw(st.booleans()),
        window_left=draw(st.one_of(st.just(-1), st.integers(0, 200))),
        split_keys=draw(st.sampled_from([0, 0, 64, 192])),
    )


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(batches())
def test_laws_of_any_batch(batch: Batch) -> None:
    check_plan(batch.plan(), batch)


# Equal requests are cut into pieces, or not at all, others anywhere.
@pytest.mark.parametrize("lens", [[1500, 0, 900, 3000, 64], [2000, 2000], [1000] * 9], ids=str)
@pytest.mark.parametrize("heads, ctas, lines", [(8, 32, 8), (4, 24, 4), (8, 12, 4), (9, 24, 3), (1, 8, 1)])
def test_long_steps_read_neighbouring_heads_at_once(heads: int, ctas: int, lines: int, lens: list[int]) -> None:
    batch = private(lens, num_kv_heads=heads, num_ctas=ctas)
    view = check_plan(batch.plan(), batch)
    of_cta = [view.tiles[begin:end] for begin, end in itertools.pairwise(view.cta_indptr)]
    each = ctas // lines
    work = [[(pair // heads, pair % heads, *span) for pair, *span, _, _, _, _, _ in tiles] for tiles in of_cta]
    by_line = [work[line * each : (line + 1) * each] for line in range(lines)]
    places = [*range(0, lines, 2), *range(1, lines, 2)]  # of two neighbours, one is half of all CTAs on
    for place, line in zip(places, by_line, strict=True):
        assert {head % lines for tiles in line for _, head, *_ in tiles} == {place}
        spans = [[(row, head // lines, *span) for row, head, *span in tiles] for tiles in line]
        assert spans == [[(row, head // lines, *span) for row, head, *span in tiles] for tiles in by_line[0]]


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(private([1500, 900, 300], q_lens=[100, 1, 30], num_kv_heads=4), id="prefill"),
        pytest.param(private([300, 150], num_kv_heads=4, num_ctas=40), id="short"),
        pytest.param(private([1000, 2000, 300], split_keys=128, num_kv_heads=4, num_ctas=8), id="fixed cuts"),
        pytest.param(
            Batch([[*range(64), *range(64 + 30 * r, 94 + 30 * r)] for r in range(8)], [94 * 16] * 8, num_kv_heads=4),
            id="packed rows",
        ),
        pytest.param(
            private([900] * 6, policy=Policy.TOPK, budget_pages=40, num_kv_heads=4, num_ctas=8), id="page lists"
        ),
        pytest.param(private([*[4000] * 6, 50], num_kv_heads=4, policy=Policy.TOPK), id="page lists of some"),
    ],
)
def test_other_steps_take_heads_in_turn(batch: Batch) -> None:
    view = check_plan(batch.plan(), batch)
    assert [tile[0] for tile in view.tiles] == sorted(tile[0] for tile in view.tiles)


def test_fixed_cuts_do_not_depend_on_the_batch() -> None:
    alone = private([1000], split_keys=128, num_ctas=132)
    crowd = private([1000, 40, 3000], split_keys=128, num_ctas=132)

    def cuts(batch: Batch) -> list[list[int]]:
        view = PlanView.of(batch.plan(), batch)
        return [tile[1:3] for tile in view.tiles if tile[0] < batch.num_kv_heads]

    assert cuts(alone) == cuts(crowd)


@pytest.mark.parametrize("policy", [Policy.WINDOW, Policy.TOPK])
@pytest.mark.parametrize(
    "exact",
    [
        pytest.param(private([30, 16, 48, 1]), id="short"),
        pytest.param(private([1500, 900, 1300], page_size=512, num_kv_heads=8), id="long"),
    ],
)
def test_below_the_budget_plans_are_equal(exact: Batch, policy: Policy) -> None:
    sparse = replace(exact, policy=policy)
    for a, b in zip(used_parts(exact.plan(), exact), used_parts(sparse.plan(), sparse), strict=True):
        assert torch.equal(a, b)


def used_parts(plan: Plan, batch: Batch) -> list[torch.Tensor]:
    """The parts of a plan's buffers that the plan defines."""
    counts = plan.counts.tolist()
    num_rows, num_tokens, size = counts[Count.NUM_ROWS], sum(batch.q_lens), batch.size
    parts = {
        "qo_indptr": plan.qo_indptr[: size + 1],
        "kv_indptr": plan.kv_indptr[: size + 1],
        "kv_indices": plan.kv_indices[: sum(map(len, batch.tables))],
        "last_page_len": plan.last_page_len[:size],
        "positions": plan.positions[:num_tokens],
        "rows": plan.rows[:num_rows],
        "row_tokens": plan.row_tokens[: sum(row[1] for row in plan.rows[:num_rows].tolist() if row[2] & 1)],
        "tiles": plan.tiles[: counts[Count.NUM_TILES]],
        "pair_tiles": plan.pair_tiles[: num_rows * batch.num_kv_heads],
        "cta_indptr": plan.cta_indptr,
        "merge_indptr": plan.merge_indptr[: num_tokens + 1],
        "merge_rows": plan.merge_rows[: int(plan.merge_indptr[num_tokens])],
        "counts": plan.counts,
    }
    return [part.cpu() for part in parts.values()]


@pytest.mark.parametrize("small", [{"pages": 5}, {"tokens": 2}], ids=str)
def test_a_batch_beyond_the_capacity_leaves_an_empty_plan(small: dict[str, int]) -> None:
    batch = private([100, 30, 40])
    plan = Plan.allocate(batch.capacity(), "cpu")
    batch.load(plan)
    plan = replace(plan, capacity=replace(plan.capacity, **small))
    plan.tiles.fill_(7)
    batch.run(plan, num_tokens=small.get("tokens"))
    assert plan.counts.tolist() == [0] * Count.OVERFLOW + [1] + [0] * (Count.NUM_COUNTS - Count.OVERFLOW - 1)
    assert not plan.cta_indptr.any()
    assert not plan.merge_indptr[: plan.capacity.tokens + 1].any()


def test_too_few_tiles_leave_an_empty_plan() -> None:
    batch = private([5000], num_ctas=32)
    plan = Plan.allocate(batch.capacity(), "cpu")
    batch.load(plan)
    batch.run(replace(plan, tiles=plan.tiles[:9]))
    assert plan.counts[Count.OVERFLOW] == 1
    assert not plan.cta_indptr.any()


def test_padded_tokens_are_in_no_row() -> None:
    batch = private([100, 30])
    plan = Plan.allocate(batch.capacity(tokens=5), "cpu")
    batch.load(plan)
    batch.run(plan, num_tokens=5)
    check_plan(plan, batch)
    assert plan.merge_indptr.tolist()[2:] == [2] * 4


def page_table_inputs(
    lens: list[int], page_size: int, context: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[list[int]]]:
    """The arguments of the op, with another's slots behind each request's, and the page ids of each request."""
    rows = torch.randperm(len(lens) + 3)[: len(lens)]
    slots = torch.randint(0, 10_000, (len(lens) + 3, context), dtype=torch.int32)
    columns = [-(-n // page_size) for n in lens]
    pages = [torch.randint(0, 10_000, (n,), dtype=torch.int32) for n in columns]
    for row, n, ids in zip(rows.tolist(), lens, pages, strict=True):
        slots[row, :n] = (ids[:, None] * page_size + torch.arange(page_size, dtype=torch.int32)).flatten()[:n]
    return slots, rows, torch.tensor(lens, dtype=torch.int64), [ids.tolist() for ids in pages]


PAGE_TABLES = [([1, 16, 17, 0, 160, 5], 16), ([3, 1, 0], 1), ([9, 10, 11], 5), ([], 64), ([2000, 1, 64], 64)]


@pytest.mark.parametrize("lens, page_size", PAGE_TABLES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_page_table(device: str, lens: list[int], page_size: int) -> None:
    *tensors, pages = page_table_inputs(lens, page_size, 2052)
    slots, rows, seq_lens = (tensor.to(device) for tensor in tensors)
    columns = [len(ids) for ids in pages]
    plan = Plan.allocate(Capacity(len(lens), len(lens), sum(columns) + 3, 1, 1, 1, 1, 1), device)
    plan.kv_indices.fill_(-7)
    ops.page_table(slots, rows, seq_lens, page_size, plan.kv_indptr, plan.kv_indices, plan.last_page_len)
    assert plan.kv_indptr.tolist() == plan_oracle.cumulative(columns)
    assert plan.kv_indices.tolist() == [*itertools.chain(*pages), *[-7] * 3]
    assert plan.last_page_len.tolist() == [(n - 1) % page_size + 1 if n else 0 for n in lens]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_page_table_stops_at_its_capacity(device: str) -> None:
    *tensors, _ = page_table_inputs([100, 100], 16, 128)
    slots, rows, seq_lens = (tensor.to(device) for tensor in tensors)
    plan = Plan.allocate(Capacity(2, 2, 20, 1, 1, 1, 1, 1), device)
    plan.kv_indices.fill_(-7)
    ops.page_table(slots, rows, seq_lens, 16, plan.kv_indptr, plan.kv_indices[:9], plan.last_page_len)
    assert plan.kv_indptr.tolist() == [0, 7, 14]
    assert plan.kv_indices.tolist()[9:] == [-7] * 11


def test_planner_begins_from_both_page_tables_alike() -> None:
    batch = private([100, 30, 64])
    planner = make_planner(PlannerOptions(page_size=16), batch.capacity(batch=5, pages=64), "cpu")
    slots = torch.zeros(8, 128, dtype=torch.int32)
    rows = torch.tensor([3, 1, 6])
    for row, table in zip(rows.tolist(), batch.tables, strict=True):
        for column, page in enumerate(table):
            slots[row, column * 16 : (column + 1) * 16] = page * 16 + torch.arange(16, dtype=torch.int32)
    planner.begin(slots, rows, torch.tensor(batch.kv_lens))
    from_slots = used_parts(planner.plan, batch)
    check_plan(planner.plan, batch)
    table = batch.plan()
    planner.begin_csr(None, table.kv_indptr, table.kv_indices, table.last_page_len)
    for a, b in zip(from_slots, used_parts(planner.plan, batch), strict=True):
        assert torch.equal(a, b)


def test_planner_says_what_does_not_fit() -> None:
    capacity = private([100, 30]).capacity()
    with pytest.raises(ValueError, match="sparse_pages: expected at least 6"):
        make_planner(PlannerOptions(policy=Policy.WINDOW, page_size=16, sink_pages=1, recent_pages=2), capacity, "cpu")
    with pytest.raises(ValueError, match="the options' page_size 64"):
        make_planner(PlannerOptions(page_size=64), capacity, "cpu")
    planner = make_planner(PlannerOptions(page_size=16), capacity, "cpu")
    with pytest.raises(ValueError, match="batch: expected at most 2 requests, got 3"):
        planner.begin(torch.zeros(4, 128, dtype=torch.int32), torch.arange(3), torch.ones(3, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_cuda_plans_as_the_cpu_does(name: str) -> None:
    batch = CASES[name]
    on_gpu = batch.plan("cuda")
    check_plan(on_gpu, batch)
    for a, b in zip(used_parts(on_gpu, batch), used_parts(batch.plan(), batch), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("may_share", [True, False])
def test_nobody_looks_for_pages_that_cannot_be_shared(may_share: bool) -> None:
    options = PlannerOptions.from_config(config.Config(), 64, may_share=may_share)
    assert options.share == may_share
