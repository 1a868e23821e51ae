"""Response similarity (RSE, arXiv 2501.12619): how closely a model's answers mirror a reference's, to a judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kdkernels.errors import UserError
from kdkernels.evaluation import text
from kdkernels.evaluation.intervals import check_draws, mean_intervals
from kdkernels.evaluation.judges import Judge, as_judge, collect, describe
from kdkernels.evaluation.similarity_result import MEASURES, SCALES, DatasetScore, PromptScore, SimilarityResult
from kdkernels.evaluation.verdicts import SimilarityCase, SimilarityScores, Unparsable

Prompt = str | Sequence[str]
Answer = str | None | Sequence[str | None]
Verdicts = Sequence[SimilarityScores | Unparsable]
Intervals = dict[str, tuple[float, float] | None]
JUDGED = ("overall", "style", "logic", "content")
BASELINES = ("bigram", "embedding")


def response_similarity(
    prompts: Sequence[Prompt],
    references: Sequence[Answer],
    responses: Sequence[Answer],
    judge: Any = None,
    *,
    datasets: Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> SimilarityResult:
    """Compare answers with reference answers: style, logic, content (0 to 2) and overall (1 to 5).

    prompts, references, responses: texts, one each. A conversation is a list of the user's turns, with as many answers
    on either side; it is judged turn by turn, shown the user's earlier turns, and scores the mean of its turns (our
    reading: the paper has single turns). A missing answer is None: the prompt is a gap that is counted and listed, not
    scored. An empty response is an answer.
    judge: None (the offline proxy `LocalLexicalJudge`), a `Judge`, a chat (`EndpointChat`, `LocalChat`), or a function
    (prompt, reference, response) -> scores.
    datasets: name of each prompt's data set; the result is the unweighted mean over them. ids: names of the prompts.
    level, resamples, seed: of the bootstrap intervals. progress: called with (judged, all).

    Identical answers score 2, 2, 2 and 5 by definition. The judge is asked all the same: what it says of them is
    reported (`identical_judged`, a warning below 4.5), and where it gives no verdict the prompt is unparsable, not 5.
    The order of the prompts changes nothing. Raises `UserError` for empty or repeated prompts, lengths that differ, and
    judges that fail for good.
    """
    names, turns, labels = checked(prompts, datasets, ids, level=level, resamples=resamples, seed=seed)
    answers = [
        (_answers("references", i, r, len(turns[i])), _answers("responses", i, a, len(turns[i])))
        for i, (r, a) in enumerate(zip(*_equally_long(prompts, references, responses), strict=True))
    ]
    chosen = as_judge(judge, "similarity")
    cases, places = _cases(turns, answers)
    done = 0

    def seen(_: int, __: SimilarityScores | Unparsable) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(cases))

    verdicts = collect(chosen.similarity(cases), len(cases), chosen, seen)
    by_prompt: list[list[int]] = [[] for _ in prompts]
    for number, place in enumerate(places):
        by_prompt[place].append(number)
    rows = tuple(
        _score(
            labels[i], names[i], len(turns[i]), [cases[n] for n in by_prompt[i]], [verdicts[n] for n in by_prompt[i]]
        )
        for i in range(len(prompts))
    )
    return _result(rows, chosen, level, resamples, seed)


def checked(
    prompts: Sequence[Prompt],
    datasets: Sequence[str] | None,
    ids: Sequence[str] | None,
    *,
    level: float,
    resamples: int,
    seed: int,
) -> tuple[list[str], list[list[str]], list[str]]:
    """(data set, turns, id) of each prompt, after all checks that need no answer: call it before paying for answers."""
    names = _names(datasets, len(prompts))
    turns, labels = _turns(prompts, names), _ids(ids, len(prompts))
    check_draws(level, resamples, seed)
    return names, turns, labels


def _cases(turns: list[list[str]], answers: list[tuple[Any, Any]]) -> tuple[list[SimilarityCase], list[int]]:
    """A case for each turn of each prompt whose answers are all there; the prompt that each belongs to."""
    cases, places = [], []
    for i, (reference, response) in enumerate(answers):
        if any(a is None for a in (*reference, *response)):
            continue
        for t, prompt in enumerate(turns[i]):
            cases.append(SimilarityCase(prompt, reference[t], response[t], tuple(turns[i][:t])))
            places.append(i)
    return cases, places


def _score(label: str, dataset: str, turns: int, cases: Sequence[SimilarityCase], verdicts: Verdicts) -> PromptScore:
    """A prompt's row of the table, from the verdicts on its turns."""
    if not cases:
        return PromptScore(label, dataset, "missing", turns, problem="an answer is missing")
    baselines: dict[str, Any] = {
        "bigram": _mean([text.bigram_overlap(c.reference, c.response) for c in cases]),
        "embedding": _mean([text.embedding_similarity(c.reference, c.response) for c in cases]),
    }
    same = [c.reference == c.response for c in cases]
    bad = [f"turn {t + 1}: {v.problem}" for t, v in enumerate(verdicts) if isinstance(v, Unparsable)]
    if bad:
        return PromptScore(
            label, dataset, "unparsable", turns, **baselines, identical=all(same), problem="; ".join(bad)
        )
    given = [v for v in verdicts if isinstance(v, SimilarityScores)]
    equal = SimilarityScores(2.0, 2.0, 2.0, 5.0)
    held = [equal if same[t] else verdict for t, verdict in enumerate(given)]
    scores: dict[str, Any] = {name: _mean([getattr(verdict, name) for verdict in held]) for name in JUDGED}
    judged = [verdict.overall for verdict, alike in zip(given, same, strict=True) if alike]
    return PromptScore(
        label, dataset, "scored", turns, **scores, **baselines, identical=all(same),
        judged=_mean(judged) if judged else None,
    )  # fmt: skip


def _result(rows: tuple[PromptScore, ...], judge: Judge, level: float, resamples: int, seed: int) -> SimilarityResult:
    groups = {name: [row for row in rows if row.dataset == name] for name in sorted({row.dataset for row in rows})}
    settings: dict[str, Any] = {"level": level, "resamples": resamples, "seed": seed}
    by_set, joint = _intervals(groups, settings)
    datasets = {
        name: DatasetScore(len(group), **_statuses(group), means=_means(group), intervals=by_set[name])
        for name, group in groups.items()
    }
    means: dict[str, Any] = {m: _mean_or_none([d.means[m] for d in datasets.values()]) for m in MEASURES}
    judged = [row.judged for row in rows if row.judged is not None]
    counts = _statuses(rows)
    return SimilarityResult(
        **means,
        intervals=joint,
        datasets=datasets,
        per_prompt=rows,
        unparsable=counts["unparsable"],
        missing=counts["missing"],
        identical=sum(row.identical for row in rows),
        identical_judged=_mean_or_none(judged),
        judge=dict(describe(judge)),
        **settings,
        warnings=_warnings(rows, datasets, judge, judged),
    )


def _intervals(
    groups: dict[str, list[PromptScore]], settings: dict[str, Any]
) -> tuple[dict[str, Intervals], Intervals]:
    """By data set and measure, and by measure of the mean over data sets; None where there is none."""
    by_set: dict[str, Intervals] = {name: {} for name in groups}
    joint: Intervals = {}
    for measures in (JUDGED, BASELINES):  # different prompts count
        tables = {}
        for name, group in groups.items():
            counted = [row for row in group if getattr(row, measures[0]) is not None]
            if counted:
                tables[name] = np.array([[getattr(row, m) for m in measures] for row in counted])
        found, whole = mean_intervals(tables, bounds=[SCALES[m] for m in measures], **settings)
        for k, measure in enumerate(measures):
            joint[measure] = whole[k]
            for name in groups:
                by_set[name][measure] = found[name][k] if name in found else None
    return by_set, joint


def _warnings(
    rows: Sequence[PromptScore], datasets: dict[str, DatasetScore], judge: Judge, judged: Sequence[float]
) -> tuple[str, ...]:
    found = []
    if judge.proxy:
        found.append(f"scored by {judge.name}, which compares words and shapes, not meaning")
    for status, what in (("unparsable", "gave no verdict on"), ("missing", "")):
        count = sum(row.status == status for row in rows)
        if count:
            subject = f"the judge {what} {count}" if what else f"an answer is missing for {count}"
            found.append(f"{subject} of {len(rows)} prompts; they are not scored")
    for name, dataset in datasets.items():
        if not dataset.scored:
            found.append(f"data set {name!r} has no scored prompt and is not part of the mean")
    if judged and _mean(judged) < 4.5:
        found.append(
            f"the judge itself gives identical answers {_mean(judged):.2f} of 5 on average ({len(judged)} prompts; "
            "they count as 5): do not trust it"
        )
    return tuple(found)


def _statuses(rows: Sequence[PromptScore]) -> dict[str, int]:
    return {status: sum(row.status == status for row in rows) for status in ("scored", "unparsable", "missing")}


def _means(rows: Sequence[PromptScore]) -> dict[str, float | None]:
    return {measure: _mean_or_none([getattr(row, measure) for row in rows]) for measure in MEASURES}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None


def _equally_long(*columns: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    prompts, references, responses = columns
    for name, column in (("references", references), ("responses", responses)):
        if isinstance(column, str) or len(column) != len(prompts):
            count = "a text" if isinstance(column, str) else len(column)
            raise UserError(
                f"{name} is {count}; allowed: one for each of the {len(prompts)} prompts, None where missing"
            )
    return references, responses


def _turns(prompts: Sequence[Prompt], names: Sequence[str]) -> list[list[str]]:
    """The user's turns of each prompt; none may be empty, no prompt may come twice in a data set."""
    if isinstance(prompts, str) or len(prompts) == 0:
        raise UserError(f"prompts is {'a text' if isinstance(prompts, str) else 'empty'}; allowed: a list of prompts")
    found: list[list[str]] = []
    first: dict[tuple[str, ...], int] = {}
    for i, prompt in enumerate(prompts):
        turns = [prompt] if isinstance(prompt, str) else list(prompt)
        if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
            raise UserError(f"prompts[{i}] is {prompt!r}; allowed: a text, or a list of the user's turns, none empty")
        before = first.setdefault((names[i], *turns), i)
        if before != i:
            raise UserError(f"prompts[{i}] repeats prompts[{before}]: {turns[0][:60]!r}; leave one out")
        found.append(turns)
    return found


def _answers(name: str, i: int, value: Any, turns: int) -> list[str | None]:
    """One answer a turn. A missing conversation is None as a whole; an empty reference is a missing one."""
    listed = isinstance(value, (list, tuple))
    answers: list[Any] = [value] * turns if value is None else list(value) if listed else [value]
    if len(answers) != turns or not all(a is None or isinstance(a, str) for a in answers):
        raise UserError(
            f"{name}[{i}] is {value!r}; allowed: a text for each of its {turns} turns, or None where missing"
        )
    return [None if name == "references" and a is not None and not a.strip() else a for a in answers]


def _names(datasets: Sequence[str] | None, count: int) -> list[str]:
    if datasets is None:
        return ["all"] * count
    if isinstance(datasets, str) or len(datasets) != count or not all(isinstance(d, str) and d for d in datasets):
        raise UserError(f"datasets is {datasets!r:.80}; allowed: a name for each of the {count} prompts")
    return list(datasets)


def _ids(ids: Sequence[str] | None, count: int) -> list[str]:
    labels = [str(i) for i in range(count)] if ids is None else [str(i) for i in ids]
    if len(labels) != count or len(set(labels)) != count:
        raise UserError(f"ids has {len(set(labels))} different names; allowed: one for each of the {count} prompts")
    return labels
