"""Which kernel can compute what, and which one is taken: one table and pure functions over it.

Nothing here touches a device. What the library was compiled with and what the machine is comes in as a :class:`Device`,
so that every choice can be asked for, printed and tested on any machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypedDict, get_args

from flashcore_sglang import measured

if TYPE_CHECKING:
    import torch

Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = get_args(Phase)
FEATURES = ("causal", "window_left", "logits_soft_cap", "lse")


class UnsupportedError(ValueError):
    """A shape that a variant, or every variant, cannot compute; the message says what to use instead."""


@dataclass(frozen=True)
class Tiling:
    """How a variant covers the work of a phase at one head size.

    Attributes:
        rows_per_tile: packed queries (token x head in group) of a tile.
        ctas_per_sm: persistent CTAs on each SM; CPU: threads on each core.
        pairs_per_cta: with so many (row, KV head) pairs for each CTA the kernel deals out whole pairs by itself, and
            plans need no cuts; 0: it runs the tiles of a plan as they were dealt.
        pack_keys: pages that requests share are read once for all of them where that saves so many keys of a KV head
            for each query of a packed row and 48 more. Below that it is faster to read them again: they come from L2.
    """

    rows_per_tile: int
    ctas_per_sm: int
    pairs_per_cta: int = 0
    pack_keys: int = 0


@dataclass(frozen=True)
class Variant:
    """What one implementation of ``attend`` can compute.

    Attributes:
        name: as the ``attend`` op takes it.
        device: ``cuda`` or ``cpu``.
        min_sm, max_sm: compute capabilities, both included; None: no bound.
        dtypes: of q, k and v alike.
        page_sizes: tokens in a page; None: any.
        max_group: query heads of a KV head.
        features: of :data:`FEATURES`.
        decode, prefill: the tiling of each head size that has a kernel.
    """

    name: str
    device: str
    dtypes: tuple[str, ...]
    decode: Mapping[int, Tiling]
    prefill: Mapping[int, Tiling]
    min_sm: tuple[int, int] | None = None
    max_sm: tuple[int, int] | None = None
    page_sizes: tuple[int, ...] | None = None
    max_group: int = 16
    features: tuple[str, ...] = FEATURES

    def tilings(self, phase: Phase) -> Mapping[int, Tiling]:
        """By head size; empty where the variant has no kernel for the phase."""
        return self.decode if phase == "decode" else self.prefill

    def tiling(self, shape: Shape) -> Tiling | None:
        """What ``shape`` is covered with, None where there is no kernel for its phase and head size."""
        return self.tilings(shape.phase).get(shape.head_dim)


# Best first where nothing was measured (measured.py). Kernel authors tune the numbers of their Tiling here.
VARIANTS = (
    Variant(
        name="wgmma_sm90",
        device="cuda",
        min_sm=(9, 0),
        max_sm=(9, 0),  # sm_90a code runs on 9.0 only
        dtypes=("bf16", "fp16"),
        page_sizes=(16, 32, 64, 128),  # a TMA box is one page of a KV head
        decode=dict.fromkeys((64, 128), Tiling(rows_per_tile=128, ctas_per_sm=2, pack_keys=1152)),
        prefill={
            **dict.fromkeys((64, 128), Tiling(rows_per_tile=192, ctas_per_sm=1, pairs_per_cta=4)),
            256: Tiling(rows_per_tile=128, ctas_per_sm=1, pairs_per_cta=4),
        },
    ),
    Variant(
        name="wmma_sm80",
        device="cuda",
        min_sm=(8, 0),
        dtypes=("bf16", "fp16"),
        decode={
            64: Tiling(rows_per_tile=64, ctas_per_sm=3, pack_keys=768),
            **dict.fromkeys((96, 128, 256), Tiling(rows_per_tile=64, ctas_per_sm=2, pack_keys=768)),
        },
        prefill={
            64: Tiling(rows_per_tile=128, ctas_per_sm=3),
            96: Tiling(rows_per_tile=128, ctas_per_sm=2),
            128: Tiling(rows_per_tile=128, ctas_per_sm=2),
            256: Tiling(rows_per_tile=64, ctas_per_sm=2),
        },
    ),
    Variant(
        name="cublaslt",
        device="cuda",
        min_sm=(8, 0),
        dtypes=("bf16", "fp16"),
        features=("causal", "lse"),
        decode={},
        prefill=dict.fromkeys((64, 128, 256), Tiling(rows_per_tile=64, ctas_per_sm=2)),
    ),
    Variant(
        name="cpu",
        device="cpu",
        dtypes=("bf16", "fp16", "fp32"),
        decode=dict.fromkeys((64, 96, 128, 256), Tiling(rows_per_tile=64, ctas_per_sm=1)),
        prefill=dict.fromkeys((64, 96, 128, 256), Tiling(rows_per_tile=64, ctas_per_sm=1)),
    ),
)
BY_NAME = {variant.name: variant for variant in VARIANTS}


@dataclass(frozen=True)
class Shape:
    """What is asked of a variant. ``page_size`` in tokens, ``features`` of :data:`FEATURES`."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: str = "bf16"
    phase: Phase = "decode"
    batch: int = 1
    features: tuple[str, ...] = ()

    @property
    def group(self) -> int:
        return self.num_qo_heads // self.num_kv_heads


@dataclass(frozen=True)
class Device:
    """A machine as the chooser sees it.

    Attributes:
        kind: ``cuda`` or ``cpu``.
        compiled: names of the variants that the loaded library holds.
        sm: compute capability, None on a CPU.
        units: SMs; CPU: threads.
        missing: variants that the library holds but that lack something on this machine, and what.
    """

    kind: str
    compiled: frozenset[str]
    sm: tuple[int, int] | None = None
    units: int = 1
    missing: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.kind if self.sm is None else f"{self.kind} sm_{self.sm[0]}{self.sm[1]}"


class PlanSizes(TypedDict):
    """What a kernel asks of plans; fields of ``planner.Capacity``."""

    rows_per_tile: int
    num_ctas: int
    pairs_per_cta: int
    pack_keys: int


@dataclass(frozen=True)
class Choice:
    """A variant with its tiling, why it was taken, and why each better one was passed over.

    Attributes:
        num_ctas: CTAs (CPU: threads) that share the work.
        why: figures, where its class of shapes was measured.
        reasons: ``(variant, why not)`` of the faster ones.
    """

    variant: Variant
    tiling: Tiling
    num_ctas: int
    why: str = ""
    reasons: tuple[tuple[str, str], ...] = ()

    @property
    def plan_sizes(self) -> PlanSizes:
        """For the ``Capacity`` of its plans."""
        t = self.tiling
        return {
            "rows_per_tile": t.rows_per_tile,
            "num_ctas": self.num_ctas,
            "pairs_per_cta": t.pairs_per_cta,
            "pack_keys": t.pack_keys,
        }


def unavailable(variant: Variant, device: Device) -> str | None:
    """Why ``variant`` cannot run on ``device`` at all, or None."""
    if variant.device != device.kind:
        return f"requires a {variant.device} device, got {device.kind}"
    if variant.name in device.missing:
        return device.missing[variant.name]
    if variant.name not in device.compiled:
        return f"not compiled into this library (it holds {', '.join(sorted(device.compiled)) or 'no variant'})"
    if device.sm is not None:
        if variant.min_sm and device.sm < variant.min_sm:
            return f"requires compute capability {_dotted(variant.min_sm)} or newer, got {_dotted(device.sm)}"
        if variant.max_sm and device.sm > variant.max_sm:
            return f"requires compute capability {_dotted(variant.max_sm)} or older, got {_dotted(device.sm)}"
    return None


def unfit(variant: Variant, shape: Shape) -> str | None:
    """What of ``shape`` the kernels of ``variant`` do not cover, whatever the device, or None."""
    head_dims = tuple(variant.tilings(shape.phase))
    if not head_dims:
        return f"has no {shape.phase} kernel"
    if shape.num_kv_heads < 1 or shape.num_qo_heads < 1 or shape.num_qo_heads % shape.num_kv_heads:
        return f"requires query heads a multiple of KV heads, got {shape.num_qo_heads} and {shape.num_kv_heads}"
    missing = [feature for feature in shape.features if feature not in variant.features]
    checks = (
        (shape.dtype in variant.dtypes, f"dtype {_any_of(variant.dtypes)}", shape.dtype),
        (shape.head_dim in head_dims, f"{shape.phase} head_dim {_any_of(head_dims)}", shape.head_dim),
        (shape.group <= variant.max_group, f"at most {variant.max_group} query heads of a KV head", shape.group),
        (shape.page_size >= 1, "page_size of at least 1", shape.page_size),
        (
            variant.page_sizes is None or shape.page_size in variant.page_sizes,
            f"page_size {_any_of(variant.page_sizes or ())}",
            shape.page_size,
        ),
        (not missing, f"only {_any_of(variant.features)}", _any_of(missing)),
    )
    reasons = [f"requires {required}, got {got}" for ok, required, got in checks if not ok]
    return " and ".join(reasons) or None


def why_not(variant: Variant, shape: Shape, device: Device) -> str | None:
    """Why ``variant`` cannot compute ``shape`` on ``device``: every reason, with what is required and what came."""
    return " and ".join(reason for reason in (unavailable(variant, device), unfit(variant, shape)) if reason) or None


def choose(shape: Shape, device: Device, forced: str = "auto") -> Choice:
    """The fastest variant that can, or ``forced`` itself.

    Fastest by what was measured for the class of ``shape`` (``measured.py``); the variants that were not measured come
    behind, in the order of the table.

    Raises:
        UnsupportedError: no variant can, or the forced one cannot; it lists each reason and what can be used.
    """
    if forced != "auto" and forced not in BY_NAME:
        raise UnsupportedError(f"variant {forced}: expected one of auto, {', '.join(BY_NAME)}")
    refusals = {variant.name: why_not(variant, shape, device) for variant in VARIANTS}
    usable = [variant for variant in VARIANTS if refusals[variant.name] is None]
    if forced != "auto" and refusals[forced] is not None:
        instead = f"use variant {_any_of([variant.name for variant in usable])} or auto" if usable else "no variant can"
        raise UnsupportedError(f"variant {forced} {refusals[forced]}; {instead} ({describe(shape)} on {device})")
    if not usable:
        reasons = "; ".join(f"{name} {reason}" for name, reason in refusals.items())
        raise UnsupportedError(f"no variant computes {describe(shape)} on {device}: {reasons}")
    known = measured.class_of(shape, device.sm)
    ranking = sorted(VARIANTS, key=lambda variant: _rank(variant, known))
    variant = next(v for v in ranking if v in usable) if forced == "auto" else BY_NAME[forced]
    tiling = variant.tiling(shape)
    assert tiling is not None  # `unfit` refuses a shape without a kernel
    before = ranking[: ranking.index(variant)] if forced == "auto" else []
    if forced != "auto":
        why = "forced"
    elif known is not None and variant.name in known.figures:
        why = known.why(variant.name)
    else:
        why = "not measured: the first of the table that can"
    return Choice(
        variant=variant,
        tiling=tiling,
        num_ctas=device.units * tiling.ctas_per_sm,
        why=why,
        reasons=tuple((other.name, str(refusals[other.name])) for other in before),
    )


def _rank(variant: Variant, known: measured.Class | None) -> int:
    """Place among the measured variants; those that were not measured share the last one, in the order of the table."""
    ranked = () if known is None else known.ranked()
    return ranked.index(variant.name) if variant.name in ranked else len(ranked)


def describe(shape: Shape) -> str:
    """The shape as :func:`parse_shape` reads it."""
    return (
        f"b{shape.batch},h{shape.num_qo_heads},kv{shape.num_kv_heads},d{shape.head_dim},page{shape.page_size},"
        f"{shape.dtype},{shape.phase}" + "".join(f",{feature}" for feature in shape.features)
    )


def parse_shape(text: str) -> Shape:
    """A shape from ``b16,h32,kv8,d128,page64,bf16[,prefill][,causal]``; h, kv and d are required.

    Raises:
        UnsupportedError: a word that is not of this form, or one that is missing.
    """
    form = "b16,h32,kv8,d128,page64,bf16[,decode|prefill][,causal]"
    numbers: dict[str, int] = {"b": 1, "page": 64}
    dtype, phase = "bf16", PHASES[0]
    features: list[str] = []
    dtypes = sorted({dtype for variant in VARIANTS for dtype in variant.dtypes})
    for word in text.split(","):
        number = re.fullmatch(r"(b|h|kv|d|page)([1-9]\d*)", word)
        if number:
            numbers[number[1]] = int(number[2])
        elif word in dtypes:
            dtype = word
        elif word in PHASES:
            phase = PHASES[PHASES.index(word)]
        elif word in FEATURES:
            features.append(word)
        else:
            raise UnsupportedError(f"shape {text!r}: expected {form}, got {word!r}")
    missing = [key for key in ("h", "kv", "d") if key not in numbers]
    if missing:
        raise UnsupportedError(f"shape {text!r}: expected {form}, {', '.join(missing)} is missing")
    sizes = numbers["h"], numbers["kv"], numbers["d"], numbers["page"]
    return Shape(*sizes, dtype, phase, numbers["b"], tuple(features))


def compiled(build_info: str) -> frozenset[str]:
    """The variants named in the JSON of ``torch.ops.flashcore.build_info()``."""
    return frozenset(json.loads(build_info)["variants"])


def missing(build_info: str) -> dict[str, str]:
    """From the same: the variants that lack something on this machine, and what."""
    return dict(json.loads(build_info)["missing"])


def device_of(device: torch.device | str, cpu_threads: int = 0) -> Device:
    """The machine behind a torch device, with what the loaded library holds. ``cpu_threads`` 0: torch's own number.

    Raises:
        LibraryError: the compiled library is missing or does not load.
    """
    import torch

    from flashcore_sglang._load import load_library

    load_library()
    info = torch.ops.flashcore.build_info()
    held = compiled(info)
    device = torch.device(device)
    if device.type != "cuda":
        return Device(device.type, held, units=cpu_threads or torch.get_num_threads())
    properties = torch.cuda.get_device_properties(device)
    return Device(
        "cuda",
        held,
        sm=(properties.major, properties.minor),
        units=properties.multi_processor_count,
        missing=missing(info),
    )


def _any_of(values: tuple[object, ...] | list[str]) -> str:
    return "|".join(map(str, values))


def _dotted(sm: tuple[int, int]) -> str:
    return f"{sm[0]}.{sm[1]}"
