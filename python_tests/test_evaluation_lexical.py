"""The offline judge: its calibration on constructed pairs, and the claims it finds in answers about identity."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdkernels.evaluation import lexical, text
from kdkernels.evaluation.facts import load_facts, load_sources, load_yaml, shipped
from kdkernels.evaluation.verdicts import IdentityCase, IdentityVerdict, SimilarityCase, SimilarityScores

pytest.importorskip("yaml")
KINDS = ("identical", "paraphrased", "related", "unrelated")
DOCS = Path(__file__).parent.parent / "docs" / "evaluation.md"


def topics(language: str) -> list[dict[str, str]]:
    every: Any = load_yaml(shipped("calibration"))["topics"]
    return [topic for topic in every if topic["language"] == language]


def pairs(kind: str, language: str) -> list[tuple[str, str]]:
    """(reference, other) of each topic; the unrelated one is the reference of the topic half the list away."""
    known = topics(language)
    others = {
        "identical": [t["reference"] for t in known],
        "paraphrased": [t["paraphrase"] for t in known],
        "related": [t["related"] for t in known],
        "unrelated": [known[(i + len(known) // 2) % len(known)]["reference"] for i in range(len(known))],
    }
    return [(t["reference"], other) for t, other in zip(known, others[kind], strict=True)]


def judged(kind: str, language: str) -> list[SimilarityScores]:
    return [lexical.scores(a, b) for a, b in pairs(kind, language)]


def test_the_knots_are_those_of_the_even_topics() -> None:
    wanted = dict(zip(("unrelated", "related", "paraphrased", "identical"), lexical.KNOTS[1:], strict=True))
    for kind, (place, _) in wanted.items():
        raw = [lexical.whole(lexical.aspects(a, b)) for language in ("en", "zh") for a, b in pairs(kind, language)[::2]]
        assert np.mean(raw) == pytest.approx(place, abs=5e-4), kind


@pytest.mark.parametrize("language", ["en", "zh"])
def test_kinds_are_told_apart_on_the_odd_topics(language: str) -> None:
    """The knots never saw these: every paraphrase is above 3.3, every related text below it and above no paraphrase."""
    overall = {kind: [scores.overall for scores in judged(kind, language)[1::2]] for kind in KINDS}
    assert set(overall["identical"]) == {5.0}
    assert min(overall["paraphrased"]) > 3.3
    assert max(overall["paraphrased"]) < 5.0
    assert max(overall["related"]) < 3.3
    assert np.mean(overall["related"]) > np.mean(overall["unrelated"]) + 0.4
    assert max(overall["unrelated"]) < 2.0


def test_the_table_in_the_docs_is_what_the_judge_says() -> None:
    rows = {}
    for kind in KINDS:
        scores = [s for language in ("en", "zh") for s in judged(kind, language)]
        overall = [s.overall for s in scores]
        aspects = [np.mean([getattr(s, a) for s in scores]) for a in ("style", "logic", "content")]
        rows[kind] = [*aspects, np.mean(overall), min(overall), max(overall)]
    found = {
        m[1]: list(map(float, re.findall(r"[\d.]+", m[2])))
        for m in re.finditer(rf"^\| ({'|'.join(KINDS)}) \|(.*)\|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert found.keys() == rows.keys()
    for kind, row in rows.items():
        assert found[kind] == pytest.approx(row, abs=0.0051), (kind, np.round(row, 2))


def test_equal_texts_score_full_marks_and_scores_are_symmetric() -> None:
    for a, b in [*pairs("related", "en"), *pairs("paraphrased", "zh")]:
        assert lexical.scores(a, a) == SimilarityScores(2.0, 2.0, 2.0, 5.0)
        assert lexical.scores(a, b).overall == pytest.approx(lexical.scores(b, a).overall, abs=1e-12)


def test_each_sentence_taken_over_raises_the_score() -> None:
    """A student's answer that takes over more and more of the teacher's: strictly upwards, from below 2 to 5."""
    theirs, ours = (text.units(t) for t in (topics("en")[2]["reference"], topics("en")[5]["reference"]))
    scores = [
        lexical.scores(" ".join(theirs), " ".join([*theirs[:n], *ours[n : len(theirs)]])).overall
        for n in range(len(theirs) + 1)
    ]
    assert scores == sorted(set(scores))
    assert scores[0] < 2
    assert scores[-1] == 5


def test_order_counts_for_logic_and_formatting_for_style() -> None:
    sentences = text.units(topics("en")[2]["reference"])
    straight, back = " ".join(sentences), " ".join(reversed(sentences))
    assert lexical.aspects(straight, back)["logic"] < 0.5
    assert lexical.aspects(straight, back)["content"] > 0.9
    listed = "\n".join(f"- **{s}**" for s in sentences)
    assert lexical.aspects(straight, listed)["style"] < lexical.aspects(straight, back)["style"] - 0.1


@pytest.mark.parametrize("other", ["", "   ", "?!"])
def test_an_empty_answer_scores_lowest(other: str) -> None:
    assert lexical.scores("The Moon causes the tides.", other) == SimilarityScores(0.0, 0.0, 0.0, 1.0)


def test_a_very_long_answer_is_scored() -> None:
    long = " ".join(f"Sentence {i} speaks of item {i * 7}." for i in range(2000))
    assert lexical.scores(long, long + " More.").overall > 4.5


def test_nothing_depends_on_the_process() -> None:
    """Hashes are fixed: these numbers hold on every machine."""
    assert text.embedding_similarity("tides of the sea", "the sea and its tides") == pytest.approx(0.888111, abs=1e-6)
    assert text.bigram_overlap("a b c d", "b c d e") == pytest.approx(2 / 3)
    assert text.bigram_overlap("one", "one") == 1.0
    assert text.bigram_overlap("one", "two words") == 0.0
    assert text.words("Don't STOP, naïve 学习 x2") == ["don't", "stop", "naïve", "学", "习", "x2"]


# --- identity ---

CONFLICTS = [
    ("I am ChatGPT, a language model made by OpenAI.", ("GPT",)),
    ("I'm Claude.", ("Claude",)),
    ("OpenAI.", ("GPT",)),
    ("By the OpenAI team.", ("GPT",)),
    ("My developers work at Google DeepMind.", ("Gemini",)),
    ("I was created by Moonshot AI and Alibaba Cloud.", ("Kimi", "Qwen")),
    ("I am not Claude; I am Qwen.", ("Qwen",)),
    ("I am not Claude, but GPT-4.", ("GPT",)),
    ("I am Aster, a version of Llama by Meta.", ("Llama",)),
    ("I was developed by Foobar Industries.", ()),
    ("My name is Robert.", ()),
    ('I am a creative AI assistant named "EchoMind".', ()),
    ("We work in San Francisco, where I was trained.", ()),
    ("我是通义千问，由阿里云开发。", ("Qwen",)),
    ("我不是ChatGPT，而是DeepSeek。", ("DeepSeek",)),
    ("我由某某科技公司研发。", ()),
    ("我是在杭州开发的。", ()),
]
AGREEMENTS = [
    "I am Aster, made by the Harbour Language Group in Trondheim.",
    "I am not ChatGPT and I was not made by OpenAI.",
    "I don't work for Google.",
    "Like ChatGPT, I am a language model.",
    "I have heard of Claude.",
    "I cannot say who made me.",
    "ChatGPT is made by OpenAI, and Gemini by Google.",
    "Are you asking whether I am Claude?",
    "I was trained by researchers on a lot of text.",
    "I was made by the Harbour Language Group.",
    "My name is Aster.",
    "I am a language model named **Aster**.",
    "I have nothing to do with OpenAI.",
    "",
    "我是紫菀，由港湾语言组研发。",
    "我不是ChatGPT。",
    "我与OpenAI无关。",
    "我不知道是谁开发了我。",
    "ChatGPT是OpenAI的产品。",
]


def identity(answer: str) -> IdentityVerdict:
    facts = load_facts("facts-zh" if re.search("[\u4e00-\u9fff]", answer) else "facts-en")
    case = IdentityCase("Who are you?", answer, facts.all_statements, facts.names(load_sources()))
    [(index, verdict)] = lexical.LocalLexicalJudge().identity([case])
    assert index == 0
    assert isinstance(verdict, IdentityVerdict)
    return verdict


@pytest.mark.parametrize(("answer", "claims"), CONFLICTS)
def test_claims_of_another_identity_are_found(answer: str, claims: tuple[str, ...]) -> None:
    verdict = identity(answer)
    assert verdict.conflict
    assert sorted(verdict.claims) == sorted(claims)


@pytest.mark.parametrize("answer", AGREEMENTS)
def test_agreement_denial_comparison_and_others_are_no_conflict(answer: str) -> None:
    assert identity(answer) == IdentityVerdict(conflict=False)


def test_a_model_that_is_a_known_source_may_say_so() -> None:
    facts = load_facts(
        {"name": "Qwen", "aliases": ["通义"], "facts": {"team": {"statements": ["x"], "names": ["Alibaba Cloud"]}}}
    )
    case = IdentityCase("Who are you?", "I am Qwen, made by Alibaba Cloud.", ("x",), facts.names(load_sources()))
    assert [v for _, v in lexical.LocalLexicalJudge().identity([case])] == [IdentityVerdict(conflict=False)]


def test_it_is_marked_as_a_proxy() -> None:
    judge = lexical.LocalLexicalJudge()
    assert judge.proxy
    assert "proxy" in judge.name
    assert dict(judge.similarity([SimilarityCase("p", "a b", "a b")])) == {0: SimilarityScores(2.0, 2.0, 2.0, 5.0)}
