"""Optional dependencies: imported on first use, with an error that names the extra to install."""

from __future__ import annotations

from typing import Any

from kdkernels.errors import UserError

# the extra of kdkernels that brings a package; `trainers` brings the others
_EXTRAS = {"gguf": "gguf", "openai": "judge", "yaml": "evaluation"}


def need(module: str, what: str) -> Any:
    """Import an optional dependency, or raise a `UserError` that names it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        extra = _EXTRAS.get(package, "trainers")
        raise UserError(f"{what} needs {package}, which is not installed: pip install 'kdkernels[{extra}]'") from error
