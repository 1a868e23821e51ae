"""`distill`: the plain training loop behind `kdkernels distill`."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdkernels.trainers.checkpoint import write_json
from kdkernels.trainers.config import DistillConfig
from kdkernels.trainers.models import load_model, load_tokenizer
from kdkernels.trainers.run import Run
from kdkernels.trainers.setup import build, check_output, saved_dtype
from kdkernels.trainers.signals import StopSignals


@dataclass(frozen=True)
class DistillResult:
    """student: the trained model in eval mode, as saved. output: the run's folder; the student is `output/student`.

    summary: what `output/summary.json` holds: teacher, student_params, steps, tokens, seconds, peak_rss_mib, and the
    held-out scores by domain `before` (if measured) and `after`.
    """

    student: Any
    tokenizer: Any
    output: Path
    summary: dict[str, Any]


def distill(
    config: DistillConfig,
    *,
    teacher: Any = None,
    student: Any = None,
    tokenizer: Any = None,
    progress: bool = True,
) -> DistillResult:
    """Distil `config.teacher` into `config.student` and save the student in transformers' format.

    Models and tokeniser may be given as objects; they then stand in for the paths (which are still recorded), and the
    student is trained in place. The optimiser's batch is `accumulate` x `batch_size` blocks; its loss is the sum over
    the tokens that count divided by their number, however they are spread over the passes.
    Raises `UserError` for wrong input and `Interrupted` after SIGINT or SIGTERM, the state saved. With
    `config.resume` a run goes on bit for bit as if it had not been interrupted (same machine, threads and versions);
    a finished run is only read back.
    """
    config.validate()
    with StopSignals() as stop:
        output = check_output(config)
        finished = output / "summary.json"
        if finished.is_file():
            summary = json.loads(finished.read_text(encoding="utf-8"))
            where = str(output / "student")
            kept = load_model("student", where, saved_dtype(config)).eval()
            return DistillResult(kept, load_tokenizer("student", where), output, summary)
        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        setup = build(config, teacher, student, tokenizer)
        write_json(output / "config.json", config.to_dict())
        summary = Run(config, setup, output, stop).train(progress)
    return DistillResult(setup.objective.student.eval(), setup.tokenizer, output, summary)
