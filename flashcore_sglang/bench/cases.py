"""What is measured: shapes of the KV cache as prefix trees, and the names they carry in result files."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ..ops import DTYPES


@dataclass(frozen=True)
class Heads:
    """Attention heads of one layer."""

    qo: int = 32
    kv: int = 8
    dim: int = 128

    @property
    def name(self) -> str:
        return f"h{self.qo}kv{self.kv}d{self.dim}"


@dataclass(frozen=True)
class DecodeCase:
    """One decode step of requests whose KV forms a prefix tree.

    Attributes:
        levels: (children of each node, tokens of a node) from the root down. ``((64, 8192),)`` is 64 requests that
            share nothing, ``((1, 4096), (64, 1024))`` 64 requests of 5120 tokens over one prefix of 4096.
        lens: explicit lengths of requests that share nothing, instead of ``levels``.
    """

    levels: tuple[tuple[int, int], ...] = ()
    lens: tuple[int, ...] = ()
    heads: Heads = field(default_factory=Heads)
    page_size: int = 64
    label: str = ""

    @property
    def batch(self) -> int:
        return len(self.lens) if self.lens else math.prod(children for children, _ in self.levels)

    @property
    def context(self) -> int:
        return max(self.lens) if self.lens else sum(tokens for _, tokens in self.levels)

    @property
    def shared(self) -> int:
        return 0 if self.lens else sum(tokens for _, tokens in self.levels[:-1])

    @property
    def name(self) -> str:
        shape = self.label or f"b{self.batch}/ctx{self.context}" + (f"/shared{self.shared}" if self.shared else "")
        return f"decode/{shape}/{self.heads.name}/p{self.page_size}"

    @property
    def bytes_per_token(self) -> int:
        return 2 * 2 * self.heads.kv * self.heads.dim

    @property
    def unique_tokens(self) -> int:
        if self.lens:
            return sum(self.lens)
        nodes, total = 1, 0
        for children, tokens in self.levels:
            nodes *= children
            total += nodes * tokens
        return total

    @property
    def unique_bytes(self) -> int:
        """Bytes of K and V when each page is read once."""
        return self.unique_tokens * self.bytes_per_token

    @property
    def dense_bytes(self) -> int:
        """Bytes of K and V when every request reads all of its pages."""
        return (sum(self.lens) if self.lens else self.batch * self.context) * self.bytes_per_token

    def page_table(self, device: str) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Scattered pages for the tree.

        Returns:
            table: int32 [batch, max pages], seq_lens: int32 [batch], and the number of pages in the pool.
        """
        lens = self.lens or (self.context,) * self.batch
        pages = [-(-n // self.page_size) for n in lens]
        table = torch.zeros(len(lens), max(pages), dtype=torch.int64)
        used = 0
        if self.lens:
            for row, count in enumerate(pages):
                table[row, :count] = torch.arange(used, used + count)
                used += count
        else:
            column, nodes = 0, 1
            for level, (children, tokens) in enumerate(self.levels):
                nodes *= children
                last = level == len(self.levels) - 1
                if tokens % self.page_size and not last:
                    raise ValueError(f"{self.name}: a shared node holds whole pages; {tokens} % {self.page_size} != 0")
                count = -(-tokens // self.page_size)
                ids = torch.arange(used, used + nodes * count).view(nodes, count)
                table[:, column : column + count] = ids.repeat_interleave(self.batch // nodes, 0)
                used, column = used + nodes * count, column + count
        scattered = torch.randperm(used)[table]
        return scattered.int().to(device), torch.tensor(lens, dtype=torch.int32, device=device), used

    def csr(self, table: torch.Tensor, lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What ``page_table`` returned as FlashInfer's (indptr, indices, last_page_len), int32."""
        pages = (lens + self.page_size - 1) // self.page_size
        indptr = torch.nn.functional.pad(pages.cumsum(0), (1, 0)).int()
        columns = torch.arange(table.shape[1], device=table.device)
        indices = table[columns[None] < pages[:, None]]
        return indptr, indices, (lens - (pages - 1) * self.page_size).int()


@dataclass(frozen=True)
class PrefillCase:
    """`batch` requests of `new` query tokens each, behind `prefix` cached tokens."""

    batch: int
    new: int
    heads: Heads
    causal: bool = True
    prefix: int = 0
    dtype: torch.dtype = torch.bfloat16
    page_size: int = 64
    shared_prefix: bool = False

    @property
    def name(self) -> str:
        prefix = f"/prefix{self.prefix}" + ("shared" if self.shared_prefix else "") if self.prefix else ""
        return (
            f"prefill/b{self.batch}/s{self.new}{prefix}/{self.heads.name}/causal{int(self.causal)}/{DTYPES[self.dtype]}/"
            f"p{self.page_size}"
        )

    @property
    def flops(self) -> float:
        """Of both matmuls; the masked half of a causal square is not counted."""
        pairs = self.new * self.prefix + self.new * self.new * (0.5 if self.causal else 1.0)
        return 4.0 * self.batch * self.heads.qo * self.heads.dim * pairs

    @property
    def unique_bytes(self) -> int:
        """Bytes of Q, K, V and O when each is read or written once."""
        prefixes = 1 if self.shared_prefix else self.batch
        keys = prefixes * self.prefix + self.batch * self.new
        rows = 2 * self.batch * self.new * self.heads.qo + 2 * keys * self.heads.kv
        return rows * self.heads.dim * self.dtype.itemsize

    @property
    def intensity(self) -> float:
        """Floating-point operations for each byte that has to move."""
        return self.flops / self.unique_bytes


_LLAMA = Heads(32, 8)


def _grid() -> list[DecodeCase]:
    limit = 100 << 30
    cases = [
        DecodeCase(levels=((batch, context),))
        for batch in (1, 2, 4, 8, 16, 64, 256)
        for context in (1024, 2048, 8192, 32768, 131072)
    ]
    return [case for case in cases if case.dense_bytes <= limit]


def _ragged() -> DecodeCase:
    generator = torch.Generator().manual_seed(0)
    lens = torch.exp2(8 + 8 * torch.rand(64, generator=generator)).int().tolist()
    return DecodeCase(lens=tuple(lens), label="b64/ctxragged256to65536")


def _shapes() -> list[DecodeCase]:
    return [
        DecodeCase(levels=((1, 8192),), heads=Heads(8, 1)),
        DecodeCase(levels=((16, 8192),), heads=Heads(8, 1)),
        DecodeCase(levels=((64, 8192),), heads=Heads(28, 4)),
        DecodeCase(levels=((16, 8192),), heads=Heads(64, 8)),
        DecodeCase(levels=((32, 4096),), heads=Heads(32, 32)),
        DecodeCase(levels=((64, 8192),), heads=Heads(32, 8, 64)),
        DecodeCase(levels=((64, 8192),), page_size=16),
        DecodeCase(levels=((64, 8192),), page_size=32),
        _ragged(),
    ]


def _shared() -> list[DecodeCase]:
    return [
        DecodeCase(levels=((1, 5760), (64, 2432))),
        DecodeCase(levels=((1, 2816), (256, 1280))),
        DecodeCase(levels=((1, 32768), (64, 4096))),
        DecodeCase(levels=((1, 8192), (128, 1024))),
        DecodeCase(levels=((4, 8192), (128, 256)), label="g4x128/ctx8448/shared8192"),
        DecodeCase(levels=((1, 4096), (8, 16384), (8, 1024)), label="tree1x8x8/ctx21504"),
    ]


def _prompts() -> list[DecodeCase]:
    """System prompts, on a GPU alone and on one of eight: where to read again and where to read once is faster."""
    return [
        DecodeCase(levels=((1, prefix), (batch, own)), heads=heads)
        for heads in (_LLAMA, Heads(8, 1))
        for batch, prefix, own in (
            (4, 4096, 256),
            (8, 1024, 1024),
            (8, 4096, 2048),
            (16, 1024, 256),
            (16, 4096, 2048),
            (32, 2048, 256),
            (64, 1024, 256),
            (64, 16384, 256),
        )
    ]


DECODE_SUITES: dict[str, list[DecodeCase]] = {
    "quick": [
        DecodeCase(levels=((1, 8192),)),
        DecodeCase(levels=((64, 8192),)),
        DecodeCase(levels=((16, 131072),)),
        DecodeCase(levels=((1, 5760), (64, 2432))),
    ],
    "grid": _grid(),
    "shapes": _shapes(),
    "shared": _shared(),
    "prompts": _prompts(),
}

# Timed, and in scripts/bench/gpu_gate.py compared with PyTorch's SDPA as a whole.
GATE = [PrefillCase(16, 2048, Heads(16, 16, 64), causal=causal, dtype=torch.float16) for causal in (False, True)]
PREFILL_SUITES: dict[str, list[PrefillCase]] = {
    "quick": [
        GATE[0],
        PrefillCase(1, 32768, _LLAMA),
    ],
    "dense": [
        *GATE,
        PrefillCase(16, 4096, Heads(96, 96), causal=False, dtype=torch.float16),
        PrefillCase(4, 8192, _LLAMA),
        PrefillCase(1, 32768, _LLAMA),
    ],
    "chunked": [
        PrefillCase(1, 8192, _LLAMA),
        PrefillCase(1, 8192, _LLAMA, prefix=8192),
        PrefillCase(1, 8192, _LLAMA, prefix=32768),
        PrefillCase(1, 8192, _LLAMA, prefix=122880),
        PrefillCase(512, 128, _LLAMA, prefix=8192, shared_prefix=True),
    ],
}
