"""The pool's choice of templates and the five mutators."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from kdkernels.evaluation.chat import CallableChat, Conversation, Reply, Usage
from kdkernels.evaluation.mutators import MUTATORS, ChatMutator, RewritingMutator
from kdkernels.evaluation.templates import Pool, load_templates, problem_of

pytest.importorskip("yaml")
LONG = "I am new here. Please be brief. {question} Thank you. Good bye."


def test_scores_are_those_of_the_published_rule() -> None:
    pool = Pool([("a {question}", "en"), ("b {question}", "en")])
    pool.step = 7
    pool.nodes[0].visits, pool.nodes[0].reward = 3, 1.5
    assert pool.score(0) == pytest.approx(1.5 / 4 + 0.5 * math.sqrt(2 * math.log(7) / 3.01))
    assert pool.score(1) == pytest.approx(0.5 * math.sqrt(2 * math.log(7) / 0.01))


def test_every_root_is_tried_before_any_comes_again_and_then_the_rewarding_ones() -> None:
    pool = Pool([(f"{i} {{question}}", "en") for i in range(10)])
    generator = np.random.default_rng(0)
    chosen = []
    for _ in range(300):
        path = pool.select(generator)
        pool.update(path, 1.0 if path[0] == 4 else 0.0)
        chosen.append(path[0])
    assert sorted(chosen[:10]) == list(range(10))
    assert chosen.count(4) > 100
    assert min(map(chosen.count, range(10))) >= 3  # nobody is forgotten


def test_the_path_goes_down_the_tree_and_rewards_come_back_up() -> None:
    pool = Pool([("a {question}", "en")])
    pool.add("b {question}", 0)
    pool.add("c {question}", 1)
    pool.add("c {question}", 0)  # known: not taken in twice
    assert [(n.text[0], n.parent, n.level) for n in pool.nodes] == [("a", None, 0), ("b", 0, 1), ("c", 1, 2)]
    generator = np.random.default_rng(0)
    paths = [tuple(pool.select(generator)) for _ in range(1000)]
    share = paths.count((0,)) / 1000
    assert share == pytest.approx(0.1, abs=0.03)
    assert paths.count((0, 1, 2)) / 1000 == pytest.approx(0.81, abs=0.04)
    assert pool.nodes[0].visits == 1000
    pool.update([0, 1, 2], 0.5)
    assert [node.reward for node in pool.nodes] == [pytest.approx(0.5 * 0.8)] * 3


@pytest.mark.parametrize("mutator", MUTATORS)
def test_rules_make_templates_of_all_that_ship(mutator: str) -> None:
    rules = RewritingMutator()
    for language, texts in load_templates().items():
        for number, text in enumerate(texts):
            made = {
                rules.mutate(mutator, text, texts[number - 1], language, np.random.default_rng(seed))[0]
                for seed in range(4)
            }
            assert all(problem_of(new) == "" for new in made)
            if text != "{question}" or mutator in ("expand", "similar", "rephrase"):
                assert made != {text}, (mutator, text)
            again = rules.mutate(mutator, text, texts[number - 1], language, np.random.default_rng(3))[0]
            assert again in made


def test_what_each_rule_does() -> None:
    rules, generator = RewritingMutator(), np.random.default_rng(1)

    def mutate(mutator: str, text: str, other: str = "Hello. {question} Answer soon.") -> str:
        return rules.mutate(mutator, text, other, "en", generator)[0]

    assert mutate("crossover", LONG) == "I am new here. Please be brief. {question} Answer soon."
    assert mutate("expand", LONG).endswith(LONG)
    assert mutate("expand", LONG) != LONG
    assert len(mutate("shorten", LONG)) < len(LONG)
    assert mutate("shorten", "{question}") == "{question}"
    similar = mutate("similar", LONG)
    assert similar.count(".") == LONG.count(".")
    assert similar != LONG
    assert mutate("rephrase", "I want to know. {question}") == "I would like to know. {question}"


def test_a_helper_model_writes_templates() -> None:
    asked = []

    def helper(prompt: str) -> str:
        asked.append(prompt)
        return '```\n"A new frame. {question}"\n```'

    mutator = ChatMutator(CallableChat(helper, "helper"))
    made = mutator.mutate("crossover", LONG, "Other {question}", "en", np.random.default_rng(0))
    assert made[1] == "helper"
    assert made[0].strip('"') == "A new frame. {question}"
    assert LONG in asked[0]
    assert "Other {question}" in asked[0]
    assert "stand in it exactly once" in asked[0]


class Stubborn:
    """A helper that never writes a template."""

    name = "stubborn"
    settings: dict[str, Any] = {}  # noqa: RUF012
    usage = Usage()

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = list(texts), 0

    def replies(self, conversations: Sequence[Conversation]) -> Iterator[tuple[int, Reply]]:
        for index in range(len(conversations)):
            yield index, Reply(self.texts[self.asked % len(self.texts)])
            self.asked += 1


def test_a_helper_that_writes_none_is_asked_three_times_and_then_the_rules_do() -> None:
    helper = Stubborn("no slot", "{question} {question}", "You are {source}. {question}")
    text, by = ChatMutator(helper).mutate("expand", LONG, LONG, "en", np.random.default_rng(0))
    assert helper.asked == 3
    assert by == "rewriting rules"
    assert text.endswith(LONG)
    patient = Stubborn("no slot", "Fine. {question}")
    assert ChatMutator(patient).mutate("expand", LONG, LONG, "en", np.random.default_rng(0)) == (
        "Fine. {question}",
        "stubborn",
    )
