"""What the tests of on-policy runs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer_runs import lines

SMALL: dict[str, Any] = {"on_policy": True, "max_new_tokens": 6, "prompt_tokens": 5, "generated_share": 1.0}


def steps(folder: Path) -> list[dict[str, Any]]:
    return [row for row in lines(folder) if row["event"] == "step"]
