"""Text with its tokens coloured by who spoke them; on a page, and on a terminal."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

STYLE = """
.passage { white-space: pre-wrap; background: var(--raised); border-radius: .5rem; padding: .75rem; margin: .75rem 0; }
.prompt { color: var(--soft); }
.tok { border-radius: .2rem; background: color-mix(in srgb, var(--c0) calc(40% * var(--j, 0)), transparent); }
.tok.t { background: color-mix(in srgb, var(--c1) calc(25% + 40% * var(--j, 0)), transparent);
  box-shadow: inset 0 -2px var(--c1); }
.tok:hover, .tok:focus { outline: 2px solid var(--ink); }
.tok:hover::after, .tok:focus::after { content: attr(data-tip); position: fixed; inset: auto 0 0 0; z-index: 1;
  padding: .6rem 1rem; background: var(--ink); color: var(--paper); font-size: .9rem; white-space: normal; }
"""
TEACHER, RESET = "\x1b[1;35m", "\x1b[0m"


@dataclass(frozen=True)
class Token:
    """A piece of text and what is known of it; numbers are None where unknown."""

    text: str
    from_teacher: bool
    jsd: float | None = None
    threshold: float | None = None
    student_log_prob: float | None = None
    teacher_log_prob: float | None = None

    @property
    def tip(self) -> str:
        """What is shown of the token when it is pointed at."""
        parts = ["teacher" if self.from_teacher else "student"]
        if self.jsd is not None:
            parts.append(f"JSD {self.jsd:.3f} bit")
        if self.threshold is not None:
            parts.append(f"threshold {self.threshold:.3f}")
        for name, value in (("student", self.student_log_prob), ("teacher", self.teacher_log_prob)):
            if value is not None:
                parts.append(f"log p {name} {value:.2f}")
        return " · ".join(parts)


@dataclass(frozen=True)
class Passage:
    """A prompt, and what was written after it."""

    prompt: str
    tokens: Sequence[Token]


def pieces(tokenizer: Any, context: Sequence[int], ids: Sequence[int]) -> list[str]:
    """The text that each of ``ids`` adds after ``context``.

    A character of several tokens goes to the last of them; the others add nothing.
    """
    every = [*context, *ids]
    begin, read = max(0, len(context) - 4), len(context)
    found = []
    for at in range(len(context), len(every)):
        before = tokenizer.decode(every[begin:read], skip_special_tokens=False)
        after = tokenizer.decode(every[begin : at + 1], skip_special_tokens=False)
        if after.endswith("\ufffd") and at + 1 < len(every):
            found.append("")
            continue
        found.append(after[len(before) :])
        begin, read = read, at + 1
    return found


def to_html(passage: Passage) -> str:
    """A block of HTML; a token is pointed at with the mouse, a finger or the keyboard."""
    spans = []
    for token in passage.tokens:
        if not token.text:
            continue
        weight = "" if token.jsd is None else f' style="--j:{min(max(token.jsd, 0.0), 1.0):.2f}"'
        speaker = "tok t" if token.from_teacher else "tok"
        tip = html.escape(token.tip, quote=True)
        spans.append(f'<span class="{speaker}"{weight} tabindex="0" data-tip="{tip}">{html.escape(token.text)}</span>')
    return f'<div class="passage"><span class="prompt">{html.escape(passage.prompt)}</span>{"".join(spans)}</div>'


def to_text(passage: Passage, colour: bool) -> str:
    """Text for a terminal: the teacher's tokens in colour, or between ``[[`` and ``]]``."""
    start, end = (TEACHER, RESET) if colour else ("[[", "]]")
    parts, speaking = [passage.prompt], False
    for token in passage.tokens:
        if token.from_teacher != speaking:
            parts.append(start if token.from_teacher else end)
            speaking = token.from_teacher
        parts.append(token.text)
    return "".join([*parts, end if speaking else ""])
