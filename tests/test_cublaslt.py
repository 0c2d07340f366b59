"""The cublaslt variant's file of algorithms, and its plans on a GPU."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import kit
import pytest
import torch
from cases import extend, make

from flashcore_sglang import PagedAttention, cublaslt, ops, variants
from flashcore_sglang.cublaslt import Algorithms, Shape, Workspace, cache_file

FOUND = "fp16-fp16-nt-64x64x64x2=6.15.1.0\nfp16-fp32-nn-64x64x64x2=66.0.1.0\n"


def test_file_is_named_by_version_and_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file("NVIDIA H200 (NVL)", 130100) == tmp_path / "flashcore" / "cublaslt-130100-nvidia-h200-nvl.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_file("L4", 1).parent == tmp_path / "home" / ".cache" / "flashcore"


def test_what_was_found_is_there_for_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.json"
    Algorithms(path).update(FOUND)
    assert Algorithms(path).lines() == FOUND
    assert [file.name for file in path.parent.iterdir()] == ["file.json"]


def test_processes_add_to_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    first, second = Algorithms(path), Algorithms(path)
    first.update("a=1\n")
    second.update("b=2\n")
    assert json.loads(path.read_text()) == {"a": "1", "b": "2"}


def test_nothing_new_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    algorithms = Algorithms(path)
    algorithms.update(FOUND)
    path.unlink()
    algorithms.update(FOUND.splitlines()[0])
    assert not path.exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', "\0"])
def test_a_corrupted_file_is_one_warning(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        algorithms = Algorithms(path)
    assert algorithms.lines() == ""
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(path) in caplog.text
    assert "found anew" in caplog.text
    caplog.clear()
    path.unlink()
    algorithms.update(FOUND)
    assert Algorithms(path).lines() == FOUND
    assert not caplog.records


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    algorithms = Algorithms(None)
    algorithms._path = tmp_path / "file" / "algorithms.json"
    for lines in (FOUND, "c=3\n"):
        algorithms.update(lines)
    assert len(caplog.records) == 1
    assert algorithms.lines() == FOUND + "c=3\n"


def test_a_library_without_the_variant_says_so() -> None:
    if json.loads(ops.build_info())["cuda"]:
        pytest.skip("this library has the variant")
    with pytest.raises(RuntimeError, match=r"flashcore.cublaslt_workspace: .* with the variant 'cublaslt'"):
        ops.cublaslt_workspace(1, 1, 1, 1, 1, 64, True, True, 0)


SHAPE = Shape(batch=2, max_qo_len=300, max_kv_len=700, num_kv_heads=2, group=4, head_dim=64, fp16=False, causal=True)


def skip_unless_it_runs() -> None:
    reason = variants.unavailable(variants.BY_NAME["cublaslt"], variants.device_of("cuda"))
    if reason:
        pytest.skip(f"cublaslt {reason}")


@pytest.mark.gpu
def test_known_algorithms_are_taken_again(tmp_path: Path) -> None:
    skip_unless_it_runs()
    device = torch.device("cuda", 0)
    path = tmp_path / "file.json"
    Workspace(device, 32, Algorithms(path)).plan(SHAPE)
    lines = Algorithms(path).lines()
    assert len(lines.splitlines()) >= 4  # S in fp32 and in fp16, with their P V
    Workspace(device, 32, Algorithms(path)).plan(SHAPE)
    assert Algorithms(path).lines() == lines


@pytest.mark.gpu
def test_what_was_not_planned_is_refused() -> None:
    skip_unless_it_runs()
    problem = make(extend("unplanned", (30, 70), num_heads=6), "cuda")
    plan = kit.make_plan(problem)
    workspace = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    with pytest.raises(RuntimeError, match="expected a planned product, got one that was not; call cublaslt_plan"):
        kit.attend(problem, plan, variant="cublaslt", workspace=workspace)
    with pytest.raises(RuntimeError, match=r"workspace: expected at least \d+ bytes, got 256"):
        kit.attend(problem, plan, variant="cublaslt", workspace=workspace[:256])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_scores_in_fp16(dtype: torch.dtype, causal: bool) -> None:
    """Without an LSE; several chunks of keys, blocks of queries and spans of blocks."""
    skip_unless_it_runs()
    problem = make(extend("fp16 scores", (1100, 9000), (700, 700), (1, 5000), dtype=dtype, causal=causal), "cuda")
    attention = PagedAttention(device="cuda")
    case = problem.case
    sizes = (case.num_heads, case.num_kv_heads, case.head_dim, case.page_size)
    attention.plan(*problem.table, *sizes, causal=causal, q_data_type=dtype, variant="cublaslt")
    out = attention.run(problem.q, (problem.k_cache, problem.v_cache))
    assert isinstance(out, torch.Tensor)
    kit.check_out(problem, out)


@pytest.mark.gpu
def test_a_logit_beyond_fp16_is_no_nan() -> None:
    skip_unless_it_runs()
    problem = make(extend("large logits", (70, 70), dtype=torch.float16), "cuda")
    problem = replace(problem, q=problem.q.sign() * 1000, k_cache=problem.k_cache.sign() * 1000)
    attention = PagedAttention(device="cuda")
    case = problem.case
    sizes = (case.num_heads, case.num_kv_heads, case.head_dim, case.page_size)
    attention.plan(*problem.table, *sizes, causal=True, q_data_type=torch.float16, variant="cublaslt")
    out = attention.run(problem.q, (problem.k_cache, problem.v_cache))
    assert isinstance(out, torch.Tensor)
    assert out.isfinite().all()


@pytest.mark.gpu
def test_a_captured_run() -> None:
    skip_unless_it_runs()
    problem = make(extend("captured", (300, 700), (20, 33)), "cuda")
    attention = PagedAttention(device="cuda")
    case = problem.case
    sizes = (case.num_heads, case.num_kv_heads, case.head_dim, case.page_size)
    attention.plan(*problem.table, *sizes, causal=True, variant="cublaslt")
    q = torch.zeros_like(problem.q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attention.run(q, (problem.k_cache, problem.v_cache), return_lse=True)
    q.copy_(problem.q)
    graph.replay()
    kit.check(problem, out, lse)


@pytest.mark.gpu
def test_two_objects_take_turns() -> None:
    """Each has its own scratch, whatever the other has planned since."""
    skip_unless_it_runs()
    problems = [make(extend(f"turn {n}", (n, 2 * n)), "cuda") for n in (30, 500)]
    objects = [PagedAttention(device="cuda") for _ in problems]
    for attention, problem in zip(objects, problems, strict=True):
        case = problem.case
        sizes = (case.num_heads, case.num_kv_heads, case.head_dim, case.page_size)
        attention.plan(*problem.table, *sizes, causal=True, variant="cublaslt")
    for attention, problem in zip(objects, problems, strict=True):
        out, lse = attention.run(problem.q, (problem.k_cache, problem.v_cache), return_lse=True)
        kit.check(problem, out, lse)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test touches the file of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cublaslt.algorithms_of.cache_clear()
