"""How much the demo's student has taken over: `make demo-report`, after `make demo` (run first where there is none).

    python -m demo.report [--demo runs/demo] [--prompts N] [--tokens N]

White-box comparison on held-out text; answers of teacher, student and the student before to the beginnings of held-out
documents, compared by the offline judge (RSE); questions about identity, asked of teacher and student. Stops and starts
again where it was. Writes DEMO/evaluation.html and .json; exit status 1 if the student does not answer more like its
teacher than before.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdkernels.errors import UserError

FACTS = {
    "name": "SmolLM2",
    "aliases": ["SmolLM"],
    "facts": {
        "team": {"statements": ["SmolLM2 was made by Hugging Face."], "names": ["Hugging Face"]},
        "technology": {"statements": ["SmolLM2 is a small language model of 135 million parameters."]},
    },
}
_OPENING = 48  # tokens of a document that are its prompt


class Evaluation:
    """The parts in their order; one whose file is there is not done again."""

    def __init__(self, demo: Path, prompts: int, tokens: int) -> None:
        self.run, self.output = demo / "distilled", demo / "distilled" / "evaluation"
        self.prompts, self.tokens = prompts, tokens
        self.config = json.loads((self.run / "config.json").read_text(encoding="utf-8"))
        self._kept: dict[str, Any] = {}

    def once(self, file: str, what: str, work: Callable[[Path], None]) -> None:
        """Do `work` unless its file is there."""
        path = self.output / file
        done = path.is_file()
        print(f"[{file}] {'done before' if done else what}", flush=True)
        if not done:
            work(path)

    def everything(self) -> None:
        """Every part."""
        self.once("compare.json", "teacher and student on the same held-out tokens", self._compare)
        self.once("prompts.jsonl", "beginnings of held-out documents", self._write_prompts)
        self.once(
            "before/rse.json", "answers of the student before, beside the teacher's", lambda p: self._rse(p, "before")
        )
        self.once("rse.json", "answers of the student, beside the teacher's", lambda p: self._rse(p, "student"))
        self.once("identity.jsonl", "questions about identity, to teacher and student", self._identity)
        self.once("ice.json", "does the student answer as somebody else?", self._ice)

    def _compare(self, path: Path) -> None:
        from kdkernels.cli import main

        line = ["evaluate", "compare", "--run", str(self.run), "--dtype", "bfloat16", "--max-tokens", "4096", "--quiet"]
        if main(line):
            raise UserError("the comparison did not run; see the line above")

    def _write_prompts(self, path: Path) -> None:
        """Lines of prompts by domain, the same number of each."""
        from kdkernels.data import load_corpus
        from kdkernels.evaluation.records import Record, write_records

        words, config = self._words(chat=False), self.config
        corpus = load_corpus(
            config["data"], config["domain"], words, length=config["block_size"], held_out=config["held_out"],
            seed=config["seed"], text_key=config["text_key"],
        )  # fmt: skip
        rows: dict[tuple[str, str], Record] = {}
        for domain, blocks in corpus.held_out.items():
            # not documents alone: three long speeches would be all of a domain
            for i in range(min(len(blocks), self.prompts)):
                text = words.decode(blocks[i]["input_ids"][:_OPENING].tolist(), skip_special_tokens=True)
                rows.setdefault((domain, text), Record(f"{domain}-{i}", domain, text))
        write_records(path, [row for row in rows.values() if row.turns[0].strip()])

    def _rse(self, path: Path, model: str) -> None:
        from kdkernels.evaluation import response_similarity
        from kdkernels.evaluation.records import generate, read_records, write_records

        rows = read_records(self.output / "prompts.jsonl")
        rows = generate(rows, "reference", self._chat("teacher", chat=False))
        rows = generate(rows, "response", self._chat(model, chat=False))
        result = response_similarity(
            [row.prompt for row in rows], [row.reference for row in rows], [row.response for row in rows],
            datasets=[row.dataset for row in rows], ids=[row.id for row in rows],
        )  # fmt: skip
        write_records(path.parent / "answers.jsonl", rows)
        result.save(path)

    def _identity(self, path: Path) -> None:
        from kdkernels.evaluation.facts import load_questions
        from kdkernels.evaluation.records import Record, generate, write_records

        rows = [Record(q.id, "identity", q.text) for q in load_questions(None, "en")]
        rows = generate(rows, "reference", self._chat("teacher", chat=True))
        write_records(path, generate(rows, "response", self._chat("student", chat=True)))

    def _ice(self, path: Path) -> None:
        from kdkernels.evaluation import identity_consistency

        identity_consistency(
            self._chat("student", chat=True), FACTS, language="en", search=False, budget=60,
            transcript=self.output / "transcript.jsonl", resume=(self.output / "transcript.jsonl").is_file(),
        ).save(path)  # fmt: skip

    def _words(self, *, chat: bool) -> Any:
        """The tokenizer; without its chat template, a prompt is a text to go on with."""
        from kdkernels.trainers.models import load_tokenizer

        words = self._kept.setdefault("words", load_tokenizer("teacher", self.config["teacher"]))
        if chat:
            return words
        plain = copy.deepcopy(words)
        plain.chat_template = None
        return plain

    def _chat(self, role: str, *, chat: bool) -> Any:
        """A model, its replies kept on disk."""
        from kdkernels.evaluation import CachedChat, LocalChat

        made = LocalChat(
            self._model(role), self._words(chat=chat), name=role, max_new_tokens=self.tokens, batch_size=12
        )
        return CachedChat(made, self.output / "replies.sqlite")

    def _model(self, role: str) -> Any:
        import torch

        from kdkernels.trainers.models import layers_of, load_model, student_from_layers

        if role not in self._kept:
            where = {"teacher": self.config["teacher"], "student": str(self.run / "student")}.get(
                role, self.config["student"]
            )
            keep = None
            if role == "before":
                keep = layers_of(where, self._model("teacher").config.num_hidden_layers)
            made = (
                load_model(role, where, torch.bfloat16)
                if keep is None
                else student_from_layers(self._model("teacher"), keep)
            )
            self._kept[role] = made.to(torch.bfloat16).eval()
        return self._kept[role]

    def scores(self) -> tuple[float, float]:
        """RSE before and after."""
        found = [
            json.loads((self.output / file).read_text(encoding="utf-8")) for file in ("before/rse.json", "rse.json")
        ]
        return found[0]["overall"], found[1]["overall"]


def main(argv: list[str] | None = None) -> int:
    """Evaluate, write the page, say whether the student has come closer; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.report", description="What the demo's student has taken over."
    )
    parser.add_argument("--demo", default="runs/demo", help="folder of the demo; where it has no student, it is run")
    parser.add_argument("--prompts", type=int, default=12, help="prompts of each domain")
    parser.add_argument("--tokens", type=int, default=48, help="longest answer")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on this disk
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    demo = Path(arguments.demo)
    try:
        return _evaluate(demo, arguments)
    except UserError as error:
        print(f"demo.report: error: {error}", file=sys.stderr)
        return 2


def _evaluate(demo: Path, arguments: argparse.Namespace) -> int:
    from kdkernels import cli

    if arguments.prompts < 1 or arguments.tokens < 1:
        raise UserError(f"prompts is {arguments.prompts}, tokens {arguments.tokens}; allowed: 1 or more")
    if not (demo / "distilled" / "summary.json").is_file():
        from demo.__main__ import main as run_demo

        status = run_demo(["--output", str(demo)])
        if status:
            return status
    evaluation = Evaluation(demo, arguments.prompts, arguments.tokens)
    evaluation.everything()
    others = [demo / "cross_entropy"] if (demo / "cross_entropy" / "summary.json").is_file() else []
    runs = [str(run) for run in (demo / "distilled", *others)]
    status = cli.main(["report", *runs, "--output", str(demo / "evaluation.html")])
    before, after = evaluation.scores()
    print(f"RSE against the teacher (offline judge, 1 to 5): {before:.3f} before, {after:.3f} after")
    if not after > before:
        print("demo.report: the student does not answer more like its teacher than before", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
