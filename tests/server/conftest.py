"""The checkpoint, the reference server, and how far two of its own runs lie apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from make_model import SHAPES, make_model
from server.harness import Server, spread

# Those of every server that is compared bit for bit with `exact`.
FLAGS = ("--dtype", "float32", "--max-total-tokens", "20032", "--chunked-prefill-size", "128", "--enable-mixed-chunk")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small, as a server's time goes into starting it; its weights are so large that attention is far from uniform."""
    shape = replace(SHAPES["small"], hidden_size=256, intermediate_size=512, num_hidden_layers=3)
    return make_model(tmp_path_factory.mktemp("model"), shape, std=0.05)


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server-logs")


@pytest.fixture(scope="session")
def reference(model: Path, logs: Path) -> Iterator[Server]:
    server = Server(model, "torch_native", logs, *["--max-total-tokens", "20000", "--dtype", "float32"])
    yield server
    server.stop()


@pytest.fixture(scope="session")
def tolerance(reference: Server) -> float:
    """How far a log-probability may lie from the reference's: twice as far as the reference's own runs lie apart."""
    return 2 * spread(reference)


@pytest.fixture(scope="session")
def exact(model: Path, logs: Path, reference: Server) -> Iterator[Server]:
    """The server as it comes: policy exact, pages of 64."""
    server = Server(model, "flashcore_sparse", logs, *FLAGS, "--enable-metrics")
    yield server
    server.stop()
