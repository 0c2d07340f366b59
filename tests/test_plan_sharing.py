"""The planner with sharing: prefix trees are found and read once, and every table there can be is planned exactly."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan_oracle import ALIKE, PACKED, Batch, check_plan
from test_plan import used_parts

from flashcore_sglang import reference, variants
from flashcore_sglang.planner import Count, Plan, Policy


@dataclass
class Node:
    """A stretch of ``keys`` that everything below it shares; a node without children is a request."""

    keys: int
    children: list[Node] = field(default_factory=list)


def leaves(count: int, keys: int) -> list[Node]:
    return [Node(keys) for _ in range(count)]


def from_tree(roots: list[Node], page_size: int, seed: int = 0, **fields: object) -> Batch:
    """The decode batch of a forest: shared keys are rounded down to pages, as SGLang's radix cache does."""
    tables: list[list[int]] = []
    kv_lens: list[int] = []
    next_page = 1

    def visit(node: Node, prefix: list[int]) -> None:
        nonlocal next_page
        columns = node.keys // page_size if node.children else -(-node.keys // page_size)
        own = list(range(next_page, next_page + columns))
        next_page += columns
        if not node.children:
            tables.append(prefix + own)
            kv_lens.append(len(prefix) * page_size + node.keys)
        for child in node.children:
            visit(child, prefix + own)

    for root in roots:
        visit(root, [])
    rng = Random(seed)
    ids = list(range(next_page))
    rng.shuffle(ids)
    order = list(range(len(tables)))
    rng.shuffle(order)
    return Batch(
        [[ids[page] for page in tables[r]] for r in order],
        [kv_lens[r] for r in order],
        page_size=page_size,
        **fields,  # type: ignore[arg-type]
    )


def unique_pages(batch: Batch) -> int:
    return len({page for table in batch.tables for page in table})


HOPPER = {"num_kv_heads": 8, "group": 4, "rows_per_tile": 64, "num_ctas": 132}
APART = {**HOPPER, "rows_per_tile": 128, "num_ctas": 264}

TREES: dict[str, Batch] = {
    "one prefix": from_tree([Node(8192, leaves(64, 512))], 64, **HOPPER),
    "four groups": from_tree([Node(2048, leaves(16, 256)) for _ in range(4)], 64, **HOPPER),
    "depth 3": from_tree([Node(4096, [Node(16384, leaves(8, 1024)) for _ in range(8)])], 64, **HOPPER),
    "depth 4, page 16": from_tree(
        [Node(2048, [Node(2048, [Node(2048, leaves(4, 100)) for _ in range(2)]) for _ in range(2)])], 16, **HOPPER
    ),
    "two rows a node": from_tree([Node(4096, leaves(21, 65))], 64, **HOPPER),
    "page 1": from_tree([Node(4000, leaves(9, 3))], 1, **HOPPER),
    "whole pages to the end": Batch([list(range(1, 101))] * 8, [6400] * 8, page_size=64, **HOPPER),
    "shared among strangers": from_tree([Node(8192, leaves(8, 100)), *leaves(9, 3000)], 64, seed=3, **HOPPER),
}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_is_read_once(name: str) -> None:
    batch = TREES[name]
    view = check_plan(batch.plan(), batch)
    stretches = {row.page_begin: -(-row.kv_len // batch.page_size) for row in view.rows}  # a node may have several rows
    assert sum(stretches.values()) == unique_pages(batch)


def test_rows_of_a_node_are_even() -> None:
    batch = TREES["two rows a node"]
    view = check_plan(batch.plan(), batch)
    assert sorted(len(row.tokens) for row in view.rows if row.flags & PACKED) == [10, 11]


# 4 prefixes of 128 units of 64 keys, read by 4 rows each for one KV head, so 16 pairs for 33 CTAs; every request has
# `own` units to itself. 16 rows of 128 units are as much as 256 requests of 8.
@pytest.mark.parametrize("own, pieces", [(2, 2), (4, 3), (6, 3), (8, 4), (12, 4), (14, 2), (40, 2)])
def test_packed_rows_are_cut_finer_where_short_tiles_end_amid_them(own: int, pieces: int) -> None:
    shape = {"num_kv_heads": 1, "group": 1, "rows_per_tile": 16, "num_ctas": 33}
    batch = from_tree([Node(8192, leaves(64, 64 * own)) for _ in range(4)], 64, **shape)
    view = check_plan(batch.plan(), batch)
    packed = [pair for pair, row in enumerate(view.rows) if row.flags & PACKED]
    assert len(packed) == 16
    assert {len(view.tiles_of(i)) for i in packed} == {pieces}


@pytest.mark.parametrize("group, pieces", [(16, 2), (17, 4)])
def test_where_one_kernel_takes_all_rows_packed_ones_are_cut_finer(group: int, pieces: int) -> None:
    """512 pairs or more and up to 16 query heads a KV head: packed rows are another kernel's."""
    shape = {"num_kv_heads": 2, "group": group, "rows_per_tile": 32 * group, "num_ctas": 66}
    batch = from_tree([Node(8192, leaves(128, 256)) for _ in range(4)], 64, **shape)
    view = check_plan(batch.plan(), batch)
    assert {len(view.tiles_of(2 * i)) for i in range(16)} == {pieces}


# (requests of a prefix, their own units, how many of 1024 SMs the packed rows get): 4 prefixes of 128 units. With 128
# requests four rows read the same keys, with 32 one does.
@pytest.mark.parametrize(
    "readers, own, share", [(128, 1, 720), (128, 4, 720), (128, 8, 614), (128, 40, 540), (32, 4, 400)]
)
def test_packed_rows_get_sms_by_their_work(readers: int, own: int, share: int) -> None:
    """Many requests: packed rows are another kernel's, and cut into no more tiles than there are CTAs."""
    shape = {"num_kv_heads": 8, "group": 1, "rows_per_tile": 32, "num_ctas": 264}
    batch = from_tree([Node(8192, leaves(readers, 64 * own)) for _ in range(4)], 64, **shape)
    view = check_plan(batch.plan(), batch)
    assert view.counts[Count.PACKED_SHARE] == share
    packed = [i for i, row in enumerate(view.rows) if row.flags & PACKED]
    assert view.pair_tiles[8 * len(packed) - 1][1] <= 264


@pytest.mark.parametrize("prefix, packed", [(384, False), (512, True)])
def test_break_even_of_eight_requests(prefix: int, packed: bool) -> None:
    batch = from_tree([Node(prefix, leaves(8, 2000))], 64, **HOPPER)
    view = check_plan(batch.plan(), batch)
    assert bool(view.counts[Count.ROWS_PACKED]) == packed


# 1152 keys for each of 32 packed queries and 48 more: 7 x 8 KV heads x 1646 keys.
@pytest.mark.parametrize("prefix, packed", [(1600, False), (1664, True)])
def test_break_even_of_all_packed_rows(prefix: int, packed: bool) -> None:
    batch = from_tree([Node(prefix, leaves(8, 2000))], 64, pack_keys=1152, **HOPPER)
    view = check_plan(batch.plan(), batch)
    assert bool(view.counts[Count.ROWS_PACKED]) == packed


def test_prefixes_pay_together() -> None:
    """What packing costs once is made up for by the rows of all nodes; their queries count as a row has them."""
    packed = [
        check_plan(batch.plan(), batch).counts[Count.ROWS_PACKED]
        for groups in (1, 2)
        for batch in [from_tree([Node(1024, leaves(8, 100))] * groups, 64, pack_keys=1152, **HOPPER)]
    ]
    assert packed == [0, 2]


# A prefix of `units` of 64 keys, one row for 8 KV heads and 132 CTAs; 16 requests of 4 query heads, `own` units each.
@pytest.mark.parametrize(
    "units, own, longest",
    [
        pytest.param(64, 1, 4, id="no shorter than a 16th of the queries"),
        pytest.param(128, 4, 10, id="as long as a CTA's share"),
        pytest.param(128, 64, 32, id="no longer than 32"),
        pytest.param(512, 1, 32, id="one for each CTA"),
    ],
)
def test_packed_tiles_are_as_long_as_a_share(units: int, own: int, longest: int) -> None:
    batch = from_tree([Node(64 * units, leaves(16, 64 * own))], 64, **HOPPER)
    view = check_plan(batch.plan(), batch)
    tiles = view.tiles_of(0)
    assert max(tile[2] - tile[1] for tile in tiles) == 64 * longest


# 64 requests of 4 query heads, 132 CTAs. 16 units of 4 KV heads for each of these are 528 units of all rows; with 8 KV
# heads packed rows have a kernel of their own, and 8 units for each CTA are 132.
@pytest.mark.parametrize("kv_heads, units, queries", [(4, 132, 64), (4, 133, 128), (8, 33, 64), (8, 34, 128)])
def test_rows_are_small_where_little_is_packed(kv_heads: int, units: int, queries: int) -> None:
    shape = {**HOPPER, "num_kv_heads": kv_heads, "rows_per_tile": 128}
    batch = from_tree([Node(64 * units, leaves(64, 100))], 64, **shape)
    view = check_plan(batch.plan(), batch)
    assert {4 * len(row.tokens) for row in view.rows if row.flags & PACKED} == {queries}


def test_packed_rows_of_few_queries_are_cut_by_shares() -> None:
    batch = from_tree([Node(32768, leaves(8, 100))], 64, **HOPPER)
    view = check_plan(batch.plan(), batch)
    rows = [row for row in view.rows if row.flags & PACKED]
    assert len(rows) == 1
    assert not rows[0].flags & ALIKE
    cuts = {tile[1] for pair in range(8) for tile in view.tiles_of(pair)}
    assert len(cuts) > 132 // 8  # another place in each pair


def test_a_small_common_start_does_not_hide_documents() -> None:
    """One page common to all does not pay by itself; the documents behind it do, and take it along."""
    batch = from_tree([Node(64, [Node(8192, leaves(4, 100)) for _ in range(2)])], 64, **HOPPER)
    view = check_plan(batch.plan(), batch)
    packed = [row for row in view.rows if row.flags & PACKED]
    assert sorted((row.kv_pos, row.kv_len, len(row.tokens)) for row in packed) == [(0, 8256, 4)] * 2


def test_deep_trees_stop_at_the_levels_there_is_room_for() -> None:
    node = Node(4096, leaves(2, 64))
    for _ in range(6):
        node = Node(4096, [node, *leaves(2, 64)])
    batch = from_tree([node], 64, **HOPPER)
    view = check_plan(batch.plan(), batch)
    assert max(len(entries) for entries in view.merge) == 5


OFF: dict[str, dict[str, object]] = {
    "switched off": {"share": False},
    "fixed cuts": {"split_keys": 128},
    "window left": {"window_left": 1 << 20},
    "a row holds one token": {"rows_per_tile": 4},
}


@pytest.mark.parametrize("name", OFF)
def test_where_nothing_is_packed(name: str) -> None:
    batch = replace(TREES["one prefix"], **OFF[name])  # type: ignore[arg-type]
    assert check_plan(batch.plan(), batch).counts[Count.ROWS_PACKED] == 0


def test_extending_requests_are_not_packed() -> None:
    batch = replace(TREES["one prefix"], q_lens=[2] * 10 + [1] * 54)
    view = check_plan(batch.plan(), batch)
    packed = {token for row in view.rows if row.flags & PACKED for token in row.tokens}
    assert packed == set(range(20, 74))


def test_sparse_requests_are_not_packed() -> None:
    long, short = from_tree([Node(8192, leaves(8, 512))], 64), from_tree([Node(4096, leaves(8, 64))], 64)
    shift = long.num_pages
    tables = long.tables + [[page + shift for page in table] for table in short.tables]
    batch = Batch(tables, long.kv_lens + short.kv_lens, page_size=64, **HOPPER)  # type: ignore[arg-type]
    batch = replace(batch, policy=Policy.TOPK, budget_pages=100)
    view = check_plan(batch.plan(), batch)
    packed = {token for row in view.rows if row.flags & PACKED for token in row.tokens}
    assert packed == set(range(8, 16))


BIG = {"page_size": 64, **HOPPER}
A, B, C = list(range(1, 101)), list(range(101, 201)), list(range(201, 301))
ADVERSARIAL: dict[str, Batch] = {
    # Nothing below is a prefix tree; SGLang never makes such tables, and the rows have to be exact all the same.
    "shared after private columns": Batch([[300 + r, *A] for r in range(8)], [6464] * 8, **BIG),
    "shared after another prefix": Batch([A + C] * 3 + [B + C] * 3, [12800] * 6, **BIG),
    "one page everywhere": Batch([[7] * 100] * 8, [6400] * 8, **BIG),
    "shifted by a column": Batch([A] * 4 + [[500, *A]] * 4, [6400] * 4 + [6464] * 4, **BIG),
    "reversed": Batch([A] * 4 + [A[::-1]] * 4, [6400] * 8, **BIG),
    "an owner that ends early": Batch([A[:50], A, A, A], [3200, 6400, 6400, 6400], **BIG),
    "an owner in mid-page": Batch([A[:50], A, A, A], [3150, 6400, 6400, 6400], **BIG),
    "a hole": Batch([A, A, [*A[:40], 400, *A[41:]], A], [6400] * 4, **BIG),
    "joined stretches of different owners": Batch(
        [[301, *A], [301, *B], [302, *A], [302, *B], [303, *A], [303, *A], [301, *A]], [6464] * 7, **BIG
    ),
    "pages beyond the pool": Batch([[1, 2, 3]] * 4, [192] * 4, **BIG),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_tables_that_are_no_tree(name: str) -> None:
    batch = ADVERSARIAL[name]
    small = {"num_pages": 2} if name == "pages beyond the pool" else {}
    check_plan(batch.plan(**small), batch)


def test_entries_behind_a_request_are_not_read() -> None:
    """A narrower batch in the buffers of a wider one: the rest of them is another batch's."""
    batch = TREES["four groups"]
    plan = Plan.allocate(batch.capacity(batch=80, tokens=80, pages=4000), "cpu")
    for buffer in plan.tensors():
        buffer.fill_(12345)
    batch.load(plan)
    batch.run(plan)
    check_plan(plan, batch)


def test_plans_follow_each_other_in_the_same_buffers() -> None:
    first, second = TREES["depth 3"], replace(TREES["four groups"], **HOPPER)
    plan = Plan.allocate(first.capacity(batch=100, tokens=100, pages=30_000, num_pages=30_000), "cpu")
    for batch in (first, second, first):
        batch.load(plan)
        batch.run(plan)
        check_plan(plan, batch)
        for a, b in zip(used_parts(plan, batch), used_parts(batch.plan(), batch), strict=True):
            assert torch.equal(a, b)


@st.composite
def tables(draw: st.DrawFn) -> Batch:
    """Random forests, half of them with pages then overwritten by other pages of the pool.

    Pages are long, so that packing pays in small tables.
    """
    rng = Random(draw(st.integers(0, 1 << 32)))
    page_size = rng.choice([16, 1024, 4096])

    def grow(depth: int) -> Node:
        keys = rng.randrange(0, 6 * page_size)
        if depth == 0 or rng.random() < 0.3:
            return Node(max(1, keys))
        return Node(keys, [grow(depth - 1) for _ in range(rng.randrange(1, 4))])

    batch = from_tree([grow(3) for _ in range(rng.randrange(1, 4))], page_size, seed=rng.randrange(1000))
    if rng.random() < 0.5:
        for _ in range(rng.randrange(1, 6)):
            table = rng.choice(batch.tables)
            if table:
                table[rng.randrange(len(table))] = rng.randrange(batch.num_pages)
    group = rng.randrange(1, 5)
    return replace(
        batch,
        num_kv_heads=rng.choice([1, 3, 8]),
        group=group,
        rows_per_tile=group * rng.randrange(1, 6),
        num_ctas=rng.randrange(1, 12),
        q_lens=[1 if rng.random() < 0.9 else min(2, n) for n in batch.kv_lens],
        policy=rng.choice([Policy.EXACT, Policy.EXACT, Policy.WINDOW]),
        pack_keys=rng.choice([0, 0, 1000, 10_000]),
    )


@settings(max_examples=3_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(tables())
def test_any_tables(batch: Batch) -> None:
    check_plan(batch.plan(), batch)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*TREES, *ADVERSARIAL])
def test_cuda_plans_as_the_cpu_does(name: str) -> None:
    batch = {**TREES, **ADVERSARIAL}[name]
    small = {"num_pages": 2} if name == "pages beyond the pool" else {}
    on_gpu = batch.plan("cuda", **small)
    check_plan(on_gpu, batch)
    for a, b in zip(used_parts(on_gpu, batch), used_parts(batch.plan(**small), batch), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@settings(max_examples=1_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(tables())
def test_cuda_plans_any_tables_as_the_cpu_does(batch: Batch) -> None:
    for a, b in zip(used_parts(batch.plan("cuda"), batch), used_parts(batch.plan(), batch), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_cuda_plans_more_requests_than_shared_memory_holds() -> None:
    """A CTA keeps 8 bytes a request at hand and more, in at most 227 KB."""
    requests = 30_000
    batch = Batch([[0, 1 + r] for r in range(requests)], [4097] * requests, page_size=4096)
    on_gpu = batch.plan("cuda")
    assert on_gpu.counts[Count.ROWS_PACKED] == -(-requests // 4)
    for a, b in zip(used_parts(on_gpu, batch), used_parts(batch.plan(), batch), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_a_captured_plan_follows_the_tables() -> None:
    """One graph for a batch size: what is shared, and how much work there is, changes between replays."""
    batches = [TREES["four groups"], TREES["one prefix"], from_tree(leaves(64, 3000), 64, **HOPPER)]
    assert len({batch.size for batch in batches}) == 1
    pages, pool = max(sum(map(len, b.tables)) for b in batches), max(b.num_pages for b in batches)
    plan = Plan.allocate(batches[0].capacity(pages=pages, num_pages=pool), "cuda")
    batches[0].load(plan)
    batches[0].run(plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batches[0].run(plan)
    for batch in [*batches, batches[0]]:
        batch.load(plan)
        graph.replay()
        torch.cuda.synchronize()
        check_plan(plan, batch)
        for a, b in zip(used_parts(plan, batch), used_parts(batch.plan(), batch), strict=True):
            assert torch.equal(a, b)


VARIANTS = ["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("wmma_sm80", "wgmma_sm90"))]


def skip_unless_it_runs(variant: str, batch: Batch, head_dim: int) -> None:
    shape = variants.Shape(
        num_qo_heads=batch.num_kv_heads * batch.group,
        num_kv_heads=batch.num_kv_heads,
        head_dim=head_dim,
        page_size=batch.page_size,
        dtype="bf16",
        phase="decode",
        features=("lse", "causal"),
    )
    if reason := variants.why_not(variants.BY_NAME[variant], shape, variants.device_of("cuda")):
        pytest.skip(f"{variant} {reason}")


def exact_attention(
    plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output and LSE in fp64 over a plan's page table, and twice the error of plain PyTorch in bf16."""
    table = [part.to(q.device) for part in (plan.qo_indptr, plan.kv_indptr, plan.kv_indices, plan.last_page_len)]
    truth, lse = reference.paged_attention(q.double(), k.double(), v.double(), *table)
    plain, _ = reference.paged_attention(q, k, v, *table, dtype=torch.bfloat16)
    return truth, lse, 2 * (plain.double() - truth).abs().max()


def check_attention(batch: Batch, variant: str, head_dim: int = 64) -> None:
    """Attention over the packed plan against fp64, at most twice as far from it as plain PyTorch in bf16."""
    device = "cpu" if variant == "cpu" else "cuda"
    heads = batch.num_kv_heads * batch.group
    if device == "cuda":
        skip_unless_it_runs(variant, batch, head_dim)
    generator = torch.Generator().manual_seed(1)
    shape = (batch.num_pages, batch.page_size, batch.num_kv_heads, head_dim)
    q = torch.randn(batch.size, heads, head_dim, generator=generator).bfloat16()
    k, v = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    plan = batch.plan(device)
    assert plan.counts[Count.ROWS_PACKED] > 0
    inputs = [x.to(device) for x in (q, k, v)]
    out, lse = batch.attend(plan, *inputs, variant)
    truth, true_lse, allowed = exact_attention(plan, q, k, v)
    assert (out.cpu().double() - truth).abs().max() <= allowed
    # A sum of head_dim products and one over the keys, in fp32.
    assert (lse.cpu().double() - true_lse).abs().max() <= head_dim * 2**-23 * true_lse.abs().max()
    # Whoever takes a tile, its results are the same.
    for _ in range(3 if device == "cuda" else 0):
        again, again_lse = batch.attend(plan, *inputs, variant)
        assert torch.equal(again, out)
        assert torch.equal(again_lse, lse)


FEW_HEADS = {**HOPPER, "num_kv_heads": 4}
DOCUMENTS = [Node(1024, [Node(2048, leaves(9, 100)), Node(1024, leaves(18, 65))])]
ATTENDED: dict[str, Batch] = {
    "documents": from_tree(DOCUMENTS, 64, **FEW_HEADS),
    "documents, page 16": from_tree(DOCUMENTS, 16, **FEW_HEADS),
    "documents, page 1": from_tree(DOCUMENTS, 1, **FEW_HEADS),
    "group 7": from_tree(DOCUMENTS, 64, **{**FEW_HEADS, "group": 7}),
    "shared after another prefix": replace(ADVERSARIAL["shared after another prefix"], num_kv_heads=2),
    "an owner in mid-page": replace(ADVERSARIAL["an owner in mid-page"], num_kv_heads=4),
    "whole pages to the end": replace(TREES["whole pages to the end"], num_kv_heads=2),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ATTENDED)
def test_attention_over_packed_rows(name: str, variant: str) -> None:
    check_attention(ATTENDED[name], variant)


@pytest.mark.gpu
@pytest.mark.parametrize("requests", [5, 8, 16, 64])
@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_a_captured_step_takes_the_kernel_of_its_plan(requests: int, variant: str) -> None:
    """Which of two kernels works, and on which branch of the graph, is the plan's; what comes behind waits for both."""
    shared = from_tree([Node(4096, leaves(requests, 300))], 64, **HOPPER)
    private = from_tree(leaves(requests, 3000), 64, **HOPPER)
    skip_unless_it_runs(variant, shared, head_dim=128)
    batches = [shared, private, shared, private]
    pages, pool = max(sum(map(len, b.tables)) for b in batches), max(b.num_pages for b in batches)
    q = torch.randn(requests, 32, 128, device="cuda").bfloat16()
    k, v = torch.randn(2, pool, 64, 8, 128, device="cuda").bfloat16()
    plan = Plan.allocate(shared.capacity(pages=pages, num_pages=pool), "cuda")
    shared.load(plan)
    shared.run(plan)
    shared.attend(plan, q, k, v, variant)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = (result.clone() for result in shared.attend(plan, q, k, v, variant))
    for batch in batches:
        batch.load(plan)
        batch.run(plan)
        assert (plan.counts[Count.ROWS_PACKED] > 0) == (batch is shared)
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        expected, expected_lse = batch.attend(plan, q, k, v, variant)
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)
        truth, _, allowed = exact_attention(plan, q, k, v)
        assert (out.double() - truth).abs().max() <= allowed


# So many requests and KV heads that packed rows are another kernel's on Hopper: rows of up to 128 queries, full and
# not, of two levels, some of which are read by several rows, more of them than a CTA knows at once; and requests that
# have no keys of their own.
READ_APART = [Node(512, [Node(320, leaves(70, 40)), Node(256, leaves(70, 130))])]
ATTENDED_APART: dict[str, Batch] = {
    "two levels": from_tree(READ_APART, 64, **APART),
    "page 16": from_tree(READ_APART, 16, **APART),
    "group 7": from_tree([Node(640, leaves(257, 40))], 64, **{**APART, "group": 7, "num_kv_heads": 4}),
    "few queries a row": from_tree([Node(640, leaves(9, 100)) for _ in range(15)], 64, **APART),
    "whole pages to the end": Batch([list(range(10))] * 128, [640] * 128, page_size=64, **APART),
    "half as many": from_tree([Node(2304, leaves(66, 90))], 64, **APART),
    "33 and 34 rows of the same keys": from_tree(
        [Node(128, leaves(66, 20)), Node(192, leaves(68, 20))], 64, **{**APART, "group": 1, "rows_per_tile": 2}
    ),
}


@pytest.mark.parametrize(
    "variant, head_dim",
    [("cpu", 64), *(pytest.param("wgmma_sm90", head_dim, marks=pytest.mark.gpu) for head_dim in (64, 128))],
)
@pytest.mark.parametrize("name", ATTENDED_APART)
def test_attention_over_many_packed_rows(name: str, variant: str, head_dim: int) -> None:
    check_attention(ATTENDED_APART[name], variant, head_dim)
