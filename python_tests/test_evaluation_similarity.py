"""Response similarity: means, gaps, identity, order, intervals, bad input, JSON."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from kdkernels import evaluation
from kdkernels.errors import UserError
from kdkernels.evaluation import SimilarityResult, response_similarity
from kdkernels.evaluation.chat import CallableChat
from kdkernels.evaluation.judges import CallableJudge, ChatJudge

PROMPTS = [f"Question {i} about topic {i % 4}?" for i in range(12)]
REFERENCES = [f"Answer {i}: the river number {i} runs under {i % 5} bridges. People walk home." for i in range(12)]
RESPONSES = [f"Reply {i}: people walk home; river {i} has {i % 3} bridges." for i in range(12)]
SETS = ["arena", "math", "share"] * 4


def steady(overall: float) -> Any:
    """A judge that says the same whatever it sees."""
    return lambda *_: {"style": 1, "logic": 1, "content": 1, "overall": overall}


def by_text(prompt: str, reference: str, response: str) -> dict[str, float]:
    """A judge whose scores depend on the case alone."""
    rng = random.Random(prompt + reference + response)
    return {**{name: rng.randrange(3) for name in ("style", "logic", "content")}, "overall": rng.randint(1, 5)}


JUDGES = {
    "offline": lambda: None,
    "function": lambda: steady(3.0),
    "harsh": lambda: steady(1.0),
    "chat": lambda: ChatJudge(CallableChat(lambda _: json.dumps(steady(2)()))),
    "random": lambda: by_text,
}


@pytest.mark.parametrize("judge", JUDGES)
def test_a_reference_against_itself_scores_exactly_5(judge: str) -> None:
    result = response_similarity(PROMPTS, REFERENCES, REFERENCES, JUDGES[judge](), datasets=SETS)
    assert (result.overall, result.style, result.logic, result.content) == (5.0, 2.0, 2.0, 2.0)
    assert (result.bigram, result.embedding) == (1.0, pytest.approx(1.0))
    assert result.intervals["overall"] == (5.0, 5.0)
    assert all(row.overall == 5.0 and row.identical for row in result.per_prompt)
    assert result.identical == len(PROMPTS)


def test_the_shortcut_hides_no_judge_s_error() -> None:
    result = response_similarity(PROMPTS, REFERENCES, REFERENCES, steady(2.0))
    assert result.overall == 5.0
    assert result.identical_judged == 2.0
    assert any("gives identical answers 2.00 of 5 on average (12 prompts" in text for text in result.warnings)
    nonsense = response_similarity(PROMPTS, REFERENCES, REFERENCES, lambda *_: "what?")
    assert (nonsense.overall, nonsense.unparsable, nonsense.identical) == (None, 12, 12)
    exact = response_similarity(PROMPTS, REFERENCES, REFERENCES)
    assert exact.identical_judged == 5.0
    assert not any("identical" in text for text in exact.warnings)


@pytest.mark.parametrize("judge", ["offline", "random"])
def test_order_changes_nothing(judge: str) -> None:
    def run(order: list[int]) -> SimilarityResult:
        columns = [[column[i] for i in order] for column in (PROMPTS, REFERENCES, RESPONSES, SETS)]
        ids = [str(i) for i in order]
        return response_similarity(*columns[:3], JUDGES[judge](), datasets=columns[3], ids=ids)

    straight = run(list(range(12)))
    for seed in range(3):
        order = random.Random(seed).sample(range(12), 12)
        other = run(order)
        assert [row.id for row in other.per_prompt] == [str(i) for i in order]
        assert sorted(other.per_prompt, key=lambda r: int(r.id)) == list(straight.per_prompt)
        ours, theirs = straight.to_dict(), other.to_dict()
        assert ours.pop("per_prompt") != theirs.pop("per_prompt")
        assert ours == theirs  # every mean and every interval, to the last bit


def test_the_mean_over_data_sets_is_unweighted() -> None:
    scores = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 5.0, "e": 4.0}
    prompts, sets = list(scores), ["big", "big", "big", "small", "small"]
    result = response_similarity(
        prompts,
        [f"r {p}" for p in prompts],
        [f"s {p}" for p in prompts],
        lambda p, *_: (0, 1, 2, scores[p]),
        datasets=sets,
    )
    assert result.datasets["big"].means["overall"] == pytest.approx(7 / 3)
    assert result.datasets["small"].means["overall"] == 4.5
    assert result.overall == pytest.approx((7 / 3 + 4.5) / 2)
    assert (result.style, result.logic, result.content) == (0.0, 1.0, 2.0)
    low, high = result.intervals["overall"] or (0, 0)
    assert 1 <= low < result.overall < high <= 5


def test_unparsable_answers_are_counted_and_not_scored() -> None:
    def judge(prompt: str, *_: str) -> Any:
        return "no idea" if "topic 1" in prompt else (1, 1, 1, 4)

    result = response_similarity(PROMPTS, REFERENCES, RESPONSES, judge)
    assert (result.unparsable, result.overall) == (3, 4.0)
    rows = [row for row in result.per_prompt if row.status == "unparsable"]
    assert [row.id for row in rows] == ["1", "5", "9"]
    assert all(row.overall is None and row.bigram is not None and "no JSON object" in row.problem for row in rows)
    assert result.datasets["all"].scored == 9
    assert "the judge gave no verdict on 3 of 12 prompts; they are not scored" in result.warnings


def test_a_judge_that_answers_only_nonsense_leaves_a_marked_gap() -> None:
    result = response_similarity(PROMPTS, REFERENCES, RESPONSES, lambda *_: "meh", datasets=SETS)
    assert (result.overall, result.unparsable) == (None, 12)
    assert result.intervals["overall"] is None
    assert result.bigram is not None
    assert "data set 'math' has no scored prompt and is not part of the mean" in result.warnings
    assert SimilarityResult.from_dict(result.to_dict()) == result


def test_missing_answers_are_a_marked_gap() -> None:
    responses = [None if i in (2, 7) else r for i, r in enumerate(RESPONSES)]
    references = ["  " if i == 5 else r for i, r in enumerate(REFERENCES)]
    result = response_similarity(PROMPTS, references, responses, steady(2.0))
    assert (result.missing, result.overall, result.datasets["all"].scored) == (3, 2.0, 9)
    assert [row.id for row in result.per_prompt if row.status == "missing"] == ["2", "5", "7"]
    assert "an answer is missing for 3 of 12 prompts; they are not scored" in result.warnings
    empty = response_similarity(PROMPTS[:2], REFERENCES[:2], ["", RESPONSES[1]])
    assert empty.missing == 0
    assert empty.per_prompt[0].overall == 1.0  # an empty answer is an answer


def test_conversations_are_judged_turn_by_turn() -> None:
    seen = []

    def judge(prompt: str, reference: str, response: str) -> Any:
        seen.append((prompt, reference, response))
        return "?" if response == "s4" else (1, 1, 1, 1 + len(seen))

    prompts = [["one", "two"], "three", ["four"]]
    result = response_similarity(prompts, [["r1", "r2"], "r3", ["r4"]], [["s1", "s2"], "s3", ["s4"]], judge)
    assert seen == [("one", "r1", "s1"), ("two", "r2", "s2"), ("three", "r3", "s3"), ("four", "r4", "s4")]
    assert [row.turns for row in result.per_prompt] == [2, 1, 1]
    assert [row.overall for row in result.per_prompt] == [2.5, 4.0, None]
    half = response_similarity([["one", "two"], "x"], [["a", "b"], "c"], [["a", "d"], "e"], lambda *_: (0, 0, 0, 2))
    assert half.per_prompt[0].overall == 3.5  # 5 for the identical turn, 2 for the other
    assert (half.per_prompt[0].identical, half.per_prompt[0].judged) == (False, 2.0)
    gap = response_similarity([["one", "two"], "x"], [["a", "b"], "c"], [["a", None], "e"], steady(2.0))
    assert gap.per_prompt[0].status == "missing"


def test_a_judge_sees_the_earlier_turns() -> None:
    seen = []

    class Watching(CallableJudge):
        def similarity(self, cases: Any) -> Any:
            seen.extend(cases)
            return super().similarity(cases)

    response_similarity([["a", "b", "c"]], [["1", "2", "3"]], [["4", "5", "6"]], Watching(steady(3.0)))
    assert [case.earlier for case in seen] == [(), ("a",), ("a", "b")]


def test_a_student_that_took_over_more_scores_higher() -> None:
    """Answers half of whose words come from the reference, against answers with a tenth of them."""
    rng = random.Random(1)
    words = ["stone", "light", "paper", "cloud", "metal", "field", "glass", "winter", "engine", "forest"]

    def student(reference: str, share: float) -> str:
        return " ".join(w if rng.random() < share else rng.choice(words) for w in reference.split())

    before, after = ([student(r, share) for r in REFERENCES] for share in (0.1, 0.5))
    low = response_similarity(PROMPTS, REFERENCES, before)
    high = response_similarity(PROMPTS, REFERENCES, after)
    assert low.judge["proxy"]
    assert (high.overall or 0) > (low.overall or 9) + 0.3
    assert (high.intervals["overall"] or (0, 0))[0] > (low.intervals["overall"] or (9, 9))[1]


def test_the_interval_is_that_of_the_mean() -> None:
    """Against Student's interval of plain scores, which is exact for them: within a tenth of its width."""
    rng = random.Random(0)
    values = [min(max(rng.gauss(3, 0.6), 1), 5) for _ in range(80)]
    prompts = [str(v) for v in values]
    result = response_similarity(prompts, ["r"] * 80, ["s"] * 80, lambda p, *_: (1, 1, 1, float(p)), resamples=4000)
    mean = sum(values) / 80
    error = (sum((v - mean) ** 2 for v in values) / 79 / 80) ** 0.5
    low, high = result.intervals["overall"] or (0, 0)
    assert low == pytest.approx(mean - 1.990 * error, abs=0.2 * error)
    assert high == pytest.approx(mean + 1.990 * error, abs=0.2 * error)


def test_json_round_trip(tmp_path: Path) -> None:
    result = response_similarity(PROMPTS, REFERENCES, [*RESPONSES[:-1], None], by_text, datasets=SETS, resamples=200)
    assert SimilarityResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    result.save(tmp_path / "rse.json")
    assert SimilarityResult.load(tmp_path / "rse.json") == result
    for content, text in (
        ("{", "cannot be read"),
        ("[]", "holds no result"),
        ('{"kind": "x"}', "result is 'x', version"),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match=text):
            SimilarityResult.load(tmp_path / "bad.json")
    with pytest.raises(UserError, match="is no 'kdkernels"):
        SimilarityResult.from_dict({"kind": result.kind, "version": 1, "datasets": {}})


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        (([], [], []), {}, "prompts is empty"),
        (("abc", ["a"] * 3, ["b"] * 3), {}, "prompts is a text"),
        ((["a", " "], ["r"] * 2, ["s"] * 2), {}, r"prompts\[1\] is ' '"),
        ((["a", "b", "a"], ["r"] * 3, ["s"] * 3), {}, r"prompts\[2\] repeats prompts\[0\]"),
        ((["a", "b"], ["r"], ["s"] * 2), {}, "references is 1; allowed: one for each of the 2 prompts"),
        ((["a", "b"], ["r"] * 2, "st"), {}, "responses is a text"),
        ((["a"], ["r"], [3]), {}, r"responses\[0\] is 3; allowed: a text"),
        (([["a", "b"]], [["r"]], [["s", "t"]]), {}, r"references\[0\] is \['r'\]; allowed: a text for each of its 2"),
        (([[]], [[]], [[]]), {}, r"prompts\[0\] is \[\]"),
        ((["a"], ["r"], ["s"]), {"datasets": ["x", "y"]}, "datasets is"),
        ((["a", "b"], ["r"] * 2, ["s"] * 2), {"ids": ["1", "1"]}, "ids has 1 different names"),
        ((["a"], ["r"], ["s"]), {"level": 95}, "level is 95; allowed: between 0 and 1"),
        ((["a"], ["r"], ["s"]), {"resamples": 1}, "resamples is 1"),
        ((["a", "b"], ["r"] * 2, ["s"] * 2), {"seed": -1}, "seed is -1; allowed: 0 or more"),
        ((["a"], ["r"], ["s"]), {"judge": 4}, "judge is 4; allowed"),
    ],
)
def test_wrong_input(arguments: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        response_similarity(*arguments, **options)


def test_one_prompt_in_two_data_sets_is_fine_and_one_prompt_alone_has_no_interval() -> None:
    result = response_similarity(["a", "a"], ["r", "r"], ["s", "s"], steady(2.0), datasets=["x", "y"])
    assert result.overall == 2.0
    assert result.intervals["overall"] is None


def test_importing_the_package_loads_nothing_heavy() -> None:
    import subprocess
    import sys

    code = (
        "import sys, kdkernels as kd; kd.evaluation.response_similarity(['a'], ['b c'], ['b d']); "
        "print([m for m in ('torch', 'transformers', 'openai', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert set(evaluation.__all__) <= set(dir(evaluation))


def test_the_blocks_of_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import re

    yaml = pytest.importorskip("yaml")
    page = (Path(__file__).resolve().parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    [example] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert yaml.safe_load(example)["name"] == "Aster"
    (tmp_path / "facts.yaml").write_text(example)
    names: dict[str, Any] = {
        "prompts": PROMPTS, "references": REFERENCES, "responses": RESPONSES, "datasets": SETS,
        "model": lambda prompt: "I am Qwen.",
    }  # fmt: skip
    rse, ice = (b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "similarity" in b or "identity" in b)
    exec(rse, names)
    assert SimilarityResult.load("rse.json") == names["result"]
    exec(ice, names)
    assert names["result"].strict.value == 1.0
