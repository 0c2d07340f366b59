"""The `flashcore` command: what it prints, and one line on stderr for a mistake."""

from __future__ import annotations

import json
import os

import pytest

from flashcore_sglang import cli, config, doctor
from flashcore_sglang.probes import Check
from flashcore_sglang.variants import VARIANTS


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(config.PREFIX)]:
        monkeypatch.delenv(name)


def test_config_show_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FLASHCORE_CONFIG", "topk-128k")
    monkeypatch.setenv("FLASHCORE_BUDGET_TOKENS", "8192")
    assert cli.main(["config", "show", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert list(shown) == list(config.Config.model_fields)
    assert (shown["policy"]["value"], shown["policy"]["source"]) == ("topk", "preset topk-128k")
    assert (shown["budget_tokens"]["value"], shown["budget_tokens"]["source"]) == (8192, "env FLASHCORE_BUDGET_TOKENS")
    assert (shown["check"]["value"], shown["check"]["source"]) == (False, "default")
    assert all(field["description"] for field in shown.values())


def test_config_show_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    values = [row[:3] for row in rows]
    assert ["share_prefixes", "true", "default"] in values
    assert ["budget_fraction", "null", "default"] in values
    assert set(config.Config.model_fields) <= {row[0] for row in rows if row}


def test_variants_of_another_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["variants", "--sm", "9.0", "--json", "--shape", "b16,h32,kv8,d128,page64,bf16,prefill"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [variant["name"] for variant in shown["variants"]] == [variant.name for variant in VARIANTS]
    assert shown["choice"]["variant"] == "wgmma_sm90"
    assert shown["choice"]["tiling"]["rows_per_tile"] == 192


def test_variants_table_names_the_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["variants", "--sm", "8.0", "--shape", "h32,kv8,d128"]) == 0
    out = capsys.readouterr().out
    assert all(variant.name in out for variant in VARIANTS)
    assert "on cuda sm_80: wmma_sm80 (64 packed queries a tile, 2 CTAs on each SM)" in out
    assert "not measured: the first of the table that can" in out
    assert "not wgmma_sm90: requires compute capability 9.0 or newer, got 8.0" in out


def test_variants_table_names_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["variants", "--sm", "9.0", "--shape", "h32,kv8,d128,prefill,causal"]) == 0
    assert "measured: 665 against 299 (wmma_sm80) and 202 (cublaslt) TFLOPS" in capsys.readouterr().out


def test_variants_force_by_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FLASHCORE_VARIANT", "wmma_sm80")
    assert cli.main(["variants", "--sm", "9.0", "--shape", "h32,kv8,d128"]) == 0
    assert "on cuda sm_90: wmma_sm80" in capsys.readouterr().out


MISTAKES = [
    (
        ["config", "show"],
        {"FLASHCORE_POLICY": "fast"},
        "FLASHCORE_POLICY: expected one of exact, window, topk, got 'fast'",
    ),
    (["config", "show"], {"FLASHCORE_CONFIG": "nope"}, "FLASHCORE_CONFIG=nope: neither a file nor a preset"),
    (["variants", "--sm", "9.0", "--shape", "h32"], {}, "shape 'h32': expected b16,"),
    (["variants", "--sm", "hopper"], {}, "--sm: expected a compute capability as in 9.0, got 'hopper'"),
    (["variants", "--sm", "9.0", "--shape", "h32,kv8,d80"], {}, "requires decode head_dim 64|128, got 80"),
    (
        ["variants", "--sm", "8.0", "--shape", "h32,kv8,d64", "--variant", "wgmma_sm90"],
        {},
        "use variant wmma_sm80 or auto",
    ),
]


@pytest.mark.parametrize("argv, env, message", MISTAKES)
def test_mistake_is_one_line_and_status_2(
    argv: list[str],
    env: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith(f"flashcore {argv[0]}: ")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "argv", [[], ["docter"], ["config"], ["doctor", "--yaml"], ["bench", "e2e", "--model", "m", "--workloads", "W9"]]
)
def test_usage_is_status_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2


def test_bench_has_the_rest_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import flashcore_sglang.bench

    monkeypatch.setattr(flashcore_sglang.bench, "main", lambda argv: len(argv))
    assert cli.main(["bench", "decode", "--json", "x"]) == 3


@pytest.mark.parametrize("status, exit_status", [("ok", 0), ("warn", 0), ("skip", 0), ("fail", 1)])
def test_doctor_status(
    status: doctor.Status, exit_status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "PROBES", {"one": lambda: [Check("one", status, "what it saw", "what to do")]})
    assert cli.main(["doctor"]) == exit_status
    assert "what it saw" in (text := capsys.readouterr().out)
    assert "-> what to do" in text
    assert cli.main(["doctor", "--json"]) == exit_status
    report = json.loads(capsys.readouterr().out)
    assert report == {
        "ok": exit_status == 0,
        "checks": [{"name": "one", "status": status, "detail": "what it saw", "fix": "what to do"}],
    }
