"""The attend op, each variant over the same cases, against the truth."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, partial

import kit
import pytest
import torch
from cases import CASES, Case, Problem, decode, extend, make
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from flashcore_sglang import ops, variants
from flashcore_sglang.bench.cases import GATE, PrefillCase
from flashcore_sglang.bench.prefill import sdpa_difference
from flashcore_sglang.planner import Count

FP32 = [replace(case, name=f"fp32 {case.name}", dtype=torch.float32) for case in CASES[::4]]
CPU = "cpu"
CUDA = [pytest.param(variant.name, marks=pytest.mark.gpu) for variant in variants.VARIANTS if variant.device == "cuda"]
EVERY = [CPU, *CUDA]
SPLITTING = [CPU, *(variant for variant in CUDA if variant.values != ("cublaslt",))]  # by a number of keys


@cache
def gpu() -> variants.Device:
    return variants.device_of("cuda")


def shape_of(case: Case) -> variants.Shape:
    used = {"window_left": case.window_left >= 0, "logits_soft_cap": case.logits_soft_cap > 0, "causal": case.causal}
    return variants.Shape(
        num_qo_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        page_size=case.page_size,
        dtype="fp16" if case.dtype == torch.float16 else "bf16",
        phase="decode" if case.decode else "prefill",
        features=("lse", *(name for name in used if used[name])),
    )


def why_not(case: Case, variant: str) -> str | None:
    """What the machine, the build or the variant lacks for a case."""
    if variant == CPU:
        return None
    return variants.why_not(variants.BY_NAME[variant], shape_of(case), gpu())


def setup(case: Case, variant: str) -> tuple[str, int]:
    """Device and rows per tile of a variant; skips what it cannot do here, with why."""
    if variant == CPU:
        return "cpu", 32
    if reason := why_not(case, variant):
        pytest.skip(f"{variant} {reason}")
    tiling = variants.BY_NAME[variant].tiling(shape_of(case))
    assert tiling is not None
    return "cuda", tiling.rows_per_tile


@pytest.mark.parametrize("variant", EVERY)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_planned(case: Case, variant: str) -> None:
    device, rows_per_tile = setup(case, variant)
    problem = make(case, device)
    kit.check(problem, *kit.plan_and_attend(problem, variant=variant, rows_per_tile=rows_per_tile))


@pytest.mark.parametrize("case", FP32, ids=str)
def test_fp32(case: Case) -> None:
    problem = make(case)
    kit.check(problem, *kit.attend(problem, kit.make_plan(problem), variant=CPU))


@pytest.mark.parametrize("variant", EVERY)
@pytest.mark.parametrize(
    "case",
    [
        extend("fully masked tiles", (40, 200), (70, 130)),
        extend("fully masked tiles of a window", (40, 300), (9, 200), window_left=5),
        extend("first block with nothing to rescale", (70, 130), (64, 64), window_left=10),
        extend("rows with no keys", (4, 2), (3, 0)),
        decode("rows with no keys in decode", 0, 3),
    ],
    ids=str,
)
def test_untrimmed(case: Case, variant: str) -> None:
    device, rows_per_tile = setup(case, variant)
    problem = make(case, device)
    for keys_per_tile in (64, 256):
        plan = kit.make_untrimmed_plan(problem, tokens_per_row=rows_per_tile // case.group, keys_per_tile=keys_per_tile)
        kit.check(problem, *kit.attend(problem, plan, variant=variant, rows_per_tile=rows_per_tile))


@pytest.mark.parametrize("variant", EVERY)
@pytest.mark.parametrize("case", [case for case in CASES if case.q_lens][::6], ids=str)
def test_same_bits_twice(case: Case, variant: str) -> None:
    device, rows_per_tile = setup(case, variant)
    problem = make(case, device)
    plan = kit.make_plan(problem, rows_per_tile=rows_per_tile, num_ctas=5)
    first, second = (kit.attend(problem, plan, variant=variant, rows_per_tile=rows_per_tile) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("variant", EVERY)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_same_bits_whoever_takes_a_tile(head_dim: int, variant: str) -> None:
    """On Hopper a prefill of so many (row, KV head) pairs hands them to CTAs as these come."""
    case = extend(
        "many pairs", *[(70 + i, 333 + i) for i in range(60)], num_heads=32, num_kv_heads=8, head_dim=head_dim
    )
    device, rows_per_tile = setup(case, variant)
    problem = make(case, device)
    plan = kit.make_plan(problem, rows_per_tile=rows_per_tile)
    first, *others = (kit.attend(problem, plan, variant=variant, rows_per_tile=rows_per_tile) for _ in range(3))
    for other in others:
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])


@pytest.mark.parametrize("variant", EVERY)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("levels", [(-1.0,), (1.0,), (-2.0, -1.0, 1.0, 2.0), (2.0, 0.0, -2.0)], ids=str)
def test_logits_far_from_zero(levels: tuple[float, ...], head_dim: int, variant: str) -> None:
    """Channel 0 puts the logits of each stretch of pages at a level of its own, in units of 128 before the scale."""
    case = extend("far logits", (200, 700), num_heads=4, num_kv_heads=2, head_dim=head_dim, page_size=64)
    device, rows_per_tile = setup(case, variant)
    problem = make(case, device)
    pages = problem.kv_indices.long()
    column = torch.arange(len(pages), device=device) * len(levels) // len(pages)
    problem.q[..., 0] = 128.0
    problem.k_cache[pages, ..., 0] = torch.tensor(levels, device=device)[column][:, None, None].to(case.dtype)
    kit.check(problem, *kit.plan_and_attend(problem, variant=variant, rows_per_tile=rows_per_tile))


@pytest.mark.parametrize("variant", EVERY)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_logits_of_zero(zero: float, head_dim: int, variant: str) -> None:
    """Of either sign: where maxima are compared by their bits, the two are far apart."""
    case = extend("zero logits", (200, 700), num_heads=4, num_kv_heads=2, head_dim=head_dim, page_size=64)
    device, rows_per_tile = setup(case, variant)
    problem = make(case, device)
    problem.q.fill_(zero)
    problem.k_cache.abs_()
    kit.check(problem, *kit.plan_and_attend(problem, variant=variant, rows_per_tile=rows_per_tile))


HEADS = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 64}
SMALL_STEPS = [
    decode("one request", 3000, **HEADS),
    decode("one key", 1, **HEADS),
    decode("no keys beside many", 700, 0, 2000, 17, **HEADS),
    decode("no keys", 0, 0, **HEADS),
    decode("around a piece", 127, 128, 129, 16, **HEADS),
    decode("groups of 2", *range(100, 900, 100), **HEADS | {"num_heads": 16}),
    decode("heads alone", *range(1, 1300, 100), **HEADS | {"num_heads": 8, "page_size": 16}),
    decode("groups of 5", 300, 65, 1, **HEADS | {"num_heads": 40}),
    decode("groups of 8", 300, 65, **HEADS | {"num_heads": 64}),
    decode("groups of 16", 300, **HEADS | {"num_heads": 128}),
    decode("head size 64", 500, 33, 1200, **HEADS | {"head_dim": 64, "page_size": 32}),
    decode("fp16", 500, 33, 1200, dtype=torch.float16, **HEADS),
    decode("window", 1000, 100, 65, 3, window_left=64, **HEADS),
    decode("soft cap", 400, 33, logits_soft_cap=2.0, **HEADS),
    decode("packed, 8 queries", 3300, 3201, shared_pages=50, **HEADS),
    decode("packed, 16 queries", 1700, 1666, 1665, 2222, shared_pages=26, **HEADS),
    decode("packed, 16 requests", *range(1665, 1681), shared_pages=26, **HEADS | {"num_heads": 8}),
    # A row whose piece ends beside a window of page ids, in front of a row of several windows in the same CTA.
    decode("ids behind a tile", 7203, 4141, 4939, **HEADS | {"num_heads": 8, "head_dim": 64, "page_size": 32}),
    decode("packed, no keys behind", 1664, 1664, 1700, shared_pages=26, **HEADS),
]


# With as many CTAs as a GPU has, since on Hopper these steps of 8 KV heads are a kernel's of its own.
@pytest.mark.parametrize("variant", EVERY)
@pytest.mark.parametrize("case", SMALL_STEPS, ids=str)
def test_small_steps(case: Case, variant: str) -> None:
    device, rows_per_tile = setup(case, variant)
    problem = make(case, device)
    plan = kit.make_plan(problem, rows_per_tile=rows_per_tile, num_ctas=264)
    assert (plan.counts[Count.ROWS_PACKED] > 0) == (case.shared_pages > 0)
    first, second = (kit.attend(problem, plan, variant=variant, rows_per_tile=rows_per_tile) for _ in range(2))
    kit.check(problem, *first)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_tiles_that_rows_do_not_tell() -> None:
    """Cuts are free only where nobody counts on those of the plan."""
    problem = make(decode("two", 500, 129))
    assert kit.make_plan(problem).free_cuts
    assert not kit.make_plan(problem, split_keys=128).free_cuts
    assert not replace(kit.make_plan(problem), selects_tiles=True).free_cuts


@pytest.mark.parametrize("variant", EVERY)
def test_pairs_enough_are_not_cut(variant: str) -> None:
    case = extend("many pairs", (700, 700), (333, 400), (1, 65))
    device, rows_per_tile = setup(case, variant)
    problem = make(case, device)
    cut = kit.make_plan(problem, rows_per_tile=rows_per_tile)
    whole = kit.make_plan(problem, rows_per_tile=rows_per_tile, pairs_per_cta=2)
    assert cut.counts[Count.NUM_PARTIALS] > 0
    assert (whole.max_partials, whole.counts[Count.NUM_PARTIALS]) == (0, 0)
    tiles = whole.tiles[: whole.counts[Count.NUM_TILES]]
    assert (tiles[:, 3] == -1).all()
    kit.check(problem, *kit.attend(problem, whole, variant=variant, rows_per_tile=rows_per_tile))


def part_of(problem: Problem, requests: slice) -> Problem:
    """Some of the requests, as a batch of their own."""
    qo_indptr, kv_indptr = (x[requests.start : requests.stop + 1] for x in (problem.qo_indptr, problem.kv_indptr))
    first, last = qo_indptr[[0, -1]].tolist()
    begin, end = kv_indptr[[0, -1]].tolist()
    return replace(
        problem,
        case=replace(problem.case, q_lens=problem.case.q_lens[requests], kv_lens=problem.case.kv_lens[requests]),
        q=problem.q[first:last],
        qo_indptr=qo_indptr - first,
        kv_indptr=kv_indptr - begin,
        kv_indices=problem.kv_indices[begin:end],
        last_page_len=problem.last_page_len[requests],
    )


# Alone, few and many: on Hopper these are three ways to launch, by two kernels.
@pytest.mark.parametrize("variant", EVERY)
@pytest.mark.parametrize("others", [2, 40])
def test_fixed_splits_do_not_depend_on_the_batch(others: int, variant: str) -> None:
    together = decode("together", 500, 129, *(64 + 9 * i for i in range(others)))
    device, rows_per_tile = setup(together, variant)
    problem = make(together, device)
    attend = partial(kit.plan_and_attend, variant=variant, rows_per_tile=rows_per_tile, split_keys=128)
    (out, lse), (out_alone, lse_alone) = attend(problem), attend(part_of(problem, slice(1, 2)), num_ctas=7)
    assert torch.equal(out[1:2], out_alone)
    assert torch.equal(lse[1:2], lse_alone)


@pytest.mark.parametrize("variant", SPLITTING)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_fixed_splits_of_a_prefill_do_not_depend_on_the_batch(head_dim: int, variant: str) -> None:
    """Behind the queries of a request's last tile lie those of the next one, whose logits are the larger ones."""
    together = extend("together", (201, 3000), (50, 2100), head_dim=head_dim, page_size=64)
    device, rows_per_tile = setup(together, variant)
    problem = make(together, device)
    problem.q[201:] *= 30

    attend = partial(kit.plan_and_attend, variant=variant, rows_per_tile=rows_per_tile, split_keys=2048)
    (out, lse), (out_alone, lse_alone) = attend(problem), attend(part_of(problem, slice(0, 1)))
    assert torch.equal(out[:201], out_alone)
    assert torch.equal(lse[:201], lse_alone)


def chunk_of(problem: Problem, begin: int, end: int) -> Problem:
    """Query tokens [begin, end) of the only request of a prefill, with the keys that are there by then."""
    case = problem.case
    new, kv_len = end - begin, case.kv_lens[0] - case.q_lens[0] + end
    pages = -(-kv_len // case.page_size)
    return replace(
        problem,
        case=replace(case, q_lens=(new,), kv_lens=(kv_len,)),
        q=problem.q[begin:end],
        qo_indptr=problem.qo_indptr.new_tensor([0, new]),
        kv_indptr=problem.kv_indptr.new_tensor([0, pages]),
        kv_indices=problem.kv_indices[:pages],
        last_page_len=problem.last_page_len.new_tensor([kv_len - (pages - 1) * case.page_size]),
    )


@pytest.mark.parametrize("variant", SPLITTING)
@pytest.mark.parametrize("group", [1, 3, 4, 5, 7])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("window_left", "levels"), [(-1, 0), (-1, 2), (700, 0)])
def test_a_token_does_not_depend_on_where_its_chunk_begins(
    window_left: int, levels: int, head_dim: int, group: int, variant: str
) -> None:
    """Where a prompt is cut hangs on the batch, and where it begins on what is cached.

    With ``levels`` logits are few numbers, so that blocks have the same maximum, of some rows below 0, until the first
    keys bring one that is a little larger.
    """
    case = extend("a prompt", (300, 1000), num_heads=group, num_kv_heads=1, head_dim=head_dim, window_left=window_left)
    device, rows_per_tile = setup(case, variant)
    problem = make(case, device)
    problem.q.mul_(4)
    if levels:
        problem.q[..., 1:] = 0
        problem.q.clamp_(-levels, levels).round_()
        problem.k_cache.clamp_(-levels, -1).round_()
        problem.k_cache[problem.kv_indices[:4].long()] *= 1.0625
        problem.q[256:258, :, 0] = -levels  # alone or among others with another sign

    attend = partial(kit.plan_and_attend, variant=variant, rows_per_tile=rows_per_tile, split_keys=4096)
    out, lse = attend(problem)
    for begin, end in ((0, 16), (16, 256), (256, 258), (256, 300)):  # at the boundaries of pages
        out_of_chunk, lse_of_chunk = attend(chunk_of(problem, begin, end))
        assert torch.equal(out[begin:end], out_of_chunk)
        assert torch.equal(lse[begin:end], lse_of_chunk)


@pytest.mark.parametrize("variant", EVERY)
def test_queries_of_earlier_launches_are_not_seen(variant: str) -> None:
    """Seven query heads a KV head leave rows of a tile without a query: there on-chip memory is what it was before."""
    case = extend("sevens", (300, 3000), num_heads=28, num_kv_heads=4, head_dim=128, page_size=64)
    device, rows_per_tile = setup(case, variant)
    problem = make(case, device)
    earlier = make(replace(case, q_lens=(2000,), num_heads=32), device)

    attend = partial(kit.plan_and_attend, variant=variant, rows_per_tile=rows_per_tile, num_ctas=132)

    def attend_after(left_behind: float) -> tuple[torch.Tensor, torch.Tensor]:
        attend(replace(earlier, q=torch.full_like(earlier.q, left_behind)))
        return attend(problem)

    (out, lse), (out_after_nan, lse_after_nan) = attend_after(0.0), attend_after(torch.nan)
    assert torch.equal(out, out_after_nan)
    assert torch.equal(lse, lse_after_nan)


@pytest.mark.parametrize("variant", EVERY)
def test_many_partial_results_of_hundreds_of_requests(variant: str) -> None:
    """On a GPU, from 8192 query heads on, up to 16 of a head are merged by a quarter of a warp, more by all of it."""
    case = decode("hundreds", *(37 * i % 1110 for i in range(520)), num_heads=16, num_kv_heads=2)
    device, rows_per_tile = setup(case, variant)
    problem = make(case, device)

    def attend(some: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        plan = kit.make_plan(some, rows_per_tile=rows_per_tile, split_keys=64)
        tiles = plan.pair_tiles[: plan.counts[Count.NUM_ROWS] * case.num_kv_heads].diff(dim=1)
        assert set(tiles.flatten().tolist()) == set(range(1, 18))
        return kit.attend(some, plan, variant=variant, rows_per_tile=rows_per_tile)

    out, lse = attend(problem)
    some = slice(100, 130)
    few = part_of(problem, some)
    out_of_few, lse_of_few = attend(few)
    kit.check(few, out_of_few, lse_of_few)
    assert torch.equal(out[some], out_of_few)
    assert torch.equal(lse[some], lse_of_few)


# Of these one kernel computes both phases, so that only the merge may tell a decode step from a mixed batch; on a GPU
# the work of a decode step is shared out otherwise from 1024 and from 8192 query heads on.
@pytest.mark.parametrize("variant", [CPU, pytest.param("wmma_sm80", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("requests", [1, 130, 1030])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_decode_tokens_of_a_mixed_batch_have_the_bits_of_a_decode_step(
    head_dim: int, requests: int, variant: str
) -> None:
    # 9000 keys are more partial results than are merged at once.
    kv_lens = (9000, 11, 0, *(100 + i % 60 for i in range(requests)))
    step = decode("decode step", *kv_lens, head_dim=head_dim)
    device, rows_per_tile = setup(step, variant)
    mixed = make(extend("mixed batch", *[(1, n) for n in kv_lens], (20, 200), head_dim=head_dim), device)
    tokens = len(kv_lens)
    alone = replace(
        mixed,
        case=step,
        q=mixed.q[:tokens],
        qo_indptr=mixed.qo_indptr[: tokens + 1],
        kv_indptr=mixed.kv_indptr[: tokens + 1],
        kv_indices=mixed.kv_indices[: mixed.kv_indptr[tokens]],
        last_page_len=mixed.last_page_len[:tokens],
    )
    # Free cuts: what wmma_sm80 may do with a mixed batch, whose tokens else have the bits of any other prefill.
    of_mixed, of_step = (
        kit.attend(
            problem,
            kit.make_plan(problem, rows_per_tile=rows_per_tile, split_keys=64),
            variant=variant,
            rows_per_tile=rows_per_tile,
            free_cuts=True,
        )
        for problem in (mixed, alone)
    )
    for together, single in zip(of_mixed, of_step, strict=True):
        assert torch.equal(together[:tokens], single)


@pytest.mark.parametrize("variant", EVERY)
def test_strided_inputs(variant: str) -> None:
    """K and V of a combined cache, and q as a slice of a fused projection."""
    case = extend("strided", (9, 40), (1, 77))
    device, rows_per_tile = setup(case, variant)
    problem = make(case, device)
    plan = kit.make_plan(problem, rows_per_tile=rows_per_tile)
    cache = torch.stack([problem.k_cache, problem.v_cache], dim=1)
    fused = torch.cat([problem.q, problem.q.flip(0)], dim=1)
    strided = replace(problem, q=fused[:, : case.num_heads], k_cache=cache[:, 0], v_cache=cache[:, 1])
    kit.check(problem, *kit.attend(strided, plan, variant=variant, rows_per_tile=rows_per_tile))


@pytest.mark.parametrize("variant", EVERY)
@pytest.mark.parametrize("is_decode", [True, False])
def test_what_lies_behind_the_last_key_is_not_read(variant: str, is_decode: bool) -> None:
    case = decode("stale", 3, 70, 17) if is_decode else extend("stale", (3, 3), (20, 70), (1, 17))
    device, rows_per_tile = setup(case, variant)
    problem = make(case, device)
    for request, last in enumerate(problem.last_page_len.tolist()):
        page = int(problem.kv_indices[problem.kv_indptr[request + 1] - 1])
        problem.k_cache[page, last:] = torch.nan
        problem.v_cache[page, last:] = torch.nan
    kit.check(problem, *kit.plan_and_attend(problem, variant=variant, rows_per_tile=rows_per_tile))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_survives(dtype: torch.dtype) -> None:
    """Over a single key the output is its V, bit for bit, for every finite number of the format."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = torch.where(bits.isfinite() & (bits != 0), bits, 1).view(-1, 64)
    problem = make(decode("numbers", *[1] * len(values), num_heads=1, num_kv_heads=1, page_size=1, dtype=dtype))
    problem.v_cache[problem.kv_indices.long(), 0, 0] = values
    out, _ = kit.attend(problem, kit.make_plan(problem), variant=CPU)
    assert torch.equal(out[:, 0].view(torch.int16), values.view(torch.int16))


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    page_size = draw(st.sampled_from([1, 3, 8, 16, 64]))
    kv_lens = draw(st.lists(st.one_of(st.integers(0, 2 * page_size + 1), st.integers(0, 400)), min_size=1, max_size=5))
    is_decode = draw(st.booleans())
    num_kv_heads = draw(st.integers(1, 3))
    return Case(
        "random",
        tuple(1 if is_decode else draw(st.integers(0, min(n, 70))) for n in kv_lens),
        tuple(kv_lens),
        num_heads=num_kv_heads * draw(st.integers(1, 16)),
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([64, 96, 128, 256])),
        page_size=page_size,
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16])),
        causal=draw(st.booleans()),
        window_left=draw(st.sampled_from([-1, -1, 0, 7, 100])),
        logits_soft_cap=draw(st.sampled_from([0.0, 0.0, 3.0])),
        shared_pages=draw(st.integers(0, min(kv_lens) // page_size)),
        seed=draw(st.integers(0, 9)),
    )


def runnable_cases(variant: str) -> st.SearchStrategy[Case]:
    """Random cases that the variant can do. To skip one of the others would be to skip the test."""
    if variant != CPU and (reason := variants.unavailable(variants.BY_NAME[variant], gpu())):
        pytest.skip(f"{variant} {reason}")
    return random_cases().filter(lambda case: why_not(case, variant) is None)


RANDOM = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)


@pytest.mark.parametrize("variant", EVERY)
@RANDOM
@given(data=st.data(), num_ctas=st.integers(1, 9))
def test_random(variant: str, data: st.DataObject, num_ctas: int) -> None:
    case = data.draw(runnable_cases(variant))
    device, rows_per_tile = setup(case, variant)
    problem = make(case, device)
    result = kit.plan_and_attend(problem, variant=variant, rows_per_tile=rows_per_tile, num_ctas=num_ctas)
    kit.check(problem, *result)


@pytest.mark.parametrize("variant", SPLITTING)
@RANDOM
@given(data=st.data(), split_keys=st.sampled_from([64, 128, 256]))
def test_random_requests_do_not_depend_on_the_batch(variant: str, data: st.DataObject, split_keys: int) -> None:
    """The others' logits are the larger ones."""
    case = data.draw(runnable_cases(variant))
    request = data.draw(st.integers(0, len(case.q_lens) - 1))
    device, rows_per_tile = setup(case, variant)
    problem = make(case, device)
    first, last = problem.qo_indptr[[request, request + 1]].tolist()
    problem.q[:first] *= 30
    problem.q[last:] *= 30
    alone = part_of(problem, slice(request, request + 1))
    assume(alone.case.decode == case.decode)  # other kernels

    attend = partial(kit.plan_and_attend, variant=variant, rows_per_tile=rows_per_tile, split_keys=split_keys)
    (out, lse), (out_alone, lse_alone) = attend(problem, num_ctas=7), attend(alone)
    assert torch.equal(out[first:last], out_alone)
    assert torch.equal(lse[first:last], lse_alone)


@pytest.mark.parametrize("variant", CUDA)
@pytest.mark.parametrize("case", GATE, ids=lambda case: case.name)
def test_a_whole_prefill_is_that_of_sdpa(case: PrefillCase, variant: str) -> None:
    """A gate: 2e-3 from PyTorch's SDPA."""
    reason = variants.unavailable(variants.BY_NAME[variant], gpu())
    if reason:
        pytest.skip(reason)
    assert sdpa_difference(case, variant) < 2e-3


def test_build_info() -> None:
    info = json.loads(ops.build_info())
    assert set(info) == {"cuda", "nvcc", "archs", "cudart", "cublaslt", "variants", "missing"}
    assert "cpu" in info["variants"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(2, 8, 80, dtype=torch.bfloat16)}, "q: expected a head_dim of 64, 96, 128 or 256, got 80"),
        ({"q": torch.zeros(2, 8, 64, dtype=torch.float64)}, "q: expected bfloat16 or float16 or float32, got another"),
        ({"q": torch.zeros(2, 8, 128, dtype=torch.bfloat16)[..., ::2]}, "q: expected the last dimension to be contig"),
        ({"q": torch.zeros(2, 7, 64, dtype=torch.bfloat16)}, "heads: expected the query heads to be a multiple of 2"),
        ({"k_cache": torch.zeros(9, 16, 2, 64)}, "k_cache: expected bfloat16, got float32"),
        ({"v_cache": torch.zeros(8, 16, 2, 64, dtype=torch.bfloat16)}, "v_cache: expected shape"),
    ],
)
def test_errors_name_op_argument_expected_and_got(change: dict[str, torch.Tensor], message: str) -> None:
    problem = make(decode("errors", 40, 50))
    plan = kit.make_plan(problem)
    with pytest.raises(RuntimeError, match=f"flashcore.attend: {message}.*; "):
        kit.attend(replace(problem, **change), plan, variant=CPU)


def test_unknown_variant_lists_the_available_ones() -> None:
    problem = make(decode("errors", 40))
    with pytest.raises(RuntimeError, match=r"variant: expected one of .*cpu.*, got 'fast'"):
        kit.attend(problem, kit.make_plan(problem), variant="fast")
