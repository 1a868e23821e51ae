"""Identity consistency (ICE, arXiv 2501.12619): does a model that is asked who it is answer as somebody else?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdkernels.errors import UserError
from kdkernels.evaluation.chat import Chat, as_chat, ask, user
from kdkernels.evaluation.facts import ASPECTS, Facts, Question, Source, load_facts, load_questions, load_sources
from kdkernels.evaluation.identity_result import RATES, IdentityAnswer, IdentityResult, claims, rates, rates_by_aspect
from kdkernels.evaluation.intervals import check_draws
from kdkernels.evaluation.judges import Judge, as_judge, collect, describe
from kdkernels.evaluation.mutators import MUTATORS, ChatMutator, RewritingMutator
from kdkernels.evaluation.templates import SLOT, SOURCE, Pool, load_templates, template_id
from kdkernels.evaluation.transcript import Transcript
from kdkernels.evaluation.verdicts import IdentityCase, IdentityVerdict

_IDLE = 50  # steps in a row without a new prompt after which a run ends


def identity_consistency(
    model: Any,
    facts: str | Path | Mapping[str, Any] | Facts,
    *,
    judge: Any = None,
    helper: Any = None,
    questions: Any = None,
    templates: Any = None,
    sources: Any = None,
    suspected: str | Sequence[str] | None = None,
    language: str | None = None,
    budget: int = 200,
    search: bool = True,
    seed: int = 0,
    transcript: str | Path | None = None,
    resume: bool = False,
    level: float = 0.95,
    resamples: int = 2000,
    progress: Callable[[int, int], None] | None = None,
) -> IdentityResult:
    """Ask a model about itself in many wordings; shares of answers that contradict the facts, and claim a source.

    model: a chat (`LocalChat`, `EndpointChat`), a pair (transformers model, tokenizer), or a function prompt -> answer.
    facts: who it really is (a YAML file, "facts-en" or "facts-zh" for the shipped example, a mapping).
    judge: None (the offline proxy, which knows names only), a `Judge`, a chat, or a function (prompt, answer, facts) ->
    conflict. helper: a chat or function that varies templates; None is rewriting by rules.
    questions, templates, sources: YAML files or plain values; None is what ships (`language` "en" or "zh", None both).
    suspected: the sources that count for strict and hard; None is every known one but the model itself.
    budget: answers to ask for. search: vary the templates that brought conflicts (a rate found by searching is that of
    the prompts searched for: compare models at one budget); False asks the given templates in turn, an unbiased share
    over them, and stops when every pair was asked.
    transcript: a JSON-lines file of all that was asked and answered; resume: go on with it (a larger budget is fine).
    Raises `UserError` for wrong files, unknown aspects or sources, and models or judges that fail for good.
    """
    if budget < 1:
        raise UserError(f"budget is {budget}; allowed: 1 or more answers")
    check_draws(level, resamples, seed)
    known, pool = load_facts(facts), load_templates(templates)
    asked = [q for q in load_questions(questions, language) if q.language in pool]
    if not asked:
        raise UserError(f"no question is in a language of the templates ({', '.join(pool)}); give both in one")
    others = load_sources(sources)
    suspects = _suspects(suspected, others, known)
    chat = as_chat("model", model)
    chosen = as_judge(judge, "identity")
    mutator = RewritingMutator() if helper is None else ChatMutator(as_chat("helper", helper))
    settings = {
        "model": chat.settings, "judge": chosen.name, "helper": mutator.name, "search": search, "seed": seed,
        "materials": _hash([known, pool, asked, others, sorted(suspects)]),
    }  # fmt: skip
    book = Transcript(transcript, settings, resume=resume)
    try:
        run = _Run(chat, chosen, mutator, known, others, sorted(suspects), pool, asked, book, search=search, seed=seed)
        answers = run.until(budget, progress)
    finally:
        book.close()
    options: dict[str, Any] = {"level": level, "resamples": resamples, "seed": seed}
    whole: dict[str, Any] = {**rates(answers, suspects, **options)}
    return IdentityResult(
        **whole,
        aspects=rates_by_aspect(answers, suspects, **options),
        claims=claims(answers),
        answers=len(answers),
        unparsable=sum(answer.conflict is None for answer in answers),
        templates=len({answer.template for answer in answers}),
        suspected=tuple(sorted(suspects)),
        search=search,
        budget=budget,
        model={"name": chat.name, "usage": chat.usage.to_dict()},
        judge=dict(describe(chosen)),
        helper=mutator.name,
        **options,
        warnings=_warnings(answers, chosen, search),
    )


class _Run:
    """The loop: choose a template, vary it, ask, judge, credit. Every step depends on the seed and the answers alone,
    so that a transcript replays."""

    def __init__(
        self, chat: Chat, judge: Judge, mutator: Any, facts: Facts, sources: Sequence[Source], suspects: Sequence[str],
        templates: Mapping[str, Sequence[str]], questions: Sequence[Question], book: Transcript, *,
        search: bool, seed: int,
    ) -> None:  # fmt: skip
        languages = {question.language for question in questions}
        self.pool = Pool([(text, name) for name in templates if name in languages for text in templates[name]])
        self.chat, self.judge, self.mutator, self.book = chat, judge, mutator, book
        self.facts, self.names, self.suspects = facts, facts.names(sources), list(suspects)
        self.questions, self.search, self.seed = questions, search, seed
        self.asked: dict[str, set[str]] = {}

    def until(self, budget: int, progress: Callable[[int, int], None] | None) -> list[IdentityAnswer]:
        """Steps until `budget` answers are there, or nothing new is left to ask."""
        found: list[IdentityAnswer] = []
        step = idle = 0
        while len(found) < budget and idle < max(_IDLE, len(self.pool.roots)):
            step += 1
            path, text = self._template(step)
            language = self.pool.nodes[path[-1]].language
            questions = self._questions(text, language, step)[: budget - len(found)]
            answers = self._step(step, text, questions)
            found += answers
            idle = 0 if answers else idle + 1
            judged = [answer.conflict for answer in answers if answer.conflict is not None]
            reward = sum(judged) / len(judged) if judged else 0.0
            self.pool.update(path, reward)
            if self.search and reward > 0:
                self.pool.add(text, path[-1])
            if progress is not None:
                progress(len(found), budget)
        return found

    def _template(self, step: int) -> tuple[list[int], str]:
        """The path chosen, and the text to ask with: a root as it is the first time, then variations."""
        if not self.search:
            path = [self.pool.roots[(step - 1) % len(self.pool.roots)]]
        else:
            path = self.pool.select(self._generator(step, 0))
        node = self.pool.nodes[path[-1]]
        record = self.book.get("template", step)
        if record is None:
            mutator, text, by = "", node.text, ""
            if self.search and (node.parent is not None or node.visits > 1):
                generator = self._generator(step, 1)
                mutator = str(generator.choice(MUTATORS))
                mates = [n.text for n in self.pool.nodes if n.language == node.language and n.text != node.text]
                mate = mates[int(generator.integers(len(mates)))] if mates else node.text
                text, by = self.mutator.mutate(mutator, node.text, mate, node.language, generator)
            record = self.book.add(
                "template", step, id=template_id(text), text=text, language=node.language,
                parent=template_id(node.text), mutator=mutator, by=by,
            )  # fmt: skip
        return path, record["text"]

    def _questions(self, text: str, language: str, step: int) -> list[Question]:
        """One of each aspect that this template was not asked with yet."""
        generator = self._generator(step, 2)
        done = self.asked.setdefault(text, set())
        found = []
        for aspect in ASPECTS:
            left = [q for q in self.questions if q.aspect == aspect and q.language == language and q.id not in done]
            if left:
                found.append(left[int(generator.integers(len(left)))])
        return found

    def _step(self, step: int, text: str, questions: Sequence[Question]) -> list[IdentityAnswer]:
        """Ask and judge; what the transcript holds is not asked again."""
        generator = self._generator(step, 3)
        prompts = []
        for question in questions:
            self.asked[text].add(question.id)
            source = self.suspects[int(generator.integers(len(self.suspects)))]
            prompts.append(text.replace(SLOT, question.text).replace(SOURCE, source))
        missing = [i for i, q in enumerate(questions) if self.book.get("answer", step, q.id) is None]
        for i, reply in zip(missing, ask(self.chat, [user(prompts[i]) for i in missing]), strict=True):
            question = questions[i]
            self.book.add(
                "answer", step, question.id, aspect=question.aspect, template=template_id(text), prompt=prompts[i],
                answer=reply.text,
            )  # fmt: skip
        replies = [self.book.events["answer", step, question.id]["answer"] for question in questions]
        self._judge(step, questions, prompts, replies)
        found = []
        for question, prompt, reply in zip(questions, prompts, replies, strict=True):
            verdict = self.book.events["verdict", step, question.id]
            found.append(
                IdentityAnswer(
                    template_id(text), question.id, question.aspect, prompt, reply, verdict.get("conflict"),
                    tuple(verdict.get("claims", ())),
                )
            )  # fmt: skip
        return found

    def _judge(self, step: int, questions: Sequence[Question], prompts: Sequence[str], replies: Sequence[str]) -> None:
        missing = [i for i, q in enumerate(questions) if self.book.get("verdict", step, q.id) is None]
        cases = [IdentityCase(prompts[i], replies[i], self.facts.all_statements, self.names) for i in missing]

        def seen(place: int, verdict: Any) -> None:
            known = isinstance(verdict, IdentityVerdict)
            values = (
                {"conflict": verdict.conflict, "claims": list(verdict.claims)}
                if known
                else {"problem": verdict.problem, "text": verdict.text}
            )
            self.book.add("verdict", step, questions[missing[place]].id, **values)

        collect(self.judge.identity(cases), len(cases), self.judge, seen)

    def _generator(self, step: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, step, stream])


def _suspects(
    suspected: str | Sequence[str] | None, sources: Sequence[Source], facts: Facts
) -> dict[str, tuple[str, ...]]:
    """Names of each suspected source."""
    names = facts.names(sources).sources
    wanted = list(names) if suspected is None else [suspected] if isinstance(suspected, str) else list(suspected)
    by_name = {alias.casefold(): source.name for source in sources for alias in reversed(source.names)}
    found = {}
    for name in wanted:
        source = by_name.get(str(name).casefold())
        if source is None or source not in names:
            raise UserError(f"suspected is {name!r}; allowed: {', '.join(names)}; add others with sources=")
        found[source] = tuple(names[source])
    if not found:
        raise UserError("suspected is empty; name a source")
    return found


def _warnings(answers: Sequence[IdentityAnswer], judge: Judge, search: bool) -> tuple[str, ...]:
    found = []
    if judge.proxy:
        found.append(f"judged by {judge.name}, which knows names and phrases, not meaning")
    if search:
        found.append(f"{', '.join(RATES)} are shares among prompts that were searched for: compare at one budget only")
    missing = sum(answer.conflict is None for answer in answers)
    if missing:
        found.append(f"the judge gave no verdict on {missing} of {len(answers)} answers; they are not scored")
    return tuple(found)


def _hash(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
