"""Judges: how answers are read, how a model is asked again, functions and local models as judges."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import tiny_models as tiny

from kdkernels.errors import UserError
from kdkernels.evaluation.chat import CallableChat, Conversation, Reply, Usage, as_chat, ask, user
from kdkernels.evaluation.judges import CallableJudge, ChatJudge, as_judge, collect
from kdkernels.evaluation.verdicts import (
    IdentityCase,
    IdentityVerdict,
    KnownNames,
    SimilarityCase,
    SimilarityScores,
    Unparsable,
    read_identity,
    read_similarity,
)

GOOD = {"style": 2, "logic": 1, "content": 0, "overall": 3}
SCORES = SimilarityScores(2.0, 1.0, 0.0, 3.0)
CASE = SimilarityCase("p", "a", "b")


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        json.dumps(GOOD),
        (2, 1, 0, 3),
        SCORES,
        f"Let me think. Style is {{close}}.\n```json\n{json.dumps(GOOD, indent=2)}\n```\nDone.",
        '{"style": "2", "logic": "1", "content": "0", "overall": "3.0", "reason": "because"}',
        f"{json.dumps(GOOD)} As I said: {json.dumps(GOOD)}",
    ],
)
def test_scores_are_read(answer: Any) -> None:
    assert read_similarity(answer) == SCORES


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("I think they are quite alike: 4 out of 5.", "no JSON object"),
        ("", "no JSON object"),
        ({**GOOD, "style": 3}, "style is 3; allowed: 0, 1 or 2"),
        ({**GOOD, "logic": 0.5}, "logic is 0.5"),
        ({**GOOD, "overall": 0}, "overall is 0; allowed: 1 to 5"),
        ({**GOOD, "overall": float("nan")}, "overall is nan"),
        ({**GOOD, "overall": True}, "overall is True"),
        ({k: v for k, v in GOOD.items() if k != "content"}, "content is None"),
        (json.dumps(GOOD) + json.dumps({**GOOD, "overall": 5}), "several JSON objects that differ"),
        ('{"style": 2, "logic": 1, "content": 0, "overall": 3', "no JSON object"),
        ("{" * 5000, "no JSON object"),
        (None, "a NoneType"),
        (4, "a int"),
    ],
)
def test_nonsense_is_unparsable_and_never_a_score(answer: Any, problem: str) -> None:
    verdict = read_similarity(answer)
    assert isinstance(verdict, Unparsable)
    assert problem in verdict.problem


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (True, IdentityVerdict(True)),
        ({"conflict": False, "claims": ["GPT"]}, IdentityVerdict(False)),
        ('{"conflict": true, "claims": ["gpt", "Nobody"]}', IdentityVerdict(True, ("GPT",))),
        ('{"conflict": "yes", "claims": "Claude"}', IdentityVerdict(True, ("Claude",))),
        ('{"conflict": true, "claims": null}', IdentityVerdict(True)),
    ],
)
def test_identity_verdicts_are_read(answer: Any, verdict: IdentityVerdict) -> None:
    assert read_identity(answer, ("GPT", "Claude")) == verdict


@pytest.mark.parametrize("answer", ['{"conflict": "perhaps"}', '{"conflict": 1}', "true", '{"claims": []}', None])
def test_identity_nonsense_is_unparsable(answer: Any) -> None:
    assert isinstance(read_identity(answer, ()), Unparsable)


class Scripted:
    """A chat that gives its lines in turn, whoever asks, last conversation first."""

    name = "scripted"

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)
        self.asked: list[list[dict[str, str]]] = []

    settings: dict[str, Any] = {}  # noqa: RUF012
    usage = Usage()

    def replies(self, conversations: Sequence[Conversation]) -> Iterator[tuple[int, Reply]]:
        for index in reversed(range(len(conversations))):
            self.asked.append([dict(m) for m in conversations[index]])
            yield index, Reply(self.lines.pop(0))


def test_a_model_that_answers_nonsense_is_asked_again_and_then_counted() -> None:
    chat = Scripted("hm", json.dumps(GOOD), json.dumps(GOOD), "what?", "hm", json.dumps({**GOOD, "overall": 5}))
    judge = ChatJudge(chat, attempts=2)
    first = dict(judge.similarity([CASE, CASE, CASE]))
    assert first[1] == first[0] == SCORES
    assert isinstance(first[2], Unparsable)
    assert first[2].text == "what?"
    assert len(chat.asked) == 4
    assert chat.asked[3][:2] == chat.asked[0]
    assert [m["role"] for m in chat.asked[3]] == ["system", "user", "assistant", "user"]
    assert chat.asked[3][2]["content"] == "hm"
    again = dict(judge.similarity([CASE]))
    assert again == {0: SimilarityScores(2.0, 1.0, 0.0, 5.0)}


def test_the_judge_is_shown_the_case_and_nothing_of_it_gets_lost() -> None:
    chat = Scripted(json.dumps(GOOD), '{"conflict": true, "claims": ["GPT"]}')
    judge = ChatJudge(chat)
    list(judge.similarity([SimilarityCase("second question", "theirs", "ours", ("first question",))]))
    shown = chat.asked[0][1]["content"]
    assert shown.index("first question") < shown.index("second question") < shown.index("theirs") < shown.index("ours")
    case = IdentityCase("Who?", "I am GPT", ("It is Aster.",), KnownNames(sources={"GPT": ("GPT",)}))
    assert dict(judge.identity([case])) == {0: IdentityVerdict(True, ("GPT",))}
    assert all(part in chat.asked[1][1]["content"] for part in ("Who?", "I am GPT", "- It is Aster.", "GPT"))


def test_functions_are_judges() -> None:
    judge = as_judge(lambda prompt, reference, response: GOOD if reference == "a" else "hm", "similarity")
    assert dict(judge.similarity([CASE])) == {0: SCORES}
    assert not judge.proxy
    with pytest.raises(UserError, match="checks no identities"):
        list(judge.identity([]))
    judge = as_judge(lambda prompt, answer, facts: answer == "liar" and facts == ("f",), "identity")
    assert dict(judge.identity([IdentityCase("p", "liar", ("f",))])) == {0: IdentityVerdict(True)}
    with pytest.raises(UserError, match="compares no answers"):
        list(judge.similarity([]))
    with pytest.raises(ZeroDivisionError):
        list(CallableJudge(lambda *_: 1 // 0).similarity([CASE]))


def test_what_is_no_judge_is_refused() -> None:
    with pytest.raises(UserError, match="judge is 'gpt'; allowed: None"):
        as_judge("gpt", "similarity")
    with pytest.raises(UserError, match="attempts is 0"):
        ChatJudge(Scripted(), attempts=0)
    judge = CallableJudge(lambda *_: GOOD)
    for wrong in ([(0, 1), (0, 1)], [(5, 1)], [(0, 1)], [(-1, 1), (0, 1)]):
        with pytest.raises(UserError, match=r"verdict"):
            collect(iter(wrong), 2, judge)


def test_functions_are_chats() -> None:
    assert ask(as_chat("model", str.upper), [user("a"), user("b")])[1].text == "B"
    assert ask(as_chat("model", lambda _: "\ud83d\ude00 cut \ud83d"), [user("a")])[0].text == "\U0001f600 cut \ufffd"
    with pytest.raises(UserError, match="returned a int"):
        ask(CallableChat(len), [user("a")])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="model is 3; allowed"):
        as_chat("model", 3)


# --- a local model ---


@pytest.fixture(scope="module")
def pair() -> Any:
    return tiny.llama(layers=2), tiny.tokenizer()


def test_a_local_model_answers_the_same_alone_and_in_a_batch(pair: Any) -> None:
    from kdkernels.evaluation.local_chat import LocalChat

    prompts = [user("alpha beta"), user("the river ran under old bridges while people"), user("def"), user("one two")]
    batched = LocalChat(*pair, max_new_tokens=6, batch_size=3)
    alone = LocalChat(*pair, max_new_tokens=6, batch_size=1)
    texts = [r.text for r in ask(batched, prompts)]
    assert texts == [r.text for r in ask(alone, prompts)]
    assert len(set(texts)) > 1
    usage = batched.usage
    assert usage.requests == 4
    assert usage.prompt_tokens == sum(len(pair[1](p[0]["content"])["input_ids"]) for p in prompts)
    assert 4 <= usage.completion_tokens <= 24


def test_sampling_is_reproducible_and_leaves_torch_s_generator_alone(pair: Any) -> None:
    import torch

    from kdkernels.evaluation.local_chat import LocalChat

    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    made = [LocalChat(*pair, max_new_tokens=8, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    texts = [ask(chat, [user("alpha beta")])[0].text for chat in made]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_settings_know_the_weights(pair: Any) -> None:
    import torch

    from kdkernels.evaluation.local_chat import LocalChat, weights_fingerprint

    model = tiny.llama(layers=2)
    same = LocalChat(model, pair[1]).settings
    assert same == LocalChat(*pair).settings
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    assert LocalChat(model, pair[1]).settings != same
    assert weights_fingerprint(model.bfloat16()) != weights_fingerprint(pair[0])


def test_a_chat_template_is_used_where_there_is_one(pair: Any) -> None:
    from kdkernels.evaluation.local_chat import LocalChat

    model, words = pair[0], tiny.tokenizer()
    plain = LocalChat(model, words, max_new_tokens=8)
    conversation = [{"role": "system", "content": "alpha"}, {"role": "user", "content": "beta"}]
    assert plain._prompt(conversation) == words("alpha\n\nbeta")["input_ids"]
    words.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant]"
    assert plain._prompt(conversation) == words("[system] alpha [user] beta [assistant]")["input_ids"]


def test_too_long_a_prompt_is_an_error(pair: Any) -> None:
    chat = as_chat("model", pair)
    with pytest.raises(UserError, match=r"a prompt of \d+ tokens and max_new_tokens 256 do not fit into its 256"):
        ask(chat, [user("alpha")])
    with pytest.raises(UserError, match="a model without its tokenizer"):
        as_chat("model", pair[0])


def test_a_local_model_that_only_babbles_is_unparsable(pair: Any) -> None:
    from kdkernels.evaluation.local_chat import LocalChat

    model = tiny.llama(layers=1)
    model.config.max_position_embeddings = 4096
    judge = ChatJudge(LocalChat(model, pair[1], max_new_tokens=4))
    assert isinstance(dict(judge.similarity([CASE]))[0], Unparsable)
