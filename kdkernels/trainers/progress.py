"""Progress bars on stderr."""

from __future__ import annotations

import sys
from typing import Any


def progress_bar(total: int, done: int, progress: bool, unit: str = "step", **options: Any) -> Any:
    """A tqdm bar on stderr; in a log file it writes a line only now and then."""
    from kdkernels.optional import need

    interval = 0.5 if sys.stderr.isatty() else 20.0
    return need("tqdm", "the progress bar").tqdm(
        total=total, initial=done, unit=unit, disable=not progress, mininterval=interval, dynamic_ncols=True, **options
    )
