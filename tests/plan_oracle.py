"""Batches for the planner as plain lists, and the laws that every plan of them obeys.

The laws are checked in Python over the finished plan, with no arithmetic of the planner: rows cover every visible key
of every token once, tiles partition rows, CTAs partition tiles evenly, merge lists are complete and in key order.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction

import torch

from flashcore_sglang import ops
from flashcore_sglang.planner.plan import SPLIT_UNIT, Capacity, Count, Plan, Policy

PACKED, SOLE, ALIKE = 1, 2, 4
ALIKE_SHIFT, ALIKE_BITS = 8, 12  # AlikeRows: behind the flags, the row's rank and how many there are
FEW_PACKED = 32  # queries of a packed row that is cut like any other
MIN_UNITS, BASE_COST, SLACK_SHARE, SLACK_UNITS = 2, 4, 16, 4  # csrc/plan/schedule.h


@dataclass
class Batch:
    """One call of the planner. ``tables[r]`` holds the page ids of request r, ``kv_lens[r]`` its keys."""

    tables: list[list[int]]
    kv_lens: list[int]
    q_lens: list[int] = field(default_factory=list)  # default: one query token each
    page_size: int = 16
    num_kv_heads: int = 2
    group: int = 4
    rows_per_tile: int = 16
    num_ctas: int = 8
    causal: bool = True
    window_left: int = -1
    policy: Policy = Policy.EXACT
    sink_pages: int = 1
    recent_pages: int = 2
    budget_pages: int = 5
    budget_share: int = 0  # 65536ths of a request's pages
    share: bool = True
    pack_keys: int = 0
    split_keys: int = 0

    def __post_init__(self) -> None:
        self.q_lens = self.q_lens or [1] * len(self.tables)
        for table, length in zip(self.tables, self.kv_lens, strict=True):
            assert len(table) == -(-length // self.page_size), "a table has a page for every key"

    @property
    def size(self) -> int:
        return len(self.tables)

    @property
    def num_pages(self) -> int:
        return 1 + max((page for table in self.tables for page in table), default=0)

    def sparse(self, r: int) -> int:
        """Pages the request's sparse row reads; 0: its rows are dense."""
        pages = {
            Policy.EXACT: 0,
            Policy.WINDOW: self.sink_pages + self.recent_pages,
            Policy.TOPK: max(self.budget_pages, self.share_of(len(self.tables[r]))),
        }[self.policy]
        return pages if pages and self.q_lens[r] == 1 and len(self.tables[r]) > pages else 0

    def share_of(self, pages: int) -> int:
        return math.ceil(Fraction(self.budget_share, 65536) * pages)

    @property
    def list_pages(self) -> int:
        longest = max(map(len, self.tables), default=0)
        return {
            Policy.EXACT: 0,
            Policy.WINDOW: self.sink_pages + self.recent_pages,
            Policy.TOPK: max(self.budget_pages, self.share_of(longest)),
        }[self.policy]

    def capacity(self, **changes: int) -> Capacity:
        lists = self.list_pages * (self.num_kv_heads if self.policy is Policy.TOPK else 1)
        sizes = {
            "batch": self.size,
            "tokens": sum(self.q_lens),
            "pages": sum(map(len, self.tables)),
            "num_pages": self.num_pages,
            "num_kv_heads": self.num_kv_heads,
            "group": self.group,
            "rows_per_tile": self.rows_per_tile,
            "num_ctas": self.num_ctas,
            "sparse_pages": self.size * lists,
            "page_size": self.page_size,
            "split_keys": self.split_keys,
        }
        return Capacity(**{**sizes, **changes}, share=self.share)

    def sparse_rows(self, begin: int) -> ops.SparseRows:
        return ops.SparseRows(
            self.sink_pages, self.recent_pages, self.budget_pages, self.budget_share, self.list_pages, begin
        )

    def load(self, plan: Plan) -> None:
        """Writes the page table into ``plan``."""
        device = plan.counts.device
        plan.batch = self.size

        def fill(buffer: torch.Tensor, values: list[int]) -> None:
            buffer[: len(values)].copy_(torch.tensor(values, dtype=torch.int32, device=device))

        fill(plan.qo_indptr, cumulative(self.q_lens))
        fill(plan.kv_indptr, cumulative([len(table) for table in self.tables]))
        fill(plan.kv_indices, [page for table in self.tables for page in table])
        fill(plan.last_page_len, [(n - 1) % self.page_size + 1 if n else 0 for n in self.kv_lens])

    def run(self, plan: Plan, num_tokens: int | None = None) -> None:
        """Runs the plan op on a loaded ``plan``."""
        c = plan.capacity
        ops.plan(
            plan.tensors(),
            plan.scratch,
            num_tokens=sum(self.q_lens) if num_tokens is None else num_tokens,
            num_kv_heads=self.num_kv_heads,
            group=self.group,
            page_size=self.page_size,
            num_pages=c.num_pages,
            rows_per_tile=self.rows_per_tile,
            max_partials=c.max_partials,
            causal=self.causal,
            window_left=self.window_left,
            policy=int(self.policy),
            sparse=self.sparse_rows(c.pages),
            share=self.share,
            pack_keys=self.pack_keys,
            split_keys=self.split_keys,
        )

    def plan(self, device: str = "cpu", **changes: int) -> Plan:
        plan = Plan.allocate(self.capacity(**changes), device)
        self.load(plan)
        self.run(plan)
        return plan

    def attend(
        self, plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out and LSE of a decode step over ``plan``, by ``variant``; what is not written is NaN."""
        head_dim, partials = q.shape[-1], plan.capacity.max_partials
        out = torch.full_like(q, torch.nan)
        lse = torch.full(q.shape[:2], torch.nan, device=q.device)
        ops.attend(
            q,
            k,
            v,
            plan.tensors(),
            torch.full((partials, head_dim), torch.nan, device=q.device),
            torch.full((partials,), torch.nan, device=q.device),
            out,
            lse,
            rows_per_tile=self.rows_per_tile,
            sm_scale=head_dim**-0.5,
            causal=self.causal,
            window_left=self.window_left,
            logits_soft_cap=0.0,
            decode=True,
            variant=variant,
            free_cuts=plan.free_cuts,
        )
        return out, lse


def cumulative(values: list[int]) -> list[int]:
    total = [0]
    for value in values:
        total.append(total[-1] + value)
    return total


@dataclass
class RowView:
    tokens: list[int]
    flags: int
    page_begin: int
    head_stride: int
    kv_len: int
    kv_pos: int


@dataclass
class PlanView:
    """A plan as Python numbers, cut to what is in use."""

    counts: list[int]
    rows: list[RowView]
    tiles: list[list[int]]
    pair_tiles: list[list[int]]  # of each (row, KV head): first, end
    cta_indptr: list[int]
    merge: list[list[tuple[int, int]]]  # of each token
    positions: list[int]
    kv_indices: list[int]
    row_tokens: list[int]

    @classmethod
    def of(cls, plan: Plan, batch: Batch) -> PlanView:
        counts = plan.counts.tolist()
        num_rows, num_tiles = counts[Count.NUM_ROWS], counts[Count.NUM_TILES]
        num_tokens = sum(batch.q_lens)
        row_tokens = plan.row_tokens.tolist()
        rows = []
        for q_begin, q_count, flags, page_begin, head_stride, kv_len, kv_pos, _ in plan.rows[:num_rows].tolist():
            tokens = list(range(q_begin, q_begin + q_count))
            if flags & PACKED:
                tokens = [row_tokens[i] for i in tokens]
            rows.append(RowView(tokens, flags, page_begin, head_stride, kv_len, kv_pos))
        indptr = plan.merge_indptr[: num_tokens + 1].tolist()
        entries = [tuple(entry) for entry in plan.merge_rows[: indptr[-1]].tolist()]
        return cls(
            counts=counts,
            rows=rows,
            tiles=plan.tiles[:num_tiles].tolist(),
            pair_tiles=plan.pair_tiles[: num_rows * batch.num_kv_heads].tolist(),
            cta_indptr=plan.cta_indptr.tolist(),
            merge=[entries[indptr[t] : indptr[t + 1]] for t in range(num_tokens)],
            positions=plan.positions[:num_tokens].tolist(),
            kv_indices=plan.kv_indices.tolist(),
            row_tokens=row_tokens,
        )

    def tiles_of(self, pair: int) -> list[list[int]]:
        return self.tiles[slice(*self.pair_tiles[pair])]


def check_plan(plan: Plan, batch: Batch) -> PlanView:
    """Raises AssertionError where the plan breaks a law; returns it as numbers."""
    view = PlanView.of(plan, batch)
    assert view.counts[Count.OVERFLOW] == 0, "the capacity was made for this batch"
    assert view.counts[Count.NUM_ROWS] <= plan.capacity.max_rows
    check_coverage(view, batch)
    check_tiles(view, batch, plan.capacity)
    check_ctas(view, batch)
    check_counts(view, batch)
    check_stretches(plan, batch)
    return view


def check_coverage(view: PlanView, batch: Batch) -> None:
    listed = set()
    token = 0
    for r, (table, kv_len, q_len) in enumerate(zip(batch.tables, batch.kv_lens, batch.q_lens, strict=True)):
        for i in range(q_len):
            position = kv_len - q_len + i
            assert view.positions[token] == position
            end = min(kv_len, position + 1) if batch.causal else kv_len
            begin = max(0, position - batch.window_left) if batch.window_left >= 0 else 0
            entries = view.merge[token]
            assert entries, f"token {token} is in a row"
            for row_index, i_token in entries:
                assert view.rows[row_index].tokens[i_token] == token
                assert (row_index, i_token) not in listed
                listed.add((row_index, i_token))
            rows = [view.rows[row_index] for row_index, _ in entries]
            for row in rows:
                assert bool(row.flags & SOLE) == (len(rows) == 1 and not row.flags & PACKED)
            if batch.sparse(r):
                check_sparse_row(view, batch, r, rows)
            elif begin < end:
                assert rows[0].kv_pos <= begin, "the first visible key is read"
                assert rows[-1].kv_pos + rows[-1].kv_len >= end, "the last visible key is read"
                for before, after in itertools.pairwise(rows):
                    assert before.kv_pos + before.kv_len == after.kv_pos, "rows follow each other along the keys"
                for row in rows:
                    assert row.kv_pos % batch.page_size == 0
                    assert row.kv_pos + row.kv_len <= kv_len
                    assert row.head_stride == 0
                    columns = slice(row.kv_pos // batch.page_size, -(-(row.kv_pos + row.kv_len) // batch.page_size))
                    pages = table[columns]
                    assert view.kv_indices[row.page_begin : row.page_begin + len(pages)] == pages
            token += 1
    assert len(listed) == sum(len(row.tokens) for row in view.rows), "no row holds a token that does not merge it"


def check_sparse_row(view: PlanView, batch: Batch, r: int, rows: list[RowView]) -> None:
    (row,) = rows
    table, kv_len, pages = batch.tables[r], batch.kv_lens[r], batch.sparse(r)
    last_page_len = (kv_len - 1) % batch.page_size + 1
    assert row.kv_len == (pages - 1) * batch.page_size + last_page_len
    assert row.kv_pos + row.kv_len == kv_len
    dense_end = sum(map(len, batch.tables))
    assert row.page_begin >= dense_end, "lists stand behind the dense table"
    if batch.policy is Policy.WINDOW:
        assert row.head_stride == 0
        chosen = view.kv_indices[row.page_begin : row.page_begin + pages]
        assert chosen == table[: batch.sink_pages] + table[len(table) - batch.recent_pages :]
    else:
        assert row.head_stride == batch.list_pages
        assert row.page_begin == dense_end + r * batch.num_kv_heads * batch.list_pages


def check_tiles(view: PlanView, batch: Batch, capacity: Capacity) -> None:
    assert len(view.tiles) == view.counts[Count.NUM_TILES] <= capacity.max_tiles
    ranges = sorted(view.pair_tiles)
    assert [0, *(end for _, end in ranges)] == [*(begin for begin, _ in ranges), len(view.tiles)], "each tile is of one"
    used: list[tuple[int, int]] = []
    for pair in range(len(view.rows) * batch.num_kv_heads):
        row = view.rows[pair // batch.num_kv_heads]
        tiles = view.tiles_of(pair)
        assert tiles, "every pair has a tile"
        assert [tile[0] for tile in tiles] == [pair] * len(tiles)
        begins, ends = [tile[1] for tile in tiles], [tile[2] for tile in tiles]
        assert [*begins, row.kv_len] == [0, *ends], "tiles partition the row's keys"
        assert all(begin % SPLIT_UNIT == 0 for begin in begins)
        assert row.kv_len == 0 or all(begin < end for begin, end in zip(begins, ends, strict=True))
        if batch.split_keys and len(tiles) > 1:
            assert all(end - begin == batch.split_keys for begin, end in zip(begins[:-1], ends[:-1], strict=True))
        packed = len(row.tokens) * batch.group
        assert packed <= batch.rows_per_tile
        direct = len(tiles) == 1 and bool(row.flags & SOLE)
        for tile in tiles:
            assert (tile[3] == -1) == direct
            assert tile[4] == row.page_begin + pair % batch.num_kv_heads * row.head_stride
            first = ~tile[5] if tile[5] < 0 else tile[5]
            listed = view.row_tokens[first:] if tile[5] < 0 else list(range(first, first + tile[6]))
            assert (tile[5] < 0) == bool(row.flags & PACKED)
            assert listed[: tile[6]] == row.tokens, "the tile says of its row what the row does"
            assert tile[7] == row.kv_pos
            if not direct:
                used.append((tile[3], tile[3] + packed))
    check_packed_cuts(view, batch)
    used.sort()
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(used)), "partials are disjoint"
    total = used[-1][1] if used else 0
    assert (used[0][0] if used else 0) >= 0
    assert view.counts[Count.NUM_PARTIALS] == total <= capacity.max_partials


def check_packed_cuts(view: PlanView, batch: Batch) -> None:
    """Rows that read the same keys are cut alike, so that they can read them together."""
    cuts: dict[tuple[int, int], list[tuple[int, int]]] = {}
    readers = Counter((row.page_begin, row.kv_len) for row in view.rows if row.flags & PACKED)
    rank = 0
    for i, row in enumerate(view.rows):
        if row.flags & PACKED:
            alone = readers[row.page_begin, row.kv_len] == 1
            assert bool(row.flags & ALIKE) == (not alone or len(row.tokens) * batch.group > FEW_PACKED)
        if not row.flags & ALIKE:
            assert row.flags < 1 << ALIKE_SHIFT
            continue
        assert row.flags >> ALIKE_SHIFT == rank | readers[row.page_begin, row.kv_len] << ALIKE_BITS
        rank = (rank + 1) % readers[row.page_begin, row.kv_len]  # rows of the same keys follow each other
        for pair in range(i * batch.num_kv_heads, (i + 1) * batch.num_kv_heads):
            tiles = view.tiles_of(pair)
            spans = [(tile[1], tile[2]) for tile in tiles]
            assert cuts.setdefault((row.page_begin, row.kv_len), spans) == spans


def unit_cost(packed: int) -> int:
    return BASE_COST if packed <= 16 else BASE_COST + packed // 32


def check_ctas(view: PlanView, batch: Batch) -> None:
    indptr = view.cta_indptr
    assert indptr[0] == 0
    assert indptr[-1] == len(view.tiles)
    assert all(a <= b for a, b in itertools.pairwise(indptr))
    if batch.split_keys or not view.tiles:
        return
    costs, weights = [], []
    for pair, begin, end, *_ in view.tiles:
        weight = unit_cost(len(view.rows[pair // batch.num_kv_heads].tokens) * batch.group)
        alike = bool(view.rows[pair // batch.num_kv_heads].flags & ALIKE)
        weights.append(weight * (-(-(end - begin) // SPLIT_UNIT) if alike else 1))  # they stay whole tiles
        costs.append(max(1, -(-(end - begin) // SPLIT_UNIT)) * weight)
    # The line also holds one unit of start-up for each pair.
    total = sum(costs) + sum(unit_cost(len(row.tokens) * batch.group) for row in view.rows) * batch.num_kv_heads
    share = total / min(batch.num_ctas, max(1, total // (MIN_UNITS * BASE_COST)))
    slack = min(share / SLACK_SHARE, SLACK_UNITS * BASE_COST) + BASE_COST if cut_by_pairs(view) else 0
    for begin, end in itertools.pairwise(indptr):
        assert sum(costs[begin:end]) <= share + slack + max(weights), (
            "no CTA has more than its share and a unit, or a packed tile"
        )


def cut_by_pairs(view: PlanView) -> bool:
    """Whether every CTA has whole (row, KV head) pairs, or one piece of one."""
    whole = {begin for begin, end in view.pair_tiles if end - begin == 1}
    ctas = itertools.pairwise(view.cta_indptr)
    return all(end - begin <= 1 or whole.issuperset(range(begin, end)) for begin, end in ctas)


def check_counts(view: PlanView, batch: Batch) -> None:
    counts = view.counts
    assert counts[Count.PAGES_DENSE] == sum(map(len, batch.tables))
    assert counts[Count.PAGES_READ] == sum(-(-row.kv_len // batch.page_size) for row in view.rows)
    assert counts[Count.ROWS_PACKED] == sum(bool(row.flags & PACKED) for row in view.rows)


def scored_columns(batch: Batch, r: int) -> int:
    """Policy topk scores the pages of a sparse request up to here."""
    return len(batch.tables[r]) - batch.recent_pages if batch.policy is Policy.TOPK and batch.sparse(r) else 0


def distinct_columns(batch: Batch) -> int:
    """Page columns to score if requests share all that they have in common up to there."""
    return len({tuple(batch.tables[r][: c + 1]) for r in range(batch.size) for c in range(scored_columns(batch, r))})


def check_stretches(plan: Plan, batch: Batch) -> None:
    """Every page to score stands once for every request, in columns and in the units of columns that kernels take."""
    stretches = plan.stretches[: plan.counts[Count.NUM_STRETCHES]].tolist()
    if not stretches:
        return
    for unit in (1, 4, 8, 16, 32):
        taken: list[list[int]] = [[] for _ in batch.tables]
        for i, (request, rank, begin, end) in enumerate(stretches):
            # Whole units; of one request alone the last one, too.
            first = max(begin - batch.sink_pages, 0) // unit
            last = max(end - batch.sink_pages + (0 if rank else unit - 1), 0) // unit
            pages = slice(batch.sink_pages + first * unit, batch.sink_pages + last * unit)
            sharers = [stretch[0] for stretch in stretches[i - rank : i + 1]]
            assert len(set(sharers)) == rank + 1
            for r in sharers if first < last else []:
                taken[r] += range(first, last)
                own, theirs = (batch.tables[s][: scored_columns(batch, s)][pages] for s in (r, request))
                assert own == theirs, "requests share the same pages"
        for r, units in enumerate(taken):
            columns = max(scored_columns(batch, r) - batch.sink_pages, 0)
            assert sorted(units) == list(range(-(-columns // unit))), "each unit of a request is scored once"


def pages_listed(plan: Plan, r: int, kv_len: int) -> list[int]:
    """How many pages each KV head of a request of ``kv_len`` keys in one sparse row reads, by the tiles' ends."""
    heads, page_size = plan.capacity.num_kv_heads, plan.capacity.page_size
    row = int(plan.merge_rows[plan.merge_indptr[r], 0])
    counts = []
    for pair in range(row * heads, (row + 1) * heads):
        begin, end = plan.pair_tiles[pair].tolist()
        tiles = plan.tiles[begin:end].tolist()
        begins, ends = zip(*((tile[1], tile[2]) for tile in tiles), strict=True)
        keys = max(end for begin, end in zip(begins, ends, strict=True) if begin < end)
        assert all(begin == end for begin, end in zip(begins, ends, strict=True) if begin >= keys)
        assert all(a == b for a, b in zip(begins[1:], ends, strict=False) if b < keys), "no gaps before the end"
        assert keys % page_size == kv_len % page_size
        counts.append(-(-keys // page_size))
    return counts
