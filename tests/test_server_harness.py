"""What the server tests stand on."""

from __future__ import annotations

import socket

from server.harness import free_port


def test_servers_that_start_together_get_ports_of_their_own() -> None:
    """As two of ten once did not: the system hands out a port again as long as nobody listens on it."""
    ports = [free_port() for _ in range(20)]
    assert ports == sorted(set(ports))
    assert ports[-1] < 32768
    assert ports[-1] - ports[0] < 100, ports


def test_a_port_in_use_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port() + 1))
        assert free_port() != taken.getsockname()[1]
