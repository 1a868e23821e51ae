"""C++ drivers under sanitizers, without torch: `python -m build_tools.sanitize [LIST]`, `... --codec BLOCKS`.

LIST is what -fsanitize= takes (default address,undefined). The CPU kernels' driver runs with every instruction set that
this machine can run, the codec's on damaged blocks; the second form is the codec's campaign alone.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

from build_tools import generate, locate, plan
from build_tools.execute import execute
from build_tools.options import BuildError, Options
from build_tools.options import read as read_options

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = "address,undefined"
UNTESTED = 77
CODEC_BLOCKS = 500  # damaged 20 ways each
EVERY = {"thread": "7"}  # thread sanitizing looks at sharing, not at tails: a seventh of the cases will do


DRIVERS = ("rows_sweep", "topk_sweep", "sparse_sweep", "shards_sweep", "gate_sweep")


def build(sanitize: str, jobs: int) -> list[Path]:
    """Compiles kernels and drivers; returns the executables."""
    folder = ROOT / "build" / f"sanitize-{sanitize.replace(',', '-')}"
    tools = plan.Toolchain(ROOT, folder, tuple(locate.find_compiler()), sanitize)
    generate.divergences_header(ROOT, folder / "gen")
    generate.facts_header(folder / "gen", {"kernels": list(generate.kernel_digests(ROOT).items())})
    kernels = plan.cpu_kernels(tools)
    steps, programs = [*kernels], [folder / name for name in DRIVERS]
    for program in programs:
        driver = tools.compile(ROOT / f"csrc/tests/{program.name}.cpp", "test_", [])
        steps += [driver, tools.link(program, [driver, *kernels], ["-pthread"])]
    execute(steps, folder, jobs)
    return programs


def codec(blocks: int, jobs: int) -> int:
    """Damaged blocks under address and undefined-behaviour sanitizers; how many ways of decoding failed."""
    folder = ROOT / "build" / "sanitize-codec"
    tools = plan.Toolchain(ROOT, folder, tuple(locate.find_compiler()), DEFAULT)
    steps = [tools.compile(ROOT / "csrc/tests/codec_fuzz.cpp", "test_", []), *plan.codec(tools, "")]
    program = folder / "codec_fuzz"
    execute([*steps, tools.link(program, steps, [])], folder, jobs)
    failed = 0
    for isa in ("", "baseline"):  # rows together where this machine can, and one by one
        start = time.monotonic()
        environment = {**os.environ, "KDKERNELS_ISA": isa, "UBSAN_OPTIONS": "print_stacktrace=1"}
        code = subprocess.run([str(program), str(blocks)], env=environment, check=False).returncode
        verdict = f"FAILED ({code})" if code else "passed"
        print(f"sanitize: codec, {isa or 'best'} {verdict} in {time.monotonic() - start:.0f} s", flush=True)
        failed += code != 0
    return failed


def main(arguments: list[str]) -> int:
    """Builds and runs; the exit status is the number of drivers and instruction sets that failed."""
    campaign = int(arguments[1]) if arguments[:1] == ["--codec"] else 0
    sanitize = arguments[0] if arguments and not campaign else DEFAULT
    options: Options = read_options()
    start = time.monotonic()
    try:
        failed = codec(campaign or CODEC_BLOCKS, options.jobs) if sanitize == DEFAULT else 0
        if campaign:
            return failed
        programs = build(sanitize, options.jobs)
    except BuildError as error:
        print(f"sanitize: {error}", file=sys.stderr)
        return 1
    print(f"sanitize: built with {sanitize} in {time.monotonic() - start:.0f} s", flush=True)
    for isa, program in itertools.product(plan.instruction_sets(ROOT), programs):
        environment = {**os.environ, "KDKERNELS_ISA": isa, "UBSAN_OPTIONS": "print_stacktrace=1"}
        start = time.monotonic()
        code = subprocess.run([str(program), EVERY.get(sanitize, "1")], env=environment, check=False).returncode
        verdict = {0: "passed", UNTESTED: "cannot run on this machine"}.get(code, f"FAILED ({code})")
        print(f"sanitize: {program.name}, {isa} {verdict} in {time.monotonic() - start:.0f} s")
        failed += code not in (0, UNTESTED)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
