"""PagedAttention: FlashInfer's plan and run, plans written in place, captured runs, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import kit
import pytest
import torch
from cases import CASES, Case, Problem, decode, extend, make

from flashcore_sglang import PagedAttention, reference, variants

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SOME = CASES[::5]


def plan(attention: PagedAttention, problem: Problem, **options: object) -> None:
    case = problem.case
    attention.plan(
        *problem.table,
        case.num_heads,
        case.num_kv_heads,
        case.head_dim,
        case.page_size,
        **{"q_data_type": case.dtype, **problem.masks, **options},  # type: ignore[arg-type]
    )


def run(attention: PagedAttention, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = attention.run(problem.q, (problem.k_cache, problem.v_cache), return_lse=True)
    return out, lse


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_against_reference(case: Case, device: str) -> None:
    problem = make(case, device)
    attention = PagedAttention(device=device)
    plan(attention, problem)
    kit.check(problem, *run(attention, problem))


@pytest.mark.parametrize("device", DEVICES)
def test_one_object_for_every_case(device: str) -> None:
    attention = PagedAttention(device=device)
    for case in SOME:
        problem = make(case, device)
        plan(attention, problem)
        kit.check(problem, *run(attention, problem))


def test_the_readme_example() -> None:
    readme = Path(__file__).parents[1] / "README.md"
    (code,) = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    tables = [names[name].to(names["device"]) for name in ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len")]
    expected, _ = reference.paged_attention(names["q"], names["k_cache"], names["v_cache"], *tables, causal=True)
    torch.testing.assert_close(names["out"].float(), expected, atol=2**-8, rtol=2**-7)  # bf16


@pytest.mark.gpu
def test_index_tensors_on_the_cpu() -> None:
    case = extend("cpu indices", (30, 70), (1, 33))
    problem, on_cpu = make(case, "cuda"), make(case)
    attention = PagedAttention(device="cuda")
    plan(attention, replace(on_cpu, q=problem.q))
    kit.check(problem, *run(attention, problem))


@pytest.mark.parametrize("device", DEVICES)
def test_combined_cache_and_given_outputs(device: str) -> None:
    problem = make(extend("combined", (30, 70), (1, 33)), device)
    attention = PagedAttention(device=device)
    plan(attention, problem)
    expected, expected_lse = (tensor.clone() for tensor in run(attention, problem))
    cache = torch.stack([problem.k_cache, problem.v_cache], dim=1)
    out, lse = torch.empty_like(expected), torch.empty_like(expected_lse)
    assert attention.run(problem.q, cache, out=out, lse=lse) is out
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert torch.equal(attention.run(problem.q, cache), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_plans_are_written_in_place(device: str) -> None:
    attention = PagedAttention(device=device, max_batch=8, max_tokens=16, max_pages=200)
    buffers = set()
    for case in (decode("short", 5, 1), decode("long", 700, 3, 90), extend("extend", (9, 100))):
        problem = make(case, device)
        plan(attention, problem)
        out, lse = run(attention, problem)
        buffers.add(out.data_ptr() if case.decode else 0)
        kit.check(problem, out, lse)
    assert len(buffers) == 2  # one for both decode plans


@pytest.mark.parametrize("policy", ["exact", "window", "topk"])
@pytest.mark.parametrize("case", [decode("decode", 700, 3, 90), extend("extend", (9, 700), (3, 3))], ids=str)
def test_run_allocates_nothing(case: Case, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SINK_TOKENS", 32), ("RECENT_TOKENS", 64), ("BUDGET_TOKENS", 256)):
        monkeypatch.setenv(f"FLASHCORE_{name}", str(value))
    problem = make(case)
    attention = PagedAttention(device="cpu")
    plan(attention, problem, policy=policy)
    run(attention, problem)
    with torch.profiler.profile(profile_memory=True) as profile:
        run(attention, problem)
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages()) == 0


@pytest.mark.gpu
def test_a_captured_run_follows_new_plans() -> None:
    attention = PagedAttention(device="cuda", max_batch=4, max_tokens=4, max_pages=400)
    problems = [make(decode("captured", *lens), "cuda") for lens in ((5, 1, 90), (700, 64, 3), (129, 400, 1))]
    pool = max(problem.k_cache.shape[0] for problem in problems)
    k_cache, v_cache = (
        torch.zeros((pool, *problems[0].k_cache.shape[1:]), dtype=torch.bfloat16, device="cuda") for _ in "kv"
    )
    q = torch.zeros_like(problems[0].q)
    plan(attention, problems[0])
    attention.run(q, (k_cache, v_cache), return_lse=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attention.run(q, (k_cache, v_cache), return_lse=True)
    for problem in problems:
        plan(attention, problem)
        q.copy_(problem.q)
        k_cache[: problem.k_cache.shape[0]] = problem.k_cache
        v_cache[: problem.v_cache.shape[0]] = problem.v_cache
        graph.replay()
        kit.check(problem, out, lse)
    with pytest.raises(ValueError, match="captured run has fixed"):
        plan(attention, make(decode("another batch", 5, 1), "cuda"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", ["window", "topk"])
@pytest.mark.parametrize("requests", [1, 40])  # on Hopper topk and exact have different kernels for many
def test_sparse_policies_below_their_budget_are_exact(
    requests: int, policy: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SINK_TOKENS", 32), ("RECENT_TOKENS", 64), ("BUDGET_TOKENS", 256)):
        monkeypatch.setenv(f"FLASHCORE_{name}", str(value))
    problem = make(decode("within", 90, 33, *range(1, requests + 1)), device)
    results = []
    for name in ("exact", policy):
        attention = PagedAttention(device=device)
        plan(attention, problem, policy=name)
        results.append([tensor.clone() for tensor in run(attention, problem)])
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    # Beyond it something is left out: the LSE can only fall.
    problem = make(decode("beyond", 900), device)
    plan(attention, problem, policy=policy)
    _, sparse = (tensor.clone() for tensor in run(attention, problem))
    plan(attention, problem)
    _, exact = run(attention, problem)
    assert bool((sparse < exact).all())
    assert bool(sparse.isfinite().all())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(2, 8, 64)}, "q: expected dtype torch.bfloat16 as planned, got torch.float32"),
        (
            {"q": torch.zeros(3, 8, 64, dtype=torch.bfloat16)},
            r"q: expected shape \(2, 8, 64\) as planned, got \(3, 8, 64\)",
        ),
        (
            {"q": torch.zeros(2, 8, 64, dtype=torch.bfloat16, device="meta")},
            "q: expected device cpu as planned, got meta",
        ),
        ({"k_cache": torch.zeros(9, 8, 2, 64, dtype=torch.bfloat16)}, r"k_cache: expected shape \(9, 16, 2, 64\)"),
        ({"v_cache": torch.zeros(9, 16, 2, 64)}, "v_cache: expected dtype"),
    ],
)
def test_tensors_that_disagree_with_the_plan(change: dict[str, torch.Tensor], message: str) -> None:
    problem = make(decode("disagree", 40, 50))
    attention = PagedAttention(device="cpu")
    plan(attention, problem)
    with pytest.raises(ValueError, match=f"{message}.*; "):
        run(attention, replace(problem, **change))


def test_a_cache_that_is_no_pair() -> None:
    problem = make(decode("pair", 40, 50))
    attention = PagedAttention(device="cpu")
    plan(attention, problem)
    expected = r"kv_cache: expected \(k_cache, v_cache\) or one tensor \[pages, 2, .*, got "
    with pytest.raises(ValueError, match=expected + r"one of shape \[\d+, 16, 2, 64\]; "):
        attention.run(problem.q, problem.k_cache)
    with pytest.raises(ValueError, match=expected + "3 tensors; "):
        attention.run(problem.q, (problem.k_cache, problem.v_cache, problem.v_cache))  # type: ignore[arg-type]


def test_pages_outside_of_the_cache() -> None:
    problem = make(decode("pages", 40, 50))
    attention = PagedAttention(device="cpu")
    plan(attention, problem)
    few = replace(problem, k_cache=problem.k_cache[:2], v_cache=problem.v_cache[:2])
    with pytest.raises(ValueError, match=r"k_cache: expected at least the \d+ pages .* kv_indices name, got 2"):
        run(attention, few)


WRONG_TABLES = (
    ("qo_indptr", [0, 50, 2], "qo_indptr: expected 0, then numbers that never fall, got [0, 50, 2]"),
    ("qo_indptr", [0, -5, 2], "qo_indptr: expected 0, then numbers that never fall"),
    ("qo_indptr", [1, 2, 3], "qo_indptr: expected 0, then"),
    ("kv_indptr", [0, 8, 7], "kv_indptr: expected 0, then numbers that never fall"),
    ("kv_indptr", [3, 3, 7], "kv_indptr: expected 0, then"),
    ("kv_indptr", [0, 3, 8], "kv_indices: expected at least kv_indptr[-1] = 8 page ids, got 7"),
    ("last_page_len", [8, 17], "last_page_len[1]: expected 1..16 keys, got 17"),
    ("last_page_len", [0, 2], "last_page_len[0]: expected 1..16 keys, got 0"),
    ("kv_indices", [-1] * 7, "kv_indices: expected page ids of at least 0, got -1"),
)


@pytest.mark.parametrize("field, values, message", WRONG_TABLES, ids=lambda value: str(value)[:24])
def test_wrong_page_tables(field: str, values: list[int], message: str) -> None:
    """A kernel would read or write outside of its tensors with any of them."""
    problem = make(decode("wrong table", 40, 50))
    changed = replace(problem, **{field: torch.tensor(values, dtype=torch.int32)})
    with pytest.raises(ValueError, match=re.escape(message) + ".*; "):
        plan(PagedAttention(device="cpu"), changed)


def test_refusals() -> None:
    problem = make(decode("refusals", 40, 50))
    attention = PagedAttention(device="cpu", max_batch=1)
    with pytest.raises(RuntimeError, match=r"call plan\(\) first"):
        run(attention, problem)
    with pytest.raises(ValueError, match="max_batch: expected at most 1, got 2"):
        plan(attention, problem)
    attention = PagedAttention(device="cpu")
    with pytest.raises(ValueError, match=r"policy: expected exact, window or topk, got 'best'"):
        plan(attention, problem, policy="best")
    with pytest.raises(ValueError, match=r"kv_data_type: expected torch.bfloat16 as q_data_type, got torch.float16"):
        plan(attention, problem, kv_data_type=torch.float16)
    with pytest.raises(variants.UnsupportedError, match="wmma_sm80"):
        plan(attention, problem, variant="wmma_sm80")
    with pytest.raises(ValueError, match=r"page_size: expected at least 1, got 0; "):
        plan(attention, replace(problem, case=replace(problem.case, page_size=0)))
    with pytest.raises(ValueError, match="qo_indptr: expected int32"):
        plan(attention, replace(problem, qo_indptr=problem.qo_indptr.long()))


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, flashcore_sglang; assert 'torch' not in sys.modules; assert flashcore_sglang.__version__"
    subprocess.run([sys.executable, "-c", code], check=True)
