"""SGLang's own benchmark on the small Llama that serve.sh makes: eight requests behind a prefix of 2K."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from server.harness import Server

pytestmark = pytest.mark.server

BACKENDS = ("flashcore_sparse", "torch_native")
RUNS = 3  # at most
FLAGS = "--page-size 64 --max-total-tokens 131072 --max-running-requests 64"
WORKLOAD = (
    "--dataset-name generated-shared-prefix --gsp-num-groups 1 --gsp-prompts-per-group 8 "
    "--gsp-system-prompt-len 2048 --gsp-question-len 32 --gsp-output-len 64 --flush-cache --warmup-requests 1"
)


@pytest.fixture(scope="module")
def servers(small_model: Path, logs: Path) -> Iterator[dict[str, Server]]:
    servers = {backend: Server(small_model, backend, logs, *FLAGS.split()) for backend in BACKENDS}
    yield servers
    for server in servers.values():
        server.stop()


def test_no_slower_than_torch_native(servers: dict[str, Server], small_model: Path, tmp_path: Path) -> None:
    """The best of a few runs counts: what other processes take away is not the server's."""
    seconds = dict.fromkeys(servers, float("inf"))
    for run in range(RUNS):
        for backend, server in servers.items():
            duration = _bench_serving(server, small_model, tmp_path / f"{backend}-{run}.jsonl")
            seconds[backend] = min(duration, seconds[backend])
        print(seconds)
        if seconds["flashcore_sparse"] <= seconds["torch_native"]:
            return
    pytest.fail(f"slower in each of {RUNS} runs: {seconds}")


def _bench_serving(server: Server, model: Path, output: Path) -> float:
    """Seconds from the first request to the last answer."""
    server.get("/health")  # waits until it is up
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", server.url]
    command += ["--model", str(model), *WORKLOAD.split(), "--disable-tqdm", "--output-file", str(output)]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(output.read_text().splitlines()[-1])
    assert result["completed"] == 8
    return float(result["duration"])
