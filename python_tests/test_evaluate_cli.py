"""`kdkernels evaluate rse | ice`: files in, models that answer, JSON out, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
from chat_server import ChatServer

from kdkernels import cli
from kdkernels.evaluation import IdentityResult, SimilarityResult

pytest.importorskip("yaml")
ROWS = [
    {
        "prompt": "How do tides arise?",
        "reference": "The Moon pulls the sea.",
        "response": "The Moon pulls.",
        "dataset": "a",
    },
    {"prompt": ["Hello", "And now?"], "reference": ["Hi.", "Go on."], "response": ["Hi.", "Stop it."], "dataset": "b"},
    {"prompt": "Why?", "reference": "Because.", "response": "Because.", "dataset": "b"},
]
FACTS = {"name": "Aster", "facts": {"team": {"statements": ["Aster was made by Harbour."], "names": ["Harbour"]}}}


@pytest.fixture(autouse=True)
def _local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        status = cli.main(list(map(str, arguments)))
    except SystemExit as stop:
        status = stop.code  # type: ignore[assignment]
    out, errors = capsys.readouterr()
    return status, out, errors


def test_rse_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data.jsonl", ROWS)
    status, out, errors = run(capsys, "evaluate", "rse", "--data", data, "--output", tmp_path / "out")
    assert status == 0, errors
    assert [line.split()[0] for line in out.splitlines()] == ["data", "a", "b", "mean", "judge:", "note:"]
    assert "judged" in errors  # the bar
    result = SimilarityResult.load(tmp_path / "out" / "rse.json")
    assert [row.id for row in result.per_prompt] == ["1", "2", "3"]
    assert f"{result.overall:.3f}" in out.splitlines()[3]
    assert result.per_prompt[2].overall == 5.0
    status, out, errors = run(capsys, "evaluate", "rse", "--data", data, "--output", tmp_path / "q", "--quiet")
    assert (status, out, errors) == (0, "", "")


def test_answers_from_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "one", "id": "x"}, {"prompt": "two"}, {"prompt": "three"}])
    write(tmp_path / "r.jsonl", [{"id": "x", "reference": "r1"}, {"prompt": "three", "reference": "r3"}])
    write(tmp_path / "s.jsonl", [{"prompt": "one", "response": "r1"}, {"prompt": "two", "response": "s2"}])
    line = ["evaluate", "rse", "--data", prompts, "--output", tmp_path / "o", "--quiet"]
    files = ["--references", tmp_path / "r.jsonl", "--responses", tmp_path / "s.jsonl"]
    assert run(capsys, *line, *files)[0] == 0
    result = SimilarityResult.load(tmp_path / "o" / "rse.json")
    assert [row.status for row in result.per_prompt] == ["scored", "missing", "missing"]
    kept = [json.loads(text) for text in (tmp_path / "o" / "answers.jsonl").read_text().splitlines()]
    assert kept[0] == {"id": "x", "dataset": "all", "prompt": "one", "reference": "r1", "response": "r1"}
    write(tmp_path / "s.jsonl", [{"prompt": "four", "response": "s"}])
    status, _, errors = run(capsys, *line, *files)
    assert (status, errors.count("\n")) == (2, 1)
    assert 'answers prompt "four", which is none of the prompts' in errors


def test_rse_with_models_and_a_judge_behind_an_endpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(messages: list[dict[str, str]]) -> str:
        if messages[0]["role"] == "system":
            return '{"style": 1, "logic": 1, "content": 1, "overall": 4}'
        return f"answer to {len(messages)} messages, the last {messages[-1]['content']!r}"

    data = write(tmp_path / "d.jsonl", [{"prompt": p["prompt"], "reference": p["reference"]} for p in ROWS])
    with ChatServer(answer).running() as server:
        line = [
            *("evaluate", "rse", "--data", data, "--output", tmp_path / "o", "--quiet", "--prices", 1, 2),
            *("--model", f"endpoint:student@{server.url}", "--judge", f"endpoint:judge@{server.url}"),
        ]
        status, _, errors = run(capsys, *line)
        assert status == 0, errors
        asked = sum(server.asked.values())
        assert asked == 4 + 4  # a turn each to the student and to the judge
        assert {r["model"] for r in server.requests} == {"student", "judge"}
        first = (tmp_path / "o" / "rse.json").read_text()
        assert run(capsys, *line)[0] == 0
        assert sum(server.asked.values()) == asked  # a rerun is free
    result = SimilarityResult.load(tmp_path / "o" / "rse.json")
    assert result.overall == 4.0
    assert result.judge["usage"]["cached"] == 4
    assert json.loads(first)["judge"]["usage"]["cost"] == pytest.approx(4 * (10 + 2 * 3) / 1e6)
    talk = json.loads((tmp_path / "o" / "answers.jsonl").read_text().splitlines()[1])["response"]
    assert talk == ["answer to 1 messages, the last 'Hello'", "answer to 3 messages, the last 'And now?'"]


def test_local_models_answer_and_are_asked_about_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.llama(layers=2)
    model.config.max_position_embeddings = 2048
    tiny.save(model, tmp_path / "model")
    data = write(tmp_path / "d.jsonl", [{"prompt": "alpha beta"}, {"prompt": ["def", "class"]}])
    local = ["--quiet", "--max-new-tokens", 5]
    line = ["evaluate", "rse", "--data", data, "--output", tmp_path / "o", *local, "--model", tmp_path / "model"]
    status, _, errors = run(capsys, *line, "--reference-model", tmp_path / "model")
    assert status == 0, errors
    assert SimilarityResult.load(tmp_path / "o" / "rse.json").overall == 5.0  # the same model against itself
    (tmp_path / "facts.json").write_text(json.dumps(FACTS))  # JSON is YAML
    line = [
        *("evaluate", "ice", "--model", tmp_path / "model", "--facts", tmp_path / "facts.json", *local),
        *("--output", tmp_path / "i", "--budget", 10, "--language", "en"),
    ]
    status, _, errors = run(capsys, *line)
    assert status == 0, errors
    assert IdentityResult.load(tmp_path / "i" / "ice.json").answers == 10
    status, _, errors = run(capsys, *line)
    assert (status, errors.count("\n")) == (2, 1)
    assert "transcript.jsonl' exists; go on with resume=True (--resume)" in errors


def test_ice_through_an_endpoint_goes_on_after_the_endpoint_was_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "facts.json").write_text(json.dumps(FACTS))
    with ChatServer(lambda m: "I am GPT, made by OpenAI.").running() as server:
        line = [
            *("evaluate", "ice", "--model", f"endpoint:m@{server.url}", "--facts", tmp_path / "facts.json"),
            *("--output", tmp_path / "o", "--retries", 0, "--budget", 30, "--suspected", "GPT", "--concurrency", 1),
        ]
        refuse = server.fault
        server.fault = lambda p, a: "500" if sum(server.served.values()) == 17 else ""  # type: ignore[method-assign]
        status, _, errors = run(capsys, *line, "--quiet")
        assert status == 2
        assert "status 500" in errors
        assert "run again" in errors
        server.fault = refuse  # type: ignore[method-assign]
        status, out, errors = run(capsys, *line, "--resume")
        assert status == 0, errors
        assert sum(server.served.values()) == 30  # two of the broken step came from the cache
    result = IdentityResult.load(tmp_path / "o" / "ice.json")
    assert (result.loose.value, result.strict.value, result.suspected) == (1.0, 1.0, ("GPT",))
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows[:7]] == [
        "aspect",
        "team",
        "industry",
        "technology",
        "geography",
        "cooperation",
        "all",
    ]
    assert "claims to be: GPT 30" in out
    assert rows[6][:3] == ["all", "30", "1.000"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["evaluate"], "the following arguments are required: COMMAND"),
        (["evaluate", "xyz"], "invalid choice: 'xyz'"),
        (["evaluate", "rse"], "required: --data, --output"),
        (["evaluate", "rse", "--data", "/no/such", "--output", "o"], "/no/such cannot be read"),
        (["evaluate", "ice", "--output", "o"], "required: --model, --facts"),
        (
            ["evaluate", "ice", "--output", "o", "--model", "/no/such", "--facts", "facts-en"],
            "model is '/no/such'; no such",
        ),
        (["evaluate", "ice", "--output", "o", "--model", "endpoint:@x", "--facts", "f"], "allowed: endpoint:NAME"),
        (["evaluate", "ice", "--output", "o", "--model", "endpoint:m@x", "--facts", "f"], "base_url is 'x'"),
        (["evaluate", "rse", "--data", "x", "--output", "o", "--stepz", "3"], "unrecognized arguments: --stepz 3"),
    ],
)
def test_wrong_commands_are_one_line(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, errors = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert text in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "is empty; give a line of JSON for each prompt"),
        ("nonsense\n", "line 1 is no JSON"),
        ("[1]\n", "line 1 is a list; allowed: a JSON object"),
        ('{"prompt": 3}\n', "line 1: prompt is 3"),
        ('{"prompt": []}\n', "line 1: prompt is []"),
        ('\n{"prompt": "a", "answer": "b"}\n', "line 2 has 'answer'; allowed: prompt, reference"),
        ('{"prompt": "a", "reference": 3}\n', "line 1: reference is 3"),
        ('{"prompt": "a", "reference": "\\ud83d"}\n', "line 1 holds half a surrogate pair"),
        ('{"prompt": "a", "reference": "b"}\n', "no prompt has a response; give it in --data, by --responses FILE, or"),
        ('{"prompt": "a", "reference": "b", "response": "c"}\n' * 2, "prompts[1] repeats prompts[0]"),
        ('{"prompt": " ", "reference": "b", "response": "c"}\n', "prompts[0] is ' '"),
    ],
)
def test_wrong_data_is_one_line(content: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d.jsonl").write_text(content)
    line = ["evaluate", "rse", "--data", tmp_path / "d.jsonl", "--output", tmp_path / "o", "--quiet"]
    status, out, errors = run(capsys, *line)
    assert (status, out, errors.count("\n")) == (2, "", 1)
    assert text in errors


def test_separators_within_a_text_do_not_part_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "one\u2028two\u2029three\x85four\r\nfive"
    data = tmp_path / "d.jsonl"
    row = {"prompt": text, "reference": text, "response": text}
    data.write_bytes(b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode() + b"\r\n")
    for given in (data, tmp_path / "o" / "answers.jsonl"):  # what it writes it reads
        assert run(capsys, "evaluate", "rse", "--data", given, "--output", tmp_path / "o", "--quiet")[0] == 0
    assert SimilarityResult.load(tmp_path / "o" / "rse.json").overall == 5.0
    [kept] = (tmp_path / "o" / "answers.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert json.loads(kept)["response"] == text


def test_nothing_is_asked_before_prompts_and_options_are_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once, twice = (write(tmp_path / f"{n}.jsonl", [{"prompt": "a", "reference": "b"}] * n) for n in (1, 2))
    with ChatServer(lambda _: "c").running() as server:
        line = ["evaluate", "rse", "--output", tmp_path / "o", "--quiet", "--model", f"endpoint:m@{server.url}"]
        for more, text in (
            (["--data", twice], "repeats prompts[0]"),
            (["--data", once, "--seed", "-1"], "seed is -1"),
            (["--data", once, "--resamples", "9"], "resamples is 9"),
        ):
            status, _, errors = run(capsys, *line, *more)
            assert (status, errors.count("\n")) == (2, 1)
            assert text in errors
        assert not server.asked


def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data.jsonl", ROWS)
    status, _, errors = run(capsys, "evaluate", "rse", "--data", data, "--output", data, "--quiet")
    assert (status, errors.count("\n")) == (2, 1)
    assert "cannot be written" in errors


def test_an_interrupt_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    data = write(tmp_path / "data.jsonl", ROWS)
    monkeypatch.setattr("kdkernels.evaluation.similarity.response_similarity", stop)
    status, _, errors = run(capsys, "evaluate", "rse", "--data", data, "--output", tmp_path / "o", "--quiet")
    assert (status, errors) == (130, "kdkernels evaluate rse: interrupted; the same command goes on\n")
