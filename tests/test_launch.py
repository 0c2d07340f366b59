"""Starting and ending servers, with modules of Python's own in a server's place."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from flashcore_sglang.launch import free_port, launched, listen_on


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


def test_servers_that_start_together_get_ports_of_their_own() -> None:
    """As two of ten once did not: the system hands out a port again as long as nobody listens on it."""
    ports = [free_port() for _ in range(20)]
    assert ports == sorted(set(ports))
    assert ports[-1] < 32768
    assert ports[-1] - ports[0] < 100, ports


def test_no_port_of_a_server_is_one_that_the_system_hands_out() -> None:
    """SGLang 0.5.17 draws that of the process group from these: when it came to bind it, another had it."""
    flags = listen_on(free_port(), []) + listen_on(free_port(), ["--tp-size", "2"])
    ports = [int(flag) for flag in flags if flag.isdigit()]
    assert len(set(ports)) == 4, flags
    assert max(ports) < 32768, flags


@pytest.mark.parametrize("flag", ["--dp-size", "--dp", "--data-parallel-size=2"])
def test_groups_of_data_parallelism_draw_ports_of_their_own(flag: str) -> None:
    assert "--nccl-port" not in listen_on(free_port(), [flag, "2"])


def test_a_port_in_use_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port() + 1))
        assert free_port() != taken.getsockname()[1]
