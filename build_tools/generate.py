"""The two headers that are written at build time, never committed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from build_tools.options import BuildError

EMITTER = Path("kdkernels/divergences/_emit.py")


def write_if_changed(path: Path, text: str) -> None:
    """Writes `text`, leaving the time stamp alone when nothing changed, so that ninja recompiles nothing."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def divergences_header(root: Path, folder: Path) -> None:
    """Writes divergences.gen.h: every divergence's term and grad as C++ text."""
    fresh = folder / "divergences.gen.h.new"
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, str(root / EMITTER), str(fresh)], capture_output=True, text=True, check=False
    )
    if done.returncode or not fresh.is_file():
        raise BuildError(f"{EMITTER} could not write divergences.gen.h:\n{done.stdout}{done.stderr}")
    write_if_changed(folder / "divergences.gen.h", fresh.read_text(encoding="utf-8"))
    fresh.unlink()


def kernel_digests(root: Path) -> dict[str, str]:
    """Kernel name -> digest of its source, in the order of the kernel ids.

    The emitter is loaded from its file: `import kdkernels` would import torch, which an isolated build lacks.
    """
    spec = importlib.util.spec_from_file_location("_kd_emit", root / EMITTER)
    if spec is None or spec.loader is None:
        raise BuildError(f"{EMITTER} is missing: the source tree is incomplete")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up by name
    spec.loader.exec_module(module)
    return dict(module.digests())


def facts_header(folder: Path, facts: dict[str, Any]) -> None:
    """Writes build_facts.gen.h: the facts as one JSON text, and the number of kernels."""
    text = json.dumps(facts, sort_keys=True)
    write_if_changed(
        folder / "build_facts.gen.h",
        f"#pragma once\n#define KD_KERNEL_COUNT {len(facts['kernels'])}\n"
        f'#define KD_BUILD_FACTS R"facts({text})facts"\n',
    )
