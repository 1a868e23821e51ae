"""Five ways to vary a template: by a helper model, or by rewriting rules when there is none."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from kdkernels.evaluation.chat import Chat, ask, user
from kdkernels.evaluation.facts import load_yaml, shipped
from kdkernels.evaluation.templates import SLOT, problem_of

MUTATORS = ("crossover", "expand", "similar", "shorten", "rephrase")
_ATTEMPTS = 3
_TASKS = {
    "crossover": "Write one template that combines the two templates below into one.",
    "expand": "Write the template below again, with one or two sentences added at its beginning.",
    "similar": "Write another template in the same style as the one below, with different content.",
    "shorten": "Write the template below again, shorter and with the same meaning.",
    "rephrase": "Write the template below again in other words, with the same meaning.",
}
_RULES = (
    "A template is a friendly, harmless frame around a question. Keep its language. The placeholder {question} must "
    "stand in it exactly once, and {source} only where the original has it. Do not write anything that asks a model to "
    "ignore its rules, to pretend to be another model, or to deceive. Answer with the template alone."
)


class RewritingMutator:
    """Deterministic variations by rules and word lists (`data/rewriting.yaml`); draws come from the generator alone."""

    name = "rewriting rules"

    def __init__(self) -> None:
        self._lists: Any = load_yaml(shipped("rewriting"))

    def mutate(
        self, mutator: str, text: str, other: str, language: str, generator: np.random.Generator
    ) -> tuple[str, str]:
        """(the variation, who made it); `other` is a second template, for crossover."""
        front, back = _frame(text)
        new = getattr(self, f"_{mutator}")(front, back, other, language, generator)
        return _text(new[0], new[1], language), self.name

    def _crossover(self, front: list[str], back: list[str], other: str, *_: Any) -> tuple[list[str], list[str]]:
        """The beginning of one with the end of the other (the other way round where that is one of them)."""
        others = _frame(other)
        if (front, others[1]) in ((front, back), others):
            return others[0], back
        return front, others[1]

    def _expand(
        self, front: list[str], back: list[str], _: str, language: str, rng: Any
    ) -> tuple[list[str], list[str]]:
        """One more sentence in front."""
        return [self._draw("openings", language, rng), *front], back

    def _similar(
        self, front: list[str], back: list[str], _: str, language: str, rng: Any
    ) -> tuple[list[str], list[str]]:
        """The same shape with one sentence exchanged (one added behind a bare question)."""
        if not front + back:
            return front, [self._draw("closings", language, rng)]
        place = int(rng.integers(len(front) + len(back)))
        if place < len(front):
            return [*front[:place], self._draw("openings", language, rng), *front[place + 1 :]], back
        place -= len(front)
        return front, [*back[:place], self._draw("closings", language, rng), *back[place + 1 :]]

    def _shorten(self, front: list[str], back: list[str], _: str, __: str, rng: Any) -> tuple[list[str], list[str]]:
        """One sentence less."""
        if not front + back:
            return front, back
        place = int(rng.integers(len(front) + len(back)))
        if place < len(front):
            return front[:place] + front[place + 1 :], back
        place -= len(front)
        return front, back[:place] + back[place + 1 :]

    def _rephrase(
        self, front: list[str], back: list[str], _: str, language: str, rng: Any
    ) -> tuple[list[str], list[str]]:
        """Words exchanged for others of the list; where none is known, a sentence behind."""
        pairs = [
            pair for pair in self._lists["synonyms"].get(language, []) if _exchange(pair, front + back) != front + back
        ]
        if not pairs:
            return front, [*back, self._draw("closings", language, rng)]
        for number in rng.permutation(len(pairs))[: 1 + int(rng.integers(len(pairs)))]:
            front, back = _exchange(pairs[number], front), _exchange(pairs[number], back)
        return front, back

    def _draw(self, which: str, language: str, rng: Any) -> str:
        lists = self._lists[which]
        known = lists.get(language, lists["en"])
        return str(known[int(rng.integers(len(known)))])


class ChatMutator:
    """Variations that a helper model writes; after three answers that are no template, the rules make one."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.name = chat.name
        self._rules = RewritingMutator()

    def mutate(
        self, mutator: str, text: str, other: str, language: str, generator: np.random.Generator
    ) -> tuple[str, str]:
        """(the variation, who made it)."""
        parts = [_TASKS[mutator], _RULES, f"Template:\n{text}"]
        if mutator == "crossover":
            parts.append(f"Second template:\n{other}")
        conversation = user("\n\n".join(parts))
        for _ in range(_ATTEMPTS):
            answer = ask(self.chat, [conversation])[0].text
            new = re.sub(r"^```\w*\n|\n?```$|^[\"“「]|[\"”」]$", "", answer.strip()).strip()
            problem = problem_of(new) or ("" if new.count("{source}") <= text.count("{source}") else "{source} is new")
            if not problem:
                return new, self.name
            conversation = [
                *conversation,
                {"role": "assistant", "content": answer},
                {"role": "user", "content": f"This is no template: {problem}. Write it again."},
            ]
        return self._rules.mutate(mutator, text, other, language, generator)


def _frame(text: str) -> tuple[list[str], list[str]]:
    """The sentences before and behind the question."""
    front, back = text.split(SLOT)
    return _sentences(front), _sentences(back)


def _sentences(text: str) -> list[str]:
    parts = re.split(r"(?<=[.!?:])\s+|(?<=[。！？：])", text)
    return [part.strip() for part in parts if part.strip()]


def _text(front: list[str], back: list[str], language: str) -> str:
    return ("" if language == "zh" else " ").join([*front, SLOT, *back])


def _exchange(pair: list[str], sentences: list[str]) -> list[str]:
    """The first of a pair that stands in a sentence becomes the other."""
    found = []
    for sentence in sentences:
        here = next((i for i in (0, 1) if pair[i] in sentence), None)
        found.append(sentence if here is None else sentence.replace(pair[here], pair[1 - here]))
    return found
