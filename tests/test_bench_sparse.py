"""What `flashcore bench sparse` checks before it times anything, and that its step is the right one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plan_oracle import pages_listed

from flashcore_sglang.bench.accuracy import distance, token_truth
from flashcore_sglang.bench.cases import Heads
from flashcore_sglang.bench.sparse import SPARSE_CASES, SparseCase, Step, check
from flashcore_sglang.planner import Count, Policy

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASE = SparseCase(2, 4000, 1024, heads=Heads(8, 2, 64))


def steps(case: SparseCase, fills_page: bool = False, device: str = "cpu") -> tuple[Step, Step, torch.Tensor]:
    torch.manual_seed(0)
    table, _, num_pages = case.dense.page_table(device)
    k = torch.randn(num_pages, case.page_size, case.heads.kv, case.heads.dim, dtype=torch.bfloat16, device=device)
    q = torch.randn(case.batch, case.heads.qo, case.heads.dim, dtype=torch.bfloat16, device=device)
    sparse, exact = (Step(case, policy, q, k, torch.randn_like(k)) for policy in (Policy.TOPK, Policy.EXACT))
    sparse.v = exact.v
    for step in (sparse, exact):
        step.plan(table, case.lens(device, fills_page))
        step.run()
    return sparse, exact, table


def test_names_are_unique_and_say_what_is_read() -> None:
    names = [case.name for case in SPARSE_CASES]
    assert len(set(names)) == len(names)
    assert names[0] == "sparse/b1/ctx131072/budget4096/h32kv8d128/p64"
    assert SparseCase(8, 131072, 4096, fraction=0.3).name == "sparse/b8/ctx131072/budget30%/h32kv8d128/p64"
    assert SparseCase(8, 131072, 4096, fraction=0.3).pages_read == 615


def test_requests_share_what_the_name_says() -> None:
    case = SparseCase(64, 65536, 4096, shared=65024)
    assert case.name == "sparse/b64/ctx65536/shared65024/budget4096/h32kv8d128/p64"
    table, _, num_pages = case.dense.page_table("cpu")
    assert num_pages == 1016 + 64 * 8
    assert (table[:, :1016] == table[0, :1016]).all()
    assert table[:, 1016:].unique().numel() == 64 * 8


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_over_shared_pages_passes(device: str) -> None:
    sparse, exact, table = steps(replace(CASE, batch=3, shared=3200), device=device)
    assert sparse.planner.plan.counts[Count.NUM_STRETCHES] > 0
    assert check(sparse, exact, table) is None


def test_the_common_step_ends_no_page() -> None:
    for case in (CASE, SparseCase(2, 4096, 1024)):
        common, filling = (case.lens("cpu", fills_page)[0] for fills_page in (False, True))
        assert common % case.page_size != 0
        assert filling % case.page_size == 0
        assert -(-common // case.page_size) == filling // case.page_size == case.pages
    assert CASE.lens("cpu", fills_page=False).tolist() == [4000, 4000]


@pytest.mark.parametrize("fills_page", [False, True])
def test_a_right_step_passes(fills_page: bool) -> None:
    sparse, exact, table = steps(CASE, fills_page)
    assert (CASE.pages_read, CASE.pages) == (16, 63)
    assert check(sparse, exact, table) is None


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_that_reuses_the_selection_reads_the_same_pages(device: str) -> None:
    sparse, _, _ = steps(CASE, device=device)
    expected = sparse.out.clone()
    sparse.out.fill_(float("nan"))
    assert torch.equal(sparse.reuse(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_attention_beside_select_reads_what_select_writes(device: str) -> None:
    """On a GPU it begins while select still runs."""
    sparse, _, _ = steps(CASE, device=device)
    for _ in range(8):
        sparse.q.normal_()
        beside = sparse.run().clone()
        behind = sparse.reuse()
        assert torch.equal(beside, behind)


@pytest.mark.parametrize("device", DEVICES)
def test_attention_over_lists_that_top_p_ends(device: str) -> None:
    sparse, _, table = steps(CASE, device=device)
    sparse.planner.options = replace(sparse.planner.options, top_p=0.6)
    sparse.plan(table, CASE.lens(device, False))
    seen = set()
    for scale in (64, 1, 16):  # lists end early, at the whole budget, and in between
        sparse.q.normal_().mul_(scale)
        sparse.run()
        lists = sparse.lists()
        for r in range(CASE.batch):
            for h, count in enumerate(pages_listed(sparse.planner.plan, r, CASE.context)):
                seen.add(count)
                group, head = slice(4 * h, 4 * h + 4), slice(h, h + 1)
                kv = sparse.k[:, :, head], sparse.v[:, :, head]
                visible = count * CASE.page_size - sparse.missing
                truth = token_truth(sparse.q[r, group], *kv, lists[r, h, :count], visible)
                error = distance(sparse.out[r, group], truth)
                assert error.largest < torch.finfo(torch.bfloat16).eps * sparse.out.abs().max().item()
    assert len(seen) > 2
    assert min(seen) < CASE.pages_read


def test_a_wrong_choice_and_a_wrong_result_are_found() -> None:
    sparse, exact, table = steps(CASE)
    lists, out = sparse.lists().clone(), sparse.out.clone()
    left_out = next(page for page in table[0, 2:55].tolist() if page not in lists[0, 1].tolist())
    sparse.lists()[0, 1, 4] = left_out
    assert "scores higher" in str(check(sparse, exact, table))
    sparse.lists().copy_(lists)
    sparse.out[1, 5] += 0.02 * sparse.out.abs().max()
    assert "off fp64" in str(check(sparse, exact, table))
    sparse.out.copy_(out)
    assert check(sparse, exact, table) is None


def test_below_the_budget_the_exact_result_is_asked_for() -> None:
    sparse, exact, table = steps(SparseCase(2, 1000, 1024, heads=Heads(8, 2, 64)))
    assert check(sparse, exact, table) is None
    sparse.out[0, 0, 0] += 0.01
    assert "below the budget" in str(check(sparse, exact, table))
