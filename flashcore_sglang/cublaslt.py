"""The scratch of the cublaslt variant, and the algorithms it has found for its matmuls, kept in memory and in a file.

The file is keyed by GPU and cuBLASLt version (its name) and by matmul (its entries). It holds no algorithm, only what
tells one from the others among those that cuBLASLt proposes: an entry that it proposes no more is timed anew.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from flashcore_sglang import ops

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shape:
    """A batch as the variant plans it.

    Attributes:
        batch: requests.
        max_qo_len, max_kv_len: query tokens and keys of the longest requests.
        num_kv_heads, group, head_dim: KV heads, query heads of each, channels.
        fp16: else bf16.
        causal: blocks above the diagonal are left out.
    """

    batch: int
    max_qo_len: int
    max_kv_len: int
    num_kv_heads: int
    group: int
    head_dim: int
    fp16: bool
    causal: bool


class Algorithms:
    """What was found for each matmul, ``{matmul: algorithm}``; ``path`` None: in memory only.

    A file that cannot be read or written costs a warning, and the time to find the algorithms again.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._found = {} if path is None else _read(path)

    def lines(self) -> str:
        """As the op takes them: ``matmul=algorithm`` lines."""
        return "".join(f"{matmul}={algorithm}\n" for matmul, algorithm in self._found.items())

    def update(self, lines: str) -> None:
        """Adds ``lines``; the file is replaced as a whole, with what other processes have added in the meantime."""
        found = dict(line.split("=", 1) for line in lines.splitlines())
        if found.items() <= self._found.items():
            return
        self._found.update(found)
        if self._path is None:
            return
        self._found = {**_read(self._path), **self._found}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, suffix=".tmp", delete=False) as file:
                json.dump(self._found, file, indent=1, sort_keys=True)
            os.replace(file.name, self._path)
        except OSError as error:
            logger.warning("flashcore: cuBLASLt algorithms are not kept: %s; make its folder writable", error)
            self._path = None


class Workspace:
    """Scratch on one device for every batch that is planned with it; it grows.

    Args:
        device: a CUDA device.
        matmul_mb: MiB for the matmuls of each lane, besides Q, K, V and scores.
        algorithms: None: those of the device's file.

    Attributes:
        tensor: uint8, for the ``attend`` op.
    """

    def __init__(self, device: torch.device, matmul_mb: int, algorithms: Algorithms | None = None) -> None:
        self.tensor = torch.empty(0, dtype=torch.uint8, device=device)
        self._matmul_bytes = matmul_mb << 20
        self._algorithms = algorithms or algorithms_of(device)
        self._planned: set[Shape] = set()

    def plan(self, shape: Shape) -> None:
        """Finds the algorithms of ``shape``: at its first call it times candidates and waits for the device.

        Raises:
            RuntimeError: a cuBLASLt call failed; the message names call, status and matmul.
        """
        if shape in self._planned:
            return
        sizes = asdict(shape) | {"matmul_bytes": self._matmul_bytes}
        size = ops.cublaslt_workspace(**sizes)
        if size > self.tensor.numel():
            self.tensor = torch.empty(size, dtype=torch.uint8, device=self.tensor.device)
        self._algorithms.update(ops.cublaslt_plan(self.tensor, known=self._algorithms.lines(), **sizes))
        self._planned.add(shape)


@cache
def algorithms_of(device: torch.device) -> Algorithms:
    """The algorithms of a device's file, read once."""
    version = int(json.loads(ops.build_info())["cublaslt"])
    return Algorithms(cache_file(torch.cuda.get_device_name(device), version))


def cache_file(gpu: str, version: int) -> Path:
    """Where the algorithms for ``gpu`` (its name) and cuBLASLt ``version`` are kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return home / "flashcore" / f"cublaslt-{version}-{name}.json"


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            raise ValueError("expected an object of strings")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        logger.warning("flashcore: %s is not used: %s; the algorithms are found anew", path, error)
        return {}
    return found
