"""The benchmarks' own arithmetic: cases, log parsing, tables. No figure of the README without its file."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from flashcore_sglang import bench, reference
from flashcore_sglang.bench import compare, decode, e2e, peers, plot, prefill, results, sparse, timing
from flashcore_sglang.bench.accuracy import Error, Truth, sample, token_truth
from flashcore_sglang.bench.cases import DECODE_SUITES, PREFILL_SUITES, DecodeCase, Heads, PrefillCase

ROOT = Path(__file__).resolve().parents[1]

TREES = [
    DecodeCase(levels=((3, 100),), page_size=16),
    DecodeCase(levels=((1, 64), (4, 40)), page_size=16),
    DecodeCase(levels=((1, 32), (2, 64), (3, 17)), page_size=16),
    DecodeCase(lens=(1, 16, 17), page_size=16),
]


@pytest.mark.parametrize("case", TREES, ids=lambda c: c.name)
def test_page_table_is_the_tree(case: DecodeCase) -> None:
    table, lens, num_pages = case.page_table("cpu")
    used: set[int] = set()
    tokens: dict[int, int] = {}
    for row, length in zip(table.tolist(), lens.tolist(), strict=True):
        pages = row[: -(-length // case.page_size)]
        assert len(set(pages)) == len(pages), f"{case.name}: a request holds a page twice"
        used.update(pages)
        for column, page in enumerate(pages):
            tokens[page] = min(case.page_size, length - column * case.page_size)
    assert used == set(range(num_pages)), case.name
    assert sum(tokens.values()) == case.unique_tokens, case.name
    assert case.unique_bytes == case.unique_tokens * 2 * 2 * case.heads.kv * case.heads.dim


def test_shared_levels_are_shared() -> None:
    case = DecodeCase(levels=((1, 32), (2, 64), (3, 17)), page_size=16)
    table, _, _ = case.page_table("cpu")
    assert torch.equal(table[:, :2], table[:1, :2].expand(6, 2))
    assert torch.equal(table[0, 2:6], table[2, 2:6])
    assert not set(table[0, 2:6].tolist()) & set(table[3, 2:6].tolist())
    assert len(set(table[:, 6].tolist())) == 6


def test_a_shared_node_of_broken_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="33 % 16"):
        DecodeCase(levels=((1, 33), (2, 16)), page_size=16).page_table("cpu")


def test_names_are_unique() -> None:
    for name, suite in DECODE_SUITES.items():
        names = [case.name for case in suite]
        assert len(set(names)) == len(names), name
    assert (
        DecodeCase(levels=((1, 5760), (64, 2432)), heads=Heads()).name == "decode/b64/ctx8192/shared5760/h32kv8d128/p64"
    )


def test_prefill_bytes_are_those_of_each_tensor_once() -> None:
    case = PrefillCase(2, 128, Heads(8, 2, 64), prefix=256, page_size=64)
    q_and_o = 2 * 2 * 128 * 8 * 64
    k_and_v = 2 * 2 * (128 + 256) * 2 * 64
    assert case.unique_bytes == 2 * (q_and_o + k_and_v)
    assert case.intensity == case.flops / case.unique_bytes
    assert replace(case, shared_prefix=True).unique_bytes == case.unique_bytes - 2 * 2 * 256 * 2 * 64


def test_the_96_heads_are_reported_one_by_one() -> None:
    case = prefill._PER_HEAD
    assert case in PREFILL_SUITES["dense"]
    rows = [results.Row(case.name, "fa3", "time_us", 22800.0), results.Row("another", "fa3", "time_us", 1.0)]
    line = prefill.per_head(case, [*rows, results.Row(case.name, "fa3", "tflops", 578.0)])
    assert "us a head: fa3 237.5; memory alone takes 16.0 at 4.2 TB/s" in line


def test_what_is_off_by_more_than_the_peers_is_not_timed() -> None:
    made = results.Results()
    calls = {"fa3": 1.0, "flashinfer": None, "flashcore": 3.0, "flashcore:wrong": 7.0}
    failures = compare.compare(
        made,
        "decode/x",
        {name: None if off is None else partial(torch.tensor, off) for name, off in calls.items()},
        error=lambda out: Error(out.item(), out.item() / 2),
        allowed=lambda of_peers: 3 * max(of_peers),
        time=lambda present: dict.fromkeys(present, timing.Time(2.0, 0.5)),
        metric="tb_s",
        work=6_000_000,
    )
    assert failures == ["decode/x: flashcore:wrong is off fp64 by 7.00e+00, allowed are 3.00e+00"]
    assert {(row.backend, row.metric): (row.value, row.spread) for row in made.rows} == {
        (name, metric): value
        for name, off in (("fa3", 1.0), ("flashcore", 3.0))
        for metric, value in (
            ("time_us", (2.0, 0.5)),
            ("tb_s", (3.0, 0.0)),
            ("max_error", (off, 0.0)),
            ("rms_error", (off / 2, 0.0)),
        )
    }


def test_only_what_is_missing_is_measured_again() -> None:
    cases = TREES[:2]
    made = results.Results()
    for name in ("flashcore", "fa3"):
        made.add(cases[0].name, name, "time_us", 1.0)
    assert list(compare.unmeasured(made, cases, ["auto"])) == cases[1:]
    assert list(compare.unmeasured(made, cases, ["auto", "wmma_sm80"])) == cases
    assert not made.rows, "of one run: the peers are measured again beside the new variant"


def decode_log(lines: list[tuple[int, float]]) -> str:
    line = "Decode batch, #running-req: {}, #token: 1, gen throughput (token/s): {:.2f}, #queue-req: 0"
    return "\n".join(line.format(running, speed) for running, speed in lines)


def test_steady_figures_are_medians_of_the_fullest_batch() -> None:
    log = decode_log([(4, 1.0), (512, 10.0), (512, 30.0), (511, 20.0), (100, 99.0)])
    assert e2e.steady(log) == (20.0, pytest.approx(1e3 * 511 / 20))
    assert e2e.steady(decode_log([(512, 0.0), (512, 1024.0)])) == (1024.0, 500.0)
    assert e2e.steady("no such line") == (0.0, 0.0)


def test_a_preset_is_a_backend_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_CONFIG", "exact")
    sparse = e2e.Backend("flashcore_sparse:topk-128k")
    assert (sparse.flag, sparse.name, sparse.file_name) == (
        "flashcore_sparse",
        "flashcore:topk-128k",
        "flashcore_sparse_topk-128k",
    )
    assert sparse.environment()["FLASHCORE_CONFIG"] == "topk-128k"
    for spec, name in (("fa3", "fa3"), ("flashcore_sparse", "flashcore")):
        assert (e2e.Backend(spec).flag, e2e.Backend(spec).name) == (spec, name)
        assert e2e.Backend(spec).environment()["FLASHCORE_CONFIG"] == "exact"


def test_workloads_are_flags_that_bench_serving_knows() -> None:
    sglang = find_spec("sglang")  # found, not imported, which takes a minute
    if sglang is None or sglang.origin is None:
        pytest.skip("SGLang is not installed")
    serving = Path(sglang.origin).with_name("benchmark") / "serving.py"
    known = set(re.findall(r'"(--[\w-]+)"', serving.read_text()))
    for name, workload in e2e.WORKLOADS.items():
        flags = workload.command(workload.output)
        assert {flag for flag in flags if flag.startswith("--")} <= known, name
        assert str(workload.output) in flags, name
        assert flags[-2:] == ["--max-concurrency", str(workload.concurrency)], name


@dataclass
class FakeServers:
    """Stands in for SGLang: which server is up, and what was sent to it."""

    up: list[str] = field(default_factory=list)
    sent: list[tuple[str, ...]] = field(default_factory=list)

    @contextmanager
    def server(self, model: str, backend: e2e.Backend, port: int, max_running: int, log: Path, flags: list[str]):  # type: ignore[no-untyped-def]
        if backend.spec == "broken":
            raise RuntimeError("did not start")
        self.up.append(backend.spec)
        log.write_text(decode_log([(4, 400.0)]))
        yield

    def serve(self, model: str, port: int, flags: list[str], output: Path, limit_s: float) -> dict[str, float]:
        self.sent.append((self.up[-1], *flags))
        if "fa3" in self.up[-1] and "4096" in flags:
            raise RuntimeError("bench_serving failed")
        log = output.parent / f"server_{self.up[-1].replace(':', '_')}.log"
        log.write_text(log.read_text() + "\n" + decode_log([(8, 800.0)]))
        return dict.fromkeys(("completed", *e2e.METRICS.values()), 1.0)


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> FakeServers:
    fake = FakeServers()
    monkeypatch.setattr(e2e, "server", fake.server)
    monkeypatch.setattr(e2e, "_serve", fake.serve)
    monkeypatch.setattr(e2e, "_healthy", lambda port: True)
    return fake


def test_a_run_goes_on_where_the_last_one_stopped(tmp_path: Path, servers: FakeServers) -> None:
    first = results.Results(path=tmp_path / "r.json", command="first")
    failures = e2e.run(
        first, "m", ["broken", "fa3", "flashcore_sparse"], ["prefill4k", "L6"], 32, tmp_path / "logs", []
    )
    assert [failure.split(":")[0] for failure in failures] == ["broken", "fa3 prefill4k"]
    assert servers.up == ["fa3", "flashcore_sparse"]
    assert {(row.case, row.backend) for row in results.load(tmp_path / "r.json")} == {
        ("e2e/L6", "fa3"),
        ("e2e/L6", "flashcore"),
        ("e2e/prefill4k", "flashcore"),
    }
    assert [row.value for row in first.rows if row.metric == "step_ms"] == [10.0] * 3  # of its own part of the log

    again = results.Results(path=tmp_path / "r.json", command="second")
    again.resume()
    backends = ["fa3", "flashcore_sparse", "flashcore_sparse:topk-128k"]
    failures = e2e.run(again, "m", backends, ["L6"], 8, tmp_path / "logs", [])
    assert not failures
    assert servers.up[2:] == ["flashcore_sparse:topk-128k"], "what is measured is not measured again"
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["command"] == "first && second"
    assert {row["backend"] for row in record["rows"]} == {"fa3", "flashcore", "flashcore:topk-128k"}


def test_a_cached_workload_prefills_before_it_measures(tmp_path: Path, servers: FakeServers) -> None:
    e2e.run(results.Results(), "m", ["flashcore_sparse"], ["L1"], 8, tmp_path, [])
    fill, measured = servers.sent
    assert fill[fill.index("--random-output-len") + 1] == "1"
    assert "--flush-cache" in fill
    assert measured[measured.index("--random-output-len") + 1] == "256"
    assert "--flush-cache" not in measured
    assert measured[-2:] == ("--warmup-requests", "0")


def test_sparse_goes_on_to_servers_of_a_model(
    tmp_path: Path, servers: FakeServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "SPARSE_CASES", [])  # kernels need a GPU
    path = tmp_path / "r.json"
    flags = ["--peers", "fa3", "--json", str(path), "--logs", str(tmp_path / "logs")]
    assert bench.main(["sparse", *flags]) == 0
    assert not servers.up, "no model, no server"
    assert bench.main(["sparse", *flags, "--model", "m"]) == 0
    assert servers.up == ["fa3", "flashcore_sparse:topk-128k"]
    measured = {(row.case, row.backend) for row in results.load(path) if row.metric == "tpot_ms"}
    assert measured == {(f"e2e/{load}", of) for load in ("L1", "L6") for of in ("fa3", "flashcore:topk-128k")}


def test_a_workload_larger_than_the_server_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--max-running 1024"):
        e2e.run(results.Results(), "m", ["fa3"], ["W1x2"], 512, tmp_path, [])


def test_markdown_shows_where_we_lose() -> None:
    rows = [
        results.Row("c", "fa3", "time_us", 100.0),
        results.Row("c", "flashinfer", "time_us", 75.0),
        results.Row("c", "flashcore", "time_us", 150.0),
        results.Row("c", "flashcore:topk", "time_us", 50.0),
    ]
    assert results.markdown(rows, "time_us").splitlines()[-1] == "| c | 100.0 | 75.0 | 150.0 | 50.0 | 1.50 |"
    best = results.markdown(rows, "time_us", reference=results.BEST).splitlines()
    assert (best[0].split(" | ")[-1], best[-1].split(" | ")[-1]) == ("flashcore / best peer |", "2.00 |")
    assert results.markdown(rows, "time_us", ours="flashcore:topk").splitlines()[-1].endswith("| 0.50 |")
    higher = [replace(row, metric="tflops") for row in rows]
    assert results.markdown(higher, "tflops", reference=results.BEST).splitlines()[-1].endswith("| 1.50 |")


def test_the_error_line_is_the_worst_case() -> None:
    errors = {"a": (1e-4, 2e-4), "b": (3e-4, 2e-4), "c": (9e-4, None)}
    rows = [results.Row(case, "flashcore", "max_error", ours) for case, (ours, _) in errors.items()]
    rows += [results.Row(case, "fa3", "max_error", fa3) for case, (_, fa3) in errors.items() if fa3]
    line = results.error_line(rows)
    assert "flashcore 3.0e-04, FA3 2.0e-04" in line
    assert line.endswith("it is at most 1.50 times FA3's (b).")
    rms = [replace(row, metric="rms_error", value=row.value / 2) for row in rows]
    line = results.error_line([*rows, *rms])
    assert line.endswith("it is at most 1.50 times FA3's (b), its root mean square is at most 1.50 times FA3's (b).")
    assert results.error_line([row for row in rows if row.backend == "flashcore"]) == ""


def test_saved_rows_come_back(tmp_path: Path) -> None:
    made = results.Results()
    made.add("decode/x", "flashcore", "time_us", 12.3456789, 0.5)
    made.add("decode/x", "flashcore", "max_error", 1.23456789e-5)
    made.save(tmp_path / "deep" / "r.json")
    assert results.load(tmp_path / "deep" / "r.json") == made.rows
    assert made.rows[1].value == 1.23457e-5, "small values keep their digits"
    assert set(json.loads((tmp_path / "deep" / "r.json").read_text())) == {"command", "host", "date", "rows"}


def test_rows_of_another_machine_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    results.Results().save(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), "host": "NVIDIA H200 (00000000)"}))
    with pytest.raises(ValueError, match="expected rows of this machine"):
        results.Results(path=file).resume()
    results.Results(path=tmp_path / "not there yet.json").resume()


def test_figures_by_another_method_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    published = timing.Method("write", "runs")
    results.Results(method=published.words).save(file)
    assert {"l2_flush": "write", "order": "runs"}.items() <= json.loads(file.read_text()).items()
    results.Results(path=file, method=published.words).resume()
    for other in (timing.Method("read", "runs"), timing.Method("write", "turns")):
        with pytest.raises(ValueError, match=r"expected rows measured with .*, got those with .*write.*runs"):
            results.Results(path=file, method=other.words).resume()


@pytest.mark.parametrize("order, runs", [("turns", "abab"), ("runs", "aabb")])
def test_every_run_finds_an_empty_l2_and_nothing_to_wait_for(
    order: timing.Order, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...
        def record(self) -> None:
            done.append("|")

        def synchronize(self) -> None: ...
        def elapsed_time(self, _: Event) -> float:
            return 0.002

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(timing, "flush_l2", lambda by: done.append("." if by == "write" else "?"))
    times = timing.measure_all(
        {name: partial(done.append, name) for name in "ab"}, 2, graph=False, method=timing.Method("write", order)
    )
    assert times == dict.fromkeys("ab", timing.Time(2.0, 0.0))
    queue = "." * timing._FLUSHES_AHEAD
    assert "".join(done).removeprefix("aabb") == "".join(f"{queue}|{name}|" for name in runs)


@pytest.mark.parametrize(
    "arguments, method",
    [
        ("decode", timing.Method("read", "turns").words),
        ("decode --flush write --order runs", timing.Method("write", "runs").words),
        ("prefill --order runs", timing.Method("read", "runs").words),
        ("sparse", timing.Method("read", "turns").words),
        ("e2e --model m", {}),
    ],
)
def test_the_method_is_recorded(arguments: str, method: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[results.Results] = []

    def run(measured: results.Results, *_: object) -> list[str]:
        made.append(measured)
        return []

    for benchmark in (decode, prefill, sparse, e2e):
        monkeypatch.setattr(benchmark, "run", run)
    assert bench.main(arguments.split()) == 0
    assert [measured.method for measured in made] == [method]


@pytest.mark.parametrize(
    "flags, wanted",
    [("", list(peers.PREFILL)), ("--no-peers", []), ("--peers fa3 cudnn", ["fa3", "cudnn"])],
)
def test_peers_are_chosen(flags: str, wanted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(prefill, "run", lambda _1, _2, _3, chosen, *_: seen.extend(chosen) or [])
    assert bench.main(["prefill", *flags.split()]) == 0
    assert seen == wanted


def test_known_peers_are_those_there_are() -> None:
    known = {name: bench._parser().parse_args([name]).peers for name in ("decode", "prefill", "sparse")}
    assert known["decode"] == list(peers.DECODE)
    assert known["prefill"] == list(peers.PREFILL)
    assert set(known["sparse"]) <= set(peers.DECODE)


def test_arguments_are_read_without_torch() -> None:
    code = "import sys; from flashcore_sglang import bench; bench._parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_tables_are_what_the_result_files_say() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts/bench/tables.py", "--check"], check=False)
    assert done.returncode == 0, "run scripts/bench/tables.py"


@pytest.mark.parametrize("name", ["h200_decode", "h200_prefill"])
def test_committed_pictures_are_of_the_committed_results(name: str) -> None:
    folder = ROOT / "scripts/bench/results"
    made_of = plot.source([folder / f"{name}.json"])
    assert made_of in (folder / f"{name}.svg").read_text(), f"flashcore bench plot {name}.json -o {name}.svg"
    assert f"scripts/bench/results/{name}.svg" in (ROOT / "README.md").read_text()


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved from now on."""
    module = pytest.importorskip("matplotlib.figure")
    saved: list[Any] = []
    save = module.Figure.savefig
    monkeypatch.setattr(module.Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k)))
    return saved


@pytest.mark.parametrize("name,metric,axes", [("h200_decode", "time_us", 2), ("h200_prefill", "tflops", 1)])
def test_a_picture_has_a_point_for_each_row(
    name: str, metric: str, axes: int, tmp_path: Path, figures: list[Any]
) -> None:
    file = ROOT / f"scripts/bench/results/{name}.json"
    for picture in ("one.svg", "two.svg"):
        assert bench.main(["plot", str(file), "-o", str(tmp_path / picture)]) == 0
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    rows = [row for row in results.load(file) if row.metric == metric]
    figure = figures[0]
    assert len(figure.axes) == axes
    points = [tuple(point) for series in figure.axes[0].collections for point in series.get_offsets()]
    assert sorted(y for _, y in points) == pytest.approx(sorted(row.value for row in rows))
    labels = {text.get_text() for text in figure.axes[0].get_legend().get_texts()}
    assert {row.backend for row in rows} <= labels


def test_limits_are_drawn(tmp_path: Path, figures: list[Any]) -> None:
    for name in ("decode", "prefill"):
        bench.main(["plot", str(ROOT / f"scripts/bench/results/h200_{name}.json"), "-o", str(tmp_path / "p.svg")])
    decode, prefill = (figure.axes[0].lines[0] for figure in figures)
    for size, time in zip(*decode.get_data(), strict=True):
        assert size / time / 1e6 == pytest.approx(4.2)
    intensity, speed = prefill.get_data()
    assert max(speed) == 750
    assert speed[0] == pytest.approx(4.2 * intensity[0])


def test_sparse_picture_is_budget_against_time_and_accuracy(tmp_path: Path, figures: list[Any]) -> None:
    made = results.Results()
    for budget, time, accuracy in ((1024, 20.0, 0.5), (4096, 40.0, 0.9)):
        case = f"sparse/b8/ctx131072/budget{budget}/h32kv8d128/p64"
        made.add(case, "fa3", "time_us", 400.0)
        made.add(case, "flashcore", "time_us", time)
        for task, worse in (("needle", 0.0), ("words", 0.25)):
            made.add(f"eval/{task}/ctx131072/budget{budget}", "flashcore:topk", "accuracy", accuracy - worse)
        made.add(f"eval/worst/ctx131072/budget{budget}", "flashcore:topk", "accuracy", 0.0)  # not counted twice
    made.add("sparse/b8/ctx131072/budget30%/h32kv8d128/p64", "flashcore", "time_us", 100.0)
    made.add("eval/needle/ctx131072/budget1024", "flashcore:exact", "accuracy", 0.95)
    made.add("e2e/L1", "fa3", "tpot_ms", 8.0)  # of a server: in no picture
    made.save(tmp_path / "r.json")
    assert bench.main(["plot", str(tmp_path / "r.json"), "-o", str(tmp_path / "p.png")]) == 0
    time, quality = figures[0].axes

    def lines(axes: Any) -> list[tuple[list[float], list[float]]]:
        return [tuple(list(values) for values in line.get_data()) for line in axes.lines if len(line.get_xdata())]

    assert ([1024, 4096, 39321], [20.0, 40.0, 100.0]) in lines(time)
    assert ([1024, 4096], [400.0, 400.0]) in lines(time)
    assert ([1024, 4096], pytest.approx([0.375, 0.775])) in lines(quality)
    assert ([1024, 4096], [0.25, 0.65]) in lines(quality)
    assert [0.95, 0.95] in [y for _, y in lines(quality)]


def test_a_picture_of_nothing_known_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = ROOT / "scripts/bench/results/h200_e2e.json"
    assert bench.main(["plot", str(server), "-o", str(tmp_path / "p.svg")]) == 2
    assert "got those of e2e" in capsys.readouterr().err
    renamed = results.Results(rows=[results.Row("decode/old", "fa3", "time_us", 1.0)])
    renamed.save(tmp_path / "r.json")
    pytest.importorskip("matplotlib")
    assert bench.main(["plot", str(tmp_path / "r.json"), "-o", str(tmp_path / "p.svg")]) == 2
    assert "decode/old: expected a case of the suites" in capsys.readouterr().err


def test_without_matplotlib_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    decode = ROOT / "scripts/bench/results/h200_decode.json"
    assert bench.main(["plot", str(decode), "-o", str(tmp_path / "p.svg")]) == 2
    assert "pip install 'flashcore-sglang[bench]'" in capsys.readouterr().err


def test_errors_are_found_and_nan_is_infinite() -> None:
    k, v = (torch.randn(5, 16, 2, 64, dtype=torch.float64) for _ in range(2))
    q = torch.randn(1, 8, 64, dtype=torch.float64)
    pages = torch.tensor([3, 0, 4], dtype=torch.int32)
    table = torch.tensor([0, 1]), torch.tensor([0, 3]), pages, torch.tensor([7])
    of_request, _ = reference.paged_attention(q, k, v, *table)
    truth = Truth.of([(2, token_truth(q[0], k, v, pages, 2 * 16 + 7)), (0, torch.zeros(8, 64, dtype=torch.float64))])
    out = torch.zeros(3, 8, 64, dtype=torch.float64)
    out[1] = torch.nan  # of a token that is not looked at
    out[2] = of_request[0]
    right = truth.error(out)
    assert right.largest < 1e-12
    assert right.rms <= right.largest
    out[2, 5, 3] += 0.25
    assert truth.error(out) == pytest.approx((0.25, 0.25 / math.sqrt(2 * 8 * 64)))
    out[0, 0, 0] = torch.nan
    assert truth.error(out) == (math.inf, math.inf)
    assert sample(100, 3) == [0, 49, 99]
    assert sample(2, 4) == [0, 1]
