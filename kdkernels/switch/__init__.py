"""SWITCH: sequences that a student writes and its teacher corrects where the two disagree (arXiv 2410.19503).

    out = kd.switch_generate(student, teacher, *kd.switch.left_padded(prompts, pad), max_new_tokens=256)
    out.sequences, out.from_teacher, out.summary()

`kd.switch_gate` decides one position, `kd.switch_generate` writes whole sequences. Schedules of the threshold, beyond
those that go by name: `kd.switch.ByDomain`, any function of (step, state).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdkernels.switch.requests import left_padded as left_padded
    from kdkernels.switch.schedules import ByDomain as ByDomain
    from kdkernels.switch.schedules import Constant as Constant
    from kdkernels.switch.schedules import Exponential as Exponential
    from kdkernels.switch.schedules import Growth as Growth
    from kdkernels.switch.schedules import Linear as Linear
    from kdkernels.switch.schedules import Mixture as Mixture
    from kdkernels.switch.schedules import MovingAverage as MovingAverage
    from kdkernels.switch.schedules import TargetShare as TargetShare
    from kdkernels.switch.state import SwitchState as SwitchState

_SCHEDULES = ("ByDomain", "Constant", "Exponential", "Growth", "Linear", "Mixture", "MovingAverage", "TargetShare")
_HOMES = {**dict.fromkeys(_SCHEDULES, "schedules"), "SwitchState": "state", "left_padded": "requests"}

__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
