"""`SparseLogits`: a teacher's distribution as the few entries that carry it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdkernels._checks import fail, require_choice, require_finite_number

if TYPE_CHECKING:
    from kdkernels.compression.encoded import EncodedLogits

KINDS = ("topk", "sampled")


@dataclass(frozen=True, eq=False)
class SparseLogits:
    """Kept entries of each row of a teacher, from `kdkernels.compress` or a `kdkernels.TeacherCache`.

    Args:
        ids: token ids ``[..., K]``, int32, ascending in each row; -1 after the last kept entry of a shorter row.
        log_probs: their log-probabilities ``[..., K]``, float32 or float64, under the whole row's distribution at
            ``temperature``; -inf where ``ids`` is -1. With ``kind="sampled"``: log(count / draws).
        log_tail: log of the mass of all entries not kept ``[...]``, dtype of ``log_probs``, summed from those entries
            themselves; -inf if there is none, and with ``kind="sampled"``.
        vocab_size: V, the entries of the full distribution.
        temperature: at which the log-probabilities hold; a loss at another temperature is an error.
        kind: ``"topk"`` (largest entries; also the nucleus of top-p) or ``"sampled"`` (draws from the teacher).
        entropy: of the whole row at ``temperature`` ``[...]``, nats, or None.
        other_tails: ``log_tail`` at further temperatures, by temperature: all that `at_temperature` needs besides.

    A row may keep nothing (ids -1, ``log_tail`` 0: all mass in the tail), as one that no teacher has scored does. In a
    loss its divergence is 0 with the modes "ghost" and "truncate", and it still counts in a mean: give it the label
    ``ignore_index`` or the token weight 0 where it should not. "renormalize" and "sampled" have no distribution to
    compare with: that row's loss is NaN, the others are not touched.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed. Values inside the tensors are looked
            at by the loss, not here.
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor
    vocab_size: int
    temperature: float = 1.0
    kind: str = "topk"
    entropy: Tensor | None = None
    other_tails: Mapping[float, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("ids", "log_probs", "log_tail"):
            if not isinstance(getattr(self, name), Tensor):
                fail(TypeError, name, type(getattr(self, name)).__name__, "a torch.Tensor")
        if self.ids.dtype != torch.int32:
            fail(TypeError, "ids dtype", self.ids.dtype, "torch.int32", "use .int()")
        if self.log_probs.dtype not in (torch.float32, torch.float64):
            fail(TypeError, "log_probs dtype", self.log_probs.dtype, "float32 or float64", "use .float()")
        require_choice("kind", self.kind, KINDS)
        require_finite_number("temperature", self.temperature)
        if self.temperature <= 0:
            fail(ValueError, "temperature", self.temperature, "> 0")
        self._check_shapes()

    def _check_shapes(self) -> None:
        if self.ids.dim() < 1 or self.ids.shape != self.log_probs.shape:
            shapes = f"{list(self.ids.shape)}, {list(self.log_probs.shape)}"
            fail(ValueError, "ids, log_probs", shapes, "of one shape [..., K]")
        leading = self.ids.shape[:-1]
        for name, x in (("log_tail", self.log_tail), ("entropy", self.entropy)):
            if x is not None and (x.shape != leading or x.dtype != self.log_probs.dtype):
                allowed = f"{list(leading)} of {self.log_probs.dtype}, one number a row"
                fail(ValueError, name, f"{list(x.shape)} of {x.dtype}", allowed)
        if not isinstance(self.vocab_size, int) or self.vocab_size < max(1, self.ids.shape[-1]):
            fail(ValueError, "vocab_size", self.vocab_size, f"an int, at least K = {self.ids.shape[-1]}")

    def __repr__(self) -> str:
        """Shapes and settings, not numbers."""
        return (
            f"SparseLogits(ids={list(self.ids.shape)}, vocab_size={self.vocab_size}, "
            f"temperature={self.temperature}, kind={self.kind!r})"
        )

    @property
    def shape(self) -> torch.Size:
        """Shape of the distribution it stands for, ``[..., V]``."""
        return torch.Size((*self.ids.shape[:-1], self.vocab_size))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the log-probabilities."""
        return self.log_probs.dtype

    @property
    def device(self) -> torch.device:
        """Device of the ids; the other tensors are on it too."""
        return self.ids.device

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        tensors = [self.ids, self.log_probs, self.log_tail, *self.other_tails.values()]
        return sum(t.nbytes for t in (tensors if self.entropy is None else [*tensors, self.entropy]))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SparseLogits:
        """The same on another device."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        entropy = None if self.entropy is None else move(self.entropy)
        tails = {t: move(x) for t, x in self.other_tails.items()}
        return SparseLogits(
            move(self.ids), move(self.log_probs), move(self.log_tail),
            self.vocab_size, self.temperature, self.kind, entropy, tails,
        )  # fmt: skip

    def at_temperature(self, temperature: float) -> SparseLogits:
        """The same rows at another temperature T', exactly, if its tail was stored (``other_tails``).

        Kept entries follow from those at T: ``log p' = (T / T') log p + c``, where c makes their mass
        ``1 - exp(log_tail')``; the tail's mass does not follow from its mass at T. The entropy is dropped. What errors
        the stored log-probabilities have (rounding, `encode`'s steps) count T / T' times.
        """
        if temperature == self.temperature:
            return self
        if self.kind != "topk" or temperature not in self.other_tails:
            stored = sorted({self.temperature, *self.other_tails})
            remedy = "compress with other_temperatures=[...]; draws (kind='sampled') hold at one temperature only"
            fail(ValueError, "temperature", temperature, f"one of those stored, {stored}", remedy)
        log_tail = self.other_tails[temperature]
        scaled = self.log_probs * (self.temperature / temperature)
        kept = torch.log(-torch.expm1(log_tail))  # log(1 - tail)
        log_probs = scaled + (kept - torch.logsumexp(scaled, -1)).unsqueeze(-1)
        tails = {t: x for t, x in self.other_tails.items() if t != temperature}
        tails[self.temperature] = self.log_tail
        log_probs = torch.where(self.ids >= 0, log_probs, -torch.inf)
        return SparseLogits(self.ids, log_probs, log_tail, self.vocab_size, temperature, self.kind, None, tails)

    def encode(self, bits: int | None = None) -> EncodedLogits:
        """Packed into few bytes: `EncodedLogits` with ``.nbytes`` and ``.decode()``.

        Ids, ``log_tail``, ``entropy`` and ``other_tails`` stay as they are (float64 is rounded to float32).

        Args:
            bits: of a log-probability: 4 to 12 (quantised over the row's range), 16 (float16) or 32 (exact float32).
                None: 8; 32 for draws, so that counts come back exactly (`kdkernels.compression.codec` has the limits
                of fewer).

        Raises:
            ValueError: naming the row: ids that do not ascend or lie outside the vocabulary, NaN; or ``bits``.
        """
        from kdkernels.compression import encoded

        return encoded.encode(self, bits)

    def to_dense(self) -> Tensor:
        """Log-probabilities ``[..., V]``, -inf where nothing is kept (the tail's mass is in ``log_tail`` alone)."""
        kept = self.ids >= 0
        dense = self.log_probs.new_full((*self.ids.shape[:-1], self.vocab_size + 1), -torch.inf)
        index = torch.where(kept, self.ids, self.vocab_size).long()  # padding goes to a column that is cut off
        return dense.scatter_(-1, index, self.log_probs)[..., : self.vocab_size]
