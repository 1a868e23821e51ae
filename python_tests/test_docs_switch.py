"""docs/switch.md, "Generating": its blocks run, its table says what the schedules do, its commands parse."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
import tiny_models as tiny

from kdkernels import cli
from kdkernels.switch import prompt_templates, schedules

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "switch.md").read_text(encoding="utf-8")
SECTION = next(part for part in TEXT.split("\n## ") if part.startswith("Generating"))


def blocks(kind: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", SECTION, re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == kind]


def test_the_block_runs() -> None:
    (code,) = blocks("python")
    found = {"student": tiny.llama(2, seed=1).eval(), "teacher": tiny.llama(4, seed=2).eval(),
             "tokenizer": tiny.tokenizer(), "texts": ["the river", "def return import class"]}  # fmt: skip
    for model in (found["student"], found["teacher"]):
        model.config.max_position_embeddings = 512
    exec(compile(code, "docs/switch.md", "exec"), found)
    assert found["out"].responses.shape[0] == 2


def test_the_table_has_every_schedule_and_its_defaults() -> None:
    table = SECTION.split("### Thresholds")[1].split("###")[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    told = {}
    for names, _, first, second in rows[2:]:
        for name, value in zip(re.findall(r"`(\w+)`", names), first.split(", "), strict=True):
            told[name] = [float(value)] + ([float(second)] if second else [])
    assert set(told) == set(schedules.NAMES)
    for name, expected in told.items():
        made = schedules.schedule_of(name)
        fields = list(vars(made).values())
        assert fields[: len(expected)] == expected
        extra = len(inspect.signature(type(made)).parameters) - len(expected)
        assert extra == (1 if name == "target_share" else 0)  # where its threshold starts


def test_the_commands_parse(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in blocks("") for line in block.splitlines() if line.startswith("kdkernels ")]
    assert len(lines) == 3
    for line in lines:
        arguments = cli._parser().parse_args(shlex.split(line)[1:])
        assert arguments.command == "generate"
    assert cli.main(["generate", "--templates"]) == 0
    assert "instruction" in capsys.readouterr().out


def test_the_template_is_one(tmp_path: Path) -> None:
    (text,) = blocks("json")
    path = tmp_path / "quiz.json"
    path.write_text(text)
    found = prompt_templates.load(str(path))
    assert found.prompt == "Q: {prompt}\nA:"
    assert found.settings == json.loads(text)["settings"]
