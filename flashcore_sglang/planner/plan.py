"""The plan: a batch's work rows and tiles in fixed-capacity device buffers.

The layout is csrc/params.h's ``struct Plan``; the planner op writes it, every attend variant reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

SPLIT_UNIT = 64  # keys; kSplitUnit in csrc/params.h
ROW_FIELDS = 8  # int32 fields of struct Row
TILE_FIELDS = 8  # int32 fields of struct Tile
STRETCH_FIELDS = 4  # int32 fields of struct Stretch
UNCUT = 1 << 30  # keys of a tile where rows are not to be cut
PLAN_CTAS = 16  # that make the sums of a plan, each for itself; kPlanCtas in csrc/plan/plan.cu
MAX_LEVELS = 4  # packed rows that a request is in at most; kMaxLevels in csrc/plan/scratch.h


class Policy(IntEnum):
    """How the rows are made; the values of ``enum class Policy`` in csrc/params.h."""

    EXACT = 0
    WINDOW = 1
    TOPK = 2


class Count(IntEnum):
    """Slots of ``Plan.counts``; the values of ``enum Count`` in csrc/params.h."""

    NUM_ROWS = 0
    NUM_TILES = 1
    NUM_PARTIALS = 2
    PAGES_READ = 3
    PAGES_DENSE = 4
    ROWS_PACKED = 5
    OVERFLOW = 6
    PAGES_DROPPED = 9
    NUM_STRETCHES = 10
    PACKED_SHARE = 11
    NUM_COUNTS = 12


@dataclass(frozen=True)
class Capacity:
    """What a plan must be able to hold; sizes every buffer, so that none is ever resized under a captured graph.

    Attributes:
        batch: requests.
        tokens: query tokens of all requests.
        pages: entries of the dense CSR page table.
        num_pages: pages of the KV pool (page ids are below it).
        num_kv_heads, group: KV heads, query heads of each.
        rows_per_tile: packed queries (token x head in group) that one tile holds.
        num_ctas: CTAs (CPU: threads) the tiles are dealt to.
        sparse_pages: entries for the page lists of sparse rows, behind the dense ones.
        share: room for packed rows of requests that share pages, and for stretches that are scored together.
        page_size: keys in a page.
        split_keys: 0, or the fixed length of a tile in deterministic mode.
        pairs_per_cta: (row, KV head) pairs for each CTA that make cuts needless, see ``variants.Tiling``; 0: none do.
        pack_keys: what packed rows must save, see ``variants.Tiling``.
    """

    batch: int
    tokens: int
    pages: int
    num_pages: int
    num_kv_heads: int
    group: int
    rows_per_tile: int
    num_ctas: int
    sparse_pages: int = 0
    share: bool = True
    page_size: int = 64
    split_keys: int = 0
    pairs_per_cta: int = 0
    pack_keys: int = 0

    def __post_init__(self) -> None:
        if self.rows_per_tile < self.group:
            raise ValueError(
                f"rows_per_tile: expected at least the group of {self.group} query heads, got {self.rows_per_tile}; "
                "a tile holds whole tokens"
            )
        if self.split_keys % SPLIT_UNIT:
            raise ValueError(
                f"split_keys: expected a multiple of {SPLIT_UNIT}, got {self.split_keys}; use 0 for balanced"
            )

    @property
    def tokens_per_row(self) -> int:
        return self.rows_per_tile // self.group

    @property
    def packs(self) -> bool:
        """Whether packed rows can arise: a row has room for two tokens, and cuts are not fixed."""
        return self.share and not self.split_keys and self.tokens_per_row >= 2

    @property
    def max_row_tokens(self) -> int:
        """Entries of packed rows: a request is in at most ``MAX_LEVELS`` of them."""
        return MAX_LEVELS * self.batch if self.packs else 0

    @property
    def max_rows(self) -> int:
        # A row ends with its request, or is full; a packed row holds at least one token.
        return self.batch + -(-self.tokens // self.tokens_per_row) + self.max_row_tokens

    @property
    def max_splits(self) -> int:
        """Tiles beyond the first of their (row, KV head): cuts at CTA boundaries, or each ``split_keys`` keys.

        In deterministic mode only requests of one query token are cut, so their pages bound the cuts.
        """
        if not self.split_keys:
            return self.num_ctas
        return -(-self.pages * self.page_size // self.split_keys) * self.num_kv_heads

    @property
    def max_packed_splits(self) -> int:
        """Tiles beyond the first of packed rows, which are cut alike and not at CTA boundaries."""
        return 2 * self.num_ctas if self.packs else 0

    @property
    def max_tiles(self) -> int:
        return self.max_rows * self.num_kv_heads + self.max_splits + self.max_packed_splits

    @property
    def max_merge(self) -> int:
        return self.tokens + self.max_row_tokens

    @property
    def max_partials(self) -> int:
        """Rows of the partial buffers: both sides of every cut, every packed row, every request that has one."""
        rows_of_a_tile = self.group if self.split_keys else self.rows_per_tile
        shared = (self.max_row_tokens + self.batch) * self.num_kv_heads * self.group if self.packs else 0
        return (2 * self.max_splits + self.max_packed_splits) * rows_of_a_tile + shared

    def needs_no_cuts(self, num_tokens: int) -> bool:
        """Whether an extend of ``num_tokens`` has pairs enough, whatever its requests: full rows are the fewest."""
        pairs = -(-num_tokens // self.tokens_per_row) * self.num_kv_heads
        return 0 < self.pairs_per_cta * self.num_ctas <= pairs

    @property
    def scratch_size(self) -> int:
        """int32 entries the planner works in: csrc/plan/scratch.h."""
        found = (2 + 8 * MAX_LEVELS) * self.batch + 3 if self.packs else 0
        nodes = 2 * MAX_LEVELS * self.batch if self.packs else 0
        sums = 6 + 13 * (self.max_rows + 1) + 5 * (self.num_ctas + 1) + 2 * (self.batch + 1) + nodes + 3
        return found + PLAN_CTAS * sums


@dataclass(eq=False)
class Plan:
    """Buffers of one plan, all int32 on one device. Shapes stand beside ``struct Plan`` in csrc/params.h."""

    capacity: Capacity
    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    last_page_len: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    row_tokens: torch.Tensor
    tiles: torch.Tensor
    pair_tiles: torch.Tensor
    cta_indptr: torch.Tensor
    merge_indptr: torch.Tensor
    merge_rows: torch.Tensor
    stretches: torch.Tensor
    counts: torch.Tensor
    scratch: torch.Tensor  # [scratch_size] written anew by every plan
    batch: int  # requests of the current plan, at most capacity.batch
    cut: bool = True  # whether rows of the current plan may be cut: if not, nothing is partial, nothing to be merged
    selections: int = 0  # runs of op select in a step, one for each layer that chooses its pages
    selects_tiles: bool = False  # whether op select shortens tiles (top-p): rows then say more than is to be read

    @classmethod
    def allocate(cls, capacity: Capacity, device: torch.device | str) -> Plan:
        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        c = capacity
        return cls(
            capacity=c,
            qo_indptr=ints(c.batch + 1),
            kv_indptr=ints(c.batch + 1),
            kv_indices=ints(c.pages + c.sparse_pages),
            last_page_len=ints(c.batch),
            positions=ints(c.tokens),
            rows=ints(c.max_rows, ROW_FIELDS),
            row_tokens=ints(max(c.max_row_tokens, 1)),
            tiles=ints(c.max_tiles, TILE_FIELDS),
            pair_tiles=ints(c.max_rows * c.num_kv_heads, 2),
            cta_indptr=ints(c.num_ctas + 1),
            merge_indptr=ints(c.tokens + 1),
            merge_rows=ints(c.max_merge, 2),
            stretches=ints(max(c.max_row_tokens, 1), STRETCH_FIELDS),
            counts=ints(Count.NUM_COUNTS),
            scratch=ints(c.scratch_size),
            batch=c.batch,
        )

    @property
    def free_cuts(self) -> bool:
        """``ops.attend``'s: the tiles are one way to cut the rows, and any other gives the same but for rounding."""
        return not self.capacity.split_keys and not self.selects_tiles

    @property
    def max_partials(self) -> int:
        """Rows of the partial buffers to give to ``attend``; with none it merges nothing."""
        return self.capacity.max_partials if self.cut else 0

    def tensors(self) -> list[torch.Tensor]:
        """The buffers in the order of ``struct Plan``, as the ops take them; per-request ones as long as the batch."""
        n = self.batch
        return [
            self.qo_indptr[: n + 1],
            self.kv_indptr[: n + 1],
            self.kv_indices,
            self.last_page_len[:n],
            self.positions,
            self.rows,
            self.row_tokens,
            self.tiles,
            self.pair_tiles,
            self.cta_indptr,
            self.merge_indptr,
            self.merge_rows,
            self.stretches,
            self.counts,
        ]
