"""`flashcore bench sparse`: selection and attention together over a part of the pages, against dense peers.

Every request reads everything in the peers and in `flashcore:exact`, and the pages of policy topk in `flashcore`: the
scores of all pages, the choice of each KV head and the attention over it, as one layer of a decode step runs them.
That is the common step, whose tokens end no page; `flashcore:fills_page` is the one in `page_size` steps that also
summarises the page which every request has filled. `flashcore:reuses` is a layer that reads the pages which the layer
before it has chosen (`reuse_layers`), `flashcore:unshared` one that scores each request by itself where they share
pages. With `--model` servers follow (e2e.py), a backend each, that decode contexts of 128K.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch

from .. import ops, variants
from ..kernel import Kernel
from ..planner import Capacity, Planner, PlannerOptions, Policy, Summaries, SummarySpec, make_planner
from ..plugin import BACKEND
from . import peers
from .accuracy import distance, sample, token_truth
from .cases import DecodeCase, Heads
from .results import OURS, Results
from .timing import measure, measure_all

EXACT = f"{OURS}:exact"
FILLS_PAGE = f"{OURS}:fills_page"
REUSES = f"{OURS}:reuses"
UNSHARED = f"{OURS}:unshared"
# End to end, beside the peers: one and six requests at 128K, whose prompts are cached.
SERVED = f"{BACKEND}:topk-128k"
WORKLOADS = ["L1", "L6"]
MAX_RUNNING = 8
_CHECKED = 4  # requests compared with fp64
_SINK_TOKENS, _RECENT_TOKENS = 128, 512


@dataclass(frozen=True)
class SparseCase:
    """One decode step of `batch` requests that read `budget` tokens, or a fraction of theirs.

    Attributes:
        context: tokens of a request; one less is measured where these end a page.
        shared: the first of them that are the same pages for all requests.
    """

    batch: int
    context: int
    budget: int
    fraction: float = 0.0
    shared: int = 0
    heads: Heads = field(default_factory=Heads)
    page_size: int = 64

    @property
    def name(self) -> str:
        shared = f"/shared{self.shared}" if self.shared else ""
        budget = f"{self.fraction:.0%}" if self.fraction else str(self.budget)
        return f"sparse/b{self.batch}/ctx{self.context}{shared}/budget{budget}/{self.heads.name}/p{self.page_size}"

    @property
    def dense(self) -> DecodeCase:
        root = ((1, self.shared),) if self.shared else ()
        levels = (*root, (self.batch, self.context - self.shared))
        return DecodeCase(levels=levels, heads=self.heads, page_size=self.page_size)

    @property
    def pages(self) -> int:
        return -(-self.context // self.page_size)

    def lens(self, device: str, fills_page: bool) -> torch.Tensor:
        """int32 ``[batch]`` tokens of each request, which end a page or do not."""
        end = self.pages * self.page_size
        tokens = end if fills_page else min(self.context, end - 1)
        return torch.full((self.batch,), tokens, dtype=torch.int32, device=device)

    @property
    def options(self) -> PlannerOptions:
        sink, recent, budget = (-(-n // self.page_size) for n in (_SINK_TOKENS, _RECENT_TOKENS, self.budget))
        return PlannerOptions(
            policy=Policy.TOPK,
            page_size=self.page_size,
            sink_pages=sink,
            recent_pages=recent,
            budget_pages=budget,
            budget_fraction=self.fraction,
            max_columns=self.pages,
        )

    @property
    def pages_read(self) -> int:
        """Of each request and KV head."""
        return min(self.options.list_pages, self.pages)


SPARSE_CASES = [
    SparseCase(1, 131072, 4096),
    SparseCase(8, 131072, 4096),
    SparseCase(16, 131072, 4096),
    SparseCase(8, 32768, 2048),
    SparseCase(8, 131072, 4096, fraction=0.3),
    SparseCase(16, 131072, 4096, fraction=0.3),
    SparseCase(8, 4096, 4096),
    SparseCase(64, 65536, 4096),
    SparseCase(64, 65536, 4096, shared=65024),
]


class Step:
    """One layer of a decode step under one policy, and one that reuses its selection, over given caches."""

    def __init__(
        self, case: SparseCase, policy: Policy, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, share: bool = True
    ) -> None:
        h, device = case.heads, q.device
        options = replace(case.options, policy=policy, share=share)
        shape = variants.Shape(
            num_qo_heads=h.qo,
            num_kv_heads=h.kv,
            head_dim=h.dim,
            page_size=case.page_size,
            dtype=ops.DTYPES[q.dtype],
            phase="decode",
            batch=case.batch,
            features=("causal",),
        )
        choice = variants.choose(shape, variants.device_of(device))
        capacity = Capacity(
            batch=case.batch,
            tokens=case.batch,
            pages=case.batch * case.pages,
            num_pages=k.shape[0],
            num_kv_heads=h.kv,
            group=h.qo // h.kv,
            sparse_pages=options.sparse_pages(case.batch, h.kv),
            page_size=case.page_size,
            **choice.plan_sizes,
        )
        self.case, self.capacity = case, capacity
        self.q, self.k, self.v = q, k, v
        self.missing = 0  # keys that the last page of a request lacks
        spec = SummarySpec([0, 1], h.dim, k.dtype, max_columns=case.pages, reuse_layers=2)
        self.summaries = Summaries(spec, k.shape[0], h.kv, device)
        self.planner: Planner = make_planner(options, capacity, device, self.summaries)
        self.out = torch.full_like(q, float("nan"))
        self.kernel = Kernel(choice, capacity, h.dim, device)

    def plan(self, table: torch.Tensor, lens: torch.Tensor) -> None:
        """Plans the step and brings the summaries up to date; once a step, and once for each change of the cache."""
        self.missing = int(-lens[0] % self.case.page_size)
        self.planner.begin_csr(None, *self.case.dense.csr(table, lens))
        zeros = torch.zeros(self.case.batch, dtype=torch.int32, device=self.q.device)
        self.planner.after_store(0, self.k, zeros)

    def select(self) -> torch.Tensor:
        self.planner.for_layer(0, self.q, self.k)
        return self.planner.plan.kv_indices

    def run(self) -> torch.Tensor:
        if not self.missing:  # what the op that stores the keys adds, in a step whose tokens end a page
            self.planner.after_store(0, self.k)
        return self.attend(0)

    def reuse(self) -> torch.Tensor:
        """The layer behind it, which reads what it has chosen."""
        return self.attend(1)

    def attend(self, layer: int) -> torch.Tensor:
        self.kernel.attend(
            self.planner.plan_of(layer),
            self.q,
            self.k,
            self.v,
            self.out,
            sm_scale=self.case.heads.dim**-0.5,
            causal=True,
            window_left=-1,
            logits_soft_cap=0.0,
            decode=True,
            selection=self.planner.selection_of(layer),
        )
        return self.out

    def lists(self) -> torch.Tensor:
        """``[batch, kv_heads, pages_read]`` pages of the last selection."""
        lists = self.planner.plan.kv_indices[self.capacity.pages :]
        shape = (self.case.batch, self.case.heads.kv, self.planner.options.list_pages)
        return lists.view(shape)[:, :, : self.case.pages_read]


def list_error(step: Step) -> float:
    """Largest absolute difference of a few requests to fp64 over the pages that were chosen; NaN is infinite."""
    case, group = step.case, step.case.heads.qo // step.case.heads.kv
    visible = case.pages_read * case.page_size - step.missing
    lists, worst = step.lists(), 0.0
    for r in sample(case.batch, _CHECKED):
        for h in range(case.heads.kv):
            rows, head = slice(h * group, (h + 1) * group), slice(h, h + 1)
            pages = lists[r, h]
            keys, values = step.k[:, :, head], step.v[:, :, head]
            truth = token_truth(step.q[r, rows], keys, values, pages, visible)
            worst = max(worst, distance(step.out[r, rows], truth).largest)
    return worst


def selection_loss(step: Step, table: torch.Tensor) -> float:
    """How much higher than the worst chosen page a page scores in fp64 that was left out: rounding, or a wrong choice.

    In units of the spread of the scores; at most 0 if there is none.
    """
    case, options = step.case, step.planner.options
    lists, worst = step.lists(), -float("inf")
    middle = slice(options.sink_pages, case.pages - options.recent_pages)
    for r in sample(case.batch, _CHECKED):
        pages = table[r, middle].long()
        mean, deviation = step.summaries.of_layer[0][pages].double().unbind(2)
        q = step.q[r].double().view(case.heads.kv, -1, case.heads.dim)
        scores = torch.einsum("hgd,chd->chg", q, mean) + torch.einsum("hgd,chd->chg", q.abs(), deviation)
        scores = scores.amax(-1)
        for h in range(case.heads.kv):
            chosen = torch.isin(pages, lists[r, h].long())
            loss = scores[~chosen, h].max() - scores[chosen, h].min()
            worst = max(worst, (loss / scores[:, h].std()).item())
    return worst


def check(sparse: Step, exact: Step, table: torch.Tensor) -> str | None:
    """What is wrong with the sparse step that has run, or None."""
    if sparse.case.pages_read == sparse.case.pages:
        return None if torch.equal(sparse.out, exact.out) else "differs from policy exact below the budget"
    loss = selection_loss(sparse, table)
    if not loss < 1e-4:
        return f"a page that was left out scores higher by {loss:.2e} deviations"
    error = list_error(sparse)
    limit = torch.finfo(sparse.out.dtype).eps * sparse.out.abs().max().item()  # an ulp of the largest
    return f"off fp64 over its own pages by {error:.2e}" if not error < limit else None


def run(results: Results, cases: list[SparseCase], peer_names: Collection[str], repeats: int) -> list[str]:
    """Measures every case that `results` does not have, saving rows as they come.

    Returns:
        What was not timed, a line each: a wrong selection, an error above bf16's, a result below the budget that is not
        the exact one.
    """
    failures: list[str] = []
    for case in cases:
        if results.has(case.name, OURS):
            continue
        results.drop(case.name)
        torch.manual_seed(0)
        table, _, num_pages = case.dense.page_table("cuda")
        lens = case.lens("cuda", fills_page=False)
        h = case.heads
        k = torch.randn(num_pages, case.page_size, h.kv, h.dim, device="cuda", dtype=torch.bfloat16)
        v = torch.randn_like(k)
        q = torch.randn(case.batch, h.qo, h.dim, device="cuda", dtype=torch.bfloat16)
        calls: dict[str, peers.Call] = {}
        for name in peer_names:
            call = peers.DECODE[name](case.dense, q, k, v, table, lens)
            if call is not None:
                calls[name] = call
        sparse, exact = (Step(case, policy, q, k, v) for policy in (Policy.TOPK, Policy.EXACT))
        unshared = Step(case, Policy.TOPK, q, k, v, share=False) if case.shared else None
        problem = None
        for fills_page in (True, False):
            for step in (sparse, exact, unshared):
                if step is not None:
                    step.plan(table, case.lens("cuda", fills_page))
                    step.run()
            problem = problem or check(sparse, exact, table)
            if unshared is not None and not torch.equal(sparse.lists(), unshared.lists()):
                problem = problem or "sharing changes what is selected"
        if problem is None:
            calls |= {OURS: sparse.run, EXACT: exact.run}
            selects = case.pages_read < case.pages
            if selects:
                calls[REUSES] = sparse.reuse
            selections = {OURS: sparse.select} if selects else {}
            if unshared is not None:
                calls[UNSHARED] = unshared.run
                selections[UNSHARED] = unshared.select
            times = measure_all(calls, repeats)
            for name, time in measure_all(selections, repeats).items():
                results.add(case.name, name, "select_us", *time)
            sparse.plan(table, case.lens("cuda", fills_page=True))
            times[FILLS_PAGE] = measure(sparse.run, repeats)
            for name, time in times.items():
                results.add(case.name, name, "time_us", *time)
            results.add(case.name, OURS, "kv_read", case.pages_read / case.pages)
            results.flush()
            print(case.name, {name: round(time.median, 1) for name, time in times.items()}, flush=True)
        else:
            failures.append(f"{case.name}: {problem}")
            print(failures[-1], flush=True)
        del k, v, calls, sparse, exact, unshared, step
        torch.cuda.empty_cache()
    return failures
