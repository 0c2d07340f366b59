"""A real SGLang server as `flashcore eval` needs it: started with a policy, asked, and its metrics read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flashcore_sglang.launch import free_port, launched, listen_on
from flashcore_sglang.plugin import BACKEND

START_LIMIT_S = 600
REQUEST_LIMIT_S = 600


@dataclass(frozen=True)
class Client:
    """Requests to a server; ``process`` and ``log`` are those of one that was started here."""

    url: str
    process: subprocess.Popen[bytes] | None = None
    log: Path | None = None

    def wait(self) -> None:
        """Returns when the server is ready.

        Raises:
            ValueError: it did not start; the message ends with the end of its log.
        """
        if self.process is None or self.log is None:
            return
        deadline = time.monotonic() + START_LIMIT_S
        while not self._healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                end = self.log.read_text(errors="replace")[-3000:]
                raise ValueError(f"the server did not start; the end of {self.log}:\n{end}")
            time.sleep(0.3)

    def generate(self, prompt: str, new_tokens: int) -> str:
        """The greedy continuation of a prompt."""
        sampling = {"temperature": 0, "max_new_tokens": new_tokens}
        body = json.dumps({"text": prompt, "sampling_params": sampling}).encode()
        request = urllib.request.Request(f"{self.url}/generate", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_LIMIT_S) as reply:
                return str(json.load(reply)["text"])
        except urllib.error.HTTPError as error:
            raise ValueError(f"{self.url}/generate: {error.code} {error.read().decode()[:500]}") from None
        except urllib.error.URLError as error:
            raise ValueError(f"{self.url}: {error.reason}; is the server running?") from None

    def model_path(self) -> str:
        """What the server serves."""
        return str(json.loads(self._get("/model_info"))["tokenizer_path"])

    def pages(self) -> tuple[float, float] | None:
        """KV pages that decode steps have read and not read so far; None where the server keeps no such metrics."""
        try:
            text = self._get("/metrics")
        except ValueError:
            return None
        counts = [re.findall(rf"^flashcore:pages_{name}_total\S* (\S+)$", text, re.M) for name in ("read", "saved")]
        if not counts[0]:
            return None
        read, saved = (sum(map(float, values)) for values in counts)
        return read, saved

    def _healthy(self) -> bool:
        try:
            self._get("/health")
        except ValueError:
            return False
        return True

    def _get(self, path: str) -> str:
        try:
            with urllib.request.urlopen(self.url + path, timeout=REQUEST_LIMIT_S) as reply:
                return str(reply.read().decode())
        except urllib.error.URLError as error:  # HTTPError is one
            raise ValueError(f"{self.url}{path}: {error}; is the server running?") from None


@contextmanager
def serve(model: Path | str, environment: dict[str, str], flags: list[str], log: Path) -> Iterator[Client]:
    """A server on this machine's GPU, or on its CPU where there is none; gone after the block with all it started.

    It may still be starting inside the block: two start in the time of one. ``Client.wait`` waits for it.

    Args:
        model: a folder or a name that SGLang can load.
        environment: FLASHCORE_* variables, which win over those of this process.
        flags: more flags of ``sglang.launch_server``.
        log: the file for its output.
    """
    import torch

    port = free_port()
    command = ["--model-path", str(model), "--attention-backend", BACKEND, "--enable-metrics"]
    command += listen_on(port, flags)
    environ = dict(os.environ)
    if not torch.cuda.is_available():
        command += ["--device", "cpu"]
        environ |= {"SGLANG_PLATFORM": "flashcore_cpu", "TRITON_INTERPRET": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    # Killed at once: nothing in it is worth saving.
    with launched([*command, *flags], environ | environment, log) as process:
        yield Client(f"http://127.0.0.1:{port}", process, log)
