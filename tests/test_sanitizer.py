"""compute-sanitizer over small cases of every kernel: no access outside of memory, no race, no misused barrier."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TOOLS = ("memcheck", "racecheck", "synccheck")
SUBJECTS = ("wgmma_sm90", "wmma_sm80", "topk")
SANITIZER = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
OPTIONS = ("--kernel-regex", "kns=flashcore", "--error-exitcode", "99")  # PyTorch's kernels are not under test

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer, a part of the CUDA toolkit, is not installed"),
]


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All tools at once: each takes longer to start than to check."""
    script = Path(__file__).with_name("sanitizer_cases.py")
    paths = os.pathsep.join([str(script.parent.parent), os.environ.get("PYTHONPATH", "")])
    runs = {
        tool: subprocess.Popen(
            [str(SANITIZER), "--tool", tool, *OPTIONS, sys.executable, str(script), *SUBJECTS],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for tool in TOOLS
    }
    yield runs
    for run in runs.values():
        run.kill()


@pytest.mark.parametrize("tool", TOOLS)
def test_clean(tool: str, runs: dict[str, subprocess.Popen[str]]) -> None:
    output, _ = runs[tool].communicate(timeout=300)
    assert runs[tool].returncode == 0, output[-4000:]
    for subject in SUBJECTS:
        assert f"{subject} ran" in output
