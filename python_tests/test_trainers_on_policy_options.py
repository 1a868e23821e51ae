"""On-policy runs: the command line, options and files that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from on_policy_runs import SMALL, steps
from trainer_runs import config, one_thread, place, words

from kdkernels import cli
from kdkernels.errors import UserError
from kdkernels.trainers import OnPolicy, distill
from kdkernels.trainers.on_policy import figures, gate_of
from kdkernels.trainers.setup import build

pytestmark = pytest.mark.slow
__all__ = ["one_thread", "place", "words"]  # fixtures


# --- command line, bad input ---


def test_on_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ["distill", "--teacher", place / "teacher", "--student", place / "student", "--data", place / "data",
           "--output", tmp_path / "run", "--steps", 3, "--batch-size", 2, "--block-size", 32, "--eval-blocks", 1,
           "--log-every", 1, "--on-policy", "--generated-share", 1, "--gate", "constant:0.2", "--max-new-tokens", 5,
           "--prompt-tokens", 4, "--replay", 4, "--bf16"]  # fmt: skip
    assert cli.main(list(map(str, job))) == 0
    assert "student:" in capsys.readouterr().out
    found = steps(tmp_path / "run")
    assert len(found) == 3
    assert {"teacher_share", "jsd", "response_length", "generated_share"} <= set(found[0])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["divergence"].startswith("SkewReverseKL")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cache": "somewhere"}, "on_policy is on; allowed: off with --cache"),
        ({"kd_weight": 0.0, "ce_weight": 1.0}, "kd_weight is 0; allowed: above 0 with --on-policy"),
        ({"replay": 1}, "replay is 1; allowed: 0, or at least the 2 sequences of a step"),
        ({"generated_share": 1.5}, r"generated_share is 1\.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 252}, "the teacher reads at most 256 tokens|the student reads at most 256 tokens"),
        ({"gate": "exponentiel"}, "gate is 'exponentiel'.*did you mean 'exponential'"),
        ({"gate": "linear:1,2"}, r"gate is 'linear:1,2'.*decay"),
        ({"gate": "constant:x"}, "gate is 'constant:x'"),
        ({"gate": "exponential:1,2,3"}, "more than two"),
        ({"prompts": "/no/such.txt"}, "prompts is '/no/such.txt'"),
        ({"sample_temperature": 1e-30}, "sample_temperature is 1e-30; allowed: "),
        ({"prompt_template": "chat"}, "prompt_template is 'chat'; allowed: 'plain' without --prompts"),
        ({"lm_data": "/no/such"}, "lm_data: data is '/no/such'; no such file or folder"),
        ({"lm_weight": 0.5}, "lm_weight is 0.5; allowed: 1.0 without --lm-data; add it"),
        ({"lm_data": "x", "lm_weight": 0.0}, "lm_weight is 0; allowed: above 0 with --lm-data"),
    ],
)
def test_what_cannot_be(place: Path, tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        distill(config(place, tmp_path / "run", **{**SMALL, **options}), progress=False)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("name", "value", "default"),
    [("prompts", "x.txt", "''"), ("gate", "constant:1", "'exponential'"), ("replay", 8, "0"), ("write_batch", 1, "0"),
     ("generated_share", 1.0, "0.5"), ("max_new_tokens", 6, "128"), ("prompt_tokens", 5, "32"),
     ("sample_temperature", 0.5, "1.0"), ("replay_share", 1.0, "0.5"), ("replay_age", 1, "100"),
     ("prompt_template", "chat", "'plain'")],
)  # fmt: skip
def test_options_that_would_change_nothing(place: Path, tmp_path: Path, name: str, value: Any, default: str) -> None:
    options = config(place, tmp_path, **{name: value})
    with pytest.raises(UserError, match=f"{name} is {value!r}; allowed: {default} without --on-policy; add it"):
        options.validate()


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.md", "x", r"allowed: a \.txt or \.jsonl file"),
        ("a.jsonl", "{bad", "line 1 is not JSON"),
        ("a.jsonl", '{"prompt": ""}', "line 1: prompt must be text"),
        ("a.jsonl", '{"prompt": "x", "response": 3}', "line 1: prompt must be text, response text or absent"),
        ("a.jsonl", '{"prompt": "x", "response": "y"}\n{"prompt": "x"}', "1 of 2 lines have a response"),
        ("a.txt", "the river " * 100, "prompts take up to"),
        ("a.jsonl", json.dumps({"prompt": "the river " * 20, "response": "y"}), "the longest prompt has"),
    ],
)
def test_files_of_prompts_that_cannot_be(place: Path, tmp_path: Path, name: str, content: str, text: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=text):
        build(config(place, tmp_path / "run", **SMALL, prompts=str(tmp_path / name)))


def test_domains_that_no_step_draws_from_are_not_weighed(place: Path, tmp_path: Path) -> None:
    options = {**SMALL, "ddk": True, "prompts": str(tmp_path / "a.jsonl")}
    (tmp_path / "a.jsonl").write_text('{"prompt": "the river"}')
    build(config(place, tmp_path / "run", **{**options, "generated_share": 0.5}))
    with pytest.raises(UserError, match="ddk is on; allowed: off where no step draws from --data"):
        build(config(place, tmp_path / "run", **options))
    (tmp_path / "a.jsonl").write_text('{"prompt": "the river", "response": "runs"}')
    with pytest.raises(UserError, match="ddk is on"):
        build(config(place, tmp_path / "run", **{**options, "generated_share": 0.5}))


def test_policies_that_cannot_be() -> None:
    for options, text in (
        ({"generated_share": -0.1}, r"generated_share = -0\.1: must be in \[0, 1\]"),
        ({"replay_share": float("nan")}, "replay_share"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"replay": 2.5}, r"replay = 2\.5"),
        ({"schedule": "sine"}, "schedule"),
        ({"temperature": 0.0}, "temperature = 0"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_p": 1.5}, r"top_p = 1\.5"),
    ):
        with pytest.raises(ValueError, match=text):
            OnPolicy(**options)
    assert gate_of("exponential:1,0.04") == ("exponential", 1.0, 0.04)
    assert gate_of("linear") == ("linear", None, None)
    assert figures(torch.zeros(8)) == {}
