"""Policy topk where requests share pages: what they have scored together, and that it changes no score."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import plan_fuzz
import pytest
import torch
from plan_oracle import Batch, check_plan, distinct_columns, scored_columns
from test_summary import Case, many_columns, run_select, summarize

from flashcore_sglang.planner import Count, GroupReduction, Plan, Policy, SummaryKind

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def shared(columns: list[tuple[int, int]], own: int = 3, **changes: object) -> Batch:
    """Requests in groups of (members, pages that they share), each with ``own`` pages more; pages of 16 keys."""
    tables, pages = [], 0
    for members, prefix in columns:
        for i in range(members):
            first = pages + prefix + i * own
            tables.append([*range(pages, pages + prefix), *range(first, first + own)])
        pages += prefix + members * own
    lens = [16 * len(table) - 5 for table in tables]
    return Batch(tables, lens, policy=Policy.TOPK, **changes)  # type: ignore[arg-type]


def stretches(plan: Plan) -> list[list[int]]:
    """(request, rank, begin, end) of each."""
    return plan.stretches[: plan.counts[Count.NUM_STRETCHES]].tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_requests_over_one_document(device: str) -> None:
    plan = shared([(4, 40)]).plan(device)
    # Three pages of each are its own, two of them recent ones, which are not scored.
    own = [[r, 0, 40, 41] for r in range(1, 4)]
    group = [[0, 0, 40, 41], [1, 1, 40, 40], [2, 2, 40, 40], [3, 3, 0, 40]]
    assert stretches(plan) == group + own


@pytest.mark.parametrize("device", DEVICES)
def test_documents_behind_a_short_common_start(device: str) -> None:
    batch = shared([(3, 40), (3, 40)])
    for table in batch.tables[3:]:
        table[0] = batch.tables[0][0]
    plan = batch.plan(device)
    check_plan(plan, batch)
    assert stretches(plan)[:3] == [[0, 0, 40, 41], [1, 1, 40, 40], [2, 2, 1, 40]]
    assert stretches(plan)[3:6] == [[3, 3, 1, 1], [4, 4, 1, 1], [5, 5, 0, 1]]
    assert sum(end - begin for _, _, begin, end in stretches(plan)) == distinct_columns(batch)


@pytest.mark.parametrize("device", DEVICES)
def test_equal_requests_keep_what_fills_no_unit_for_themselves(device: str) -> None:
    batch = shared([(3, 40)], own=0)
    plan = batch.plan(device)
    check_plan(plan, batch)
    assert stretches(plan) == [[0, 0, 38, 38], [1, 1, 38, 38], [2, 2, 0, 38], [1, 0, 38, 38], [2, 0, 38, 38]]


@pytest.mark.parametrize("device", DEVICES)
def test_more_branches_on_a_path_than_it_holds(device: str) -> None:
    """Requests leave one by one, so that the last ones could follow seven others."""
    leave = [30, 60, 90, 92, 94, 96, 98, 100]
    tables = [[*range(column), *range(200 * (r + 1), 200 * (r + 1) + 104 - column)] for r, column in enumerate(leave)]
    batch = Batch(tables, [16 * 104 - 5] * 8, policy=Policy.TOPK)
    plan = batch.plan(device)
    check_plan(plan, batch)
    assert [stretch for stretch in stretches(plan) if stretch[0] == 7] == [
        [7, 7, 0, 30],
        [7, 6, 30, 60],
        [7, 5, 60, 90],
        [7, 0, 90, 102],
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "batch",
    [
        shared([(1, 40), (1, 40)]),
        shared([(4, 2)], own=20),  # too little in common
        shared([(4, 40)], share=False),
        shared([(4, 40)], budget_pages=43),  # dense: packed instead
        shared([(4, 40)], split_keys=64),
        shared([(4, 40)], q_lens=[2, 2, 2, 2]),
        replace(shared([(4, 40)]), policy=Policy.WINDOW),
        replace(shared([(4, 40)]), policy=Policy.EXACT),
    ],
    ids=["alone", "little", "off", "dense", "deterministic", "extend", "window", "exact"],
)
def test_nothing_is_scored_together(batch: Batch, device: str) -> None:
    plan = shared([(4, 40)], num_ctas=batch.num_ctas).plan(device)
    assert plan.counts[Count.NUM_STRETCHES] > 0
    other = batch.plan(device)
    other.counts[Count.NUM_STRETCHES] = 7  # what a plan before it has left
    batch.run(other)
    assert other.counts[Count.NUM_STRETCHES] == 0


def test_dense_and_sparse_requests_share_with_their_like_alone() -> None:
    """Dense requests of a batch are packed as before, and no sparse one follows them."""
    long, short = shared([(3, 600)]), 500
    tables = [table[:short] for table in long.tables] + long.tables
    batch = replace(
        long, tables=tables, kv_lens=[16 * len(t) - 5 for t in tables], q_lens=[], budget_pages=short, num_kv_heads=8
    )
    plan = batch.plan()
    check_plan(plan, batch)
    assert plan.counts[Count.ROWS_PACKED] > 0
    assert {r for r, *_ in stretches(plan)} == {3, 4, 5}


def draw(seed: int) -> tuple[Batch, Case]:
    """A batch of plan_fuzz under policy topk, and what its pages are scored by."""
    rng = Random(seed)
    batch = plan_fuzz.draw(seed).batch
    sink, recent = rng.choice([0, 1, 1, 2, 5]), rng.choice([1, 1, 2, 4])
    batch = replace(
        batch,
        policy=Policy.TOPK,
        sink_pages=sink,
        recent_pages=recent,
        budget_pages=sink + recent + rng.choice([1, 2, 8]),
        budget_share=rng.choice([0, 0, 65536 // 4]),
        num_kv_heads=rng.choice([1, 2]),
        rows_per_tile=64,
    )
    case = Case(
        tuple(batch.kv_lens),
        page_size=batch.page_size,
        num_kv_heads=batch.num_kv_heads,
        group=batch.group,
        head_dim=rng.choice([64, 64, 96, 128, 128, 256]),
        dtype=rng.choice([torch.bfloat16, torch.bfloat16, torch.float16]),
        kind=rng.choice(list(SummaryKind)),
        fp8=rng.random() < 0.25,
        reduction=rng.choice(list(GroupReduction)),
        std_weight=rng.choice([1.0, 0.7]),
    )
    return batch, case


def select_both(batch: Batch, case: Case, device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, Plan]]:
    """Lists, scores and plan with sharing and without. CUDA shares scores in batches that fill a GPU."""
    torch.manual_seed(0)
    k_cache, q = case.cache(batch.num_pages), case.query(batch.size)
    summaries = summarize(case, batch, k_cache, batch.plan(), [0] * batch.size).to(device)
    q, k_cache = q.to(device), k_cache.to(device)
    # The last page of a request may be one of another's here, unlike in a server. If it is full, a run summarises it.
    run_select(case, batch.plan(device), batch, q, k_cache, summaries)
    for share in (True, False):
        plan = replace(batch, share=share).plan(device)
        yield *run_select(case, plan, batch, q, k_cache, summaries, columns=many_columns(batch, device)), plan


def check_scores(batch: Batch, case: Case, device: str) -> int:
    """Raises AssertionError where sharing makes a difference; returns the number of stretches."""
    (lists, scores, plan), (lists_alone, scores_alone, alone) = select_both(batch, case, device)
    assert alone.counts[Count.NUM_STRETCHES] == 0
    assert torch.equal(lists, lists_alone)
    assert torch.equal(scores.view(torch.int32), scores_alone.view(torch.int32))  # as bits: NaN where none is written
    for r in range(batch.size):
        columns = scored_columns(batch, r)
        assert not scores[r, :, batch.sink_pages : columns].isnan().any()
        assert scores[r, :, columns:].isnan().all()
    return int(plan.counts[Count.NUM_STRETCHES])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part", range(4))
def test_random_batches(part: int, device: str) -> None:
    together = 0
    for seed in range(part, 400, 4):
        batch, case = draw(seed)
        try:
            check_plan(batch.plan(device), batch)
            together += check_scores(batch, case, device) > 0
        except Exception as error:
            raise AssertionError(f"seed {seed}: {batch} {case}") from error
    assert together > 30


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", list(SummaryKind))
def test_many_requests_over_one_document(kind: SummaryKind, device: str) -> None:
    """More members than a warp has lanes, and a warp's share that ends between them."""
    batch = shared([(70, 100), (3, 20), (1, 50)], own=12, num_kv_heads=8, rows_per_tile=64)
    assert check_scores(batch, Case(tuple(batch.kv_lens), num_kv_heads=8, kind=kind), device) > 70


@pytest.mark.gpu
def test_plans_of_both_devices_are_the_same() -> None:
    for seed in range(400):
        batch, _ = draw(seed)
        cpu, cuda = batch.plan(), batch.plan("cuda")
        assert torch.equal(cpu.counts, cuda.counts.cpu()), seed
        assert stretches(cpu) == stretches(cuda), seed
