"""The pool of prompt templates and the choice of the next one to vary (GPTFuzzer's MCTS-Explore, arXiv 2309.10253)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdkernels.errors import UserError
from kdkernels.evaluation.facts import _mapping, _read

SLOT = "{question}"
SOURCE = "{source}"
EXPLORATION = 0.5
STOP = 0.1  # chance of staying at a template that has children
DISCOUNT, LEAST = 0.1, 0.2  # a reward found at depth d counts max(LEAST, 1 - DISCOUNT d) for those above


@dataclass
class Node:
    """A template in the pool; `parent` is an index, None for the ones it began with."""

    text: str
    language: str
    parent: int | None = None
    level: int = 0
    children: list[int] = field(default_factory=list)
    visits: int = 0
    reward: float = 0.0


class Pool:
    """Templates that vary each other, as a forest."""

    def __init__(self, roots: Sequence[tuple[str, str]]) -> None:
        self.nodes = [Node(text, language) for text, language in roots]
        self.roots = list(range(len(self.nodes)))
        self.step = 0

    def score(self, index: int) -> float:
        """reward / (visits + 1) + 0.5 sqrt(2 ln(step) / (visits + 0.01))."""
        node = self.nodes[index]
        explore = math.sqrt(2 * math.log(self.step) / (node.visits + 0.01))
        return node.reward / (node.visits + 1) + EXPLORATION * explore

    def select(self, generator: np.random.Generator) -> list[int]:
        """The path to the template to vary next: the best of the roots, then of its children, and so on."""
        self.step += 1
        path = [max(self.roots, key=self.score)]
        while self.nodes[path[-1]].children and generator.random() >= STOP:
            path.append(max(self.nodes[path[-1]].children, key=self.score))
        for index in path:
            self.nodes[index].visits += 1
        return path

    def update(self, path: Sequence[int], reward: float) -> None:
        """Credit the templates of a path with a reward in [0, 1]."""
        share = max(LEAST, 1 - DISCOUNT * self.nodes[path[-1]].level)
        for index in path:
            self.nodes[index].reward += reward * share

    def add(self, text: str, parent: int) -> None:
        """Take a variation into the pool, unless its text is there."""
        if any(node.text == text for node in self.nodes):
            return
        above = self.nodes[parent]
        above.children.append(len(self.nodes))
        self.nodes.append(Node(text, above.language, parent, above.level + 1))


def template_id(text: str) -> str:
    """A template's name: 10 hexadecimal digits of its text's hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def problem_of(text: str) -> str:
    """Why a text is no template, or ""."""
    if text.count(SLOT) != 1:
        return f"{SLOT} stands {text.count(SLOT)} times in it; allowed: once"
    if len(text) > 2000:
        return f"it has {len(text)} characters; allowed: 2000"
    return ""


def load_templates(value: str | Path | Mapping[str, Any] | None = None) -> dict[str, tuple[str, ...]]:
    """Templates by language, from a YAML file or a mapping of language -> list; None is the shipped pool."""
    table, where = _read("templates" if value is None else value, "templates")
    found = {}
    for language, texts in _mapping(table.get("templates", table), f"{where}: templates").items():
        if not isinstance(texts, list) or not texts:
            raise UserError(f"{where}: templates.{language} is {texts!r:.60}; allowed: a list of texts")
        for number, text in enumerate(texts):
            problem = problem_of(text) if isinstance(text, str) else "it is no text"
            if problem:
                raise UserError(f"{where}: templates.{language}[{number}] is {text!r:.60}; {problem}")
        if len(set(texts)) != len(texts):
            raise UserError(f"{where}: templates.{language} holds a text twice; leave one out")
        found[str(language)] = tuple(texts)
    return found
