"""The server under the traffic it is made for: page 64 (the default), radix cache, chunked and mixed prefill."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from server.harness import Server, deviations, random_prompts

pytestmark = pytest.mark.server

FLAGS = "--dtype float32 --max-total-tokens 20032 --chunked-prefill-size 128 --enable-mixed-chunk --enable-metrics"


@pytest.fixture(scope="module")
def server(model: Path, logs: Path, reference: Server) -> Iterator[Server]:
    server = Server(model, "flashcore_sparse", logs, *FLAGS.split())
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def _answers_afterwards(server: Server) -> Iterator[None]:
    yield
    assert len(server.generate([1, 2, 3], new_tokens=4).tokens) == 4


def test_page_size_is_64_by_default(server: Server) -> None:
    assert re.search(r"page_size\W+64", server.get("/server_info"))


def test_prompts_longer_than_a_chunk(server: Server, reference: Server, tolerance: float) -> None:
    results = [server.generate(prompt, new_tokens=8) for prompt in random_prompts((1, 64, 127, 129, 500), seed=2)]
    assert max(deviations(results, reference)) <= tolerance


def test_sixteen_streams_of_mixed_chunks(server: Server, reference: Server, tolerance: float) -> None:
    """Prompts arrive while others decode, so that chunks of prefill and decode tokens share batches."""
    results = server.generate_all(random_prompts(range(5, 325, 20), seed=3), new_tokens=32)
    assert max(deviations(results, reference)) <= tolerance


def test_cached_prefix(server: Server, reference: Server, tolerance: float) -> None:
    prefix = random_prompts((300,), seed=4)[0]
    server.generate(prefix, new_tokens=1)
    results = server.generate_all(random_prompts((1, 30, 64, 100), 5, prefix), new_tokens=8, start=len(prefix))
    assert all(result.cached_tokens >= 256 for result in results)  # the whole pages of the prefix
    assert max(deviations(results, reference)) <= tolerance


def test_decode_reads_shared_pages_once(server: Server, reference: Server, tolerance: float) -> None:
    """Enough requests over enough common pages for the planner to pack them into rows of their own."""
    before = _rows_packed(server)
    prefix = random_prompts((1100,), seed=6)[0]
    server.generate(prefix, new_tokens=1)
    prompts = random_prompts((*range(1, 31, 2), 70), 7, prefix)
    results = server.generate_all(prompts, new_tokens=24, start=len(prefix))
    assert max(deviations(results, reference)) <= tolerance
    assert _rows_packed(server) > before


def test_clients_that_hang_up(server: Server, reference: Server, tolerance: float) -> None:
    """Half of the streams end early; the rest is not disturbed and no page is lost."""
    prompts = random_prompts(range(20, 180, 20), seed=8)
    with ThreadPoolExecutor(16) as pool:
        broken = [pool.submit(server.break_off, prompt, 3) for prompt in prompts]
        results = server.generate_all(prompts, new_tokens=24)
        assert [stream.result() for stream in broken] == [3] * len(prompts)
    assert max(deviations(results, reference)) <= tolerance
    server.flush()


def test_flushed_cache(server: Server, reference: Server, tolerance: float) -> None:
    """Freed pages hold other keys when they are used again."""
    first = server.generate_all(random_prompts((200, 300, 400), seed=9), new_tokens=8)
    server.flush()
    second = server.generate_all(random_prompts((210, 310, 410), seed=11), new_tokens=8)
    assert all(result.cached_tokens == 0 for result in second)
    assert max(deviations(first + second, reference)) <= tolerance


def _rows_packed(server: Server) -> float:
    found = re.search(r"^flashcore:rows_packed_total\S* (\S+)$", server.get("/metrics"), re.MULTILINE)
    return float(found[1]) if found else 0.0
