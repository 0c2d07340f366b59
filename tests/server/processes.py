"""Two ways to start an SGLang server: as users do, and in a tenth of the time.

A server is three processes, and each spends most of its start on imports. `fork` takes them all from one process that
has imported SGLang already; what they then run is the same.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Protocol
from unittest import mock

MODULE = "sglang.launch_server"
IMPORTED = (
    MODULE,
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
)


class Process(Protocol):
    """Leader of a session, so that a signal to its process group reaches all that it starts."""

    pid: int

    def poll(self) -> int | None:
        """The exit status; None while it runs."""

    def wait(self, timeout: float) -> object:
        """Returns when it has ended."""


def spawn(arguments: list[str], environ: dict[str, str], log: Path) -> Process:
    """`python -m sglang.launch_server arguments`."""
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", MODULE, *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,
        )


def fork(arguments: list[str], environ: dict[str, str], log: Path) -> Process:
    """The same from a process with SGLang in memory, imported under the environment of the first call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    process = _Forked(target=_main, args=(arguments, environ, log))
    with mock.patch.dict(os.environ, environ, clear=True):
        process.start()
    return process


class _Forked(ForkServerProcess):
    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float) -> object:
        return self.join(timeout)


def _main(arguments: list[str], environ: dict[str, str], log: Path) -> None:
    os.setsid()
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.clear()
    os.environ.update(environ)
    # SGLang asks for spawn, which would import everything again.
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *_, **__: None  # type: ignore[assignment]
    sys.argv = [MODULE, *arguments]
    runpy.run_module(MODULE, run_name="__main__")
