"""`flashcore eval`: the tasks through a server for each policy, side by side."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from statistics import fmean

from flashcore_sglang import config
from flashcore_sglang.bench import results
from flashcore_sglang.eval import tasks
from flashcore_sglang.eval.server import Client, serve

TOKENS_PER_WORD = 4  # that a tokenizer may need
CONCURRENT = 4  # requests that one server is asked at once


@dataclass(frozen=True)
class Contender:
    """A server to be compared.

    Attributes:
        name: of its column in the tables.
        environment: what makes it different.
        budgets: the rows that it stands in: its budget, or all of them if it reads everything; none: rows without one.
    """

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    budgets: tuple[int, ...] = ()

    def cases(self, task: str, length: int) -> list[str]:
        """Names of its rows of one task and length."""
        case = f"eval/{task}/ctx{length}"
        return [f"{case}/budget{budget}" for budget in self.budgets] or [case]

    @property
    def log(self) -> str:
        """A file's name that no other contender has."""
        return "-".join([*self.name.split(":"), *map(str, self.budgets)]) + ".log"


def contenders(policies: Iterable[str], budgets: Sequence[int], summaries: Sequence[str]) -> list[Contender]:
    """`exact`, `window` and `topk` once for each budget, `topk` for each kind of summary, too, where some are named.

    Raises:
        ConfigError: a budget that does not go with the sinks and recent pages, or an unknown summary.
    """
    kinds: Sequence[str | None] = summaries or [None]  # None: as configured
    made = []
    for policy in policies:
        if policy == "exact":
            made.append(Contender(f"{results.OURS}:exact", {"FLASHCORE_POLICY": "exact"}, tuple(budgets)))
            continue
        for budget in budgets:
            if policy == "window":
                recent = budget - config.load().sink_tokens
                if recent < 1:
                    raise config.ConfigError(f"policy window: a budget of {budget} is no more than the sinks")
                variables = {"FLASHCORE_POLICY": "window", "FLASHCORE_RECENT_TOKENS": str(recent)}
                made.append(Contender(f"{results.OURS}:window", variables, (budget,)))
                continue
            for kind in kinds:
                name = f"{results.OURS}:topk"
                fields: dict[str, str | int] = {"policy": "topk", "budget_tokens": budget}
                if kind is not None:
                    name += f":{kind}"
                    fields["summary_kind"] = kind
                config.load(**fields)
                variables = {config.PREFIX + field.upper(): str(value) for field, value in fields.items()}
                made.append(Contender(name, variables, (budget,)))
    return made


def counter(model: str) -> tasks.Count:
    """Tokens of a text, by the tokenizer of a model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def ask(client: Client, sample: tasks.Sample) -> list[float]:
    """The scores of a sample's questions. The first one leaves the document in the server's cache for the others."""

    def score(item: tuple[str, tasks.Question]) -> float:
        prompt, question = item
        return question.score(client.generate(prompt, TOKENS_PER_WORD * question.new_words))

    first, *others = sample.prompts()
    with ThreadPoolExecutor(CONCURRENT) as pool:
        return [score(first), *pool.map(score, others)]


Samples = dict[tuple[str, int], list[tasks.Sample]]  # of a task and a length


def make_samples(
    names: Sequence[str], lengths: Sequence[int], documents: int, seed: int, count: tasks.Count
) -> Samples:
    """`documents` samples of each task and length."""
    return {
        (task, length): [tasks.make(task, length, count, seed + i) for i in range(documents)]
        for length in lengths
        for task in names
    }


def run(contender: Contender, client: Client, samples: Samples) -> list[results.Row]:
    """Asks one server everything: accuracy and the share of KV that decode reads, by task and length."""
    client.wait()
    table = results.Results()

    def add(task: str, length: int, metric: str, value: float) -> None:
        for case in contender.cases(task, length):
            table.add(case, contender.name, metric, value)

    for length in dict.fromkeys(length for _, length in samples):
        accuracies, shares = [], []
        for task in (task for task, of_length in samples if of_length == length):
            before = client.pages()
            scores = [score for sample in samples[task, length] for score in ask(client, sample)]
            after = client.pages()
            accuracies.append(fmean(scores))
            add(task, length, "accuracy", accuracies[-1])
            if before and after and after != before:
                read, saved = after[0] - before[0], after[1] - before[1]
                shares.append(read / (read + saved))
                add(task, length, "kv_read", shares[-1])
            print(f"{contender.name}: {task} at {length}: {accuracies[-1]:.3f} of {len(scores)} questions", flush=True)
        add("average", length, "accuracy", fmean(accuracies))
        add("worst", length, "accuracy", min(accuracies))
        if shares:
            add("average", length, "kv_read", fmean(shares))
    return table.rows


def run_servers(
    todo: Sequence[Contender], at_once: int, model: str, flags: list[str], logs: Path, make: Callable[[], Samples]
) -> list[results.Row]:
    """The rows of all contenders, in their order; ``at_once`` servers share the machine."""
    rows: list[results.Row] = []
    samples: Samples = {}
    for first in range(0, len(todo), at_once):
        some = todo[first : first + at_once]
        with ExitStack() as stack:
            clients = [stack.enter_context(serve(model, c.environment, flags, logs / c.log)) for c in some]
            samples = samples or make()  # while they start
            # Whatever goes wrong, the servers go first: a request to one that is gone fails at once.
            pool = ThreadPoolExecutor(at_once)
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            for done in pool.map(run, some, clients, repeat(samples)):
                rows += done
    return rows


def main(argv: Sequence[str]) -> int:
    """Runs the tasks and prints a table of accuracies and one of shares; exit status 0 however good they are."""
    options = _options(argv)
    table = results.Results()
    todo = contenders(options.policies, options.budgets, options.summaries)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        client = Client(options.url.rstrip("/")) if options.url else None
        flags = ["--context-length", str(max(options.lengths) + 512), *options.flags]
        model = options.model or (client.model_path() if client else "")
        if not model:
            from flashcore_sglang.examples.retrieval_model import make_model

            model = str(make_model(folder / "retrieval-model"))
            # Left to itself SGLang would give the KV cache of a small model most of the memory.
            flags = ["--max-total-tokens", str(2 * max(options.lengths) + 8192), *flags]
        count = counter(model)
        make = partial(make_samples, options.tasks, options.lengths, options.samples, options.seed, count)
        if client:
            table.rows += run(Contender(options.name), client, make())
        else:
            table.rows += run_servers(todo, options.at_once, model, flags, options.logs or folder, make)
    for metric in ("accuracy", "kv_read"):
        if results.pivot(table.rows, metric):
            results.show(table.rows, metric)
    if options.json:
        table.save(options.json)
    return 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flashcore eval",
        description="Long-context tasks through a real SGLang server for each policy: accuracy and KV read.",
        epilog="Flags after -- go to sglang.launch_server. Policies are exact, window and topk.",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help="ask this running server instead; its policy is its own (needs --enable-metrics)")
    where.add_argument("--logs", type=Path, metavar="DIR", help="keep the servers' logs")
    parser.add_argument("--model", metavar="PATH", help="default: the retrieval model of the examples")
    parser.add_argument("--name", default="server", help="of the server at --url in the tables (default: server)")
    parser.add_argument("--tasks", nargs="+", choices=tasks.TASKS, default=list(tasks.TASKS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384], metavar="TOKENS")
    parser.add_argument("--policies", nargs="+", choices=("exact", "window", "topk"), default=["exact", "topk"])
    parser.add_argument("--budgets", nargs="+", type=int, default=[1024], metavar="TOKENS", help="of window and topk")
    parser.add_argument("--summaries", nargs="+", default=[], metavar="KIND", help="of topk (default: as configured)")
    parser.add_argument("--samples", type=int, default=2, help="documents of each task and length (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=1, help="servers that share the machine (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results")
    arguments = list(argv)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    options.flags = arguments[split + 1 :]
    return options
