"""`kdkernels generate`: text on the terminal, the page, the figures, templates, students side by side, wrong input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny_models as tiny

from kdkernels import cli
from kdkernels.switch import prompt_templates

PROMPTS = ["def return import", "the river ran under old bridges", "alpha beta"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student with a tokenizer and one without."""
    root = tmp_path_factory.mktemp("generate")
    words = tiny.tokenizer()
    tiny.save(tiny.llama(4, seed=2), root / "teacher", words)
    tiny.save(tiny.llama(2, seed=1), root / "student", words)
    tiny.llama(3, seed=3).save_pretrained(root / "bare")
    return root


def run(place: Path, *flags: object, prompts: list[str] | None = None) -> int:
    models = ["--student", place / "student", "--teacher", place / "teacher"]
    line = ["generate", *(PROMPTS if prompts is None else prompts), *models, *flags]
    return cli.main([str(part) for part in line])


def test_text_page_and_figures(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = ["--output", tmp_path / "a.html", "--json", tmp_path / "a.json"]
    assert run(place, "--max-new-tokens", 24, "--decay", 0.15, "--batch-size", 2, *results) == 0
    printed = capsys.readouterr().out
    assert all(prompt in printed for prompt in PROMPTS)
    assert "\x1b" not in printed  # not a terminal
    found = json.loads((tmp_path / "a.json").read_text())[0]
    assert found["rows"] == 3
    assert found["settings"]["decay"] == 0.15
    assert found["measured"] == found["tokens"]
    marked = re.findall(r"\[\[(.*?)\]\]", printed, flags=re.DOTALL)
    assert marked
    html = (tmp_path / "a.html").read_text()
    assert html.count('class="tok t"') <= found["teacher_tokens"] + 1  # the key has one; some tokens have no text
    assert html.count('class="tok t"') > 1
    assert html.count("<svg") == 3
    assert "https://" not in html
    assert f"{found['teacher_share']:.1%}" in printed
    assert f"{found['teacher_share']:.1%}" in html
    for tip in re.findall(r'data-tip="([^"]*)"', html):
        assert re.match(r"(student|teacher) · JSD [\d.]+ bit · threshold [\d.]+ · log p student -[\d.]+ · ", tip)


def test_the_same_seed_gives_the_same_text_whatever_the_batches(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for seed, batch in ((0, 8), (0, 1), (1, 8)):
        flags = ["--seed", seed, "--batch-size", batch, "--max-new-tokens", 12, "--output", ""]
        assert run(place, *flags) == 0
        texts.append(capsys.readouterr().out.split("teacher's share")[0])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("choice", "no_color", "coloured"), [("always", "1", True), ("auto", "", False), ("never", "", False)]
)
def test_colour_is_a_choice(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    choice: str,
    no_color: str,
    coloured: bool,
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    assert (
        run(place, "--color", choice, "--schedule", "constant", "--tau0", -1, "--max-new-tokens", 3, "--output", "")
        == 0
    )
    printed = capsys.readouterr().out
    assert ("\x1b[" in printed) == coloured
    assert ("[[" in printed) != coloured


def test_no_color_is_respected_on_a_terminal(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--schedule", "constant", "--tau0", -1, "--max-new-tokens", 3, "--output", ""]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert run(place, *flags) == 0
    assert "\x1b[" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(place, *flags) == 0
    assert "\x1b[" not in capsys.readouterr().out


def test_students_side_by_side_write_alone(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = ["--output", tmp_path / "b.html", "--json", tmp_path / "b.json", "--max-new-tokens", 16]
    others = ["--compare", place / "bare", place / "teacher"]
    assert run(place, *others, *results) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    assert [Path(study["name"]).name for study in found] == ["student", "bare", "teacher"]
    assert all(study["teacher_tokens"] == 0 and study["measured"] == study["tokens"] for study in found)
    assert found[0]["mean_jsd"] > 0.05
    assert found[2]["mean_jsd"] == pytest.approx(0, abs=1e-6)  # a teacher as its own student
    assert found[2]["log_likelihood_ratio"] == pytest.approx(0, abs=1e-5)
    html = (tmp_path / "b.html").read_text()
    assert html.count('class="passage"') == 9
    assert 'class="tok t"' in html  # the key alone
    assert html.count('class="tok t"') == 1
    printed = capsys.readouterr().out
    assert printed.count("--- ") == 3


def test_templates_set_format_and_schedule(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDKERNELS_TEMPLATES", str(tmp_path / "mine"))
    (tmp_path / "mine").mkdir()
    own = {"description": "questions", "prompt": "Q: {prompt}\nA:", "settings": {"schedule": "constant", "tau0": -1}}
    (tmp_path / "mine" / "quiz.json").write_text(json.dumps(own))
    (tmp_path / "mine" / "open.toml").write_text('prompt = "{prompt}"\n[settings]\nschedule = "constant"\ntau0 = 1\n')
    lines = [
        {"text": "alpha", "template": "quiz"},
        {"text": "beta", "template": "open"},
        {"text": "x {y}", "template": "quiz"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    source = ["--prompts", tmp_path / "p.jsonl", "--text-key", "text"]
    flags = ["--output", "", "--json", tmp_path / "c.json", "--max-new-tokens", 5]
    assert run(place, *source, *flags, prompts=[]) == 0
    printed = capsys.readouterr().out
    assert "Q: alpha\nA:[[" in printed
    assert "Q: x {y}\nA:[[" in printed
    assert re.search(r"^beta(?!\[\[)", printed, flags=re.MULTILINE)
    found = json.loads((tmp_path / "c.json").read_text())[0]
    assert found["teacher_tokens"] > 0
    assert found["settings"]["template"] == "quiz, open"
    assert cli.main(["generate", "--templates"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("plain", "chat", "instruction", "code", "prose", "quiz", "open"))


def test_a_schedule_given_on_the_command_line_brings_its_own_parameters(place: Path, tmp_path: Path) -> None:
    flags = ["--template", "prose", "--output", "", "--json", tmp_path / "d.json", "--max-new-tokens", 4, "--quiet"]
    assert run(place, *flags) == 0
    assert json.loads((tmp_path / "d.json").read_text())[0]["settings"]["decay"] == 0.04
    assert run(place, "--schedule", "linear", *flags) == 0
    assert "decay" not in json.loads((tmp_path / "d.json").read_text())[0]["settings"]


def test_every_packaged_template_is_in_order() -> None:
    words = tiny.tokenizer()
    words.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    for path in prompt_templates.PACKAGED.iterdir():
        template = prompt_templates.load(str(path))
        assert template.description
        assert "alpha beta" in words.decode(template.ids(words, "alpha beta"))
    chat = prompt_templates.load("chat")
    assert words.decode(chat.ids(words, "hi")) == "<user>hi<assistant>"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--student", ""], "student is ''"),
        (["--template", "none"], "template is 'none'"),
        (["--template", "chat"], "the tokenizer has no chat format"),
        (["--schedule", "linaer"], "did you mean 'linear'"),
        (["--schedule", "linear", "--decay", "1"], "decay = 1.0"),
        (["--tau0", "nan"], "tau0 = nan"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--max-new-tokens", "999"], "context, 256"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--temperature", "0"], "temperature = 0.0"),
        (["--prompts", "nowhere.txt"], "no such file"),
        (["--device", "nowhere"], "device is 'nowhere'"),
        (["--compare", "x", "--tau0", "0.1"], "the students write alone"),
        (["--teacher", "./nowhere"], "no such folder"),
        ([" "], "prompt 4 is empty"),
    ],
)
def test_wrong_input_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    models = {"--student": str(place / "student"), "--teacher": str(place / "teacher")}
    given = [part for name, path in models.items() if name not in flags for part in (name, path)]
    assert cli.main(["generate", *PROMPTS, *flags, *given, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_prompts_that_cannot_be_read(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.jsonl"
    texts = {
        "": "there is no prompt",
        '{"prompt": "a"}\n{"text": 1}': "line 2: no text under 'prompt'",
        "nonsense": "line 1: no text",
        '{"prompt": 3}': "line 1: prompt and template must be text",
    }
    for text, message in texts.items():
        path.write_text(text)
        assert run(place, "--prompts", path, prompts=[]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"promt": "{prompt}"}, "unknown key 'promt'"),
        ({"prompt": "no place"}, "prompt has no {prompt}"),
        ({"prompt": 3}, "prompt is 3"),
        ({"chat": True, "prompt": "{prompt}"}, "prompt and chat"),
        ({"settings": {"tau": 1}}, "unknown setting 'tau'"),
        ({"settings": {"tau0": "1"}}, "tau0 is '1'"),
        ({"settings": {"top_k": True}}, "top_k is True"),
    ],
)
def test_a_broken_template_is_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], values: dict[str, object], message: str
) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(values))
    assert run(place, "--template", path) == 2
    assert message in capsys.readouterr().err


def test_different_tokenizers_are_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save(tiny.llama(2), tmp_path / "other", tiny.tokenizer(280))
    assert (
        cli.main(["generate", "alpha", "--student", str(tmp_path / "other"), "--teacher", str(place / "teacher")]) == 2
    )
    assert "tokenizers differ" in capsys.readouterr().err
