"""The capability table and the chooser, for machines that this one is not."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from flashcore_sglang import measured
from flashcore_sglang.config import Config
from flashcore_sglang.measured import CLASSES, Class, class_of
from flashcore_sglang.variants import (
    BY_NAME,
    PHASES,
    VARIANTS,
    Device,
    Shape,
    UnsupportedError,
    choose,
    compiled,
    describe,
    missing,
    parse_shape,
    unavailable,
    unfit,
    why_not,
)

RESULTS = Path(__file__).parents[1] / "scripts" / "bench" / "results"
ALL = frozenset({"wgmma_sm90", "wmma_sm80", "cublaslt", "cpu"})
H200 = Device("cuda", ALL, sm=(9, 0), units=132)
A100 = Device("cuda", ALL, sm=(8, 0), units=108)
B200 = Device("cuda", ALL, sm=(10, 0), units=148)
T4 = Device("cuda", ALL, sm=(7, 5), units=40)
CPU = Device("cpu", ALL, units=8)
LLAMA = Shape(32, 8, 128, 64)


@dataclass(frozen=True)
class Case:
    name: str
    shape: Shape
    device: Device
    variant: str
    ctas: int


CASES = [
    Case("hopper decode", LLAMA, H200, "wgmma_sm90", 264),
    Case("hopper prefill", replace(LLAMA, phase="prefill"), H200, "wgmma_sm90", 132),
    Case("hopper decode, page 1", replace(LLAMA, page_size=1), H200, "wmma_sm80", 264),
    Case("hopper decode, page 128", replace(LLAMA, page_size=128), H200, "wgmma_sm90", 264),
    Case("hopper decode, page 256", replace(LLAMA, page_size=256), H200, "wmma_sm80", 264),
    Case("hopper decode, head 256", replace(LLAMA, head_dim=256), H200, "wmma_sm80", 264),
    Case("hopper prefill, head 256", replace(LLAMA, head_dim=256, phase="prefill"), H200, "wgmma_sm90", 132),
    Case("hopper prefill, head 96", replace(LLAMA, head_dim=96, phase="prefill"), H200, "wmma_sm80", 264),
    Case("hopper, library without sm_90a", LLAMA, replace(H200, compiled=frozenset({"wmma_sm80"})), "wmma_sm80", 264),
    Case("ampere", LLAMA, A100, "wmma_sm80", 216),
    Case("blackwell has no wgmma", LLAMA, B200, "wmma_sm80", 296),
    Case("cpu, fp32", replace(LLAMA, dtype="fp32", page_size=5), CPU, "cpu", 8),
]


def test_a_variant_that_lacks_a_library_says_which() -> None:
    device = replace(H200, compiled=ALL - {"cublaslt"}, missing={"cublaslt": "needs libcublasLt.so.13"})
    assert unavailable(BY_NAME["cublaslt"], device) == "needs libcublasLt.so.13"
    with pytest.raises(UnsupportedError, match=r"variant cublaslt needs libcublasLt.so.13; use variant wgmma_sm90"):
        choose(replace(LLAMA, phase="prefill"), device, "cublaslt")
    info = json.dumps({"variants": ["cpu"], "missing": dict(device.missing)})
    assert missing(info) == device.missing


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_choice(case: Case) -> None:
    choice = choose(case.shape, case.device)
    assert (choice.variant.name, choice.num_ctas) == (case.variant, case.ctas), choice
    known = class_of(case.shape, case.device.sm)
    ranked = [] if known is None else list(known.ranked())
    ranked += [variant.name for variant in VARIANTS if variant.name not in ranked]
    assert [name for name, _ in choice.reasons] == ranked[: ranked.index(case.variant)]
    assert all(reason for _, reason in choice.reasons)
    assert choose(case.shape, case.device, case.variant) == replace(choice, reasons=(), why="forced")


@pytest.mark.parametrize("entry", CLASSES, ids=lambda entry: entry.case)
def test_table_holds_what_was_measured(entry: Class) -> None:
    path = RESULTS / f"h200_variants_{entry.phase}.json"
    metric = {"TFLOPS": "tflops", "us": "time_us"}[entry.unit]
    found = {
        row["backend"].removeprefix("flashcore:"): round(row["value"], 0 if entry.unit == "TFLOPS" else 1)
        for row in json.loads(path.read_text())["rows"]
        if (row["case"], row["metric"]) == (entry.case, metric)
    }
    assert found == entry.figures


def test_the_fastest_is_taken() -> None:
    """A class in which the table's last variant wins, to see that figures decide and not the table."""
    decode = replace(CLASSES[-1], figures={"wgmma_sm90": 20.0, "wmma_sm80": 10.0})
    prefill = replace(CLASSES[0], figures={"wgmma_sm90": 400, "wmma_sm80": 500, "cublaslt": 600})
    assert decode.ranked() == ("wmma_sm80", "wgmma_sm90")
    assert prefill.ranked() == ("cublaslt", "wmma_sm80", "wgmma_sm90")
    assert (
        prefill.why("cublaslt")
        == f"measured: 600 against 500 (wmma_sm80) and 400 (wgmma_sm90) TFLOPS in {prefill.case}"
    )


def test_figures_decide_among_those_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(32, 8, 128, 64, "bf16", "prefill", 1, ("causal",))
    monkeypatch.setattr(measured, "CLASSES", (replace(CLASSES[3], figures={"cublaslt": 3, "wmma_sm80": 2}),))
    assert choose(shape, H200).variant.name == "cublaslt"
    windowed = choose(replace(shape, features=("causal", "window_left")), H200)
    assert windowed.variant.name == "wmma_sm80"
    assert windowed.reasons == (("cublaslt", "requires only causal|lse, got window_left"),)
    assert choose(shape, A100).why == "not measured: the first of the table that can"


CLASSES_OF = (
    ("small decode", Shape(32, 8, 128, 64, batch=4), "decode/b1/ctx8192/h32kv8d128/p64"),
    ("decode", Shape(32, 8, 128, 64, batch=5), "decode/b64/ctx8192/h32kv8d128/p64"),
    ("decode of another head size", Shape(32, 8, 96, 64), None),
    (
        "prefill",
        Shape(32, 8, 128, 64, phase="prefill", features=("causal", "lse")),
        "prefill/b4/s8192/h32kv8d128/causal1/bf16/p64",
    ),
    ("not causal", Shape(16, 16, 64, 64, "fp16", "prefill"), "prefill/b16/s2048/h16kv16d64/causal0/fp16/p64"),
)


@pytest.mark.parametrize("name, shape, case", CLASSES_OF, ids=[case[0] for case in CLASSES_OF])
def test_class_of_a_shape(name: str, shape: Shape, case: str | None) -> None:
    found = class_of(shape, (9, 0))
    assert (found and found.case) == case, name
    assert class_of(shape, (8, 0)) is None


REFUSED = [
    ("no GPU kernel below sm_80", LLAMA, T4, "auto", "requires compute capability 8.0 or newer, got 7.5"),
    ("head size", replace(LLAMA, head_dim=80), H200, "auto", "requires decode head_dim 64|96|128|256, got 80"),
    (
        "group",
        replace(LLAMA, num_qo_heads=17, num_kv_heads=1),
        CPU,
        "auto",
        "at most 16 query heads of a KV head, got 17",
    ),
    (
        "heads",
        replace(LLAMA, num_qo_heads=12),
        CPU,
        "auto",
        "requires query heads a multiple of KV heads, got 12 and 8",
    ),
    ("fp32 on a GPU", replace(LLAMA, dtype="fp32"), H200, "auto", "requires dtype bf16|fp16, got fp32"),
    (
        "forced, page",
        replace(LLAMA, page_size=5),
        H200,
        "wgmma_sm90",
        "requires page_size 16|32|64|128, got 5; use variant wmma_sm80",
    ),
    (
        "forced, device",
        LLAMA,
        A100,
        "wgmma_sm90",
        "requires compute capability 9.0 or newer, got 8.0; use variant wmma_sm80",
    ),
    ("forced, cpu on a GPU", LLAMA, H200, "cpu", "requires a cpu device, got cuda; use variant wgmma_sm90|wmma_sm80"),
    ("forced, phase", LLAMA, H200, "cublaslt", "cublaslt has no decode kernel"),
    (
        "forced, two reasons",
        replace(LLAMA, page_size=5, head_dim=256),
        H200,
        "wgmma_sm90",
        "head_dim 64|128, got 256 and requires page_size",
    ),
    (
        "forced, not compiled",
        LLAMA,
        replace(H200, compiled=frozenset({"cpu"})),
        "wmma_sm80",
        "(it holds cpu); no variant can",
    ),
    ("unknown", LLAMA, H200, "wmma", "variant wmma: expected one of auto, wgmma_sm90, wmma_sm80, cublaslt, cpu"),
]


@pytest.mark.parametrize("name, shape, device, forced, message", REFUSED, ids=[case[0] for case in REFUSED])
def test_refusal_says_required_and_got(name: str, shape: Shape, device: Device, forced: str, message: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        choose(shape, device, forced)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_features_are_refused_not_ignored() -> None:
    shape = replace(LLAMA, phase="prefill", features=("causal", "logits_soft_cap"))
    assert unfit(BY_NAME["cublaslt"], shape) == "requires only causal|lse, got logits_soft_cap"
    assert why_not(BY_NAME["wmma_sm80"], shape, H200) is None


def test_every_variant_of_the_config_is_in_the_table() -> None:
    allowed = Config.model_json_schema()["properties"]["variant"]["enum"]
    assert set(allowed) == {"auto", *BY_NAME}


def test_a_tile_holds_a_whole_group() -> None:
    # A row is a whole number of tokens with all the query heads of a KV head: the planner divides rows_per_tile by it.
    for variant in VARIANTS:
        for phase in PHASES:
            for tiling in variant.tilings(phase).values():
                assert tiling.rows_per_tile >= variant.max_group


def test_compiled_reads_build_info() -> None:
    device = Device("cuda", compiled(json.dumps({"cuda": True, "variants": ["cpu", "wmma_sm80"]})), sm=(9, 0))
    assert [variant.name for variant in VARIANTS if unavailable(variant, device) is None] == ["wmma_sm80"]


def test_shape_reads_what_it_prints() -> None:
    text = "b16,h28,kv4,d96,page16,fp16,prefill,causal"
    shape = parse_shape(text)
    assert shape == Shape(28, 4, 96, 16, "fp16", "prefill", 16, ("causal",))
    assert describe(shape) == text
    assert parse_shape("h32,kv8,d128") == LLAMA


@pytest.mark.parametrize("text", ["h32,kv8", "h32,kv8,d128,fp64", "h0,kv8,d128", "", "h32,kv8,d128,page"])
def test_bad_shape_is_one_line(text: str) -> None:
    with pytest.raises(UnsupportedError, match="expected b16,h32,kv8,d128,page64"):
        parse_shape(text)
