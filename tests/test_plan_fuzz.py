"""Random batches that share pages: the laws of their plans, and attention over them against the truth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import plan_fuzz
import pytest
import torch
from plan_fuzz import Attended

from flashcore_sglang import variants


def run(seeds: Iterable[int], draw: Callable[[int], Attended], variant: str, device: str) -> None:
    """Checks the cases of the seeds that the variant has a kernel for."""
    checked = packed = 0
    for seed in seeds:
        case = draw(seed)
        if variants.unfit(variants.BY_NAME[variant], shape_of(case)):
            continue
        try:
            packed += plan_fuzz.check(case, variant, device)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {case}") from error
        checked += 1
    assert packed > checked // 8 > 0, "cases that pack nothing say nothing about packed rows"


def shape_of(case: Attended) -> variants.Shape:
    b = case.batch
    return variants.Shape(
        num_qo_heads=b.num_kv_heads * b.group,
        num_kv_heads=b.num_kv_heads,
        head_dim=case.head_dim,
        page_size=b.page_size,
        dtype="bf16",
        phase="decode",
        features=("lse", "causal"),
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they give on tensors as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# In parts, so that a run on several processes deals them out.
@pytest.mark.parametrize("part", range(10))
def test_attention_over_random_batches(part: int) -> None:
    run(range(part, 10_000, 10), plan_fuzz.draw, "cpu", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("variant, tiles", [("wmma_sm80", (64,)), ("wgmma_sm90", (64, 128))])
def test_attention_over_random_batches_on_a_gpu(variant: str, tiles: tuple[int, ...]) -> None:
    if reason := variants.unavailable(variants.BY_NAME[variant], variants.device_of("cuda")):
        pytest.skip(f"{variant} {reason}")
    run(range(2_000), lambda seed: plan_fuzz.draw(seed, tiles), variant, "cuda")
