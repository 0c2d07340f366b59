"""The reference against loops over single numbers, and the literal execution of plans against the reference."""

from __future__ import annotations

import math

import kit
import pytest
import torch
from cases import Case, Problem, decode, extend, make

from flashcore_sglang import reference

SMALL = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "page_size": 4}
CASES = [
    decode("decode", 1, 4, 5, 0, 9, **SMALL),
    extend("extend", (3, 7), (0, 0), (5, 5), (1, 8), **SMALL),
    extend("more queries than keys", (4, 2), (2, 0), **SMALL),
    extend("not causal", (3, 7), (2, 2), causal=False, **SMALL),
    extend("window", (6, 9), (2, 2), window_left=2, **SMALL),
    extend("not causal window", (6, 9), causal=False, window_left=2, **SMALL),
    extend("soft cap", (6, 9), logits_soft_cap=0.5, **SMALL),
    extend("scale", (6, 9), sm_scale=2.0, logits_soft_cap=1.0, **SMALL),
]


def naive(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Python floats, one logit at a time."""
    case = problem.case
    q, k_cache, v_cache = (tensor.double().tolist() for tensor in (problem.q, problem.k_cache, problem.v_cache))
    out, lse = [], []
    token = 0
    for request, (q_len, kv_len) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
        first_page = int(problem.kv_indptr[request])
        for i in range(q_len):
            position = kv_len - q_len + i
            for head in range(case.num_heads):
                weights, values = [], []
                for j in range(kv_len):
                    if (case.causal and j > position) or (0 <= case.window_left < position - j):
                        continue
                    page = int(problem.kv_indices[first_page + j // case.page_size])
                    k = k_cache[page][j % case.page_size][head // case.group]
                    logit = sum(a * b for a, b in zip(q[token][head], k, strict=True))
                    logit *= case.sm_scale or 1 / math.sqrt(case.head_dim)
                    if case.logits_soft_cap:
                        logit = case.logits_soft_cap * math.tanh(logit / case.logits_soft_cap)
                    weights.append(math.exp(logit))
                    values.append(v_cache[page][j % case.page_size][head // case.group])
                total = sum(weights)
                columns = list(zip(*values, strict=True)) or [()] * case.head_dim
                out.append([sum(w * v for w, v in zip(weights, c, strict=True)) / (total or 1) for c in columns])
                lse.append(math.log2(total) if total else -math.inf)
            token += 1
    return torch.tensor(out).view(problem.q.shape), torch.tensor(lse).view(problem.q.shape[:2])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_loops(case: Case) -> None:
    problem = make(case)
    q, k, v = (tensor.double() for tensor in (problem.q, problem.k_cache, problem.v_cache))
    out, lse = reference.paged_attention(q, k, v, *problem.table, **problem.masks)
    expected_out, expected_lse = naive(problem)
    torch.testing.assert_close(out.float(), expected_out)
    torch.testing.assert_close(lse.float(), expected_lse)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plan_executed_literally(case: Case) -> None:
    problem = make(case)
    q, k, v = (tensor.double() for tensor in (problem.q, problem.k_cache, problem.v_cache))
    expected = reference.paged_attention(q, k, v, *problem.table, **problem.masks)
    plans = [
        kit.make_untrimmed_plan(problem, tokens_per_row=2, keys_per_tile=3),
        kit.make_plan(problem, rows_per_tile=4),
    ]
    for plan in plans:
        torch.testing.assert_close(reference.attend_plan(q, k, v, plan, **problem.masks), expected)


def test_a_tile_left_out_shows() -> None:
    problem = make(decode("decode", 40, **SMALL))
    plan = kit.make_untrimmed_plan(problem, tokens_per_row=1, keys_per_tile=16)
    plan[7][1, 2] -= 1  # one key less
    q, k, v = (tensor.double() for tensor in (problem.q, problem.k_cache, problem.v_cache))
    out, _ = reference.attend_plan(q, k, v, plan)
    expected, _ = reference.paged_attention(q, k, v, *problem.table)
    assert not torch.allclose(out, expected)


def test_computation_dtype() -> None:
    problem = make(decode("decode", 40))
    tensors = (problem.q, problem.k_cache, problem.v_cache, *problem.table)
    assert reference.paged_attention(*tensors)[0].dtype == torch.float32
    assert reference.paged_attention(problem.q.double(), *tensors[1:])[0].dtype == torch.float64
    assert reference.paged_attention(*tensors, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
