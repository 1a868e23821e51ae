"""The suite notices deliberate bugs (mutants.txt); here a sample, all of them in the soak tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mutants
import pytest

pytestmark = pytest.mark.sample(3)

TABLE = mutants.mutants()
PYTHON = [mutant.name for mutant in TABLE if not mutants.is_cpp(mutant)]
CPP = [mutant.name for mutant in TABLE if mutants.is_cpp(mutant)]
FOLDER = Path(__file__).parent


def kill(*arguments: str) -> None:
    """In a process of its own, which must not have imported kdkernels."""
    command = [sys.executable, str(FOLDER / "mutants.py"), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]


@pytest.mark.parametrize("mutant", TABLE, ids=lambda m: m.name)
def test_a_mutant_applies_and_names_tests_that_exist(mutant: mutants.Mutant) -> None:
    """A text that has moved on would otherwise survive unseen."""
    text = (mutants.ROOT / mutant.file).read_text()
    assert text.count(mutant.old) == 1, f"{mutant.old!r} stands {text.count(mutant.old)} times in {mutant.file}"
    assert mutant.tests
    for test in mutant.tests:
        file, _, rest = test.partition("::")
        assert f"def {rest.partition('[')[0]}(" in (FOLDER / file).read_text(), test


def test_names_are_unique() -> None:
    assert len({mutant.name for mutant in TABLE}) == len(TABLE) > 50


def test_a_harmless_change_is_reported_as_a_survivor(tmp_path: Path) -> None:
    """The verdicts of the runner: only failing tests kill."""
    assert mutants._verdict(1, "") == ""
    assert mutants._verdict(0, "") == "survived"
    assert "another copy" in mutants._verdict(mutants.WRONG_COPY, "")
    assert "exit code 4" in mutants._verdict(4, "no such test")


@pytest.mark.slow
def test_a_sample_is_killed() -> None:
    kill(*PYTHON[::11])


@pytest.mark.soak
def test_a_cpp_mutant_is_killed() -> None:
    kill("--cpp", CPP[0])


@pytest.mark.soak
def test_all_are_killed() -> None:
    kill()


@pytest.mark.soak
def test_all_cpp_mutants_are_killed() -> None:
    kill("--cpp")
