"""The cublaslt variant's runs and file of algorithms, its way through a server's phase, and its plans on a GPU."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import kit
import pytest
import torch
from cases import extend, make
from hypothesis import given
from hypothesis import strategies as st

from flashcore_sglang import PagedAttention, cublaslt, ops, reference, variants
from flashcore_sglang.cublaslt import Algorithms, Matmuls, Workspace, cache_file, fp32_scores, split
from flashcore_sglang.ops import CublasLtShape
from flashcore_sglang.phase import Batch, Phase
from flashcore_sglang.planner import Capacity, PlannerOptions

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
        ops.cublaslt_workspace(SHAPE, 0)


SHAPE = CublasLtShape(
    batch=2,
    max_qo_len=300,
    max_kv_len=700,
    num_kv_heads=2,
    group=4,
    head_dim=64,
    fp16=False,
    causal=True,
    fp32_scores=False,
)


@pytest.mark.parametrize(
    "setting, dtype, fp32",
    [
        ("auto", torch.float16, True),
        ("auto", torch.bfloat16, False),
        ("fp16", torch.float16, False),
        ("fp32", torch.bfloat16, True),
    ],
)
def test_what_scores_are_kept_in(setting: str, dtype: torch.dtype, fp32: bool) -> None:
    assert fp32_scores(setting, dtype) == fp32


@dataclass(frozen=True)
class Split:
    name: str
    qo_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    runs: tuple[tuple[int, int, int, int], ...]  # begin, end, max_qo_len, max_kv_len


SPLITS = (
    Split("empty batch", (), (), ()),
    Split("no queries", (0, 0), (5, 700), ()),
    Split("one", (1,), (1,), ((0, 1, 64, 64),)),
    Split("even", (512,) * 4, (512,) * 4, ((0, 4, 512, 512),)),
    Split("a prefix of no keys", (64,), (0,), ((0, 1, 64, 0),)),
    Split("within the bound", (512, 256), (512, 512), ((0, 2, 512, 512),)),
    Split("long after short", (64, 8192), (64, 8192), ((0, 1, 64, 64), (1, 2, 8192, 8192))),
    Split("short after long", (8192, 1, 1), (8192, 700, 650), ((0, 1, 8192, 8192), (1, 3, 64, 704))),
    Split("no queries in between", (100, 100, 0, 100), (100, 100, 0, 100), ((0, 4, 128, 128),)),
    Split("no queries and long", (100, 0), (100, 900), ((0, 1, 128, 128),)),
)


@pytest.mark.parametrize("case", SPLITS, ids=lambda case: case.name)
def test_split(case: Split) -> None:
    runs = split(case.qo_lens, case.kv_lens, SHAPE)
    assert [(run.begin, run.end, run.shape.max_qo_len, run.shape.max_kv_len) for run in runs] == list(case.runs)
    for run in runs:
        assert run.shape.batch == run.end - run.begin
        assert run.shape._replace(batch=2, max_qo_len=300, max_kv_len=700) == SHAPE


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3000)), max_size=30))
def test_every_query_is_in_one_run_that_holds_it(lens: list[tuple[int, int]]) -> None:
    qo_lens, kv_lens = [qo for qo, _ in lens], [qo + prefix for qo, prefix in lens]
    runs = split(qo_lens, kv_lens, SHAPE)
    held = [i for run in runs for i in range(run.begin, run.end)]
    assert held == sorted(set(held))
    assert {i for i, qo in enumerate(qo_lens) if qo} <= set(held)
    for run in runs:
        assert max(qo_lens[run.begin : run.end]) <= run.shape.max_qo_len
        assert max(kv_lens[run.begin : run.end]) <= run.shape.max_kv_len


class FakeWorkspace(Workspace):
    """Plans on a machine without a GPU: it remembers what it is asked for."""

    def __init__(self) -> None:
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self.asked: list[tuple[CublasLtShape, bool]] = []

    def plan(self, shape: CublasLtShape, measure: bool = True) -> None:
        self.asked.append((shape, measure))


def test_a_phase_computes_each_request_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server's extend does, with the reference in place of the kernel: the parts make up the whole batch."""
    case = extend("extend", (300, 700), (4, 4), (2, 90), (500, 500), page_size=16, causal=True)
    problem = make(case)
    slots = torch.zeros(len(case.q_lens), 1024, dtype=torch.int32)
    indptr, pages = problem.table[1].tolist(), problem.table[2].tolist()
    for i in range(len(case.q_lens)):
        of_request = torch.tensor(pages[indptr[i] : indptr[i + 1]], dtype=torch.int32)
        held = (of_request[:, None] * 16 + torch.arange(16, dtype=torch.int32)).flatten()
        slots[i, : len(held)] = held
    workspace = FakeWorkspace()
    phase = Phase(
        "prefill",
        variants.Choice(variants.BY_NAME["cublaslt"], variants.Tiling(64, 1), 4),
        PlannerOptions(page_size=16),
        Capacity(16, 2048, 1024, problem.k_cache.shape[0], case.num_kv_heads, case.group, 64, 4, page_size=16),
        case.head_dim,
        "cpu",
        matmuls=Matmuls(workspace, SHAPE._replace(num_kv_heads=case.num_kv_heads, group=case.group)),
    )
    lengths: list[tuple[int, int]] = []

    def attend(
        q: Any, k: Any, v: Any, plan: Any, _o: Any, _l: Any, out: torch.Tensor, lse: Any, **settings: Any
    ) -> None:
        assert (settings["variant"], settings["fp32_scores"], lse) == ("cublaslt", False, None)
        assert settings["workspace"] is workspace.tensor
        qo_indptr = plan[0]
        tokens = slice(int(qo_indptr[0]), int(qo_indptr[-1]))
        assert out[tokens].isnan().all()
        out[tokens] = reference.paged_attention(q, k, v, *plan[:4], causal=True)[0][tokens].to(out.dtype)
        lengths.append((settings["max_qo_len"], settings["max_kv_len"]))

    monkeypatch.setattr(ops, "attend", attend)
    batch = Batch(
        req_to_token=slots,
        req_pool_indices=torch.arange(len(case.q_lens)),
        seq_lens=torch.tensor(case.kv_lens),
        num_tokens=sum(case.q_lens),
        num_pages=len(pages),
        qo_indptr=problem.table[0],
        qo_lens=case.q_lens,
        kv_lens=case.kv_lens,
    )
    phase.begin(batch, [-1])
    out = torch.full_like(problem.q, torch.nan)
    caches = problem.k_cache.nan_to_num(), problem.v_cache.nan_to_num()
    phase.attend(problem.q, *caches, out, layer_id=0, window=-1, sm_scale=0.125, logits_soft_cap=0.0)
    whole, _ = reference.paged_attention(problem.q, *caches, *problem.table, causal=True)
    torch.testing.assert_close(out.float(), whole, rtol=1e-2, atol=1e-2)
    assert [(run.max_qo_len, run.max_kv_len, measured) for run, measured in workspace.asked] == [
        (*sizes, False) for sizes in lengths
    ]
    assert lengths == [(320, 704), (64, 128), (512, 512)]


def test_a_phase_wants_lengths_on_the_host() -> None:
    with pytest.raises(ValueError, match="expected all lengths on the host, got none; serve with another variant"):
        Matmuls(FakeWorkspace(), SHAPE).begin([3], None)


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
    assert len(lines.splitlines()) >= 2  # S and P V
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
def test_scores_in_fp16(dtype: torch.dtype, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an LSE; several runs, chunks of keys, blocks of queries and spans of blocks."""
    skip_unless_it_runs()
    monkeypatch.setenv("FLASHCORE_CUBLASLT_SCORES", "fp16")
    problem = make(extend("fp16 scores", (1100, 9000), (700, 700), (1, 5000), dtype=dtype, causal=causal), "cuda")
    attention = PagedAttention(device="cuda")
    case = problem.case
    sizes = (case.num_heads, case.num_kv_heads, case.head_dim, case.page_size)
    attention.plan(*problem.table, *sizes, causal=causal, q_data_type=dtype, variant="cublaslt")
    out = attention.run(problem.q, (problem.k_cache, problem.v_cache))
    assert isinstance(out, torch.Tensor)
    kit.check_out(problem, out)


@pytest.mark.gpu
def test_a_logit_beyond_fp16_is_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_it_runs()
    monkeypatch.setenv("FLASHCORE_CUBLASLT_SCORES", "fp16")
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
def test_an_lse_is_refused_with_scores_in_fp16() -> None:
    skip_unless_it_runs()
    problem = make(extend("lse", (30, 70)), "cuda")
    scratch = Workspace(torch.device("cuda", 0), 32, Algorithms(None))
    scratch.plan(kit.matmuls(problem.case))
    with pytest.raises(RuntimeError, match="expected scores in fp32 for an LSE, got fp16; plan and run with"):
        kit.attend(problem, kit.make_plan(problem), variant="cublaslt", workspace=scratch.tensor, fp32_scores=False)


@pytest.mark.gpu
def test_what_is_not_measured_runs_and_can_be_measured_later(tmp_path: Path) -> None:
    skip_unless_it_runs()
    problem = make(extend("not measured", (90, 170), num_heads=10), "cuda")
    scratch = Workspace(torch.device("cuda", 0), 32, Algorithms(tmp_path / "file.json"))
    shape = kit.matmuls(problem.case)
    scratch.plan(shape, measure=False)
    assert not (tmp_path / "file.json").exists()
    out, lse = kit.attend(problem, kit.make_plan(problem), variant="cublaslt", workspace=scratch.tensor)
    kit.check(problem, out, lse)
    scratch.plan(shape)
    assert Algorithms(tmp_path / "file.json").lines()


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
