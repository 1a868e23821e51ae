"""What can go wrong in the emulator: the program asks for something unknown, or does something wrong."""

from __future__ import annotations


class PTXError(RuntimeError):
    """Any complaint of the emulator. Its text names the instruction."""


class ParseError(PTXError):
    """The text is not the PTX that the parser knows."""


class Unsupported(PTXError):  # noqa: N818
    """An instruction, modifier or operand that the emulator does not know; never guessed at."""


class Fault(PTXError):  # noqa: N818
    """The program did something wrong."""


class OutOfBounds(Fault):
    """An access outside every allocation, or in the gap between two rows of a strided tensor."""


class Misaligned(Fault):
    """An address that is no multiple of the access's size."""


class Uninitialised(Fault):
    """A read of memory that nothing wrote."""


class SharedRace(Fault):
    """Two warps touched the same shared bytes between two barriers, one of them writing."""


class WriteConflict(Fault):
    """Threads of one instruction write different values to one place: which one stays is undefined."""


class BarrierDivergence(Fault):
    """Threads of a CTA wait at different barriers, or a barrier can never be completed."""


class Divergence(Fault):
    """A warp-wide instruction names lanes that do not execute it together."""


class Trap(Fault):
    """`trap`, a failed device assertion, or a call."""
