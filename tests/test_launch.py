"""Starting and ending servers, with modules of Python's own in a server's place."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from flashcore_sglang.launch import launched


@pytest.mark.parametrize("grace_s", [0.0, 5.0])
def test_a_server_is_gone_after_the_block(grace_s: float, tmp_path: Path) -> None:
    with launched(["0"], os.environ, tmp_path / "log", grace_s, module="http.server") as process:
        assert process.poll() is None
    assert process.poll() is not None


@pytest.mark.parametrize("grace_s", [0.0, 5.0])
def test_why_a_server_did_not_start_is_what_is_raised(grace_s: float, tmp_path: Path) -> None:
    """Not that there is nothing left to be ended."""
    log = tmp_path / "log"

    def fail() -> None:
        with launched(["no-port"], os.environ, log, grace_s, module="http.server") as process:
            process.wait(60)
            raise RuntimeError("the server did not start")

    with pytest.raises(RuntimeError, match="the server did not start"):
        fail()
    assert "no-port" in log.read_text()


def test_a_server_is_gone_after_sigterm(tmp_path: Path) -> None:
    """As when `timeout` ends a benchmark."""
    servers = []

    def wait() -> None:
        with launched(["0"], os.environ, tmp_path / "log", module="http.server") as process:
            servers.append(process)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        wait()
    assert servers[0].poll() is not None
