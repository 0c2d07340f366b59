"""The ops as torch.compile and torch.export see them: opcheck on real plans, and fakes on the meta device."""

from __future__ import annotations

import kit
import pytest
import torch
from cases import Case, decode, extend, indptr, make
from torch._subclasses.fake_tensor import FakeTensorMode

from flashcore_sglang import ops

# The ops write buffers and have no gradient: what opcheck tests of autograd does not apply.
CHECKS = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("case", [decode("decode", 40, 3), extend("extend", (5, 40), (3, 3))], ids=str)
def test_attend(case: Case) -> None:
    problem = make(case)
    plan = kit.make_plan(problem)
    partials = torch.empty(plan.capacity.max_partials, case.head_dim)
    lse = torch.empty(problem.q.shape[:2])
    inputs = (problem.q, problem.k_cache.nan_to_num(), problem.v_cache.nan_to_num(), plan.tensors())
    outputs = (partials, torch.empty(len(partials)), torch.empty_like(problem.q), lse)
    settings = (32, 0.125, case.causal, -1, 0.0, case.decode, "cpu")
    torch.library.opcheck(ops.library().attend.default, (*inputs, *outputs, *settings), test_utils=CHECKS)


def test_plan() -> None:
    plan = kit.make_plan(make(decode("decode", 40, 3)))
    c = plan.capacity
    sizes = (2, c.num_kv_heads, c.group, c.page_size, c.num_pages, c.rows_per_tile, c.max_partials)
    args = (plan.tensors(), plan.scratch, *sizes, True, -1, 0, 0, 1, 0, 0, 0, c.pages, True, 0, 0)
    torch.library.opcheck(ops.library().plan.default, args, test_utils=CHECKS)


def test_page_table() -> None:
    slots = torch.arange(64, dtype=torch.int32).view(2, 32)
    outputs = (indptr([2, 2]), torch.zeros(8, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    args = (slots, torch.tensor([1, 0]), torch.tensor([20, 32]), 16, *outputs)
    torch.library.opcheck(ops.library().page_table.default, args, test_utils=CHECKS)


def test_summarize() -> None:
    k_cache = torch.randn(4, 16, 2, 64)
    table = (indptr([2, 2]), torch.arange(4, dtype=torch.int32), torch.tensor([3, 16], dtype=torch.int32))
    args = (k_cache, *table, torch.zeros(2, dtype=torch.int32), 2, 0, torch.zeros(4, 2, 2, 64))
    torch.library.opcheck(ops.library().summarize.default, args, test_utils=CHECKS)


def test_store() -> None:
    caches = torch.randn(4, 16, 2, 64), torch.randn(4, 16, 2, 64)
    new = torch.randn(5, 2, 64), torch.randn(5, 2, 64), torch.tensor([32, 33, 34, 62, 63])
    table = (indptr([2, 2]), torch.tensor([0, 2, 1, 3], dtype=torch.int32), torch.tensor([3, 16], dtype=torch.int32))
    first_page = torch.zeros(2, dtype=torch.int32)
    args = (*new, indptr([3, 2]), *caches, *table, first_page, 2, 0, torch.zeros(4, 2, 2, 64))
    torch.library.opcheck(ops.library().store.default, args, test_utils=CHECKS)


def test_select() -> None:
    problem = make(decode("select", 40, 3))
    plan = kit.make_plan(problem)
    summaries = torch.randn(problem.k_cache.shape[0], 2, 2, 64).to(torch.bfloat16)
    scores = torch.zeros(2 * 2 * 8)
    args = (problem.q, problem.k_cache, plan.tensors(), summaries, scores, 8, 0, 0, 1.0, 0.125, 65536, 1, 1, 4, 0, 4)
    torch.library.opcheck(ops.library().select.default, (*args, plan.capacity.pages), test_utils=CHECKS)


def test_select_attend() -> None:
    case = decode("select and attend", 40, 3)
    problem = make(case)
    plan = kit.make_plan(problem)
    partials = torch.empty(plan.capacity.max_partials, case.head_dim)
    summaries = torch.randn(problem.k_cache.shape[0], 2, 2, 64).to(torch.bfloat16)
    inputs = (problem.q, problem.k_cache.nan_to_num(), problem.v_cache.nan_to_num(), plan.tensors())
    outputs = (partials, torch.empty(len(partials)), torch.empty_like(problem.q), torch.empty(problem.q.shape[:2]))
    settings = (32, 0.125, 0.0, "cpu", True, summaries, torch.zeros(2 * 2 * 8), 8, 0, 0, 1.0, 65536)
    args = (*inputs, *outputs, *settings, 1, 1, 4, 0, 4, plan.capacity.pages)
    k, v = torch.randn(2, 2, 2, 64).to(torch.bfloat16)
    for new in ((None, None, None), (k, v, torch.tensor([3, 5]))):
        torch.library.opcheck(ops.library().select_attend.default, (*args, *new, False), test_utils=CHECKS)


def test_fake_tensors_never_reach_a_kernel() -> None:
    """Fakes have no data: a missing fake would be an error here, a wrong one would read through a null pointer."""
    with FakeTensorMode():
        slots = torch.zeros(2, 32, dtype=torch.int32)
        ints = [torch.zeros(n, dtype=torch.int32) for n in (3, 8, 2)]
        lens = torch.zeros(2, dtype=torch.int64)
        assert ops.library().page_table(slots, lens, lens, 16, *ints) is None
