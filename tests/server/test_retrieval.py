"""A model that truly retrieves, through the server: topk answers as exact does from a quarter of the pages.

The same questions under policy window, which reads as much but chooses nothing, show that the right pages are needed:
a selection that does not look at the query, or at the keys, fails here as window does.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from flashcore_sglang.bench import results
from flashcore_sglang.eval import runner, tasks
from flashcore_sglang.examples.retrieval_model import make_model

pytestmark = pytest.mark.server

LENGTH = 4096
BUDGET = LENGTH // 4
FLAGS = f"--context-length {LENGTH + 64} --max-total-tokens 16384 --skip-server-warmup"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[results.Row]:
    folder = tmp_path_factory.mktemp("retrieval")
    model = str(make_model(folder / "model"))
    make = partial(runner.make_samples, list(tasks.TASKS), [LENGTH], 1, 0, runner.counter(model))
    todo = [
        # Every layer selects, so that the share of pages is that of the budget.
        replace(contender, environment={**contender.environment, "FLASHCORE_DENSE_LAYERS": "0"})
        for contender in runner.contenders(["exact", "topk", "window"], [BUDGET], [])
    ]
    return runner.run_servers(todo, 3, model, FLAGS.split(), folder, make)


def test_topk_answers_as_exact_does(rows: list[results.Row]) -> None:
    for case, found in results.pivot(rows, "accuracy").items():
        assert found["flashcore:exact"].value == 1.0, case
        assert found["flashcore:topk"].value == 1.0, case


def test_the_right_pages_are_needed(rows: list[results.Row]) -> None:
    found = results.pivot(rows, "accuracy")
    for task in ("needle", "variables"):
        assert found[f"eval/{task}/ctx{LENGTH}/budget{BUDGET}"]["flashcore:window"].value < 0.8, task


def test_the_share_of_pages_read_is_reported(rows: list[results.Row]) -> None:
    for case, found in results.pivot(rows, "kv_read").items():
        assert found["flashcore:topk"].value < 0.5, case
        assert found["flashcore:exact"].value > 0.5, case
