"""A whole SGLang server as a test subject: start it, send it traffic, compare log-probabilities.

Greedy tokens of two servers part ways at the first near tie, so tokens are never compared. Instead every sequence that
a server under test has produced is scored by the reference server, which reads it as one prompt.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from server import processes

from flashcore_sglang.launch import free_port, listen_on

START_SECONDS = 600  # on a busy machine
REQUEST_SECONDS = 300

CPU_ENVIRONMENT = {"SGLANG_PLATFORM": "flashcore_cpu", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
GPU_ENVIRONMENT = {"SGLANG_USE_SGL_FA3_KERNEL": "1"}  # the reference; else SGLang asks a hub for it


@dataclass(frozen=True)
class Result:
    """One request's answer. Log-probabilities are those of the tokens from `start` on, then of the new ones."""

    prompt: list[int]
    start: int
    tokens: list[int]
    prompt_logprobs: list[float]
    token_logprobs: list[float]
    cached_tokens: int
    retractions: int

    @property
    def sequence(self) -> list[int]:
        return self.prompt + self.tokens

    @property
    def logprobs(self) -> list[float]:
        return self.prompt_logprobs + self.token_logprobs


class Server:
    """A server process. Creating one does not wait for it: two start in the time of one. The first request waits."""

    def __init__(
        self,
        model: Path,
        backend: str,
        folder: Path,
        *flags: str,
        device: str = "cpu",
        environment: dict[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{backend}-{self.port}.log"
        arguments = ["--model-path", str(model), "--device", device, "--attention-backend", backend]
        arguments += [*listen_on(self.port, flags), "--skip-server-warmup", "--sleep-on-idle"]
        environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environ |= {"SGLANG_DEBUG_MEMORY_POOL": "1", **(CPU_ENVIRONMENT if device == "cpu" else GPU_ENVIRONMENT)}
        own = environment or {}
        # A GPU's context does not survive a fork, and SGLang reads some of its variables as it is imported.
        warm = device == "cpu" and not any(name.startswith("SGLANG_") for name in own)
        start = processes.fork if warm else processes.spawn
        self.process = start([*arguments, *flags], environ | own, self.log)
        self._ready = False

    def stop(self) -> None:
        """Ends the server and the processes that it started."""
        with suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=60)

    def post(self, path: str, **arguments: Any) -> requests.Response:
        self._wait_until_ready()
        response = requests.post(self.url + path, timeout=REQUEST_SECONDS, **arguments)
        assert response.ok, f"{path}: {response.status_code} {response.text[:500]}\n{self.tail()}"
        return response

    def get(self, path: str) -> str:
        self._wait_until_ready()
        response = requests.get(self.url + path, timeout=REQUEST_SECONDS)
        assert response.ok, f"{path}: {response.status_code} {response.text[:500]}\n{self.tail()}"
        return response.text

    def generate(self, prompt: Sequence[int], new_tokens: int, start: int = 0) -> Result:
        """Greedy continuation of `prompt`; log-probabilities from position `start` (and the cache used before it)."""
        body = _request(prompt, new_tokens) | {"return_logprob": True, "logprob_start_len": start}
        answer = self.post("/generate", json=body).json()
        meta = answer["meta_info"]
        # The first token of a prompt has no log-probability.
        scored = [entry[0] for entry in meta["input_token_logprobs"] if entry[0] is not None]
        return Result(
            prompt=list(prompt),
            start=len(prompt) - len(scored),
            tokens=[entry[1] for entry in meta["output_token_logprobs"]],
            prompt_logprobs=scored,
            token_logprobs=[entry[0] for entry in meta["output_token_logprobs"]],
            cached_tokens=meta["cached_tokens"],
            retractions=meta["num_retractions"],
        )

    def generate_all(self, prompts: Iterable[Sequence[int]], new_tokens: int, start: int = 0) -> list[Result]:
        """All at once."""
        with ThreadPoolExecutor(64) as pool:
            return list(pool.map(lambda prompt: self.generate(prompt, new_tokens, start), prompts))

    def break_off(self, prompt: Sequence[int], after: int) -> int:
        """Reads `after` tokens of a stream and hangs up; returns how many came."""
        body = _request(prompt, 512) | {"stream": True}
        self._wait_until_ready()
        with requests.post(self.url + "/generate", json=body, stream=True, timeout=REQUEST_SECONDS) as response:
            lines = (line for line in response.iter_lines() if line.startswith(b"data:"))
            return len(list(itertools.islice(lines, after)))

    def flush(self) -> None:
        """Empties the radix cache; waits for running requests, and fails where one does not end."""
        self.post("/flush_cache", params={"timeout": 30})

    def tail(self) -> str:
        """The end of the server's log, for people."""
        return f"{self.log}:\n" + "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._ready:
            assert self.process.poll() is None, f"the server ended with {self.process.poll()}\n{self.tail()}"
            assert time.monotonic() < deadline, f"the server did not start in {START_SECONDS} s\n{self.tail()}"
            try:
                self._ready = requests.get(self.url + "/health", timeout=20).ok
            except requests.RequestException:
                time.sleep(0.5)


@contextmanager
def beside_torch_native(
    model: Path, logs: Path, *flags: str, own_flags: Sequence[str] = ()
) -> Iterator[dict[str, Server]]:
    """Servers of torch_native and of ours, by their backends, around one model that may have sliding windows.

    ``own_flags`` are for ours alone. Both end with the block.
    """
    both = ("--dtype", "float32", "--max-total-tokens", "20032", "--disable-hybrid-swa-memory", *flags)
    servers = {
        "torch_native": Server(model, "torch_native", logs, *both),
        "flashcore_sparse": Server(model, "flashcore_sparse", logs, *both, *own_flags),
    }
    try:
        yield servers
    finally:
        for server in servers.values():
            server.stop()


def deviations(results: Iterable[Result], reference: Server) -> list[float]:
    """|log-probability - the reference's| of every token of `results`, the reference reading each as one prompt."""
    results = list(results)
    with ThreadPoolExecutor(64) as pool:
        scores = list(
            pool.map(lambda result: reference.generate(result.sequence, 0, max(result.start - 1, 0)), results)
        )
    found = []
    for result, score in zip(results, scores, strict=True):
        expected = score.prompt_logprobs[result.start - score.start :]
        found += [abs(a - b) for a, b in zip(result.logprobs, expected, strict=True)]
    return found


def spread(reference: Server) -> float:
    """The largest difference between two runs of the reference, in batches of other compositions.

    In one, prompts are read and continued all at once; in the other, each sequence is read by itself.
    """
    lengths = 3 * (3, 17, 64, 65, 130, 200, 333, 500, 800, 1200)  # as many tokens as the tests compare
    together = reference.generate_all(random_prompts(lengths, seed=1), 32)
    reference.flush()
    alone = [reference.generate(result.sequence, new_tokens=0) for result in together]
    return max(
        abs(a - b)
        for one, two in zip(together, alone, strict=True)
        for a, b in zip(one.logprobs, two.logprobs, strict=True)
    )


def random_prompts(lengths: Iterable[int], seed: int, prefix: Sequence[int] = ()) -> list[list[int]]:
    """Prompts of random tokens behind a common prefix."""
    generator = random.Random(seed)
    return [[*prefix, *(generator.randrange(10000) for _ in range(length))] for length in lengths]


def come_and_go(server: Server, seed: int, prefix_length: int, new_tokens: int) -> list[Result]:
    """Streams over one prefix, of which some hang up; once they decode, others arrive over a prefix that is new."""
    first, second = random_prompts((prefix_length, prefix_length // 4), seed)
    staying = random_prompts(range(1, 61, 5), seed + 1, first)
    leaving = random_prompts(range(3, 63, 15), seed + 2, first)
    arriving = random_prompts(range(2, 62, 15), seed + 3, second)
    server.generate(first, new_tokens=1)
    with ThreadPoolExecutor(3) as pool:
        streams = pool.submit(server.generate_all, staying, new_tokens, prefix_length)
        broken = pool.map(lambda prompt: server.break_off(prompt, 3), leaving)
        assert list(broken) == [3] * len(leaving)
        late = pool.submit(server.generate_all, arriving, new_tokens)
        return streams.result() + late.result()


def _request(prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    return {"input_ids": list(prompt), "sampling_params": sampling}
