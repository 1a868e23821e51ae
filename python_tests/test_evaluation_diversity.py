"""kdkernels/evaluation/diversity.py: counted by hand, and on answers that have collapsed."""

from __future__ import annotations

import math
import random

import pytest

from kdkernels.errors import UserError
from kdkernels.evaluation import DiversityResult, response_diversity
from kdkernels.evaluation.text import embedding_similarity

WORDS = [f"w{i}x" for i in range(400)]


def texts(count: int, seed: int, words: list[str] = WORDS) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=40)) for _ in range(count)]


def test_counts_by_hand() -> None:
    found = response_diversity(["a b a b", "a b c d e", "q"], cut=4)
    first = found.responses
    assert first["distinct_1"].value == pytest.approx(5 / 9)  # a b c d q of 4 + 4 + 1
    assert first["distinct_2"].value == pytest.approx(4 / 6)  # ab ba bc cd of 3 + 3
    assert first["distinct_3"].value == pytest.approx(4 / 4)
    assert first["words"].value == pytest.approx(10 / 3)
    assert first["repetition"].value == 0
    assert first["stock_share"].value is None
    assert found.references == {}
    again = response_diversity(["one two three four one two three four", "x y"]).responses
    assert again["repetition"].value == pytest.approx((1 / 5 + 0) / 2)


def test_self_similarity_is_the_mean_over_pairs_and_its_jackknife_the_definition() -> None:
    answers = ["the river runs to the sea", "the river runs to a lake", "prices rose in spring"]
    pairs = [(0, 1), (0, 2), (1, 2)]
    cosines = {pair: embedding_similarity(answers[pair[0]], answers[pair[1]]) for pair in pairs}
    found = response_diversity(answers).responses["self_similarity"]
    assert found.value == pytest.approx(sum(cosines.values()) / 3, abs=1e-9)
    left = [cosines[1, 2], cosines[0, 2], cosines[0, 1]]
    mean = sum(left) / 3
    error = math.sqrt(2 / 3 * sum((x - mean) ** 2 for x in left))
    assert found.high - found.value == pytest.approx(4.303 * error, rel=1e-3)


def test_the_jackknife_of_distinct_counts_each_answer_out() -> None:
    answers = texts(12, 0)
    whole = response_diversity(answers).responses["distinct_2"]
    left = [response_diversity(answers[:i] + answers[i + 1 :]).responses["distinct_2"].value for i in range(12)]
    mean = sum(left) / 12
    error = math.sqrt(11 / 12 * sum((x - mean) ** 2 for x in left))
    assert whole.high - whole.value == pytest.approx(2.201 * error, rel=1e-3)


def test_stock_phrases_are_the_teachers() -> None:
    teacher = [f"{text} i hope this helps you" for text in texts(20, 1)]
    student = [f"{text} i hope this helps you" for text in texts(10, 2)] + texts(10, 3)
    found = response_diversity(student, teacher)
    assert {p.phrase for p in found.stock_phrases} == {"i hope this helps", "hope this helps you"}
    assert all(p.references == 1 and p.answers == 0.5 for p in found.stock_phrases)
    assert found.references["stock_share"].value == pytest.approx(5 / 45)
    assert found.responses["stock_share"].value == pytest.approx(5 / 45 / 2)
    assert found.collapsed == ()


def test_collapse_is_flagged_and_only_then() -> None:
    teacher = texts(20, 1)
    same = response_diversity(texts(20, 2), teacher)
    assert same.collapsed == ()
    narrow = response_diversity(texts(20, 2, WORDS[:6]), teacher)
    assert {"distinct_2", "distinct_3", "self_similarity"} <= set(narrow.collapsed)
    stuck = response_diversity(["so it goes on and on and then " * 6 for _ in range(20)], teacher)
    assert "repetition" in stuck.collapsed
    assert any("far from the references'" in warning for warning in stuck.warnings)


def test_json_order_and_empty_answers() -> None:
    answers, teacher = [*texts(6, 2), ""], texts(7, 1)
    found = response_diversity(answers, teacher)
    assert DiversityResult.from_dict(found.to_dict()) == found
    assert found.empty == 1
    assert found.warnings[0] == "1 of 7 answers hold no word"
    turned = response_diversity(answers[::-1], teacher[::-1])
    for name, estimate in found.responses.items():
        assert turned.responses[name].value == pytest.approx(estimate.value, abs=1e-12), name


@pytest.mark.parametrize(
    ("answers", "options", "message"),
    [
        ([], {}, "responses has 0 texts"), (["one", "..."], {}, "responses has 1 texts"), ("text", {}, "list of texts"),
        (["a b", 3], {}, "a list of texts"), (["a b", "c d"], {"references": ["a"]}, "references has 1 texts"),
        (["a b", "c d"], {"cut": 2}, "cut is 2"), (["a b", "c d"], {"level": 1.0}, "level 1.0"),
    ],
)  # fmt: skip
def test_bad_input(answers: list[str], options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        response_diversity(answers, **options)  # type: ignore[arg-type]
