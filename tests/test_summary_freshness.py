"""No summary is older than its keys: pages that are reused, shared, loaded and overwritten between a server's forwards.

The pool is driven as SGLang drives it, with the writes that this project does not see: pages of ended requests are
overwritten, prefixes come from a cache, a swapped-out request comes back on other pages. After every forward the
summaries of all pages that its requests could score are those of the keys now in the cache.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

from flashcore_sglang import variants
from flashcore_sglang.phase import Batch, Phase
from flashcore_sglang.planner import Capacity, PlannerOptions, Policy, Summaries, SummarySpec

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PAGE, KV_HEADS, GROUP, HEAD_DIM = 16, 2, 4, 64
NUM_PAGES, LAYERS, SLOTS, CONTEXT = 96, (0, 1, 2), 6, 512


@dataclass
class Request:
    slot: int
    pages: list[int] = field(default_factory=list)
    kv_len: int = 0


class Server:
    """A KV pool, its page tables, and the two phases of a backend over them."""

    def __init__(self, device: str, seed: int) -> None:
        self.random = random.Random(seed)
        self.device = device
        self.k = {layer: self._pages() for layer in LAYERS}
        self.v = {layer: self._pages() for layer in LAYERS}
        self.free = list(range(1, NUM_PAGES))
        self.cached: list[int] = []  # full pages of a request that has ended, still in the radix cache
        self.running: list[Request] = []
        self.req_to_token = torch.zeros(SLOTS, CONTEXT, dtype=torch.int32, device=device)
        options = PlannerOptions(
            policy=Policy.TOPK,
            page_size=PAGE,
            sink_pages=1,
            recent_pages=1,
            budget_pages=4,
            max_columns=CONTEXT // PAGE,
        )
        spec = SummarySpec(LAYERS, HEAD_DIM, torch.bfloat16, CONTEXT // PAGE, dense_layers=1)
        self.summaries = Summaries(spec, NUM_PAGES, KV_HEADS, device)
        self.fresh = Summaries(spec, NUM_PAGES, KV_HEADS, device)
        self.decode = self._phase("decode", options)
        self.extend = self._phase("prefill", options)

    def _pages(self) -> torch.Tensor:
        return torch.randn(NUM_PAGES, PAGE, KV_HEADS, HEAD_DIM).bfloat16().to(self.device)

    def _phase(self, name: variants.Phase, options: PlannerOptions) -> Phase:
        heads = KV_HEADS * GROUP
        shape = variants.Shape(heads, KV_HEADS, HEAD_DIM, PAGE, "bf16", name, features=("causal",))
        choice = variants.choose(shape, variants.device_of(self.device))
        capacity = Capacity(
            batch=SLOTS,
            tokens=SLOTS * CONTEXT,
            pages=SLOTS * CONTEXT // PAGE,
            num_pages=NUM_PAGES,
            num_kv_heads=KV_HEADS,
            group=GROUP,
            rows_per_tile=choice.tiling.rows_per_tile,
            num_ctas=choice.num_ctas,
            page_size=PAGE,
        )
        return Phase(name, choice, options, capacity, HEAD_DIM, self.device, self.summaries)

    def forward(self, requests: list[Request], new: list[int], phase: Phase) -> None:
        """Stores `new` tokens of each request, then does what a backend does with every layer."""
        for request, count in zip(requests, new, strict=True):
            request.kv_len += count
            while len(request.pages) * PAGE < request.kv_len:
                request.pages.append(self.take())
            for token in range(request.kv_len):
                slot = request.pages[token // PAGE] * PAGE + token % PAGE
                self.req_to_token[request.slot, token] = slot
        lens = [request.kv_len for request in requests]
        indptr = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32, device=self.device)
        batch = Batch(
            req_to_token=self.req_to_token,
            req_pool_indices=torch.tensor([request.slot for request in requests], device=self.device),
            seq_lens=torch.tensor(lens, device=self.device),
            num_tokens=sum(new),
            num_pages=sum(len(request.pages) for request in requests),
            qo_indptr=None if phase.decode else indptr,
        )
        phase.begin(batch, [-1])
        slots = torch.tensor(
            [
                request.pages[token // PAGE] * PAGE + token % PAGE
                for request, count in zip(requests, new, strict=True)
                for token in range(request.kv_len - count, request.kv_len)
            ],
            device=self.device,
        )
        for layer in LAYERS:
            # More than there are tokens, as where a batch is padded; read as qkv projections leave them.
            padded = torch.randn(sum(new) + 3, 2 * KV_HEADS, HEAD_DIM).bfloat16().to(self.device)
            k, v = padded[:, :KV_HEADS], padded[:, KV_HEADS:]
            expected_k, expected_v = self.k[layer].clone(), self.v[layer].clone()
            for cache, new_rows in ((expected_k, k), (expected_v, v)):
                cache.view(-1, KV_HEADS, HEAD_DIM)[slots] = new_rows[: sum(new)]
            caches = self.k[layer], self.v[layer]
            padded_slots = torch.nn.functional.pad(slots, (0, 3))
            if self.random.random() < 0.5 and phase.store(-1, layer, k, v, padded_slots, *caches):
                self.attend(phase, layer, sum(new))
            else:
                self.k[layer].copy_(expected_k)  # by somebody else
                self.v[layer].copy_(expected_v)
                phase.after_store(-1, layer, self.k[layer])
            assert torch.equal(self.k[layer], expected_k)
            assert torch.equal(self.v[layer], expected_v)
        self.check(requests, phase)

    def attend(self, phase: Phase, layer: int, tokens: int) -> None:
        """For its side effect: a decode step stores its keys and values where it attends."""
        q = torch.randn(tokens, KV_HEADS * GROUP, HEAD_DIM).bfloat16().to(self.device)
        settings = {"window": -1, "sm_scale": 0.125, "logits_soft_cap": 0.0}
        phase.attend(q, self.k[layer], self.v[layer], torch.empty_like(q), layer_id=layer, **settings)

    def check(self, requests: list[Request], phase: Phase) -> None:
        plan = phase.planner(-1).plan
        for layer in self.summaries.of_layer:
            first = torch.zeros(plan.batch, dtype=torch.int32, device=self.device)
            self.fresh.update(plan, layer, self.k[layer], first)
            for request in requests:
                full = request.pages[: request.kv_len // PAGE]
                ours, expected = (pool.of_layer[layer][full] for pool in (self.summaries, self.fresh))
                assert torch.equal(ours, expected), f"layer {layer}, {request}"

    def take(self) -> int:
        return self.free.pop(self.random.randrange(len(self.free)))

    def start(self) -> None:
        """A request whose prompt may begin with what an ended one has left in the cache."""
        prefix = self.cached[: self.random.randint(0, len(self.cached))] if not self._cache_in_use() else []
        taken = {request.slot for request in self.running}
        slot = self.random.choice([slot for slot in range(SLOTS) if slot not in taken])
        request = Request(slot, list(prefix), len(prefix) * PAGE)
        self.cached = [page for page in self.cached if page not in prefix]
        self.running.append(request)
        self.forward([request], [self.random.randint(1, 90)], self.extend)

    def _cache_in_use(self) -> bool:
        return any(set(request.pages) & set(self.cached) for request in self.running)

    def end(self) -> None:
        """A request leaves full pages to the cache, and what the cache held is free: anybody may write there."""
        request = self.running.pop(self.random.randrange(len(self.running)))
        self.overwrite(self.cached)
        self.free += self.cached
        full = request.kv_len // PAGE
        self.cached, rest = request.pages[:full], request.pages[full:]
        self.overwrite(rest)
        self.free += rest

    def swap(self) -> None:
        """A request is swapped out, its pages are overwritten, and it comes back on others with one more token."""
        request = self.random.choice(self.running)
        old, request.pages = request.pages, [self.take() for _ in request.pages]
        for keys in self.k.values():
            keys[request.pages] = keys[old].clone()
        self.overwrite(old)
        self.free += old
        self.forward([request], [1], self.extend)

    def overwrite(self, pages: list[int]) -> None:
        for keys in self.k.values():
            keys[pages] = torch.randn(len(pages), PAGE, KV_HEADS, HEAD_DIM).bfloat16().to(self.device)

    def step(self) -> None:
        self.forward(self.running, [1] * len(self.running), self.decode)

    def continue_together(self) -> None:
        """A mixed batch: one request is given a chunk, the others decode."""
        chunks = [1] * len(self.running)
        chunks[self.random.randrange(len(chunks))] = self.random.randint(1, 40)
        self.forward(self.running, chunks, self.extend)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(4))
def test_no_summary_is_older_than_its_keys(seed: int, device: str) -> None:
    torch.manual_seed(seed)
    server = Server(device, seed)
    for _ in range(60):
        full = any(request.kv_len > CONTEXT - 50 for request in server.running) or len(server.free) < 30
        if server.running and (full or len(server.running) == SLOTS):
            server.end()
        elif not server.running or server.random.random() < 0.15:
            server.start()
        else:
            events = [server.step] * 6 + [server.continue_together, server.swap, server.end]
            server.random.choice(events)()
        if server.running:
            server.step()
