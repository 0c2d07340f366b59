"""Configuration: precedence, sources, and one line for each mistake."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pydantic import ValidationError

from flashcore_sglang import config
from flashcore_sglang.config import Config, ConfigError


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(config.PREFIX)]:
        monkeypatch.delenv(name)


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_environment_over_file_over_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "policy: window\nsink_tokens: 64\n")
    monkeypatch.setenv("FLASHCORE_CONFIG", path)
    monkeypatch.setenv("FLASHCORE_SINK_TOKENS", "256")
    monkeypatch.setenv("FLASHCORE_CUBLASLT_WS_MB", "64")
    monkeypatch.setenv("FLASHCORE_VARIANT", "")  # empty: as if unset
    loaded = config.load(check=True)
    assert (loaded.policy, loaded.sink_tokens, loaded.cublaslt_ws_mb, loaded.check) == ("window", 256, 64, True)
    assert loaded.variant == "auto"
    sources = config.sources({"check"})
    assert sources["policy"] == f"file {path}"
    assert sources["sink_tokens"] == "env FLASHCORE_SINK_TOKENS"
    assert sources["check"] == "argument"
    assert sources["variant"] == "default"
    assert list(sources) == list(Config.model_fields)


def test_default_preset_writes_out_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = config.load()
    monkeypatch.setenv("FLASHCORE_CONFIG", "default")
    assert config.load() == defaults
    assert set(config.sources().values()) == {"preset default"}, "default.yaml must name every field"


PRESETS = {
    "default": {"policy": "exact", "variant": "auto", "page_size": 64},
    "exact": {"policy": "exact", "share_prefixes": True},
    "window": {"policy": "window", "recent_tokens": 8192},
    "topk-128k": {"policy": "topk", "budget_tokens": 4096, "dense_layers": 2},
    "wmma": {"variant": "wmma_sm80", "policy": "exact"},
}


def test_presets_are_the_documented_ones() -> None:
    assert set(config.presets()) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_CONFIG", name)
    loaded = config.load().model_dump()
    assert {key: loaded[key] for key in PRESETS[name]} == PRESETS[name]


@pytest.mark.parametrize("text, value", [("auto", "auto"), ("1", True), ("true", True), ("0", False), ("off", False)])
def test_metrics_reads_words(text: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_METRICS", text)
    assert config.load().metrics is value or config.load().metrics == value == "auto"


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        config.load().policy = "topk"  # type: ignore[misc]


@dataclass(frozen=True)
class Mistake:
    name: str
    message: str
    env: dict[str, str] = field(default_factory=dict)
    file: str | None = None


MISTAKES = [
    Mistake(
        "value in the environment",
        "FLASHCORE_POLICY: expected one of exact, window, topk, got 'fast'",
        {"FLASHCORE_POLICY": "fast"},
    ),
    Mistake("value in a file", "mine.yaml: variant: expected one of auto, wgmma_sm90,", file="variant: wmma"),
    Mistake(
        "type",
        "FLASHCORE_BUDGET_TOKENS: expected a whole number, at least 1, got '4k'",
        {"FLASHCORE_BUDGET_TOKENS": "4k"},
    ),
    Mistake(
        "fraction",
        "FLASHCORE_BUDGET_FRACTION: expected a number, at least 0, at most 1 or null, got '30'",
        {"FLASHCORE_BUDGET_FRACTION": "30"},
    ),
    Mistake(
        "multiple", "expected a whole number, at least 64, a multiple of 64, got '100'", {"FLASHCORE_SPLIT_KEYS": "100"}
    ),
    Mistake("zero", "top_p: expected a number, more than 0, at most 1, got 0", file="top_p: 0"),
    Mistake(
        "true for a number",
        "page_size: expected a whole number, at least 1, at most 1024, got True",
        file="page_size: yes",
    ),
    Mistake("false for a number", "top_p: expected a number, more than 0, at most 1, got False", file="top_p: false"),
    Mistake("negative", "sink_tokens: expected a whole number, at least 0, got -1", file="sink_tokens: -1"),
    Mistake(
        "not a number",
        "FLASHCORE_STD_WEIGHT: expected a number, at least 0, got 'nan'",
        {"FLASHCORE_STD_WEIGHT": "nan"},
    ),
    Mistake(
        "two types", "FLASHCORE_METRICS: expected true or false or auto, got 'some'", {"FLASHCORE_METRICS": "some"}
    ),
    Mistake(
        "unknown variable", "FLASHCORE_POLICI; did you mean FLASHCORE_POLICY? (allowed: ", {"FLASHCORE_POLICI": "topk"}
    ),
    Mistake(
        "unknown key", "mine.yaml: unknown key 'budget'; did you mean budget_tokens? (allowed: ", file="budget: 4096"
    ),
    Mistake(
        "missing file",
        "FLASHCORE_CONFIG=/no/such.yaml: neither a file nor a preset (presets: default,",
        {"FLASHCORE_CONFIG": "/no/such.yaml"},
    ),
    Mistake("missing preset", "did you mean topk-128k? (presets: default, exact,", {"FLASHCORE_CONFIG": "topk"}),
    Mistake("a folder", "FLASHCORE_CONFIG=/: neither a file nor a preset", {"FLASHCORE_CONFIG": "/"}),
    Mistake("not YAML", "mine.yaml: cannot be read as YAML: ", file="policy: [exact"),
    Mistake("not UTF-8", "mine.yaml: cannot be read as YAML: ", file="policy: \udcff"),
    Mistake("a list", "mine.yaml: expected `field: value` lines, got a YAML list", file="- exact"),
    Mistake(
        "budget",
        "policy topk: budget_tokens must exceed sink_tokens + recent_tokens = 128 + 512 = 640, got 640",
        {"FLASHCORE_POLICY": "topk", "FLASHCORE_BUDGET_TOKENS": "640"},
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_is_one_line(mistake: Mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in mistake.env.items():
        monkeypatch.setenv(name, value)
    if mistake.file is not None:
        path = tmp_path / "mine.yaml"
        path.write_bytes(mistake.file.encode(errors="surrogateescape"))
        monkeypatch.setenv("FLASHCORE_CONFIG", str(path))
    with pytest.raises(ConfigError) as error:
        config.load()
    assert mistake.message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_argument() -> None:
    with pytest.raises(ConfigError, match="argument: unknown field 'polcy'; did you mean policy"):
        config.load(polcy="topk")


def test_other_policies_do_not_check_the_budget() -> None:
    assert config.load(policy="window", recent_tokens=8192).budget_tokens == 4096


@pytest.mark.parametrize(
    "page_size, expected",
    [(1, (130, 513, 4096)), (64, (3, 9, 64)), (16, (9, 33, 256)), (1024, (1, 1, 4))],
)
def test_pages_round_up(page_size: int, expected: tuple[int, int, int]) -> None:
    assert config.load(sink_tokens=130, recent_tokens=513).pages(page_size) == expected


def test_pages_leave_one_to_choose() -> None:
    sink, recent, budget = config.load(policy="topk", sink_tokens=1, recent_tokens=1, budget_tokens=3).pages(64)
    assert (sink, recent, budget) == (1, 1, 3)
