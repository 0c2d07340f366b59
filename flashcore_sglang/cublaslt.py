"""The host's part of the cublaslt variant: which requests go together, in which scratch, by which algorithms.

Algorithms that were measured are kept in memory and in a file, keyed by GPU and cuBLASLt version (its name) and by
matmul (its entries). The file holds no algorithm, only what tells one from the others among those that cuBLASLt
proposes: an entry that it proposes no more is timed anew.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from flashcore_sglang import ops
from flashcore_sglang.ops import CublasLtShape

logger = logging.getLogger(__name__)

GRAIN = 64  # lengths are rounded up to a multiple, as the kernels pad them: fewer shapes to plan
MAX_PLANNED = 4096  # shapes remembered as planned
MAX_PADDING = 1.5  # products computed for each one asked for, until requests are better computed apart


@dataclass(frozen=True)
class Run:
    """Requests ``begin`` to ``end`` of a batch, computed together, all padded to the longest of them."""

    begin: int
    end: int
    shape: CublasLtShape


def fp32_scores(setting: str, dtype: torch.dtype) -> bool:
    """What ``cublaslt_scores`` means for inputs of ``dtype``.

    auto keeps scores in fp32 for fp16 inputs. For bf16 ones fp16 scores are rounded less than the probabilities are.
    """
    return dtype == torch.float16 if setting == "auto" else setting == "fp32"


def layer_shape(
    num_qo_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, causal: bool, scores: str
) -> CublasLtShape:
    """All of a ``CublasLtShape`` but its sizes, which are 0. ``scores`` is the setting ``cublaslt_scores``."""
    return CublasLtShape(
        batch=0,
        max_qo_len=0,
        max_kv_len=0,
        num_kv_heads=num_kv_heads,
        group=num_qo_heads // num_kv_heads,
        head_dim=head_dim,
        fp16=dtype == torch.float16,
        causal=causal,
        fp32_scores=fp32_scores(scores, dtype),
    )


def split(qo_lens: Sequence[int], kv_lens: Sequence[int], like: CublasLtShape) -> tuple[Run, ...]:
    """Cuts a batch where padding to the longest request would cost more than ``MAX_PADDING``.

    Args:
        qo_lens, kv_lens: query tokens and keys of each request.
        like: gives all but the sizes.
    """
    runs: list[Run] = []
    begin, used, longest = 0, 0, (0, 0)

    def close(end: int) -> None:
        if longest[0] > 0:
            shape = like._replace(batch=end - begin, max_qo_len=longest[0], max_kv_len=longest[1])
            runs.append(Run(begin, end, shape))

    for i, lens in enumerate(zip(qo_lens, kv_lens, strict=True)):
        qo_len, kv_len = (-(-n // GRAIN) * GRAIN for n in lens)
        both = max(longest[0], qo_len), max(longest[1], kv_len)
        if longest[0] > 0 and (i + 1 - begin) * both[0] * both[1] > MAX_PADDING * (used + qo_len * kv_len):
            close(i)
            begin, used, both = i, 0, (qo_len, kv_len)
        used, longest = used + qo_len * kv_len, both
    close(len(qo_lens))
    return tuple(runs)


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
        self._planned: set[tuple[CublasLtShape, bool]] = set()

    def plan(self, shape: CublasLtShape, measure: bool = True) -> None:
        """Finds the algorithms of ``shape``.

        Args:
            shape: what ``attend`` will be asked for.
            measure: time the candidates of algorithms that are not known yet, which waits for the device; else take
                those that cuBLASLt would.

        Raises:
            RuntimeError: a cuBLASLt call failed; the message names call, status and matmul.
        """
        if (shape, measure) in self._planned:
            return
        size = ops.cublaslt_workspace(shape, self._matmul_bytes)
        if size > self.tensor.numel():
            self.tensor = self.tensor.new_empty(0)  # the old scratch makes room for the new one
            self.tensor = torch.empty(size, dtype=torch.uint8, device=self.tensor.device)
        known = self._algorithms.lines()
        found = ops.cublaslt_plan(self.tensor, shape, self._matmul_bytes, known=known, measure=measure)
        self._algorithms.update(found)
        if len(self._planned) == MAX_PLANNED:
            self._planned.clear()
        self._planned.add((shape, measure))

    def calls(
        self, plan: Sequence[torch.Tensor], runs: Iterable[Run], lse: bool = False
    ) -> Iterator[tuple[list[torch.Tensor], dict[str, Any]]]:
        """Of each run what ``ops.attend`` takes: ``plan`` (``Plan.tensors()``) with its requests, and its lengths.

        ``lse``: an LSE is asked for, which takes fp32 scores.
        """
        qo_indptr, kv_indptr, kv_indices, last_page_len, *rest = plan
        for run in runs:
            requests, ends = slice(run.begin, run.end), slice(run.begin, run.end + 1)
            yield (
                [qo_indptr[ends], kv_indptr[ends], kv_indices, last_page_len[requests], *rest],
                {
                    "workspace": self.tensor,
                    "max_qo_len": run.shape.max_qo_len,
                    "max_kv_len": run.shape.max_kv_len,
                    "fp32_scores": lse or run.shape.fp32_scores,
                },
            )


class Matmuls:
    """The runs of one batch after the other in one workspace, planned without a wait for the device.

    Args:
        workspace: for all of them.
        like: gives the shape of a run all but its sizes.
    """

    def __init__(self, workspace: Workspace, like: CublasLtShape) -> None:
        self._workspace = workspace
        self._like = like
        self._runs: tuple[Run, ...] = ()

    def begin(self, qo_lens: Sequence[int] | None, kv_lens: Sequence[int] | None) -> None:
        """Plans a batch, by the query tokens and keys of each request.

        Raises:
            ValueError: the host does not know them.
        """
        if qo_lens is None or kv_lens is None:
            raise ValueError("variant cublaslt: expected all lengths on the host, got none; serve with another variant")
        self._runs = split(qo_lens, kv_lens, self._like)
        for run in self._runs:
            self._workspace.plan(run.shape, measure=False)

    def calls(self, plan: Sequence[torch.Tensor]) -> Iterator[tuple[list[torch.Tensor], dict[str, Any]]]:
        """As ``Workspace.calls``, of the present batch."""
        return self._workspace.calls(plan, self._runs)


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
