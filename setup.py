"""The native half of the build; everything else is in pyproject.toml. See build_tools/ and _kd_build.py."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_tools import native, options  # noqa: E402

TORCH_LIBRARY = "kdkernels.kdkernels_C"
PYTHON_MODULE = "kdkernels._codec"


class BuildNative(build_ext):
    """Builds both shared objects in one parallel run, outside setuptools' one-source-at-a-time compiler."""

    def build_extensions(self) -> None:
        # Not setuptools' build_temp: that is a fresh folder for every editable install, and this one is incremental.
        folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        outputs = {ext.name: Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions}
        native.build(ROOT, folder, self.distribution.get_version(), chosen, outputs)

    def get_ext_filename(self, fullname: str) -> str:
        """The torch library is loaded by torch, not imported: its name carries no Python version."""
        if fullname.endswith("kdkernels_C"):  # setuptools asks with and without the package in front
            return fullname.replace(".", "/") + ".so"
        return str(super().get_ext_filename(fullname))


def _options() -> options.Options:
    try:
        chosen = options.read()
    except options.BuildError as error:
        native.fail(error)
    if chosen.mode == "auto" and not chosen.native:
        print(f"kdkernels: no native build on {sys.platform} (Linux only); eager and Triton serve every call")
    return chosen


chosen = _options()
modules = [Extension(TORCH_LIBRARY, ["csrc/ops.cpp"]), Extension(PYTHON_MODULE, ["csrc/bindings.cpp"])]
setup(ext_modules=modules if chosen.native else [], cmdclass={"build_ext": BuildNative})
