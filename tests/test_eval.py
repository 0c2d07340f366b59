"""The tasks and the model that answers them, without a server; with one: server/test_retrieval.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flashcore_sglang.config import ConfigError
from flashcore_sglang.eval import runner, server, tasks
from flashcore_sglang.examples.retrieval_model import make_model, make_tokenizer, make_weights, vocabulary

TOKENIZER = make_tokenizer()


def count(text: str) -> int:
    return len(TOKENIZER.encode(text, add_special_tokens=False).ids)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("retrieval") / "model")


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("length", [512, 4096])
def test_a_prompt_fits_and_holds_its_answer(task: str, length: int) -> None:
    sample = tasks.make(task, length, count, seed=1)
    assert sample.questions
    for prompt, question in sample.prompts():
        tokens = TOKENIZER.encode(prompt).tokens
        assert "<unk>" not in tokens
        assert len(tokens) + question.new_words <= length
        assert len(tokens) > length - 100
        assert set(question.expected) <= set(tokens)
        assert not set(question.expected) & set(TOKENIZER.encode(question.text).tokens)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_samples_follow_from_the_seed(task: str) -> None:
    assert tasks.make(task, 1024, count, seed=1) == tasks.make(task, 1024, count, seed=1)
    assert tasks.make(task, 1024, count, seed=1) != tasks.make(task, 1024, count, seed=2)


def test_needles_have_similar_names() -> None:
    """Each name shares its adjective or its animal with another one."""
    document = tasks.make("needle", 16384, count, seed=0).document
    names = [sentence.split()[:2] for sentence in document.split("The secret words of the ")[1:]]
    assert len(names) == 16
    for i, (adjective, animal) in enumerate(names):
        assert any(adjective == a or animal == b for j, (a, b) in enumerate(names) if j != i)


def test_scores() -> None:
    question = tasks.Question("", ("amber", "kite", "plum"), new_words=4)
    assert question.score("are Amber, kite plum.") == 1.0
    assert question.score("are kite kite") == pytest.approx(1 / 3)
    assert question.score("are one two three amber kite plum") == 0.0  # too late


def test_a_length_that_is_too_short() -> None:
    with pytest.raises(ValueError, match="at least 512 tokens, got 100"):
        tasks.make("needle", 100, count, seed=0)


def test_contenders() -> None:
    made = runner.contenders(["exact", "window", "topk"], [1024], ["mean", "min_max"])
    policies = ["exact", "window", "topk:mean", "topk:min_max"]
    assert [c.name for c in made] == [f"flashcore:{policy}" for policy in policies]
    assert {case for c in made for case in c.cases("needle", 4096)} == {"eval/needle/ctx4096/budget1024"}
    assert len({c.log for c in runner.contenders(["exact", "window", "topk"], [1024, 2048], [])}) == 5
    assert runner.Contender("server").cases("needle", 4096) == ["eval/needle/ctx4096"]
    assert made[1].environment == {"FLASHCORE_POLICY": "window", "FLASHCORE_RECENT_TOKENS": "896"}
    assert made[3].environment["FLASHCORE_SUMMARY_KIND"] == "min_max"
    with pytest.raises(ConfigError, match="budget_tokens must exceed"):
        runner.contenders(["topk"], [512], [])
    with pytest.raises(ConfigError, match="no more than the sinks"):
        runner.contenders(["window"], [128], [])
    with pytest.raises(ConfigError, match="summary_kind"):
        runner.contenders(["topk"], [1024], ["median"])


def test_a_server_has_what_the_user_has_set_but_for_what_is_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[dict[str, str]] = []

    @contextmanager
    def launched(arguments: list[str], environment: dict[str, str], log: Path) -> Iterator[None]:
        given.append(environment)
        yield

    monkeypatch.setattr(server, "launched", launched)
    monkeypatch.setenv("FLASHCORE_REUSE_LAYERS", "2")
    monkeypatch.setenv("FLASHCORE_POLICY", "exact")
    with server.serve("model", {"FLASHCORE_POLICY": "topk"}, [], tmp_path / "log"):
        pass
    assert (given[0]["FLASHCORE_REUSE_LAYERS"], given[0]["FLASHCORE_POLICY"]) == ("2", "topk")


def test_the_model_is_small_and_always_the_same(model: Path) -> None:
    assert sum(path.stat().st_size for path in model.iterdir()) <= 20e6
    again = make_weights()
    assert all((weight == again[name]).all() for name, weight in make_weights().items())
    assert json.loads((model / "config.json").read_text())["vocab_size"] == len(vocabulary())


@pytest.mark.parametrize("task", tasks.TASKS)
def test_transformers_reads_the_answer_from_the_model(model: Path, task: str) -> None:
    """Nothing of ours takes part: the checkpoint is a plain LlamaForCausalLM."""
    transformers = pytest.importorskip("transformers")
    llama = transformers.AutoModelForCausalLM.from_pretrained(model)
    prompt, question = next(tasks.make(task, 1024, count, seed=0).prompts())
    tokens = transformers.AutoTokenizer.from_pretrained(model)(prompt, return_tensors="pt")
    answer = llama.generate(**tokens, max_new_tokens=2 + question.new_words, do_sample=False)[0]
    said = TOKENIZER.decode(answer[tokens["input_ids"].shape[1] :].tolist())
    assert question.score(said) == 1.0, said
