"""Checkpoints that are whole or absent.

One file per checkpoint, `step-00000123.pt`, read back with `weights_only=True` (tensors and plain values, no code).
"""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdkernels.durable import write_atomically
from kdkernels.errors import UserError

FORMAT = 1
_NAME = re.compile(r"step-(\d{8})\.pt")


def write_json(path: Path, value: Any) -> None:
    """A JSON file, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: (file.write(text.encode()), None)[1])


def rng_state() -> dict[str, Any]:
    """States of the generators that a training step may draw from, as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            cached,
        ],
        "python": [version, list(internal), gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """The inverse of `rng_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def steps_in(folder: Path) -> list[int]:
    """Steps that have a checkpoint, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, os.listdir(folder)) if match)


def path_of(folder: Path, step: int) -> Path:
    """The file of one step."""
    return folder / f"step-{step:08d}.pt"


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` (tensors and plain values) as the checkpoint of `step`; only the newest `keep` stay."""
    path = path_of(folder, step)
    write_atomically(path, lambda file: torch.save({"format": FORMAT, "step": step, **state}, file))
    for old in steps_in(folder)[:-keep]:
        path_of(folder, old).unlink()
    for left in folder.glob(".step-*.tmp"):  # a killed run's
        left.unlink()
    return path


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint; `UserError` when it is damaged or from a newer version."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"checkpoint {str(path)!r} cannot be read ({error}); delete it and resume from the one before"
        ) from error
    except Exception as error:  # pickle.UnpicklingError: weights_only met something that is no tensor or plain value
        raise UserError(f"checkpoint {str(path)!r} is not one of ours ({type(error).__name__}); delete it") from error
    if state.get("format") != FORMAT:
        raise UserError(f"checkpoint {str(path)!r} has format {state.get('format')}; this version reads {FORMAT}")
    return dict(state)
