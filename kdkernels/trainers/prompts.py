"""Prompts of a file, with responses where it has them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdkernels.errors import UserError


@dataclass(frozen=True)
class Prompts:
    """Token ids of prompts and of their responses (ended by the end-of-text token), or None for the latter."""

    prompts: list[list[int]]
    responses: list[list[int]] | None
    fingerprint: str


def load_prompts(path: str, template: str, tokenizer: Any) -> Prompts:
    """A .txt file has a prompt a line, a .jsonl file ``prompt`` and, in every line or in none, ``response``.

    The template puts a prompt to the models: `kdkernels generate --templates` lists them.
    """
    from kdkernels.switch import prompt_templates

    file = Path(path).expanduser()
    if not file.is_file() or file.suffix not in (".txt", ".jsonl"):
        raise UserError(f"prompts is {path!r}; allowed: a .txt or .jsonl file; correct the path")
    form = prompt_templates.load(template)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"prompts {path!r} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from error
    rows = [_row(f"prompts {path!r} line {i}", line, file.suffix) for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"prompts is {path!r}, which holds no prompt; add some")
    answered = [response for _, response in rows if response is not None]
    if answered and len(answered) < len(rows):
        raise UserError(
            f"prompts {path!r}: {len(answered)} of {len(rows)} lines have a response; allowed: all or none; split it"
        )
    prompts = [form.ids(tokenizer, prompt) for prompt, _ in rows]
    end = [tokenizer.eos_token_id]
    responses = [tokenizer(text, add_special_tokens=False)["input_ids"] + end for text in answered] or None
    digest = hashlib.sha256(json.dumps([prompts, responses]).encode()).hexdigest()
    return Prompts(prompts, responses, digest)


def _row(where: str, line: str, suffix: str) -> tuple[str, str | None]:
    if suffix == ".txt":
        return line, None
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error}); correct it") from error
    prompt, response = (row.get("prompt"), row.get("response")) if isinstance(row, dict) else (None, None)
    if not isinstance(prompt, str) or not prompt.strip() or not isinstance(response, str | None):
        raise UserError(f"{where}: prompt must be text, response text or absent; correct it")
    return prompt, response
