"""The instructions, by family. Importing this package fills the registry of `lanes`."""

from . import asynchronous, atomics, bits, compare, convert, floating, integer, loads, moves, warp  # noqa: F401
