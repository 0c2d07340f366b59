"""`flashcore bench e2e`: a real SGLang server with dummy weights, driven by SGLang's own bench_serving.

What a client sees (`output_tok_s`, `tpot_ms`, `itl_ms`, `ttft_ms`) is bench_serving's. `itl_ms` is the median gap
between chunks as its one Python thread reads them: where the server is faster than that thread, chunks wait in the
socket and are read in bursts, and the median gap is shorter than any step was. `step_ms` is the honest figure beside
it: how long the server takes for one token of each request of its fullest batch, from its own log.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..launch import launched, listen_on
from ..plugin import BACKEND
from .results import OURS, Results

_START_LIMIT_S = 300


@dataclass(frozen=True)
class Workload:
    """What bench_serving is asked to send.

    Attributes:
        data: its flags for the prompts; `{output}` stands for the tokens that each request generates.
        concurrency: requests at once.
        output: tokens that each request generates.
        cached: a first, unmeasured pass prefills the prompts, so that the measured one does nothing but decode. Else
            the first requests wait, after their first token, until the last prompt is prefilled.
    """

    data: str
    concurrency: int
    output: int
    cached: bool = False

    def command(self, output: int) -> list[str]:
        """Flags, for `output` tokens a request."""
        return [*self.data.format(output=output).split(), "--max-concurrency", str(self.concurrency)]


def _shared(groups: int, prompts: int, prefix: int, question: int) -> Workload:
    data = (
        f"--dataset-name generated-shared-prefix --gsp-num-groups {groups} --gsp-prompts-per-group {prompts} "
        f"--gsp-system-prompt-len {prefix} --gsp-question-len {question} --gsp-fast-prepare --gsp-output-len {{output}}"
    )
    return Workload(data, concurrency=groups * prompts, output=256)


def _random(prompts: int, length: int, output: int, concurrency: int, cached: bool = False) -> Workload:
    data = (
        f"--dataset-name random-ids --num-prompts {prompts} --random-input-len {length} --random-output-len {{output}} "
        "--random-range-ratio 1"
    )
    return Workload(data, concurrency, output, cached)


# W1, W2: many requests over few long prefixes; W1x2: 1,024 at once. W3: long contexts, prefill included. W4: nothing
# shared. L1, L6: decode at 128K by itself.
WORKLOADS: dict[str, Workload] = {
    "W1": _shared(4, 128, 8192, 128),
    "W2": _shared(1, 64, 65536, 256),
    "W3": _random(4, 129000, 256, 4),
    "W4": _random(1024, 1024, 256, 512),
    "W1x2": _shared(8, 128, 8192, 128),
    "L1": _random(1, 129000, 256, 1, cached=True),
    "L6": _random(6, 129000, 256, 6, cached=True),
    "short": _shared(1, 8, 512, 64),
    "prefill4k": _random(32, 4096, 1, 32),
    "prefill128k": _random(4, 129000, 1, 4),
}

# metric of a result file -> field of bench_serving's record; the last two are of the server's log
METRICS: dict[str, str] = {
    "output_tok_s": "output_throughput",
    "input_tok_s": "input_throughput",
    "itl_ms": "median_itl_ms",
    "tpot_ms": "median_tpot_ms",
    "ttft_ms": "median_ttft_ms",
    "steady_tok_s": "steady",
    "step_ms": "step",
}

_DECODE_LINE = re.compile(r"Decode batch.*?#running-req: (\d+).*?gen throughput \(token/s\): ([\d.]+)")


def steady(log: str) -> tuple[float, float]:
    """What the server's log says of its fullest decode batch, as medians of its lines.

    Args:
        log: the server's log of one workload.

    Returns:
        Tokens a second, and milliseconds of a step; zeros where the log has no decode line.
    """
    lines = [(int(running), float(speed)) for running, speed in _DECODE_LINE.findall(log)]
    fullest = max((running for running, _ in lines), default=0)
    full = [(running, speed) for running, speed in lines if running >= 0.98 * fullest and speed > 0]
    if not full:
        return 0.0, 0.0
    speeds = (speed for _, speed in full)
    return statistics.median(speeds), statistics.median(1e3 * running / speed for running, speed in full)


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health_generate", timeout=30) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


@dataclass(frozen=True)
class Backend:
    """An `--attention-backend` value, or `flashcore_sparse:PRESET` for one of ours under FLASHCORE_CONFIG=PRESET."""

    spec: str

    @property
    def flag(self) -> str:
        return self.spec.partition(":")[0]

    @property
    def preset(self) -> str:
        return self.spec.partition(":")[2]

    @property
    def name(self) -> str:
        """In a result file."""
        return self.spec.replace(BACKEND, OURS)

    @property
    def file_name(self) -> str:
        return self.spec.replace(":", "_")

    def environment(self) -> dict[str, str]:
        return {**os.environ, "FLASHCORE_CONFIG": self.preset} if self.preset else dict(os.environ)


@contextmanager
def server(model: str, backend: Backend, port: int, max_running: int, log: Path, flags: list[str]) -> Iterator[None]:
    """A server that is up inside the block and gone after it, with every process it started."""
    command = ["--model", model, "--load-format", "dummy", "--attention-backend", backend.flag]
    command += listen_on(port, flags)
    command += ["--mem-fraction-static", "0.88", "--cuda-graph-backend-prefill", "disabled"]
    command += ["--cuda-graph-max-bs", str(max_running), "--max-running-requests", str(max_running), *flags]
    try:
        with launched(command, backend.environment(), log, grace_s=5) as process:
            deadline = time.monotonic() + _START_LIMIT_S
            while "ready to roll" not in log.read_text():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(
                        f"the {backend.spec} server did not start; the end of {log}:\n{log.read_text()[-3000:]}"
                    )
                time.sleep(0.5)
            yield
    finally:
        time.sleep(2)  # the driver frees the memory of killed processes a moment later


def _serve(model: str, port: int, flags: list[str], output: Path, limit_s: float) -> dict[str, float]:
    """One pass of bench_serving; its record."""
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--model", model, "--tokenizer", model, "--disable-tqdm"]
    command += ["--output-file", str(output), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
    if done.returncode:
        raise RuntimeError(f"bench_serving {shlex.join(flags)} failed:\n{done.stderr[-3000:]}")
    record: dict[str, float] = json.loads(output.read_text().splitlines()[-1])
    return record


def drive(model: str, workload: Workload, port: int, log: Path, output: Path, limit_s: float) -> dict[str, float]:
    """Sends a workload to the server that is up.

    Args:
        model: folder with the tokenizer.
        workload: what to send.
        port: of the server.
        log: the server's log, which it goes on writing.
        output: bench_serving appends its records here.
        limit_s: seconds after which a pass counts as hung.

    Returns:
        bench_serving's record, with `steady` and `step` of the server's log.
    """
    before = ["--warmup-requests", "1", "--flush-cache"]
    if workload.cached:
        _serve(model, port, [*workload.command(1), "--warmup-requests", "0", "--flush-cache"], output, limit_s)
        before = ["--warmup-requests", "0"]
    seen = len(log.read_text())
    record = _serve(model, port, [*workload.command(workload.output), *before], output, limit_s)
    record["steady"], record["step"] = steady(log.read_text()[seen:])
    return record


def run(
    results: Results,
    model: str,
    backends: list[str],
    workloads: list[str],
    max_running: int,
    logs: Path,
    flags: list[str],
    limit_s: float = 300,
    port: int = 30000,
) -> list[str]:
    """Every workload on every backend, one server after the other on the same GPU; rows are saved as they come.

    What `results` has already is not measured again, and what fails does not stop the rest.

    Returns:
        What failed, a text each.

    Raises:
        ValueError: a workload keeps more requests running than the server would.
    """
    for name in workloads:
        if WORKLOADS[name].concurrency > max_running:
            raise ValueError(
                f"{name} keeps {WORKLOADS[name].concurrency} requests running, the server at most {max_running}: "
                f"--max-running {WORKLOADS[name].concurrency}"
            )
    logs.mkdir(parents=True, exist_ok=True)
    failures = []
    for backend in map(Backend, backends):
        missing = [workload for workload in workloads if not results.has(f"e2e/{workload}", backend.name)]
        if not missing:
            continue
        log = logs / f"server_{backend.file_name}.log"
        try:
            with server(model, backend, port, max_running, log, flags):
                for workload in missing:
                    output = logs / f"{backend.file_name}_{workload}.jsonl"
                    try:
                        record = drive(model, WORKLOADS[workload], port, log, output, limit_s)
                    except (RuntimeError, subprocess.TimeoutExpired) as error:
                        failures.append(f"{backend.spec} {workload}: {error}")
                        print(failures[-1], flush=True)
                        continue
                    shown = {}
                    for metric, key in METRICS.items():
                        results.add(f"e2e/{workload}", backend.name, metric, record[key])
                        shown[metric] = round(record[key], 2)
                    results.add(f"e2e/{workload}", backend.name, "completed", record["completed"])
                    results.add(f"e2e/{workload}", backend.name, "healthy", float(_healthy(port)))
                    results.flush()
                    print(backend.spec, workload, shown, flush=True)
        except RuntimeError as error:
            failures.append(f"{backend.spec}: {error}")
            print(failures[-1], flush=True)
    return failures
