"""The instructions, by family. Importing this package fills the registry of `lanes`."""

from . import (  # noqa: F401
    asynchronous,
    atomics,
    bits,
    carry,
    cluster,
    compare,
    convert,
    floating,
    integer,
    loads,
    mbarrier,
    moves,
    special,
    tensor,
    warp,
)
