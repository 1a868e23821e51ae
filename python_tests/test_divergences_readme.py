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
    env |= {"KD_BUILD": "cpu"}  # the CUDA kernels know no divergence by name
    env["PATH"] = f"{python.parent}{os.pathsep}{env['PATH']}"
    return subprocess.run(command, shell=True, cwd=tree, env=env, capture_output=True, text=True, check=False)


def add_twins(tree: Path) -> None:
    """Forward and reverse KL under names that the native kernels do not know, hence without their online sweep."""
    for name in ("forward_kl", "reverse_kl"):
        text = (tree / f"kdkernels/divergences/{name}.py").read_text(encoding="utf-8")
        text = re.sub(r"class (\w+)\(", r"class \1Twin(", text).replace(f'name = "{name}"', f'name = "{name}_twin"')
        (tree / f"kdkernels/divergences/{name}_twin.py").write_text(text, encoding="utf-8")


ONLINE_IS_GENERIC = """
import sys
sys.path.insert(0, "python_tests")
import torch, kdkernels as kd
from cases import KINDS, pair

def run(student, teacher, name, **options):
    leaf = student.clone().requires_grad_()
    loss = kd.distillation_loss(leaf, teacher, name, backend="cpp", reduction="none", **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0].float()

for kind in KINDS:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for vocab in (1, 67, 301, 5000):
            student, teacher = pair(kind, 3, vocab, dtype)
            more = {"labels": torch.arange(3) % vocab, "ce_weight": 0.5, "temperature": 2.0}
            for options in ({}, more):
                for name in ("forward_kl", "reverse_kl"):
                    (one, d_one), (two, d_two) = (run(student, teacher, n, **options) for n in (name, name + "_twin"))
                    where = (kind, dtype, vocab, name, bool(options))
                    assert torch.equal(one.isnan(), two.isnan()), where
                    assert ((one - two).abs() <= 1e-6 * one.abs().clamp(min=1))[~one.isnan()].all(), (where, one, two)
                    # 2 q (|log q / p| + D) is what a row's gradient is made of
                    allowed = 2 * torch.finfo(dtype).eps * d_two.norm(dim=-1) + 1e-6 * (1 + two.abs())
                    assert ((d_one - d_two).norm(dim=-1) <= allowed)[~one.isnan()].all(), (where, d_one, d_two)
                    assert kind != "ordinary" or vocab == 1 or d_two.norm(dim=-1).min() > 1e-2, where
print("equal")
"""


@pytest.mark.slow
@needs_compiler
def test_the_steps_work_as_written(tmp_path, steps):
    """File, build, contract test, all backends included; then the promise that follows the steps.

    The build also holds twins of the two KLs: what their online kernels compute is what the generic ones do.
    """
    tree, python = make_copy(tmp_path / "tree"), make_environment(tmp_path / "env", build_tools=True).python
    assert not (tree / steps.path).exists()
    (tree / steps.path).write_text(steps.text, encoding="utf-8")
    add_twins(tree)
    for command in steps.commands:
        done = follow(tree, python, command)
        assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d\d passed", done.stdout)
    assert "skipped" not in done.stdout
    name = Path(steps.path).stem
    use = f"import torch, kdkernels as kd; z = torch.randn(2, 3, 7); kd.distillation_loss(z[0], z[1], '{name}', "
    done = follow(tree, python, f"python -c \"{use}backend='cpp')\"")
    assert done.returncode == 0, done.stderr
    (tree / "compare.py").write_text(ONLINE_IS_GENERIC, encoding="utf-8")
    done = follow(tree, python, "python compare.py")
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


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
