"""Long-context tasks in the manner of RULER (arXiv 2404.06654), made locally from a seed.

A sample is a document and questions about it. Every prompt ends so that a model that continues it first writes a word
that says nothing ("are", "=", ":"). That word comes out of the prefill, which reads everything under any policy; all
that is scored comes out of decode steps, which is where a policy drops pages.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from flashcore_sglang.eval import words

TOKENS_PER_NEEDLE = 1024
QUESTIONS = 8  # at most, about one document
CHAIN = 4  # assignments from a variable to its number
FREQUENT = 3  # words asked for
ZIPF = 2.0  # the word of rank r is r^-ZIPF as frequent as the first

# Words of the sentences below, beside those of `words`.
SENTENCES = re.findall(
    r"\w+|[^\w\s]",
    "the two some one are for and read text it holds secret words find them what of question answer let assignments "
    "follow number is value until you reach most frequent three in order . , : ? =",
)


@dataclass(frozen=True)
class Question:
    """What is appended to a document, and the words that the continuation must hold.

    Attributes:
        text: ends where the model continues.
        expected: lower-case words.
        new_words: words of the continuation that are looked at.
    """

    text: str
    expected: tuple[str, ...]
    new_words: int

    def score(self, continuation: str) -> float:
        """The share of the expected words among the first ``new_words`` of a continuation."""
        said = set(re.findall(r"\w+", continuation.lower())[: self.new_words])
        return sum(word in said for word in self.expected) / len(self.expected)


@dataclass(frozen=True)
class Sample:
    """A document and questions, each to be asked by itself."""

    document: str
    questions: tuple[Question, ...]

    def prompts(self) -> Iterator[tuple[str, Question]]:
        for question in self.questions:
            yield f"{self.document} {question.text}", question


Count = Callable[[str], int]  # tokens of a text


def prose(rng: random.Random) -> str:
    """A sentence that no question is about; some name the colours and animals of needles, or hold their words."""
    pick = rng.choice
    person, verb, place = pick(words.PEOPLE), pick(words.VERBS), f"{pick(words.PREPOSITIONS)} the {pick(words.PLACES)}"
    kind = rng.random()
    if kind < 0.02:
        return f"The {person} {verb} the {pick(words.ADJECTIVES)} {pick(words.ANIMALS)} {place}."
    if kind < 0.04:
        return f"The {person} {verb} the {pick(words.VALUES)} one {pick(words.TIMES)}."
    if kind < 0.10:
        return f"The {pick(words.THINGS)} {place} are for the {person}."
    return f"The {person} {verb} {pick(['the', 'two', 'some'])} {pick(words.THINGS)} {place} one {pick(words.TIMES)}."


def needle(length: int, count: Count, rng: random.Random) -> Sample:
    """Many sentences of one kind about animals with similar names; questions ask for the words of one of them."""
    total = max(4, length // TOKENS_PER_NEEDLE)
    # Few adjectives and animals, so that every name shares each of its parts with others.
    adjectives = rng.sample(words.ADJECTIVES, min(len(words.ADJECTIVES), 2 + total // 8))
    animals = rng.sample(words.ANIMALS, min(len(words.ANIMALS), 2 + total // 4))
    names = rng.sample([f"{a} {b}" for a in adjectives for b in animals], total)
    facts = {name: rng.sample(words.VALUES, 3) for name in names}
    needles = [f"The secret words of the {name} are {' '.join(facts[name])}." for name in names]
    questions = tuple(
        Question(
            f"Question: What are the secret words of the {name}? Answer: The secret words of the {name}",
            tuple(facts[name]),
            new_words=4,  # "are" and three
        )
        for name in rng.sample(names, min(QUESTIONS, total))
    )
    return _sample("Read the text below. It holds secret words. Find them.", needles, questions, length, count, rng)


def variables(length: int, count: Count, rng: random.Random) -> Sample:
    """Chains of assignments in no order; questions ask to follow one of them to its number."""
    chains = max(2, length // TOKENS_PER_NEEDLE // CHAIN)
    names = rng.sample(words.VARIABLES, chains * CHAIN)
    numbers = rng.sample(words.NUMBERS, chains)
    values = [(*names[i * CHAIN : (i + 1) * CHAIN], number) for i, number in enumerate(numbers)]
    needles = [f"Let {a} = {b}." for chain in values for a, b in pairwise(chain)]
    questions = tuple(
        Question(
            f"Question: What number is the value of {chain[0]}? Follow the assignments until you reach the number. "
            f"Answer: {chain[0]}",
            chain[1:],
            new_words=3 * CHAIN,
        )
        for chain in rng.sample(values, min(QUESTIONS, chains))
    )
    return _sample("Read the text below. It holds assignments. Follow them.", needles, questions, length, count, rng)


def frequent(length: int, count: Count, rng: random.Random) -> Sample:
    """A text of invented words, some of which are much more frequent than others; the question asks for these."""
    coded = rng.sample(words.CODED, len(words.CODED))
    weights = [rank**-ZIPF for rank in range(1, len(coded) + 1)]
    question = Question(
        "Question: What are the three most frequent words of the text? Answer: The three most frequent words, in order",
        tuple(coded[:FREQUENT]),
        new_words=FREQUENT,
    )
    start = "Read the text below and find the most frequent words."
    left = length - count(f"{start} {question.text}") - 16
    text = [start]
    while left > 0:
        line = " ".join(rng.choices(coded, weights, k=20)) + "."
        text.append(line)
        left -= count(line)
    return Sample(" ".join(text[:-1]), (question,))


TASKS: dict[str, Callable[[int, Count, random.Random], Sample]] = {
    "needle": needle,
    "variables": variables,
    "frequent": frequent,
}


def make(task: str, length: int, count: Count, seed: int) -> Sample:
    """A sample of a task.

    Args:
        task: a key of ``TASKS``.
        length: tokens that a prompt and its answer may take; 512 at least.
        count: tokens of a text.
        seed: the same seed makes the same sample for the same tokenizer.
    """
    if length < 512:
        raise ValueError(f"task {task}: expected a length of at least 512 tokens, got {length}")
    return TASKS[task](length, count, random.Random(f"{task}/{length}/{seed}"))


def _sample(
    start: str, needles: list[str], questions: tuple[Question, ...], length: int, count: Count, rng: random.Random
) -> Sample:
    """Needles at random places in as much prose as fits."""
    rng.shuffle(needles)
    answer = max(4 * question.new_words for question in questions)
    left = length - answer - count(start) - max(count(question.text) for question in questions)
    left -= sum(count(sentence) for sentence in needles)
    text: list[str] = []
    while left > 0:
        text.append(prose(rng))
        left -= count(text[-1])
    for sentence in needles:
        text.insert(rng.randrange(len(text)), sentence)
    return Sample(" ".join([start, *text[:-1]]), questions)
