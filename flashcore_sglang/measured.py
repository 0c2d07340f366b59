"""How fast the variants are, measured side by side on an H200: what the chooser ranks them by.

Figures are those of ``scripts/bench/results/h200_variants_*.json``. A shape falls into the first class that it matches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashcore_sglang.variants import Shape

DEVICE_SM = (9, 0)


@dataclass(frozen=True)
class Class:
    """Shapes that one measured case stands for.

    Attributes:
        case: as in the result file.
        phase, head_dim: of the shapes.
        causal: of a prefill; None: either.
        max_batch: requests at most; None: any number.
        figures: by variant: TFLOPS of a prefill (more is better), microseconds of a decode step (less is better).
    """

    case: str
    phase: str
    head_dim: int
    figures: Mapping[str, float]
    causal: bool | None = None
    max_batch: int | None = None

    @property
    def unit(self) -> str:
        """Of the figures."""
        return "TFLOPS" if self.phase == "prefill" else "us"

    def holds(self, shape: Shape) -> bool:
        """Whether the case stands for ``shape``."""
        return (
            (shape.phase, shape.head_dim) == (self.phase, self.head_dim)
            and self.causal in (None, "causal" in shape.features)
            and (self.max_batch is None or shape.batch <= self.max_batch)
        )

    def ranked(self) -> tuple[str, ...]:
        """The variants, fastest first."""
        return tuple(sorted(self.figures, key=lambda name: self.figures[name], reverse=self.unit == "TFLOPS"))

    def why(self, variant: str) -> str:
        """The figure of ``variant`` beside the others'."""
        others = " and ".join(f"{self.figures[name]:g} ({name})" for name in self.ranked() if name != variant)
        return f"measured: {self.figures[variant]:g} against {others} {self.unit} in {self.case}"


CLASSES = (
    Class(
        case="prefill/b16/s2048/h16kv16d64/causal0/fp16/p64",
        phase="prefill",
        head_dim=64,
        causal=False,
        figures={"wgmma_sm90": 483, "wmma_sm80": 269, "cublaslt": 75},
    ),
    Class(
        case="prefill/b16/s2048/h16kv16d64/causal1/fp16/p64",
        phase="prefill",
        head_dim=64,
        causal=True,
        figures={"wgmma_sm90": 369, "wmma_sm80": 221, "cublaslt": 61},
    ),
    Class(
        case="prefill/b16/s4096/h96kv96d128/causal0/fp16/p64",
        phase="prefill",
        head_dim=128,
        causal=False,
        figures={"wgmma_sm90": 580, "wmma_sm80": 295, "cublaslt": 139},
    ),
    Class(
        case="prefill/b4/s8192/h32kv8d128/causal1/bf16/p64",
        phase="prefill",
        head_dim=128,
        causal=True,
        figures={"wgmma_sm90": 665, "wmma_sm80": 299, "cublaslt": 202},
    ),
    Class(
        case="decode/b1/ctx8192/h32kv8d128/p64",
        phase="decode",
        head_dim=128,
        max_batch=4,
        figures={"wgmma_sm90": 19.9, "wmma_sm80": 22.0},
    ),
    Class(
        case="decode/b64/ctx8192/h32kv8d128/p64",
        phase="decode",
        head_dim=128,
        figures={"wgmma_sm90": 488.9, "wmma_sm80": 493.8},
    ),
)


def class_of(shape: Shape, sm: tuple[int, int] | None) -> Class | None:
    """The class that ``shape`` falls into on a device of compute capability ``sm``, None where nothing was measured."""
    if sm != DEVICE_SM:
        return None
    return next((measured for measured in CLASSES if measured.holds(shape)), None)
