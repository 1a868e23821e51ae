"""Deliberate bugs, each a text replaced in one source file, and the quick tests that must notice it.

    python python_tests/mutants.py [NAME...]         kill these (default: all but the C++ ones), one line each
    python python_tests/mutants.py --cpp [NAME...]   the C++ ones, each compiled in a temporary copy

A mutant survives if its tests pass; it is stale if its text is no longer in the file, which fails the run as well.
Python mutants run in a temporary copy of the package without native kernels, in a fork of a process that has imported
torch but not kdkernels. Before any mutant the copy runs unchanged: it must pass.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("mutants.txt")
WRONG_COPY = 77  # conftest's exit code where the package under test is not the patched one


class Mutant(NamedTuple):
    """``old`` stands once in ``file`` (relative to the repository) and becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def mutants() -> list[Mutant]:
    """The table in mutants.txt."""
    blocks = re.split(r"^\[(.*)\]\n", TABLE.read_text(), flags=re.MULTILINE)[1:]
    table = []
    for name, body in zip(blocks[::2], blocks[1::2], strict=True):
        lines = body.rstrip().split("\n")
        old, new = ("\n".join(line[2:] for line in lines if line[:2] == sign) for sign in ("- ", "+ "))
        table.append(Mutant(name, lines[0], old, new, tuple(line[2:] for line in lines if line[:2] == "  ")))
    return table


def is_cpp(mutant: Mutant) -> bool:
    """Whether it has to be compiled."""
    return mutant.file.startswith("csrc/")


def apply(mutant: Mutant, root: Path) -> None:
    """Patch the copy under ``root``; a text that is not there exactly once makes the mutant stale."""
    path = root / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise LookupError(f"stale: {mutant.old!r} stands {text.count(mutant.old)} times in {mutant.file}")
    path.write_text(text.replace(mutant.old, mutant.new))


@contextlib.contextmanager
def _copy_of_the_package() -> Iterator[Path]:
    """Python files only: without native kernels every call is eager's."""
    with tempfile.TemporaryDirectory(prefix="kd-mutant-") as folder:
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / "kdkernels", Path(folder) / "kdkernels", ignore=ignore)
        yield Path(folder)


def _pytest(root: Path, tests: tuple[str, ...], *options: str) -> list[str]:
    """Arguments of pytest for a run against the copy under ``root``."""
    nodes = [str(ROOT / "python_tests" / test) for test in tests]
    quick = ["-m", "not slow and not soak", "-o", f"pythonpath={root}", "-o", "addopts=--strict-markers"]
    return [
        "-x",
        "-q",
        "--no-header",
        "--all",
        "-p",
        "no:cacheprovider",
        *quick,
        "-c",
        str(ROOT / "pyproject.toml"),
        *options,
        *nodes,
    ]


def _in_a_fork(root: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """pytest's exit code and output, against the copy under ``root``."""
    report = root / "report.txt"
    child = os.fork()
    if child == 0:
        code = 3
        with contextlib.suppress(BaseException), open(report, "w") as out, contextlib.redirect_stdout(out):
            sys.path.insert(0, str(root))
            os.environ["KDKERNELS_TEST_ROOT"] = str(root)
            sys.dont_write_bytecode = True
            import pytest

            code = int(pytest.main(_pytest(root, tests, "--backends=eager")))
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), report.read_text()


def _verdict(code: int, output: str) -> str:
    """ "" for a mutant that tests killed, else what went wrong."""
    if code == 1:
        return ""
    return {0: "survived", WRONG_COPY: "ran against another copy"}.get(
        code, f"pytest exit code {code}: {output[-500:]}"
    )


def _control(tests: tuple[str, ...]) -> str:
    with _copy_of_the_package() as root:
        code, output = _in_a_fork(root, tests)
    return "" if code == 0 else f"the unchanged copy fails ({code}): {output[-1500:]}"


Outcome = tuple[str, str]
"""A mutant's name and what went wrong with it: nothing if it was killed."""


def run_python(chosen: list[Mutant]) -> Iterator[Outcome]:
    """The unchanged copy first; if that fails nothing else is said."""
    import hypothesis  # noqa: F401  imported before the forks, once for all
    import pytest  # noqa: F401
    import torch

    assert "kdkernels" not in sys.modules
    torch.set_num_threads(1)  # no pool of threads that a fork would lose
    broken = _control(tuple(sorted({test for mutant in chosen for test in mutant.tests})))
    yield "unchanged", broken
    for mutant in chosen if not broken else []:
        with _copy_of_the_package() as root:
            try:
                apply(mutant, root)
            except LookupError as error:
                yield mutant.name, str(error)
                continue
            yield mutant.name, _verdict(*_in_a_fork(root, mutant.tests))


def run_cpp(chosen: list[Mutant]) -> Iterator[Outcome]:
    """The same for C++: one copy of the sources, built once and then anew, as far as needed, for each mutant."""
    with tempfile.TemporaryDirectory(prefix="kd-mutant-") as folder:
        root = Path(folder)
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        for name in ("kdkernels", "csrc", "build_tools"):
            shutil.copytree(ROOT / name, root / name, ignore=ignore)
        for name in ("setup.py", "pyproject.toml", "_kd_build.py", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, root / name)
        broken = _build_and_test(root, tuple(sorted({test for mutant in chosen for test in mutant.tests})), expected=0)
        yield "unchanged", broken
        for mutant in chosen if not broken else []:
            before = (root / mutant.file).read_text()
            try:
                apply(mutant, root)
                yield mutant.name, _build_and_test(root, mutant.tests, expected=1)
            except LookupError as error:
                yield mutant.name, str(error)
            (root / mutant.file).write_text(before)


def _build_and_test(root: Path, tests: tuple[str, ...], expected: int) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "KDKERNELS_TEST_ROOT": str(root), "PYTHONPATH": str(root)}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    built = subprocess.run(build, cwd=root, env=env, capture_output=True, text=True, check=False)
    if built.returncode != 0:
        return f"does not compile: {built.stderr[-1500:]}"
    command = [sys.executable, "-m", "pytest", *_pytest(root, tests, "--backends=cpp")]
    ran = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    if ran.returncode == expected:
        return ""
    return _verdict(ran.returncode, ran.stdout) if expected else f"the unchanged copy fails: {ran.stdout[-1500:]}"


def main(arguments: list[str]) -> int:
    """Exit code 1 if a mutant survived, is stale, or the unchanged copy fails."""
    cpp = "--cpp" in arguments
    names = [name for name in arguments if name != "--cpp"]
    table = [mutant for mutant in mutants() if is_cpp(mutant) == cpp]
    unknown = set(names) - {mutant.name for mutant in table}
    if unknown:
        print(f"no such mutants: {sorted(unknown)}")
        return 1
    chosen = [mutant for mutant in table if not names or mutant.name in names]
    wrong = 0
    for name, problem in run_cpp(chosen) if cpp else run_python(chosen):
        print(
            f"{'PROBLEM' if problem else 'passes' if name == 'unchanged' else 'killed'}  {name}  {problem}".rstrip(),
            flush=True,
        )
        wrong += bool(problem)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
