"""The result of `response_similarity`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdkernels.evaluation.results import Result

MEASURES = ("overall", "style", "logic", "content", "bigram", "embedding")
SCALES = {"overall": (1.0, 5.0), "style": (0.0, 2.0), "logic": (0.0, 2.0), "content": (0.0, 2.0),
          "bigram": (0.0, 1.0), "embedding": (0.0, 1.0)}  # fmt: skip


@dataclass(frozen=True)
class PromptScore:
    """One prompt. status: "scored", "unparsable" (the judge gave no verdict) or "missing" (an answer is).

    Scores are means over its turns, None unless scored; bigram and embedding need no judge and are None only where an
    answer is missing. `judged`: the judge's own overall score where the answers are identical and 5 stands by
    definition.
    """

    id: str
    dataset: str
    status: str
    turns: int = 1
    overall: float | None = None
    style: float | None = None
    logic: float | None = None
    content: float | None = None
    bigram: float | None = None
    embedding: float | None = None
    identical: bool = False
    judged: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class DatasetScore:
    """Means over the scored prompts of a data set (None without any), with intervals by measure."""

    prompts: int
    scored: int
    unparsable: int
    missing: int
    means: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]


@dataclass(frozen=True)
class SimilarityResult(Result):
    """RSE. The scores are unweighted means over data sets of the means over their scored prompts.

    overall 1 to 5; style, logic, content 0 to 2; bigram, embedding: baselines, 0 to 1, over all prompts with answers.
    None where no prompt could be scored. `intervals`: by measure, at `level`, over prompts drawn again in data sets.
    `judge`: name, proxy (True for the offline imitation of a judge) and usage. `warnings`: what to know before one
    trusts the numbers.
    """

    kind = "kdkernels.response_similarity"

    overall: float | None
    style: float | None
    logic: float | None
    content: float | None
    bigram: float | None
    embedding: float | None
    intervals: dict[str, tuple[float, float] | None]
    datasets: dict[str, DatasetScore]
    per_prompt: tuple[PromptScore, ...]
    unparsable: int
    missing: int
    identical: int
    identical_judged: float | None
    judge: dict[str, Any]
    level: float
    resamples: int
    seed: int
    warnings: tuple[str, ...] = ()

    @classmethod
    def _inner(cls, values: dict[str, Any]) -> dict[str, Any]:
        datasets = {
            name: DatasetScore(
                **{**d, "means": {m: d["means"][m] for m in MEASURES}, "intervals": _pairs(d["intervals"])}
            )
            for name, d in values["datasets"].items()
        }
        return {
            **values,
            "intervals": _pairs(values["intervals"]),
            "datasets": datasets,
            "per_prompt": tuple(PromptScore(**row) for row in values["per_prompt"]),
            "warnings": tuple(values["warnings"]),
        }


def _pairs(values: dict[str, Any]) -> dict[str, tuple[float, float] | None]:
    return {name: None if values[name] is None else (values[name][0], values[name][1]) for name in MEASURES}
