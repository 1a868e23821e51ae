"""README's "Add a divergence", followed to the letter in a copy of this tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_packaging import ROOT, make_environment, make_tree, needs_compiler


@dataclass(frozen=True)
class Steps:
    """What the section tells the reader to do."""

    path: str
    text: str
    commands: list[str]


@pytest.fixture(scope="module")
def steps() -> Steps:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Add a divergence\n")[1].split("\n## ")[0]
    (path,) = set(re.findall(r"`(kdkernels/divergences/[a-z]\w*\.py)`", section))
    (text,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (commands,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    return Steps(path, text, commands.splitlines())


def make_copy(folder: Path) -> Path:
    tree = make_tree(folder)
    skip = shutil.ignore_patterns("__pycache__", ".hypothesis")
    shutil.copytree(ROOT / "python_tests", tree / "python_tests", ignore=skip)
    return tree


def follow(tree: Path, python: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Runs one line of the section in `tree` as a shell would, with `python` meaning that interpreter."""
    private = ("KD_", "PIP_", "PYTHONPATH", "KDKERNELS", "PYTEST", "VIRTUAL_ENV")
    env = {name: value for name, value in os.environ.items() if not name.startswith(private)}
    env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "KDKERNELS_TEST_ROOT": str(tree)}
    env["PATH"] = f"{python.parent}{os.pathsep}{env['PATH']}"
    return subprocess.run(command, shell=True, cwd=tree, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
@needs_compiler
def test_the_steps_work_as_written(tmp_path, steps):
    """File, build, contract test, all backends included; then the promise that follows the steps."""
    tree, python = make_copy(tmp_path / "tree"), make_environment(tmp_path / "env", build_tools=True).python
    assert not (tree / steps.path).exists()
    (tree / steps.path).write_text(steps.text, encoding="utf-8")
    for command in steps.commands:
        done = follow(tree, python, command)
        assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d\d passed", done.stdout)
    assert "skipped" not in done.stdout
    name = Path(steps.path).stem
    use = f"import torch, kdkernels as kd; z = torch.randn(2, 3, 7); kd.distillation_loss(z[0], z[1], '{name}', "
    done = follow(tree, python, f"python -c \"{use}backend='cpp')\"")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_wrong_gradient_fails_the_contract(tmp_path, steps):
    """Without native kernels here: the file as printed passes, the same file with a slip in `grad` does not."""
    tree = make_copy(tmp_path / "tree")
    contract, chosen = steps.commands[-1].split(" -k ")
    head, grad = steps.text.split("def grad")
    slips = [grad.replace("q - p", "p - q"), grad.replace("(lq - lp)", "(lq - lp + 0.001)")]
    assert grad not in slips
    for body in (grad, *slips):
        (tree / steps.path).write_text(f"{head}def grad{body}", encoding="utf-8")
        done = follow(tree, Path(sys.executable), f'{contract} -k "{chosen} and (grad_is or vanishes)"')
        if body is grad:
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            assert done.returncode == 1, done.stdout + done.stderr
            assert "FAILED python_tests/test_divergences.py::test_grad_is_the_derivative_of_term" in done.stdout
