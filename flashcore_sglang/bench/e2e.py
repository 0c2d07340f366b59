"""`flashcore bench e2e`: a real SGLang server with dummy weights, driven by SGLang's own bench_serving."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .results import Results

BACKEND = "flashcore_sparse"  # --attention-backend
_PORT = 30000
_START_LIMIT_S = 300


def _shared(groups: int, prompts: int, prefix: int, question: int) -> list[str]:
    return (
        f"--dataset-name generated-shared-prefix --gsp-num-groups {groups} --gsp-prompts-per-group {prompts} "
        f"--gsp-system-prompt-len {prefix} --gsp-question-len {question} --gsp-output-len 256 --gsp-fast-prepare "
        f"--max-concurrency {groups * prompts}"
    ).split()


def _random(prompts: int, length: int, output: int, concurrency: int) -> list[str]:
    return (
        f"--dataset-name random-ids --random-input-len {length} --random-output-len {output} --random-range-ratio 1 "
        f"--num-prompts {prompts} --max-concurrency {concurrency}"
    ).split()


# W1, W2: many requests over few long prefixes. W3: long contexts. W4: nothing shared.
WORKLOADS: dict[str, list[str]] = {
    "W1": _shared(4, 128, 8192, 128),
    "W2": _shared(1, 64, 65536, 256),
    "W3": _random(4, 129000, 256, 4),
    "W4": _random(1024, 1024, 256, 512),
    "W1x2": _shared(8, 128, 8192, 128),
    "short": _shared(1, 8, 512, 64),
    "prefill4k": _random(32, 4096, 1, 32),
    "prefill128k": _random(4, 129000, 1, 4),
}

# metric of a result file -> field of bench_serving's record
METRICS: dict[str, str] = {
    "output_tok_s": "output_throughput",
    "itl_ms": "median_itl_ms",
    "tpot_ms": "median_tpot_ms",
    "ttft_ms": "median_ttft_ms",
    "steady_tok_s": "",
}

_DECODE_LINE = re.compile(r"Decode batch.*?#running-req: (\d+).*?gen throughput \(token/s\): ([\d.]+)")


def steady_tokens_per_s(log: str) -> float:
    """Median decode throughput of the server's log lines that ran its fullest batch.

    Args:
        log: the server's log of one workload.

    Returns:
        Tokens a second; 0 where the log has no decode line.
    """
    lines = [(int(running), float(speed)) for running, speed in _DECODE_LINE.findall(log)]
    if not lines:
        return 0.0
    fullest = max(running for running, _ in lines)
    return statistics.median(speed for running, speed in lines if running >= 0.98 * fullest)


def _healthy() -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{_PORT}/health_generate", timeout=30) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


@contextmanager
def server(model: str, backend: str, max_running: int, log: Path, flags: list[str]) -> Iterator[None]:
    """A server that is up inside the block and gone after it, with every process it started."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model", model, "--load-format", "dummy"]
    command += ["--attention-backend", backend, "--host", "127.0.0.1", "--port", str(_PORT)]
    command += ["--mem-fraction-static", "0.88", "--cuda-graph-backend-prefill", "disabled"]
    command += ["--cuda-graph-max-bs", str(max_running), "--max-running-requests", str(max_running), *flags]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + _START_LIMIT_S
        while "ready to roll" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the {backend} server did not start; the end of {log}:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        time.sleep(2)  # the driver frees the memory of killed processes a moment later


def _drive(model: str, workload: str, output: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--host", "127.0.0.1"]
    command += ["--port", str(_PORT), "--model", model, "--tokenizer", model, "--warmup-requests", "1"]
    command += ["--flush-cache", "--disable-tqdm", "--output-file", str(output), *WORKLOADS[workload]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"bench_serving {workload} failed:\n{done.stderr[-3000:]}")
    record: dict[str, float] = json.loads(output.read_text().splitlines()[-1])
    return record


def run(
    results: Results,
    model: str,
    backends: list[str],
    workloads: list[str],
    max_running: int,
    logs: Path,
    flags: list[str],
) -> None:
    """Every workload on every backend, one server after the other on the same GPU; rows are added as they come."""
    logs.mkdir(parents=True, exist_ok=True)
    for backend in backends:
        log = logs / f"server_{backend}.log"
        name = "flashcore" if backend == BACKEND else backend
        with server(model, backend, max_running, log, flags):
            for workload in workloads:
                seen = len(log.read_text())
                record = _drive(model, workload, logs / f"{backend}_{workload}.jsonl")
                record["steady"] = steady_tokens_per_s(log.read_text()[seen:])
                for metric, key in METRICS.items():
                    results.add(f"e2e/{workload}", name, metric, record[key or "steady"])
                results.add(f"e2e/{workload}", name, "completed", record["completed"])
                results.add(f"e2e/{workload}", name, "healthy", float(_healthy()))
                shown = {metric: round(record[key or "steady"], 2) for metric, key in METRICS.items()}
                print(backend, workload, shown, flush=True)
