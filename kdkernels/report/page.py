"""One HTML file that needs nothing else: no network, no fonts, no scripts from elsewhere; readable on a phone."""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #667085; --line: #d5dae3; --paper: #fff; --raised: #f5f7fa;
  --c0: #2f6fb3; --c1: #d97706; --c2: #2a9d74; --c3: #b0417f; --c4: #7a5bc4; --c5: #6b7280; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #384152; --paper: #14181f; --raised: #1d232d;
    --c0: #6aa9e9; --c1: #f0a54a; --c2: #58c79c; --c3: #e07bb3; --c4: #ab92ea; --c5: #9aa3b2; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1rem 4rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; line-height: 1.25; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.soft, figcaption, th { color: var(--soft); font-weight: normal; font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem .25rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.25rem 0; max-width: 44rem; } svg { width: 100%; height: auto; display: block; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(title: str, body: str, style: str = "") -> str:
    """A whole document; ``body`` is HTML, ``title`` is text. The policy in its head forbids it to load anything."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of text cells; the first column is on the left, numbers are the caller's to format."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}</table></div>'


def write(path: str | Path, text: str) -> Path:
    """The page as a file, whole or not at all; its folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path
