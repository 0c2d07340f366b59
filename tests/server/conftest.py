"""The checkpoint, the reference server, and how far two of its own runs lie apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from make_model import SHAPES, make_model
from server.harness import Server, random_prompts


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small enough that a server's time goes into starting it."""
    shape = replace(SHAPES["small"], hidden_size=256, intermediate_size=512, num_hidden_layers=3)
    return make_model(tmp_path_factory.mktemp("model"), shape)


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server-logs")


@pytest.fixture(scope="session")
def reference(model: Path, logs: Path) -> Iterator[Server]:
    server = Server(model, "torch_native", logs, "--max-total-tokens", "20000", "--dtype", "float32")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def tolerance(reference: Server) -> float:
    """Twice the largest difference between two runs of the reference in batches of other compositions."""
    prompts = random_prompts((3, 17, 64, 65, 130, 200, 333, 500), seed=1)
    together = reference.generate_all(prompts, new_tokens=24)
    reference.flush()
    alone = [reference.generate(result.sequence, new_tokens=0) for result in together]
    return 2 * max(
        abs(a - b)
        for one, two in zip(together, alone, strict=True)
        for a, b in zip(one.logprobs, two.logprobs, strict=True)
    )
