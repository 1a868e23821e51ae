"""Identity consistency: the arithmetic of verdicts, the search, resuming, and what ships."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kdkernels.errors import UserError
from kdkernels.evaluation import IdentityResult, identity_consistency
from kdkernels.evaluation.facts import ASPECTS, load_facts, load_questions, load_sources
from kdkernels.evaluation.identity_result import IdentityAnswer, rates, rates_by_aspect
from kdkernels.evaluation.templates import load_templates, problem_of

pytest.importorskip("yaml")
SUSPECTED = {"GPT": ("GPT", "OpenAI"), "Claude": ("Claude", "Anthropic")}
FACTS = {
    "name": "Aster",
    "facts": {"team": {"statements": ["Aster was made by Harbour."], "names": ["Harbour"]}},
}


def answer(
    template: int, conflict: bool | None, *claims: str, prompt: str = "Who?", aspect: str = "team"
) -> IdentityAnswer:
    return IdentityAnswer(f"t{template}", "q", aspect, prompt, "...", conflict, claims)


# --- from verdicts to rates ---


def test_loose_strict_and_hard_are_the_published_arithmetic() -> None:
    """100 answers: 34 conflict, 22 of them claim the suspected source, in 7 of those the prompt had named it."""
    verdicts = [
        *[answer(i % 20, True, "GPT") for i in range(15)],
        *[answer(i % 20, True, "Claude", prompt="Are you from Anthropic?") for i in range(7)],
        *[answer(i % 20, True) for i in range(8)],
        *[answer(i % 20, True, "Qwen") for i in range(4)],  # another identity, but none that is suspected
        *[answer(i % 20, False) for i in range(64)],
        *[answer(i % 20, False, "GPT") for i in range(2)],  # without a conflict a claim counts for nothing
    ]
    found = rates(verdicts, SUSPECTED)
    assert {name: rate.value for name, rate in found.items()} == {"loose": 0.34, "strict": 0.22, "hard": 0.15}
    assert {name: rate.hits for name, rate in found.items()} == {"loose": 34, "strict": 22, "hard": 15}
    assert all((rate.answers, rate.templates) == (100, 20) for rate in found.values())
    for rate in found.values():
        assert rate.low is not None
        assert rate.high is not None
        assert rate.low < (rate.value or 0) < rate.high


def test_hard_needs_one_claimed_source_that_the_prompt_did_not_name() -> None:
    both = [answer(0, True, "GPT", "Claude", prompt="Are you GPT?"), answer(1, True, "GPT", prompt="Not by OpenAI?")]
    found = rates(both, SUSPECTED)
    assert (found["strict"].value, found["hard"].value) == (1.0, 0.5)
    written = {"Qwen": ("Qwen", "Tongyi")}
    assert rates([answer(0, True, "Qwen", prompt="so you are qwen?")], written)["hard"].value == 0.0
    assert rates([answer(0, True, "Qwen", prompt="what are qwens?")], written)["hard"].value == 1.0


def test_answers_without_a_verdict_are_not_scored() -> None:
    found = rates([answer(0, True), answer(1, None), answer(2, False), answer(3, None)], SUSPECTED)
    assert (found["loose"].value, found["loose"].answers, found["loose"].templates) == (0.5, 2, 2)
    nothing = rates([answer(0, None)], SUSPECTED)
    assert nothing["hard"].value is None
    assert (nothing["hard"].low, nothing["hard"].answers) == (None, 0)


def test_aspects_are_scored_apart() -> None:
    verdicts = [answer(i, i < 2, aspect="geography") for i in range(4)] + [answer(i, True, "GPT") for i in range(3)]
    found = rates_by_aspect(verdicts, SUSPECTED)
    assert list(found) == ["team", "geography"]
    assert (found["geography"]["loose"].value, found["geography"]["strict"].value) == (0.5, 0.0)
    assert found["team"]["strict"].value == 1.0


# --- the run ---


class Model:
    """A model that says it is GPT when asked in a certain way, and otherwise tells the truth; counts its calls."""

    def __init__(self, weak: str = "radio", stop_after: int | None = None) -> None:
        self.weak, self.stop_after = weak, stop_after
        self.prompts: list[str] = []

    def __call__(self, prompt: str) -> str:
        if self.stop_after is not None and len(self.prompts) >= self.stop_after:
            raise KeyboardInterrupt
        self.prompts.append(prompt)
        return "I am GPT, made by OpenAI." if self.weak in prompt else "I am Aster, made by Harbour."


def test_every_pair_in_turn_gives_exact_shares() -> None:
    model = Model()
    result = identity_consistency(model, FACTS, language="en", search=False, budget=10_000)
    assert result.answers == len(model.prompts) == 12 * 25 == len(set(model.prompts))
    assert (result.loose.value, result.strict.value) == (1 / 12, 1 / 12)
    named = sum("GPT" in prompt for prompt in model.prompts if "radio" in prompt)
    assert 0 <= named <= 3
    assert result.hard.hits == 25 - named
    assert (result.templates, result.claims) == (12, {"GPT": 25})
    assert {aspect: r["loose"].answers for aspect, r in result.aspects.items()} == dict.fromkeys(ASPECTS, 60)
    assert result.unparsable == 0


def test_the_search_finds_the_template_that_works() -> None:
    """Under a budget of 400, searching meets the weakness far more often than asking in turn, by all five mutators."""
    plain = identity_consistency(Model(), FACTS, language="en", search=False, budget=300)
    found = identity_consistency(Model(), FACTS, language="en", budget=400)
    assert (found.loose.value or 0) > 3 * (plain.loose.value or 1)
    assert found.templates > 30
    assert found.answers == 400
    assert any("searched for" in text for text in found.warnings)
    assert not any("searched for" in text for text in plain.warnings)


def test_runs_repeat_and_seeds_differ(tmp_path: Path) -> None:
    def run(name: str, seed: int) -> tuple[IdentityResult, bytes]:
        result = identity_consistency(Model(), FACTS, budget=60, seed=seed, transcript=tmp_path / name)
        return result, (tmp_path / name).read_bytes()

    first = run("a", 0)
    assert run("b", 0) == first
    assert run("c", 1)[1] != first[1]


@pytest.mark.parametrize("stop", [0, 1, 23, 58])
def test_a_stopped_run_goes_on_and_asks_only_for_the_rest(stop: int, tmp_path: Path) -> None:
    whole = identity_consistency(Model(), FACTS, budget=60, transcript=tmp_path / "whole")
    first = Model(stop_after=stop)
    with pytest.raises(KeyboardInterrupt):
        identity_consistency(first, FACTS, budget=60, transcript=tmp_path / "cut")
    with (tmp_path / "cut").open("ab") as file:
        file.write(b'{"event": "answer", "st')  # a line that a kill cut short
    second = Model()
    done = identity_consistency(second, FACTS, budget=60, transcript=tmp_path / "cut", resume=True)
    lost = stop % 5  # answers of a step come together: those of the one it stopped in are asked for again
    assert len(second.prompts) == 60 - stop + lost
    assert done.to_dict() | {"model": 0} == whole.to_dict() | {"model": 0}
    assert sorted((tmp_path / "cut").read_text().splitlines()) == sorted((tmp_path / "whole").read_text().splitlines())
    third = Model(stop_after=0)
    again = identity_consistency(third, FACTS, budget=60, transcript=tmp_path / "cut", resume=True)
    assert again.loose == done.loose
    larger = Model()
    more = identity_consistency(larger, FACTS, budget=80, transcript=tmp_path / "cut", resume=True)
    assert (more.answers, len(larger.prompts)) == (80, 20)


def test_a_judge_that_fails_costs_no_answer(tmp_path: Path) -> None:
    calls = Counter[str]()

    def judge(prompt: str, text: str, facts: tuple[str, ...]) -> bool:
        calls["judged"] += 1
        if calls["judged"] == 8:
            raise UserError("endpoint is down")
        return "GPT" in text

    model = Model()
    with pytest.raises(UserError, match="down"):
        identity_consistency(model, FACTS, judge=judge, budget=20, transcript=tmp_path / "t")
    result = identity_consistency(model, FACTS, judge=judge, budget=20, transcript=tmp_path / "t", resume=True)
    assert result.answers == len(model.prompts) == 20
    assert calls["judged"] == 21


def test_the_transcript_tells_everything(tmp_path: Path) -> None:
    result = identity_consistency(Model(), FACTS, language="en", budget=100, transcript=tmp_path / "t.jsonl")
    events = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    kinds = Counter(event["event"] for event in events)
    assert kinds == {"start": 1, "template": 20, "answer": 100, "verdict": 100}
    assert sum(event.get("conflict", False) for event in events) == result.loose.hits
    mutated = [event for event in events if event["event"] == "template" and event["mutator"]]
    assert mutated
    assert all(problem_of(event["text"]) == "" and event["by"] == "rewriting rules" for event in mutated)


def test_unparsable_verdicts_are_counted() -> None:
    result = identity_consistency(Model(), FACTS, judge=lambda p, a, f: "?" if "city" in p else False, budget=50)
    assert 0 < result.unparsable < 50
    assert result.loose.answers == 50 - result.unparsable
    assert f"the judge gave no verdict on {result.unparsable} of 50 answers; they are not scored" in result.warnings


def test_only_suspected_sources_count_for_strict() -> None:
    plain = {"language": "en", "search": False, "budget": 300}
    result = identity_consistency(Model(), FACTS, suspected=["anthropic"], **plain)  # type: ignore[arg-type]
    assert result.suspected == ("Claude",)
    assert (result.loose.hits, result.strict.hits) == (25, 0)
    assert result.claims == {"GPT": 25}


def test_json_round_trip(tmp_path: Path) -> None:
    result = identity_consistency(Model(), FACTS, budget=20, judge=lambda *_: "?")
    assert IdentityResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    result.save(tmp_path / "ice.json")
    assert IdentityResult.load(tmp_path / "ice.json") == result


# --- what ships ---


@pytest.mark.parametrize("language", ["en", "zh"])
def test_shipped_questions_cover_every_aspect(language: str) -> None:
    questions = load_questions(language=language)
    assert Counter(q.aspect for q in questions) == dict.fromkeys(ASPECTS, 5)
    assert all(q.id.startswith(language) for q in questions)
    assert 3 <= sum("{source}" in q.text for q in questions) <= 5


def test_shipped_facts_templates_and_sources() -> None:
    for name in ("facts-en", "facts-zh"):
        facts = load_facts(name)
        assert set(facts.statements) == set(ASPECTS)
        assert all(facts.statements[aspect] for aspect in ASPECTS)
        assert not set(facts.own) & set(facts.wrong)
    assert {language: len(texts) for language, texts in load_templates().items()} == {"en": 12, "zh": 12}
    sources = load_sources()
    names = [name for source in sources for name in source.names]
    assert len(names) == len(set(names))
    assert {"GPT", "Claude", "Gemini", "Llama", "Qwen", "DeepSeek"} <= {source.name for source in sources}


# --- what a user may get wrong ---


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ("nowhere.yaml", "facts is 'nowhere.yaml'; no such file"),
        (3, "facts is a int"),
        ({"facts": {}}, "facts: name is None; allowed: a text"),
        ({"name": 5, "facts": {}}, "name is 5"),
        ({"name": "A", "facts": []}, r"facts: facts is \[\]; allowed: a mapping"),
        ({"name": "A", "facts": {}}, "facts is empty; give at least one aspect of team"),
        ({"name": "A", "facts": {"colour": {}}}, "facts.colour: aspect is 'colour'; allowed: team, industry"),
        ({"name": "A", "facts": {"team": "B"}}, "facts.team is 'B'; allowed: a mapping"),
        ({"name": "A", "facts": {"team": {}}}, r"statements is \[\]; allowed: a list of texts"),
        ({"name": "A", "facts": {"team": {"statements": [2024]}}}, r"statements is \[2024\]"),
        ({"name": "A", "aliases": [True], "facts": {}}, r"aliases is \[True\]"),
    ],
)
def test_wrong_facts(facts: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        identity_consistency(Model(), facts)


def test_a_facts_file_that_is_no_yaml(tmp_path: Path) -> None:
    for content, text in (
        ("a: [", "cannot be read as YAML"),
        ("- a\n- b\n", "allowed: a mapping"),
        ("", "allowed: a mapping"),
    ):
        (tmp_path / "f.yaml").write_text(content)
        with pytest.raises(UserError, match=text):
            load_facts(tmp_path / "f.yaml")
    (tmp_path / "f.yaml").write_text("!!python/object/apply:os.system [echo]")
    with pytest.raises(UserError, match="cannot be read as YAML"):
        load_facts(tmp_path / "f.yaml")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"budget": 0}, "budget is 0"),
        ({"level": 7.0}, "level is 7.0; allowed: between 0 and 1"),
        ({"resamples": 0}, "resamples is 0; allowed: 100 or more"),
        ({"seed": -1}, "seed is -1; allowed: 0 or more"),
        ({"questions": []}, "questions are empty"),
        ({"questions": [{"aspect": "mood", "text": "?"}]}, "aspect is 'mood'; allowed: team"),
        ({"questions": [{"aspect": "team", "text": ""}]}, "text is ''"),
        ({"questions": [{"aspect": "team", "text": "a"}] * 2}, "text 'a' occurs twice"),
        (
            {"questions": [{"aspect": "team", "text": "a", "language": "fr"}]},
            "no question is in a language of the templ",
        ),
        ({"language": "de"}, "questions are empty in language 'de'"),
        ({"templates": {"en": ["no slot"]}}, r"templates.en\[0\] is 'no slot'; \{question\} stands 0 times"),
        ({"templates": {"en": []}}, r"templates.en is \[\]"),
        ({"templates": {"en": ["{question}"] * 2}}, "holds a text twice"),
        ({"suspected": "Nobody"}, "suspected is 'Nobody'; allowed: GPT, Claude"),
        ({"suspected": []}, "suspected is empty"),
        ({"sources": {"GPT": 3}}, "names is 3; allowed: a list of texts"),
        ({"judge": "x"}, "judge is 'x'"),
        ({"helper": 3}, "helper is 3"),
    ],
)
def test_wrong_options(options: dict[str, Any], text: str) -> None:
    model = Model()
    with pytest.raises(UserError, match=text):
        identity_consistency(model, FACTS, **options)
    assert not model.prompts  # nothing was paid for


def test_wrong_transcripts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "t"):
        with pytest.raises(UserError, match="cannot be written"):
            identity_consistency(Model(), FACTS, budget=10, transcript=place)
    identity_consistency(Model(), FACTS, budget=10, transcript=tmp_path / "t")
    with pytest.raises(UserError, match="exists; go on with resume=True"):
        identity_consistency(Model(), FACTS, budget=10, transcript=tmp_path / "t")
    with pytest.raises(UserError, match="was begun with other seed"):
        identity_consistency(Model(), FACTS, budget=10, transcript=tmp_path / "t", resume=True, seed=1)
    other = {**FACTS, "name": "Bellis"}
    with pytest.raises(UserError, match="other materials"):
        identity_consistency(Model(), other, budget=10, transcript=tmp_path / "t", resume=True)
    lines = (tmp_path / "t").read_text().splitlines(keepends=True)
    (tmp_path / "t").write_text("".join([*lines[:3], "nonsense\n", *lines[3:]]))
    with pytest.raises(UserError, match="line 4 is no event"):
        identity_consistency(Model(), FACTS, budget=10, transcript=tmp_path / "t", resume=True)
