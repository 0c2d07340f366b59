"""The server under the traffic it is made for: page 64 (the default), radix cache, chunked and mixed prefill."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from server.harness import Server, come_and_go, deviations, random_prompts

pytestmark = pytest.mark.server


@pytest.fixture(autouse=True)
def _answers_afterwards(exact: Server) -> Iterator[None]:
    yield
    assert len(exact.generate([1, 2, 3], new_tokens=4).tokens) == 4


def test_page_size_is_64_by_default(exact: Server) -> None:
    assert re.search(r"page_size\W+64", exact.get("/server_info"))


def test_prompts_longer_than_a_chunk(exact: Server, reference: Server, tolerance: float) -> None:
    results = [exact.generate(prompt, new_tokens=8) for prompt in random_prompts((1, 64, 127, 129, 500), seed=2)]
    assert max(deviations(results, reference)) <= tolerance


def test_sixteen_streams_of_mixed_chunks(exact: Server, reference: Server, tolerance: float) -> None:
    """Prompts arrive while others decode, so that chunks of prefill and decode tokens share batches."""
    results = exact.generate_all(random_prompts(range(5, 325, 20), seed=3), new_tokens=32)
    assert max(deviations(results, reference)) <= tolerance


def test_cached_prefix(exact: Server, reference: Server, tolerance: float) -> None:
    prefix = random_prompts((300,), seed=4)[0]
    exact.generate(prefix, new_tokens=1)
    results = exact.generate_all(random_prompts((1, 30, 64, 100), 5, prefix), new_tokens=8, start=len(prefix))
    assert all(result.cached_tokens >= 256 for result in results)  # the whole pages of the prefix
    assert max(deviations(results, reference)) <= tolerance


def test_prefixes_that_come_and_go(exact: Server, reference: Server, tolerance: float) -> None:
    """Streams share a prefix, some hang up, others arrive over another; then the prefix lies in other pages."""
    for _ in range(2):
        before = _rows_packed(exact)
        results = come_and_go(exact, seed=12, prefix_length=1100, new_tokens=32)
        assert max(deviations(results, reference)) <= tolerance
        assert _rows_packed(exact) > before
        exact.flush()  # and no page is lost
        exact.generate(random_prompts((300,), seed=13)[0], new_tokens=1)


def test_flushed_cache(exact: Server, reference: Server, tolerance: float) -> None:
    """Freed pages hold other keys when they are used again."""
    first = exact.generate_all(random_prompts((200, 300, 400), seed=9), new_tokens=8)
    exact.flush()
    second = exact.generate_all(random_prompts((210, 310, 410), seed=11), new_tokens=8)
    assert all(result.cached_tokens == 0 for result in second)
    assert max(deviations(first + second, reference)) <= tolerance


def _rows_packed(exact: Server) -> float:
    found = re.search(r"^flashcore:rows_packed_total\S* (\S+)$", exact.get("/metrics"), re.MULTILINE)
    return float(found[1]) if found else 0.0
