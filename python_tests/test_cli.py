"""`kdkernels` as a user runs it: in a process of its own, by its exit status and what it prints and leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny

from kdkernels import cli
from kdkernels.trainers.config import DistillConfig

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    tiny.write_corpus(root / "data")
    tiny.save(tiny.llama(4), root / "teacher")
    return root


def flags(place: Path, output: Path, **options: Any) -> list[str]:
    settings = {
        "teacher": place / "teacher", "student": "every:2", "data": place / "data", "output": output, "steps": 6,
        "batch-size": 2, "block-size": 32, "lr": 3e-3, "eval-blocks": 2, "log-every": 2, **options,
    }  # fmt: skip
    return [
        "distill",
        *(part for k, v in settings.items() for part in ((f"--{k}",) if v is True else (f"--{k}", str(v)))),
    ]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "kdkernels", *arguments]
    return subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)


def steps_logged(run: Path) -> int:
    log = run / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return max((row.get("step", 0) for row in rows if row["event"] == "step"), default=0)


def wait_for(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while steps_logged(run) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.02)


def weights(run: Path) -> bytes:
    return (run / "student" / "model.safetensors").read_bytes()


# --- the whole job ---


@pytest.mark.slow
def test_distill_trains_logs_and_saves(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run = tmp_path / "run"
    done = tiny.command(*flags(place, run, steps=12, mix="equal"), env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "held-out text" in done.stdout
    assert all(name in done.stdout for name in ("code", "prose", "lists", str(run / "student")))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 12
    assert all(summary["after"][name]["kl"] < before["kl"] for name, before in summary["before"].items())
    assert summary["student_params"] < summary["teacher_params"]
    assert summary["peak_rss_mib"] > 50
    saved = json.loads((run / "config.json").read_text())
    assert set(saved) == {f for f in DistillConfig.__dataclass_fields__}
    assert saved["steps"] == 12
    assert saved["temperature"] == 1.0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == ["start", "eval", *["step"] * 6, "eval", "end"]
    import transformers

    student = transformers.AutoModelForCausalLM.from_pretrained(run / "student")
    assert student.config.num_hidden_layers == 2
    assert transformers.AutoTokenizer.from_pretrained(run / "student").eos_token == "<|end|>"


def test_config_files_give_the_same_run(place: Path, tmp_path: Path) -> None:
    values = {
        "teacher": str(place / "teacher"), "student": "every:2", "data": str(place / "data"), "steps": 3, "lr": 3e-3,
        "batch-size": 2, "block_size": 32, "eval_blocks": 1, "divergence": "jsd", "divergence_args": {"beta": 0.3},
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(values))
    toml = "".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items() if not isinstance(v, dict))
    (tmp_path / "run.toml").write_text(toml + "[divergence_args]\nbeta = 0.3\n")
    files = ["run.json", "run.toml"] if sys.version_info >= (3, 11) else ["run.json"]
    for file in files:
        arguments = [
            "distill",
            "--config",
            str(tmp_path / file),
            "--output",
            str(tmp_path / file[4:]),
            "--quiet",
            "--steps",
            "2",
        ]
        assert cli.main(arguments) == 0
        summary = json.loads((tmp_path / file[4:] / "summary.json").read_text())
        assert (summary["divergence"], summary["steps"]) == ("JSD(beta=0.3)", 2)
    assert len({weights(tmp_path / file[4:]) for file in files}) == 1


# --- stopping and going on ---


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_resume_is_bit_identical(place: Path, tmp_path: Path, signum: signal.Signals) -> None:
    options = {"steps": 400, "log-every": 10, "save-every": 1000}
    process = start(flags(place, tmp_path / "cut", **options))
    wait_for(tmp_path / "cut", 20, process)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert f"stopped by {signum.name} at step" in errors
    assert "Traceback" not in errors
    assert len(list((tmp_path / "cut" / "checkpoints").glob("step-*.pt"))) == 1
    assert not (tmp_path / "cut" / "student").exists()
    for name, resume in (("cut", {"resume": True}), ("whole", {})):
        done = tiny.command(*flags(place, tmp_path / name, **options, **resume), env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("kills", [(2, 17, 31), pytest.param(range(1, 59), marks=pytest.mark.soak)], ids=["3", "58"])
def test_killed_at_random_moments_and_resumed_it_is_bit_identical(
    place: Path, tmp_path: Path, kills: Sequence[int]
) -> None:
    """SIGKILL, time and again, wherever it falls: what is acknowledged is there, the rest is done again."""
    options = {"steps": 60, "log-every": 1, "save-every": 3, "accumulate": 2}
    for step in kills:
        process = start(flags(place, tmp_path / "cut", **options, resume=True))
        wait_for(tmp_path / "cut", step, process)
        process.kill()
        process.wait()
    for name in ("cut", "whole"):
        done = tiny.command(*flags(place, tmp_path / name, **options, resume=True), env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    rows = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "step"] == list(range(1, 61))


# --- what a user may get wrong ---


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["distill"], "teacher is ''"),
        (["distill", "--stepz", "3"], "unrecognized arguments: --stepz 3"),
        (["distill", "--steps", "many"], "invalid int value: 'many'"),
        (["distill", "--schedule", "sine"], "invalid choice: 'sine'"),
        (["distill", "--config", "nowhere.toml"], "config is 'nowhere.toml'; no such file"),
        (["distill", "--domain", "code"], "domain is 'code'; allowed: NAME=VALUE"),
        (["distill", "--divergence-args", "beta=x"], "allowed: a number after the ="),
        (["nonsense"], "invalid choice: 'nonsense'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main(arguments)
    except SystemExit as stop:
        status = stop.code  # type: ignore[assignment]
    out, errors = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert errors.startswith("kdkernels")
    assert text in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"teacher": "/no/such/teacher"}, "teacher is '/no/such/teacher'; no such folder"),
        ({"data": "/no/such/data"}, "data is '/no/such/data'"),
        ({"divergence": "reverse_lk"}, "did you mean 'reverse_kl'"),
    ],
)
def test_wrong_runs_are_one_line_and_leave_nothing(
    place: Path, tmp_path: Path, change: dict[str, str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    assert cli.main(flags(place, tmp_path / "run", **{"tokenizer": place / "teacher", **change})) == 2
    errors = capsys.readouterr().err
    assert text in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_a_wrong_run_has_no_traceback_in_a_process_of_its_own(place: Path, tmp_path: Path) -> None:
    options = {"teacher": "nobody/has-this-model", "tokenizer": place / "teacher"}
    done = tiny.command(*flags(place, tmp_path / "run", **options), env=ENVIRONMENT)
    assert done.returncode == 2
    wanted = "kdkernels distill: error: teacher is 'nobody/has-this-model'; it cannot be loaded"
    assert done.stderr.startswith(wanted)
    assert done.stderr.count("\n") == 1


def test_config_files_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = (
        ("a.json", "{", "cannot be read"),
        ("a.yaml", "", "allowed: a .json or .toml file"),
        ("b.json", "[]", "list"),
    )
    for name, content, text in cases:
        (tmp_path / name).write_text(content)
        assert cli.main(["distill", "--config", str(tmp_path / name)]) == 2
        assert text in capsys.readouterr().err
    (tmp_path / "c.json").write_text('{"learning_rate": 1}')
    assert cli.main(["distill", "--config", str(tmp_path / "c.json")]) == 2
    assert "unknown option 'learning_rate'" in capsys.readouterr().err


# --- the rest of the command ---


def test_help_lists_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("info", "distill", "bench"))
    with pytest.raises(SystemExit):
        cli.main(["distill", "--help"])
    text = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in text for name in DistillConfig.__dataclass_fields__)


def test_info_prints_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text
    assert "eager" in text
    assert cli.main(["info", "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_bench_hands_its_arguments_over(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("runpy.run_module", lambda name, **_: seen.append([name, *sys.argv[1:]]))
    monkeypatch.setattr(sys, "argv", ["kdkernels"])
    assert cli.main(["bench", "--quick", "dense", "--help"]) == 0
    assert seen == [["benchmarks.run", "--quick", "dense", "--help"]]


def test_bench_outside_a_checkout_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = cli.__file__
    try:
        cli.__file__ = str(tmp_path / "site-packages" / "kdkernels" / "cli.py")
        before = Path.cwd()
        os.chdir(tmp_path)
        assert cli.main(["bench"]) == 2
    finally:
        os.chdir(before)
        cli.__file__ = here
    assert "checkout" in capsys.readouterr().err


def test_startup_does_not_import_transformers() -> None:
    code = "import sys, kdkernels.cli as c; c._parser(); print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
