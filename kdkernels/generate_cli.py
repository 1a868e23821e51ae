"""`kdkernels generate`: text that a student writes and a teacher corrects, on the terminal and as a page.

kdkernels generate --student S --teacher T [PROMPT ...] [--prompts FILE] [--template NAME]
kdkernels generate --student S --compare S2 S3 ... --teacher T ...      students alone, side by side
kdkernels generate --templates                                          the templates there are
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdkernels.errors import UserError

_DEFAULTS: dict[str, Any] = {
    "schedule": "exponential", "tau0": None, "decay": None, "temperature": 1.0, "top_k": None, "top_p": None,
    "greedy": False, "max_new_tokens": 128,
}  # fmt: skip


def add_parser(commands: Any) -> None:
    """Put `generate` into the command line."""
    parser = commands.add_parser(
        "generate",
        help="text that a student writes and a teacher corrects, token by token",
        description="Generate with a student that a teacher corrects where the two disagree (SWITCH).",
    )
    parser.set_defaults(run=_generate)
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="a prompt; or --prompts")
    parser.add_argument("--prompts", metavar="FILE", help=".txt: a prompt a line; .jsonl: a prompt a line in "
                        "--text-key, its template, if it has one, in `template`")  # fmt: skip
    parser.add_argument(
        "--text-key", default="prompt", metavar="STR", help="the prompt's field of a line (default prompt)"
    )
    parser.add_argument(
        "--template", default="plain", metavar="NAME", help="prompt format and settings (default plain)"
    )
    parser.add_argument("--templates", action="store_true", help="list the templates and stop")
    models = parser.add_argument_group("models")
    for role in ("student", "teacher"):
        models.add_argument(f"--{role}", metavar="MODEL", help="a folder, a .gguf file or a name")
    models.add_argument("--compare", nargs="+", default=[], metavar="MODEL", help="more students: each writes alone "
                        "from the same prompts and numbers, the teacher only measures")  # fmt: skip
    models.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default float32)")
    models.add_argument(
        "--device", default="auto", metavar="STR", help="torch device; auto takes a GPU if there is one"
    )
    _add_settings(parser)
    results = parser.add_argument_group("results")
    results.add_argument("--output", default="generated.html", metavar="FILE", help="the page (default generated.html)")
    results.add_argument("--json", metavar="FILE", help="write the figures by position as JSON too")
    results.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="on the terminal "
                         "(default auto: not with NO_COLOR, not into a file)")  # fmt: skip
    results.add_argument("--quiet", action="store_true", help="no progress bar, no text")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation; what is not given comes from the template")
    group.add_argument("--schedule", metavar="NAME", help="course of the threshold: exponential (the default), linear, "
                       "constant, growth, mixture, random, moving_average, target_share")  # fmt: skip
    group.add_argument("--tau0", type=float, metavar="FLOAT", help="the schedule's first parameter")
    group.add_argument("--decay", type=float, metavar="FLOAT", help="its second")
    group.add_argument("--temperature", type=float, metavar="FLOAT", help="of sampling (1.0)")
    group.add_argument("--top-k", type=int, metavar="INT", help="draw from the k most likely tokens")
    group.add_argument("--top-p", type=float, metavar="FLOAT", help="draw from the most likely tokens with this mass")
    group.add_argument("--greedy", action=argparse.BooleanOptionalAction, help="take the most likely token")
    group.add_argument("--max-new-tokens", type=int, metavar="INT", help="the most tokens of a response (128)")
    group.add_argument("--seed", type=int, default=0, metavar="INT", help="of the draws (default 0)")
    group.add_argument("--batch-size", type=int, default=8, metavar="INT", help="prompts at a time (default 8)")
    group.add_argument("--measure", choices=("always", "needed"), default="always", help="needed: leave out what "
                       "cannot change the text, also from the figures (default always)")  # fmt: skip


def _generate(arguments: argparse.Namespace) -> int:
    from kdkernels.switch import prompt_templates

    if arguments.templates:
        print("\n".join(f"{name:14}{prompt_templates.load(str(path)).description}"
                        for name, path in sorted(prompt_templates.names().items())))  # fmt: skip
        return 0
    prompts = _prompts(arguments)
    for name in ("student", "teacher"):
        if not getattr(arguments, name):
            raise UserError(f"{name} is ''; allowed: a folder, a file or a name; give --{name}")
    if arguments.batch_size < 1:
        raise UserError(f"batch_size is {arguments.batch_size}; allowed: at least 1; raise it")
    from kdkernels.report import generation, page

    begin = time.perf_counter()
    session = _Session(arguments, prompts)
    studies = [session.study(where) for where in (arguments.student, *arguments.compare)]
    seconds = time.perf_counter() - begin
    if not arguments.quiet:
        _show(studies, arguments.color)
        tokens = sum(s.summary["tokens"] for s in studies)
        print(f"{tokens} tokens in {seconds:.1f} s")
    if arguments.output:
        print(f"page: {page.write(arguments.output, generation.generation_page(studies))}")
    if arguments.json:
        page.write(arguments.json, json.dumps([s.to_dict() for s in studies], indent=1) + "\n")
    return 0


def _prompts(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """(prompt, template) in their order."""
    found = [(text, arguments.template) for text in arguments.prompt]
    if arguments.prompts:
        path = Path(arguments.prompts)
        if not path.is_file():
            raise UserError(f"prompts is {arguments.prompts!r}; no such file; give a .txt or .jsonl file")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                found.append(_prompt(line, f"{path}, line {number}", path.suffix == ".jsonl", arguments))
    if not found:
        raise UserError("there is no prompt; give one, or --prompts FILE")
    empty = next((i for i, (text, _) in enumerate(found) if not text.strip()), None)
    if empty is not None:
        raise UserError(f"prompt {empty + 1} is empty; there is nothing to continue; remove it")
    return found


def _prompt(line: str, where: str, is_json: bool, arguments: argparse.Namespace) -> tuple[str, str]:
    if not is_json:
        return line, arguments.template
    try:
        row = json.loads(line)
        text = row[arguments.text_key]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: no text under {arguments.text_key!r}; give --text-key, or mend the line") from error
    template = row.get("template", arguments.template)
    if not isinstance(text, str) or not isinstance(template, str):
        raise UserError(f"{where}: prompt and template must be text; mend the line")
    return text, template


class _Session:
    """What every student of a call shares: prompts with their templates and settings, the teacher, the draws."""

    def __init__(self, arguments: argparse.Namespace, prompts: list[tuple[str, str]]) -> None:
        import torch

        from kdkernels.switch import prompt_templates
        from kdkernels.trainers import models

        self.arguments, self.prompts = arguments, prompts
        self.device, self.dtype = torch.device(_device(arguments.device)), getattr(torch, arguments.dtype)
        names = dict.fromkeys(template for _, template in prompts)
        self.templates = {name: prompt_templates.load(name) for name in names}
        self.settings = {name: _settings(arguments, template) for name, template in self.templates.items()}
        self.longest = max(s["max_new_tokens"] for s in self.settings.values())
        generator = torch.Generator().manual_seed(arguments.seed)
        self.uniforms = torch.rand(len(prompts), self.longest, dtype=torch.float64, generator=generator)
        self.teacher = models.load_model("teacher", arguments.teacher, self.dtype).to(self.device).eval()
        self.words = models.load_tokenizer("teacher", arguments.teacher)

    def study(self, where: str) -> Any:
        """Everything that one student writes, as a `Study`."""
        from kdkernels.report.generation import Study, passages_of
        from kdkernels.switch.output import merged
        from kdkernels.trainers import models

        student = models.load_model("student", where, self.dtype).to(self.device).eval()
        words = self._tokenizer(where)
        outputs: list[Any] = []
        texts: dict[int, Any] = {}
        for rows, out in self._batches(student, words):
            outputs.append(out)
            texts.update(zip(rows, passages_of(out, words), strict=True))
        shown: dict[str, Any] = {"template": ", ".join(self.templates)}
        if len(self.settings) == 1:
            shown.update(next(iter(self.settings.values())))
        shown = {k: v for k, v in {**shown, "seed": self.arguments.seed}.items() if v is not None and v is not False}
        name = where if self.arguments.compare else Path(where).name
        return Study(name, shown, merged(outputs, 0), [texts[i] for i in range(len(texts))])

    def _tokenizer(self, where: str) -> Any:
        """The student's tokenizer, which must be the teacher's; the teacher's where a checkpoint has none."""
        from kdkernels.trainers import models

        try:
            words = models.load_tokenizer("student", where)
        except UserError:
            return self.words
        models.same_tokenizer(self.words, words)
        return words

    def _batches(self, student: Any, words: Any) -> Iterator[tuple[list[int], Any]]:
        """(numbers of the prompts, their `SwitchOutput`), prompts of one template together."""
        from kdkernels.trainers.progress import progress_bar

        size = self.arguments.batch_size
        with progress_bar(len(self.prompts) * self.longest, 0, not self.arguments.quiet, "token") as bar:
            for name in self.templates:
                rows = [i for i, (_, template) in enumerate(self.prompts) if template == name]
                for begin in range(0, len(rows), size):
                    batch = rows[begin : begin + size]
                    yield batch, self._responses(student, words, name, batch, bar)

    def _responses(self, student: Any, words: Any, template: str, rows: list[int], bar: Any) -> Any:
        import kdkernels as kd

        settings = dict(self.settings[template])
        greedy = settings.pop("greedy")
        ids = [self.templates[template].ids(words, self.prompts[i][0]) for i in rows]
        try:
            return kd.switch_generate(
                student, self.teacher, *kd.switch.left_padded(ids, 0), **settings, do_sample=not greedy,
                uniforms=self.uniforms[rows, : settings["max_new_tokens"]], tokenizer=words,
                measure=self.arguments.measure, progress=lambda done, most: bar.update(len(ids)),
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error


def _settings(arguments: argparse.Namespace, template: Any) -> dict[str, Any]:
    """Flags first, then the template, then the defaults; students that are compared write alone."""
    from kdkernels.switch.schedules import schedule_of

    flags = {key: getattr(arguments, key) for key in _DEFAULTS if getattr(arguments, key) is not None}
    chosen = {**_DEFAULTS, **template.settings, **flags}
    if "schedule" in flags:  # the template's parameters are those of its own schedule
        chosen.update({key: flags.get(key) for key in ("tau0", "decay")})
    if arguments.compare:
        if {"schedule", "tau0", "decay"} & set(flags):
            raise UserError("compare: the students write alone; leave --schedule, --tau0 and --decay away")
        chosen.update(schedule="constant", tau0=1.0, decay=None)
    try:
        schedule_of(chosen["schedule"], chosen["tau0"], chosen["decay"])
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    if chosen["max_new_tokens"] < 1:
        raise UserError(f"max_new_tokens is {chosen['max_new_tokens']}; allowed: at least 1; raise it")
    return chosen


def _show(studies: list[Any], choice: str) -> None:
    """Every text with the teacher's tokens marked, then the figures."""
    from kdkernels.report.passages import to_text

    colour = choice == "always" or (choice == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    for study in studies:
        if len(studies) > 1:
            print(f"--- {study.name}")
        for passage in study.passages:
            print(to_text(passage, colour) + "\n")
        s = study.summary
        print(f"teacher's share {s['teacher_share']:.1%}, mean divergence {_figure(s['mean_jsd'])} bit, "
              f"log-likelihood ratio {_figure(s['log_likelihood_ratio'])} nats a token")  # fmt: skip
        for name, change in study.changes.items():
            if change is not None:
                print(f"{name.replace('_', ' ')} changes at token {change.position}: {change.before:.3f} before, "
                      f"{change.after:.3f} after (p {change.p_value:.3f})")  # fmt: skip


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return str(torch.empty(0, device=name).device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device is {name!r}; allowed: a torch device of this machine; correct it") from error
