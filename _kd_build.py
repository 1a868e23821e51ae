"""PEP 517 backend: setuptools' own, plus one question first: does the target environment have torch?

With build isolation pip runs this in an environment of its own. If the environment being installed into
already has torch >= 2.10, that one's headers are used and nothing is downloaded; if not (or under tools that
hide the target, such as `uv` and `python -m build`), torch becomes a build requirement.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from setuptools import build_meta as _setuptools  # noqa: E402
from setuptools.build_meta import (  # noqa: E402
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from build_tools import locate, native, options  # noqa: E402

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, Any] | None


def _with_torch(requirements: list[str]) -> list[str]:
    try:
        missing = options.read().native and locate.find_torch() is None
    except options.BuildError as error:
        native.fail(error)
    return [*requirements, "torch>=2.10"] if missing else requirements


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """What the build environment needs beyond pyproject's list."""
    return _with_torch(_setuptools.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """The same for `pip install -e`."""
    return _with_torch(_setuptools.get_requires_for_build_editable(config_settings))


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Builds a wheel from a clean staging folder: files that an earlier run left there would get into it."""
    for leftover in [*(ROOT / "build").glob("lib*"), *(ROOT / "build").glob("bdist*")]:
        shutil.rmtree(leftover)
    return str(_setuptools.build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Puts the shared objects beside the sources; KD_BUILD=none takes away those of an earlier install."""
    if options.read().mode == "none":
        for stale in [
            *(ROOT / "kdkernels").glob("kdkernels_C*.so"),
            *(ROOT / "kdkernels").glob("_codec*.so"),
        ]:
            stale.unlink()
    return str(_setuptools.build_editable(wheel_directory, config_settings, metadata_directory))
