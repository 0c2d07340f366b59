"""What every test shares: a fixed seed, the choice of tests by what the machine has, and a small checkpoint."""

from functools import cache
from pathlib import Path

import pytest
import torch
from make_model import SHAPES, make_model


@cache
def why_no_gpu() -> str:
    """Why the tests marked `gpu` cannot run here; empty where they can."""
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability()
    return "" if major >= 8 else f"the GPU's compute capability {major}.{minor} is below 8.0"


def pytest_report_header() -> str:
    reason = why_no_gpu()
    return f"tests marked gpu: deselected, {reason}" if reason else f"gpu: {torch.cuda.get_device_name()}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if why_no_gpu():
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved random Llama (8 query heads, 2 KV heads, head size 64; token i is the word "t<i>")."""
    return make_model(tmp_path_factory.mktemp("small-llama"), SHAPES["small"])
