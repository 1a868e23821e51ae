"""The mutable state of one run, and the steps it takes: train, evaluate, log, save."""

from __future__ import annotations

import math
import platform
import signal
import time
from pathlib import Path
from typing import Any

import torch

from kdkernels.data import BlockOrder, batch_of, counted
from kdkernels.errors import UserError
from kdkernels.trainers import checkpoint
from kdkernels.trainers.config import DistillConfig
from kdkernels.trainers.domain_order import domains_of
from kdkernels.trainers.heldout import measure
from kdkernels.trainers.language import LanguageStream
from kdkernels.trainers.logbook import Logbook, peak_rss_mib
from kdkernels.trainers.on_policy import WritingStopped
from kdkernels.trainers.on_policy_text import OnPolicyText
from kdkernels.trainers.optim import build_optimizer, learning_rate
from kdkernels.trainers.progress import progress_bar
from kdkernels.trainers.setup import Setup, save_student, saved_dtype
from kdkernels.trainers.signals import Interrupted, StopSignals
from kdkernels.trainers.tally import Window

Scores = dict[str, dict[str, float | None]]


class Run:
    """One run from its first (or its resumed) step to the saved student.

    What a checkpoint holds is exactly what the following steps depend on: parameters, moments, generators, the step
    (which gives the learning rate and the place in the data), and the sums behind the next line of the log.
    """

    def __init__(self, config: DistillConfig, setup: Setup, output: Path, stop: StopSignals) -> None:
        self.config, self.output, self.stop = config, output, stop
        self.objective, self.corpus, self.tokenizer = setup.objective, setup.corpus, setup.tokenizer
        self.student = setup.objective.student
        self.optimizer = build_optimizer(self.student, config)
        self.domains = domains_of(config, setup, output) if config.ddk else None
        sizes = {name: len(blocks) for name, blocks in self.corpus.train.items()}
        self.order = self.domains or BlockOrder(sizes, config.mix, config.seed)
        self.writing = OnPolicyText.of(config, setup, self.order) if setup.writer is not None else None
        self.language = LanguageStream(setup.language, config, setup.objective) if setup.language is not None else None
        self.step = 0
        self.evaluated = -1  # the latest step with an evaluation
        self.tokens = 0  # tokens that counted, so far
        self.seconds = 0.0
        self.clock = time.perf_counter()
        self.before: Scores = {}
        self.window = Window()
        self.checkpoints = output / "checkpoints"
        self.log = Logbook(output / "metrics.jsonl", self._restore() if config.resume else 0)

    # --- state ---

    def _restore(self) -> int:
        """Load the newest checkpoint, if any; returns the length of the log it belongs to, bytes."""
        steps = checkpoint.steps_in(self.checkpoints)
        if not steps:
            return 0
        state = checkpoint.load(checkpoint.path_of(self.checkpoints, steps[-1]))
        if state["fingerprint"] != self.corpus.fingerprint:
            raise UserError("data has changed since the run began, so it cannot go on; choose another --output")
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("step", "evaluated", "tokens", "seconds", "before"):
            setattr(self, name, state[name])
        self.window = Window(state["sums"], *state["window"])
        for name in ("domains", "writing", "language"):
            if (part := getattr(self, name)) is not None:
                part.load_state_dict(state[name])
        checkpoint.set_rng_state(state["rng"])
        return int(state["log_length"])

    def _save(self) -> None:
        state = {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": checkpoint.rng_state(),
            "evaluated": self.evaluated,
            "tokens": self.tokens,
            "seconds": self._tick(),
            "before": self.before,
            "sums": self.window.sums,
            "window": [self.window.steps, self.window.tokens, self.window.seconds],
            "log_length": self.log.length(),
            "domains": None if self.domains is None else self.domains.state_dict(),
            "writing": None if self.writing is None else self.writing.state_dict(),
            "language": None if self.language is None else self.language.state_dict(),
            "fingerprint": self.corpus.fingerprint,
        }
        checkpoint.save(self.checkpoints, self.step, state, self.config.keep)

    def _tick(self) -> float:
        """Seconds spent in this run, over all its sessions."""
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        return self.seconds

    # --- the loop ---

    def train(self, progress: bool) -> dict[str, Any]:
        """Run to the end, save the student, and return the summary; `Interrupted` after a signal, the state saved."""
        config = self.config
        if self.step == 0 and self.evaluated < 0:
            self.log.write("start", config=config.to_dict(), versions=versions(), fingerprint=self.corpus.fingerprint)
        if self.writing is not None:
            self.writing.writer.progress = progress
        with progress_bar(config.steps, self.step, progress) as bar:
            while self.step < config.steps:
                if self._evaluation_due() and self._evaluate() is None:
                    self._leave()
                if self.domains is not None and self.domains.due(self.step):
                    self.log.write("ddk", **self.domains.remeasure(self.student, self.step))
                if not self._advance():
                    self._leave()
                bar.update()
                if self.step % config.log_every == 0 or self.step == config.steps:
                    bar.set_postfix(self._log_step(), refresh=False)
                if config.save_every and self.step % config.save_every == 0:
                    self._save()
        self.student.to(saved_dtype(config))  # what is scored is what is saved; a second cast changes nothing
        after = self._evaluate()
        if after is None:
            self._leave()
            raise AssertionError("unreachable")
        return self._finish(after)

    def _advance(self) -> bool:
        """One optimiser step; False, with nothing changed, when a signal came before it was complete."""
        config, begin = self.config, time.perf_counter()
        rng = checkpoint.rng_state()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        taken = self._gradients()
        if taken is None:
            self.optimizer.zero_grad()
            checkpoint.set_rng_state(rng)
            return False
        if config.clip:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for part in (self.writing, self.language):
            if part is not None:
                part.commit()
        sums, items = taken
        self.step += 1
        self.tokens += items
        self.window.add(sums, items, time.perf_counter() - begin)
        return True

    def _gradients(self) -> tuple[torch.Tensor, int] | None:
        """Every pass of a step, forwards and backwards: sums for the log, and the tokens that count; None after a
        signal."""
        try:
            batches, generated = self._batches()
        except WritingStopped:
            return None
        items = sum(counted(batch["labels"]) for batch in batches)
        second = [] if self.language is None else self.language.batches(self.step)
        # hard labels are for text that somebody meant, not for what the student has written
        ce_weight = 0.0 if generated else self.config.ce_weight
        sums = torch.zeros(5, dtype=torch.float64, device=self.objective.device)
        for number, batch in enumerate(batches):
            if self.stop.received is not None:
                return None
            loss, parts = self.objective(batch, max(items, 1), ce_weight=ce_weight)
            loss.backward()
            sums += torch.cat([loss.detach().double().reshape(1), parts])
            if self.language is not None:
                sums[0] += self.language.backward(second[number])
        return sums, items

    def _batches(self) -> tuple[list[dict[str, torch.Tensor]], bool]:
        """The batches of a step, one a pass, and whether their text was generated."""
        if self.writing is not None:
            return self.writing.batches(self.step, lambda: self.stop.received is not None)
        size, passes, device = self.config.batch_size, self.config.accumulate, self.objective.device
        cursor = self.step * passes * size
        return [batch_of(self.corpus, self.order, cursor + i * size, size, device) for i in range(passes)], False

    def _log_step(self) -> dict[str, str]:
        """Write the means since the last line; returns what the progress bar shows."""
        window, self.window = self.window, Window()
        loss, *means = window.means()
        if not math.isfinite(loss):
            raise UserError(
                f"loss is {loss} at step {self.step}; begin again with another --output and a lower --lr "
                f"({self.config.lr}) or a --clip ({self.config.clip})"
            )
        names = ("divergence", "nll", "top1", "entropy")
        row = {name: value for name, value in zip(names, means, strict=True)}
        if self.config.kd_weight == 0:
            row = {"nll": row["nll"], "entropy": row["entropy"]}
        for part in (self.writing, self.language):
            row |= {} if part is None else part.figures()
        rate = learning_rate(self.step - 1, self.config)
        speed = window.tokens / max(window.seconds, 1e-9)
        self.log.write(
            "step", step=self.step, loss=loss, **row, lr=rate, tokens=self.tokens, tokens_per_second=round(speed, 1)
        )
        return {"loss": f"{loss:.3f}", "tok/s": f"{speed:.0f}"}

    def _evaluation_due(self) -> bool:
        if self.step == self.evaluated:
            return False
        every = self.config.eval_every
        return self.config.eval_before if self.step == 0 else bool(every) and self.step % every == 0

    def _evaluate(self) -> Scores | None:
        """Held-out scores by domain, logged; None when a signal came first."""
        objective, scores = self.objective, {}
        training = self.student.training
        self.student.eval()
        for name, blocks in self.corpus.held_out.items():
            if self.stop.received is not None:
                self.student.train(training)
                return None
            scores[name] = measure(
                objective.cached or (objective.teacher, objective.teacher_head),
                (self.student, objective.student_head),
                blocks,
                limit=self.config.eval_blocks,
                batch_size=self.config.batch_size,
                dtype=objective.dtype,
                device=objective.device,
                vocab_size=objective.vocab_size,
                backend=self.config.backend,
            ).to_dict()
        self.student.train(training)
        self.evaluated = self.step
        if self.step == 0:
            self.before = scores
        self.log.write("eval", step=self.step, domains=scores)
        return scores

    def _leave(self) -> None:
        """Save what there is and raise `Interrupted`."""
        self._save()
        self.log.close()
        signum = self.stop.received or signal.SIGTERM
        raise Interrupted(
            f"stopped by {signal.Signals(signum).name} at step {self.step} of {self.config.steps}; saved in "
            f"{str(self.checkpoints)!r}; go on with --resume",
            signum,
        )

    def _recorded_teacher(self) -> str:
        cached = self.objective.cached
        return "" if cached is None else cached.cache.settings.teacher

    def _finish(self, after: Scores) -> dict[str, Any]:
        """Save the student and the summary; the checkpoints, needed no more, go."""
        where = save_student(self.student, self.tokenizer, self.output)
        config = self.config
        summary = {
            "teacher": config.teacher or self._recorded_teacher(),
            **({"cache": config.cache} if config.cache else {}),
            "student": str(where),
            "student_params": _parameters(self.student),
            "teacher_params": _parameters(self.objective.teacher),
            "divergence": str(self.objective.divergence),
            "steps": self.step,
            "tokens": self.tokens,
            "before": self.before,
            "after": after,
            "seconds": round(self._tick(), 3),
            "peak_rss_mib": round(peak_rss_mib(), 1),
            "versions": versions(),
        }
        self.log.write("end", **{key: summary[key] for key in ("steps", "tokens", "seconds", "peak_rss_mib")})
        self.log.close()
        checkpoint.write_json(self.output / "summary.json", summary)
        if self.domains is not None:
            self.domains.draw(self.output / "ddk.png")
        for step in checkpoint.steps_in(self.checkpoints):
            checkpoint.path_of(self.checkpoints, step).unlink()
        return summary


def _parameters(model: Any) -> int | None:
    return None if model is None else sum(p.numel() for p in model.parameters())


def versions() -> dict[str, str]:
    """The versions a result depends on."""
    import importlib.metadata

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("kdkernels", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
