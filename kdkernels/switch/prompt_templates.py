"""Prompt formats with the threshold settings that go with them, as small files.

A template is a .json (or .toml) file: ``description``; ``prompt``, text with ``{prompt}`` in it, or ``chat`` true for
the tokenizer's own chat format (with ``system``, optional); ``settings``, options of `kdkernels generate` that the
command line overrides. Looked for by name in the user's folder, then in the package; a path to a file works too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdkernels.errors import UserError

PACKAGED = Path(__file__).with_name("templates")
SETTINGS: dict[str, tuple[type, ...]] = {
    "schedule": (str,), "tau0": (int, float), "decay": (int, float), "temperature": (int, float), "top_k": (int,),
    "top_p": (int, float), "greedy": (bool,), "max_new_tokens": (int,),
}  # fmt: skip
_PLACE = "{prompt}"


@dataclass(frozen=True)
class Template:
    """How a prompt is put to a model, and how far the student may then go."""

    name: str
    description: str = ""
    prompt: str = _PLACE
    chat: bool = False
    system: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def ids(self, tokenizer: Any, text: str) -> list[int]:
        """The prompt's tokens."""
        if not self.chat:
            return [int(i) for i in tokenizer(self.prompt.replace(_PLACE, text))["input_ids"]]
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"template is {self.name!r}, a chat; the tokenizer has no chat format; use another template"
            )
        turns = [{"role": "system", "content": self.system}] if self.system else []
        turns.append({"role": "user", "content": text})
        shown = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return [int(i) for i in tokenizer(shown, add_special_tokens=False)["input_ids"]]


def user_folder() -> Path:
    """$KDKERNELS_TEMPLATES, else kdkernels/templates in the user's configuration folder."""
    given = os.environ.get("KDKERNELS_TEMPLATES")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "kdkernels" / "templates"


def names() -> dict[str, Path]:
    """Every template by name; the user's hide the package's."""
    files = [p for folder in (PACKAGED, user_folder()) if folder.is_dir() for p in sorted(folder.iterdir())]
    return {p.stem: p for p in files if p.suffix in (".json", ".toml")}


def load(name: str) -> Template:
    """A template by name or path; `UserError` says what is wrong with it."""
    from kdkernels.trainers.config import read_config_file

    path = Path(name)
    if path.suffix not in (".json", ".toml"):
        known = names()
        if name not in known:
            raise UserError(f"template is {name!r}; allowed: {', '.join(sorted(known))}, or a file; choose one")
        path = known[name]
    return _checked(path, read_config_file(path))


def _checked(path: Path, values: dict[str, Any]) -> Template:
    kinds = {"description": str, "prompt": str, "chat": bool, "system": str, "settings": dict}
    for key, value in values.items():
        if key not in kinds:
            raise UserError(f"template {str(path)!r}: unknown key {key!r}; allowed: {', '.join(kinds)}; correct it")
        if not isinstance(value, kinds[key]):
            raise UserError(f"template {str(path)!r}: {key} is {value!r}; allowed: {kinds[key].__name__}; correct it")
    for key, value in values.get("settings", {}).items():
        if key not in SETTINGS:
            raise UserError(
                f"template {str(path)!r}: unknown setting {key!r}; allowed: {', '.join(SETTINGS)}; correct it"
            )
        if not isinstance(value, SETTINGS[key]) or (isinstance(value, bool) and bool not in SETTINGS[key]):
            kind = " or ".join(t.__name__ for t in SETTINGS[key])
            raise UserError(f"template {str(path)!r}: {key} is {value!r}; allowed: {kind}; correct it")
    if not values.get("chat") and _PLACE not in values.get("prompt", _PLACE):
        raise UserError(f"template {str(path)!r}: prompt has no {_PLACE}; put it where the text goes")
    if values.get("chat") and "prompt" in values:
        raise UserError(f"template {str(path)!r}: prompt and chat; allowed: one of them; remove the other")
    return Template(path.stem, **values)
