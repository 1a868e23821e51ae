"""Runs the steps of a plan: by ninja where it is present, else by a plain parallel loop."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build_tools.options import BuildError
from build_tools.plan import Step


def _escape(path: Path | str) -> str:
    """A path in a ninja build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_text(steps: list[Step]) -> str:
    """The build.ninja of these steps. Depfiles name the headers, so only what changed is recompiled."""
    lines = ["ninja_required_version = 1.5", "rule compile", "  command = $command", "  depfile = $out.d"]
    lines += ["  deps = gcc", "rule link", "  command = $command"]
    for step in steps:
        rule = "compile" if step.compiles else "link"
        lines.append(f"build {_escape(step.output)}: {rule} {' '.join(map(_escape, step.inputs))}")
        lines.append(f"  command = {shlex.join(step.command).replace('$', '$$')}")
    return "\n".join(lines) + "\n"


def _loop(steps: list[Step], jobs: int) -> None:
    def run(step: Step) -> tuple[Step, subprocess.CompletedProcess[str]]:
        return step, subprocess.run(step.command, capture_output=True, text=True, check=False)

    failed = []
    for group in ([s for s in steps if s.compiles], [s for s in steps if not s.compiles]):
        with ThreadPoolExecutor(jobs) as pool:
            for step, done in pool.map(run, group):
                if done.returncode:
                    failed.append(step)
                    print(f"{shlex.join(step.command)}\n{done.stdout}{done.stderr}", file=sys.stderr, flush=True)
                elif done.stderr:
                    print(done.stderr, file=sys.stderr, flush=True)
        if failed:
            raise BuildError(
                f"{len(failed)} of {len(group)} commands failed: {', '.join(s.inputs[0].name for s in failed)}"
            )


def execute(steps: list[Step], build: Path, jobs: int) -> None:
    """Makes every output. Raises BuildError after the compiler's own message has been printed."""
    for step in steps:
        step.output.parent.mkdir(parents=True, exist_ok=True)
    ninja = shutil.which("ninja")
    if ninja is None:
        _loop(steps, jobs)
        return
    (build / "build.ninja").write_text(ninja_text(steps), encoding="utf-8")
    sys.stdout.flush()
    if subprocess.run([ninja, "-C", str(build), "-j", str(jobs)], check=False).returncode:
        raise BuildError("ninja stopped: a command failed")
