"""Chats behind endpoints: a real server that fails on purpose, kept replies, kills, keys."""

from __future__ import annotations

import json
import pickle
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chat_server import FAULTS, ChatServer

from kdkernels.errors import UserError
from kdkernels.evaluation.chat import Reply, ask, user
from kdkernels.evaluation.endpoint import EndpointChat, _seconds
from kdkernels.evaluation.reply_cache import CachedChat, ReplyCache

pytestmark = pytest.mark.slow

pytest.importorskip("openai")
SECRET = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def echo(messages: list[dict[str, str]]) -> str:
    return f"you said {messages[-1]['content']}"


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.soak)])
def test_with_a_fifth_of_requests_failing_none_is_lost_and_none_doubled(count: int, tmp_path: Path) -> None:
    prompts = [f"prompt {i}" for i in range(count)]
    with ChatServer(echo, faults=0.2, hang=2.5).running() as server:
        chat = EndpointChat("m", server.url, timeout=2.0, retry_delay=0.01, concurrency=16)
        cached = CachedChat(chat, tmp_path / "replies.sqlite")
        seen = list(cached.replies([user(p) for p in prompts]))
    assert sorted(index for index, _ in seen) == list(range(count))
    assert all(reply.text == f"you said {prompts[index]}" for index, reply in seen)
    assert server.served == dict.fromkeys(prompts, 1)
    assert len(cached.cache) == count
    faults = sum(server.kinds[kind] for kind in FAULTS)
    assert 0.1 * count < faults < 0.4 * count
    assert all(server.kinds[kind] for kind in FAULTS), server.kinds
    usage = cached.usage
    assert usage.requests == sum(server.asked.values()) == count + faults
    assert usage.retries == faults
    assert (usage.prompt_tokens, usage.completion_tokens) == (10 * count, 3 * count)


def test_equal_prompts_are_asked_once_and_reruns_not_at_all(tmp_path: Path) -> None:
    conversations = [user(f"prompt {i % 3}") for i in range(9)]
    with ChatServer(echo).running() as server:
        first = CachedChat(EndpointChat("m", server.url), tmp_path / "r.sqlite")
        before = ask(first, conversations)
        again = CachedChat(EndpointChat("m", server.url), tmp_path / "r.sqlite")
        after = ask(again, conversations)
        assert sum(server.asked.values()) == 3
        assert [r.text for r in before] == [r.text for r in after] == [echo(list(c)) for c in conversations]
        assert (again.usage.requests, again.usage.cached) == (0, 9)
        for other in (EndpointChat("n", server.url), EndpointChat("m", server.url, temperature=0.5)):
            ask(CachedChat(other, tmp_path / "r.sqlite"), conversations)
        assert sum(server.asked.values()) == 9  # another model, another temperature: other answers


def test_killed_and_run_again_it_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    count, concurrency = 60, 4
    rows = [{"prompt": f"prompt {i}", "reference": f"a{i} b", "response": f"a{i} c"} for i in range(count)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = json.dumps({"style": 1, "logic": 1, "content": 1, "overall": 3})
    with ChatServer(lambda _: scores, delay=0.03).running() as server:
        line = [
            *(sys.executable, "-m", "kdkernels", "evaluate", "rse", "--data", tmp_path / "data.jsonl", "--quiet"),
            *("--output", tmp_path / "out", "--judge", f"endpoint:m@{server.url}", "--concurrency", concurrency),
        ]
        process = subprocess.Popen(list(map(str, line)))
        deadline = time.monotonic() + 60
        while sum(server.served.values()) < count // 3:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.1)  # what was under way at the server
        kept = (
            sqlite3.connect(tmp_path / "out" / "replies.sqlite").execute("SELECT COUNT(*) FROM replies").fetchone()[0]
        )
        asked = sum(server.asked.values())
        assert count // 3 - concurrency <= kept < count
        subprocess.run(list(map(str, line)), check=True, timeout=60)
        assert sum(server.asked.values()) - asked == count - kept
        assert sum(server.served.values()) <= count + concurrency
        result = json.loads((tmp_path / "out" / "rse.json").read_text())
        assert (result["overall"], result["unparsable"]) == (3.0, 0)
        assert result["judge"]["usage"] == {
            "requests": count - kept, "retries": 0, "cached": kept,
            "prompt_tokens": 10 * (count - kept), "completion_tokens": 3 * (count - kept), "cost": None,
        }  # fmt: skip


def test_an_endpoint_that_is_down_is_an_error_that_says_so() -> None:
    with ChatServer(echo).running() as server:
        url = server.url
    chat = EndpointChat("m", url, retries=2, retry_delay=0.001)
    with pytest.raises(UserError, match=r"no connection.*3 times; see that it is up and reachable, then run again"):
        ask(chat, [user("x")])
    assert chat.usage.requests == 3


def test_when_one_request_fails_for_good_the_others_in_flight_are_kept(tmp_path: Path) -> None:
    def picky(messages: list[dict[str, str]]) -> str:
        return "fine"

    with ChatServer(picky, delay=0.05).running() as server:
        server.fault = lambda prompt, attempt: "500" if prompt == "bad" else ""  # type: ignore[method-assign]
        chat = CachedChat(EndpointChat("m", server.url, retries=0, concurrency=4), tmp_path / "r.sqlite")
        with pytest.raises(UserError, match="status 500"):
            ask(chat, [user("bad"), *(user(f"good {i}") for i in range(50))])
        assert len(chat.cache) == sum(server.served.values()) >= 3
        assert sum(server.asked.values()) < 12  # the rest was not begun


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_refusals_are_not_tried_again_and_show_no_key(status: int) -> None:
    with ChatServer(echo).running() as server:
        server.status = status
        with pytest.raises(UserError, match=f"status {status}: key \\[key\\] is no good") as caught:
            ask(EndpointChat("m", server.url), [user("x")])
        assert sum(server.asked.values()) == 1
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_the_key_goes_to_the_endpoint_and_nowhere_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with ChatServer(echo, faults=0.3).running() as server:
        chat = CachedChat(EndpointChat("m", server.url, timeout=0.25, retry_delay=0.01), tmp_path / "r.sqlite")
        ask(chat, [user(f"p {i}") for i in range(10)])
        assert server.keys == {f"Bearer {SECRET}"}
    chat.cache.close()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"p 3" in written
    shown = [repr(chat.chat), str(chat.chat), repr(chat.settings), repr(chat.usage), *capfd.readouterr()]
    assert SECRET.encode() not in written
    assert not any(SECRET in text for text in shown)
    with pytest.raises(TypeError, match="never written"):
        pickle.dumps(chat.chat)


def test_concurrency_and_rates_are_kept() -> None:
    with ChatServer(echo, delay=0.1).running() as server:
        ask(EndpointChat("m", server.url, concurrency=3), [user(f"p {i}") for i in range(12)])
        assert server.most == 3
    with ChatServer(echo).running() as server:
        ask(EndpointChat("m", server.url, requests_per_minute=1200), [user(f"p {i}") for i in range(8)])
        gaps = [b - a for a, b in zip(sorted(server.times), sorted(server.times)[1:], strict=False)]
        assert sorted(server.times)[-1] - sorted(server.times)[0] > 7 * 0.05 * 0.9
        assert sum(gaps) / len(gaps) > 0.045
    with ChatServer(echo).running() as server:  # 13 tokens an answer: one each 0.1 s
        chat = EndpointChat("m", server.url, tokens_per_minute=7800, concurrency=1)
        ask(chat, [user(f"p {i}") for i in range(4)])
        assert server.times[-1] - server.times[0] > 0.27


def test_the_endpoint_s_own_pause_is_kept() -> None:
    with ChatServer(echo).running() as server:
        server.fault = lambda prompt, attempt: "" if attempt else "429"  # type: ignore[method-assign]
        began = time.monotonic()
        ask(EndpointChat("m", server.url, retry_delay=30.0), [user("x")])
        assert 0.01 <= time.monotonic() - began < 10


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b'{"choices": [null]}', b'{"choices": [{"message": null}]}',
        b'{"choices": [{"message": "x"}]}', b'{"choices": [{"message": {"content": ["x"]}}]}',
        b'{"choices": [{"message": {"content": "x"}}], "usage": "y"}',
        b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 1e999}}', b"[" * 200_000,
    ],
)  # fmt: skip
def test_bodies_that_are_no_answer_are_asked_for_again_and_then_said(body: bytes) -> None:
    with ChatServer(echo).running() as server:
        chat = EndpointChat("m", server.url, retries=1, retry_delay=0.001)
        server.body = body
        with pytest.raises(UserError, match=r"what it sent is no answer .*, 2 times"):
            ask(chat, [user("x")])


def test_half_a_character_is_kept_as_a_mark(tmp_path: Path) -> None:
    """A limit on tokens may cut an emoji in two; JSON can say that, files and hashes cannot."""
    with ChatServer(lambda _: "fine \ud83d").running() as server:
        chat = CachedChat(EndpointChat("m", server.url), tmp_path / "r.sqlite")
        [reply] = ask(chat, [user("x")])
        assert reply.text == "fine \ufffd"
        ask(chat, [[*user("x"), {"role": "assistant", "content": reply.text}, *user("y")]])
        assert len(chat.cache) == 2


@pytest.mark.parametrize(("header", "seconds"), [("2.5", 2.5), (None, 0), ("-1", 0), ("nan", 0), ("inf", 0), ("x", 0)])
def test_pauses_are_read(header: str | None, seconds: float) -> None:
    assert _seconds(header) == seconds


def test_tokens_and_cost_are_counted() -> None:
    with ChatServer(echo).running() as server:
        chat = EndpointChat("m", server.url, prices=(2.0, 10.0))
        assert ask(chat, [user("a"), user("b")])[0] == Reply("you said a", 10, 3)
        assert chat.usage.cost == pytest.approx((20 * 2 + 6 * 10) / 1e6)


def test_the_request_holds_what_was_asked_for() -> None:
    with ChatServer(echo).running() as server:
        options = {"seed": 7, "max_completion_tokens": 9, "top_k": 3}
        ask(EndpointChat("m", server.url, max_tokens=None, options=options), [user("x")])
        sent = {k: v for k, v in server.requests[0].items() if k != "messages"}
        assert sent == {"model": "m", "temperature": 0.0, "seed": 7, "max_completion_tokens": 9, "top_k": 3}


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("localhost:8000", "allowed: http://HOST"),
        ("ftp://x/v1", "allowed: http://HOST"),
        ("http://me:sk-1@host/v1", "base_url holds a user, a password or a query"),
        ("https://host/v1?key=sk-1", "base_url holds a user, a password or a query"),
    ],
)
def test_wrong_urls(url: str, text: str) -> None:
    with pytest.raises(UserError, match=text) as caught:
        EndpointChat("m", url)
    assert "sk-1" not in str(caught.value)


def test_without_a_key_only_an_endpoint_of_one_s_own_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="environment variable OPENAI_API_KEY is not set"):
        EndpointChat("m")
    with ChatServer(echo).running() as server:
        assert ask(EndpointChat("m", server.url), [user("x")])[0].text == "you said x"


@pytest.mark.parametrize(
    ("options", "text"),
    [({"timeout": 0}, "timeout is 0"), ({"concurrency": 0}, "concurrency"), ({"retries": -1}, "retries")],
)
def test_wrong_numbers(options: dict[str, int], text: str) -> None:
    with pytest.raises(UserError, match=text):
        EndpointChat("m", "http://x", **options)  # type: ignore[arg-type]


def test_a_file_that_is_no_cache_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "r.sqlite").write_text("no database at all, but long enough to look like one" * 100)
    before = (tmp_path / "r.sqlite").read_bytes()
    with pytest.raises(UserError, match="it cannot be opened as a cache of replies"):
        ReplyCache(tmp_path / "r.sqlite")
    assert (tmp_path / "r.sqlite").read_bytes() == before
