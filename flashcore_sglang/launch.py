"""Starts `sglang.launch_server` beside this process, and ends it with all that it has started."""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

MODULE = "sglang.launch_server"

_PORTS = itertools.count(random.randrange(10000, 30000, 100))


def free_port() -> int:
    """A port of this machine that no other server of this process gets, however long this one takes to bind it.

    They are one behind the other, as SGLang takes a server's further ports 100 to 1000 above its first, and below those
    that systems hand out.
    """
    for port in _PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable: the ports have no end")


def listen_on(port: int, flags: Sequence[str]) -> list[str]:
    """Flags for a server that this machine alone reaches, at ``port``, and that gets ``flags`` besides.

    They name the port of its process group, too: SGLang 0.5.17 draws one from those that systems hand out and binds it
    seconds later, when it may have been handed out again. Not with data parallelism, which has a group for each part.
    """
    address = ["--host", "127.0.0.1", "--port", str(port)]
    if any(flag.startswith(("--dp", "--data-parallel")) for flag in flags):
        return address
    return [*address, "--nccl-port", str(free_port())]


@contextmanager
def launched(
    flags: Sequence[str], environment: Mapping[str, str], log: Path, grace_s: float = 0.0, module: str = MODULE
) -> Iterator[subprocess.Popen[bytes]]:
    """A server that may still be starting inside the block, and is gone after it, even if SIGTERM ends the block.

    Args:
        flags: of the module.
        environment: all of it.
        log: the file for the server's output.
        grace_s: seconds that it has to end by itself before it is killed.
        module: another one than SGLang's server.
    """
    previous = signal.signal(signal.SIGTERM, _leave)  # `timeout`, say; by default nothing below would run
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *flags],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        signal.signal(signal.SIGTERM, previous)
        with suppress(ProcessLookupError):  # all of it has ended by itself
            if grace_s > 0:
                os.killpg(process.pid, signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(grace_s)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
