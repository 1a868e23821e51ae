"""`compress`: from full distributions to the few entries that are kept of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import arguments, backends
from kdkernels._checks import fail, require_finite_number, values_checked
from kdkernels.compression import shards
from kdkernels.logits import LinearLogits
from kdkernels.sparse_logits import SparseLogits

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

MOST_KEPT = 4096
_LEAST_T, _MOST_T = 1e-5, 1e6


class Options(NamedTuple):
    """Options of `compress`; see there."""

    k: int
    top_p: float | None
    samples: int | None
    temperature: float
    generator: torch.Generator | None
    other_temperatures: Sequence[float]
    entropy: bool
    vocab_size: int | None
    chunk_bytes: int | None
    backend: str


class Call(NamedTuple):
    """What one process, or one rank, makes of its arguments."""

    logits: Tensor | LinearLogits
    others: list[float]
    backend: str


def compress(
    logits: Tensor | LinearLogits,
    k: int = 64,
    *,
    top_p: float | None = None,
    samples: int | None = None,
    temperature: float = 1.0,
    group: ProcessGroup | DeviceMesh | None = None,
    generator: torch.Generator | None = None,
    other_temperatures: Sequence[float] = (),
    entropy: bool = False,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> SparseLogits:
    """A teacher's rows as the few entries that carry them: what a cache stores and a sparse loss takes.

    Three ways to choose. The k most likely entries, exactly, of equally likely ones those with the lower ids. With
    ``top_p`` of these only the nucleus: the smallest set of most likely entries with mass >= p, at most k. With
    ``samples=n`` n draws from the distribution, with replacement (random sampling distillation, arXiv 2503.16870):
    the entries drawn with ``log(count / n)``, an unbiased estimate of the whole row; k is not used.

    Log-probabilities are those of the whole row at ``temperature``, which acts before anything is chosen. To train at
    another temperature T' later, what is kept at T does not suffice: the tail's mass at T' is needed. Name those
    temperatures in ``other_temperatures`` (4 bytes a row each), and `SparseLogits.at_temperature` gives the rows there.

    Args:
        logits: ``[..., V]``, or `LinearLogits`, whose logits exist one chunk of rows at a time. float32, bfloat16,
            float16, float64; without gradient.
        k: most entries kept, 1 to 4096 and at most V. A row with fewer finite logits keeps those.
        top_p: p in (0, 1], or None.
        samples: draws a row, or None.
        temperature: T in [1e-5, 1e6].
        group: a process group (or one-dimensional DeviceMesh) over whose ranks the vocabulary is sharded: ``logits`` is
            this rank's part, in rank order, of any size, also none. Every rank gets the answer of the whole. DTensors
            sharded over the vocabulary (logits ``Shard(-1)``, weight and bias ``Shard(0)``) need no group. Options that
            differ, or a wrong argument on one rank, are an error on every rank.
        generator: of the draws. Uniform numbers (float64, ``[N, samples]`` in one call of ``torch.rand``, on the device
            of the logits) are drawn with it and turned into entries by the inverse of the cumulative mass in order of
            the ids: equal numbers give equal draws on every backend, up to rounding where a number falls between two
            entries. Under ``group`` the first rank's numbers decide on all.
        other_temperatures: further temperatures at which the tail's mass is kept.
        entropy: whether each row's entropy at ``temperature``, in nats, is kept.
        vocab_size: entries that exist, in all; columns beyond are padding. Default: all.
        chunk_bytes: memory for one chunk of rows: of logits from `LinearLogits`, and of what the eager backend keeps
            of rows (72 bytes an entry; draws on a GPU are its work). Default: 256 MiB.
        backend: "auto", or one of "eager", "cpp", "cuda".

    Returns:
        `SparseLogits` with ids ``[..., K]``: K = k (ids -1 where fewer are kept) or, with ``samples``, the most
        different entries that any row has drawn. float32, for float64 logits float64.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed; on a CPU also the first row that has
            NaN, +inf, or nothing but -inf. On other devices and under torch.compile values are not looked at
            (``KDKERNELS_CHECK=1`` does): such a row has ids -1 and NaN.
    """
    asked = Options(
        k, top_p, samples, temperature, generator, other_temperatures, entropy, vocab_size, chunk_bytes, backend
    )
    if group is not None or arguments.holds_dtensors(logits):
        call, share = _agreed(logits, group, asked)
    else:
        call = _prepare(logits, asked, False)
        share = shards.Share.of([call.logits.shape[-1]], 0, vocab_size)
    others = call.others
    if samples is None and k > share.vocab:
        fail(ValueError, "k", k, f"at most the vocabulary, {share.vocab}")
    part = shards.part_of(call.logits, share, float(temperature), call.backend, chunk_bytes)
    if samples is not None:
        return _sampled(part, samples, generator, entropy)
    found = part.largest(k, others, entropy)
    _check_rows(found.log_tail.isnan(), part.leading)
    kept = SparseLogits(
        found.ids, found.log_probs, found.log_tail, share.vocab, float(temperature), "topk",
        found.entropy if entropy else None, dict(zip(others, found.other_tails.unbind(-1), strict=True)),
    )  # fmt: skip
    return _shaped(kept if top_p is None else _nucleus(kept, top_p), part.leading)


def _prepare(logits: Tensor | LinearLogits, asked: Options, sharded: bool) -> Call:
    """Checks of everything that needs no other rank."""
    _check_choice(asked.k, asked.top_p, asked.samples, asked.generator, asked.entropy)
    others = _check_temperatures(asked.temperature, asked.other_temperatures, asked.samples)
    _check_sizes(asked.vocab_size, asked.chunk_bytes)
    logits = arguments.under_autocast(_check_logits(logits, sharded))
    kernel = backends.SELECTION if asked.samples is None else backends.DRAWS
    return Call(logits, others, _serving(asked.backend, logits.device.type, logits.dtype, kernel))


@torch.compiler.disable
def _agreed(logits: Tensor | LinearLogits, group: object | None, asked: Options) -> tuple[Call, shards.Share]:
    """This rank's part of a call that every rank makes alike. Under torch.compile it is left to eager torch."""
    from kdkernels import shard_agreement  # imports torch.distributed
    from kdkernels.shard_groups import localize

    def prepare() -> tuple[Call, dict[str, Any], int]:
        call = _prepare(localize(logits), asked, True)
        _check_generator(asked.generator, call.logits.device)
        page = shard_agreement.form_of(call.logits) | {"backend": call.backend, "other_temperatures": call.others}
        for name in ("k", "top_p", "samples", "temperature", "entropy", "vocab_size"):
            page[name] = getattr(asked, name)
        return call, page, call.logits.shape[-1]

    ranks = shard_agreement.ranks_of(group, logits)
    call, sizes = shard_agreement.agreed(ranks, logits, prepare)
    return call, shards.Share.of(sizes, ranks.rank, asked.vocab_size, ranks.group)


def _serving(backend: str, device: str, dtype: torch.dtype, kernel: str) -> str:
    """The backend of a call: the same for every call of a compiled graph, so not traced."""
    return backends.choose(backend, torch.device(device), dtype, kernel)


_serving._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in losses.py


def _sampled(part: shards.Part, samples: int, generator: torch.Generator | None, entropy: bool) -> SparseLogits:
    """Draws as entries with their frequencies."""
    drawn = part.drawn(samples, generator)
    _check_rows(drawn[:, 0] < 0, part.leading)
    n, vocab = drawn.shape[0], part.share.vocab
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = first.cumsum(-1) - 1
    width = int(place[:, -1].max()) + 1 if n else 1
    ids = drawn.new_full((n, width), -1).scatter_(-1, place, drawn)
    count = torch.zeros((n, width), dtype=torch.int64, device=drawn.device)
    count.scatter_add_(-1, place, torch.ones_like(place))
    log_probs = (count.double() / samples).log().to(part.dtype)
    log_tail = log_probs.new_full((n,), -torch.inf)
    whole = part.largest(1, [], True).entropy if entropy else None
    return _shaped(SparseLogits(ids, log_probs, log_tail, vocab, part.temperature, "sampled", whole), part.leading)


def _nucleus(kept: SparseLogits, p: float) -> SparseLogits:
    """Of the entries kept the fewest most likely ones with mass >= p (all if they have less); others go to the tail."""
    log_p, order = kept.log_probs.sort(dim=-1, descending=True, stable=True)  # of equal ones the lower id first
    mass = log_p.double().exp()
    stays = mass.cumsum(-1) - mass < (p if p < 1 else torch.inf)  # the sum may round to 1 before the last entry
    stays = torch.zeros_like(stays).scatter_(-1, order, stays) & (kept.ids >= 0)
    gone = ~stays

    def grown(at: SparseLogits) -> Tensor:
        dropped = torch.where(gone, at.log_probs.double(), -torch.inf)
        return torch.logsumexp(torch.cat((at.log_tail.double()[..., None], dropped), -1), -1).to(at.dtype)

    tails = {t: grown(kept.at_temperature(t)) for t in kept.other_tails}
    place = gone.long().sort(dim=-1, stable=True).indices  # what stays in order, then what does not
    ids = torch.where(stays, kept.ids, -1).gather(-1, place)
    log_probs = torch.where(stays, kept.log_probs, -torch.inf).gather(-1, place)
    return SparseLogits(
        ids, log_probs, grown(kept), kept.vocab_size, kept.temperature, "topk", kept.entropy, tails
    )  # fmt: skip


def _shaped(rows: SparseLogits, leading: torch.Size) -> SparseLogits:
    """Rows ``[N, K]`` in the leading shape of the logits."""
    ids, log_probs = (x.reshape(*leading, x.shape[-1]) for x in (rows.ids, rows.log_probs))
    entropy = None if rows.entropy is None else rows.entropy.reshape(leading)
    tails = {t: x.reshape(leading) for t, x in rows.other_tails.items()}
    log_tail = rows.log_tail.reshape(leading)
    return SparseLogits(ids, log_probs, log_tail, rows.vocab_size, rows.temperature, rows.kind, entropy, tails)


def _check_choice(
    k: int, top_p: float | None, samples: int | None, generator: torch.Generator | None, entropy: bool
) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MOST_KEPT:
        fail(ValueError, "k", repr(k), f"an int in 1 .. {MOST_KEPT}")
    require_finite_number("top_p", top_p, optional=True)
    if top_p is not None and not 0 < top_p <= 1:
        fail(ValueError, "top_p", top_p, "in (0, 1], or None for the k largest")
    if samples is not None:
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            fail(ValueError, "samples", repr(samples), "an int >= 1, or None for the largest entries")
        if top_p is not None:
            fail(ValueError, "top_p, samples", f"{top_p}, {samples}", "not both", "draws are from the whole row")
    elif generator is not None:
        fail(ValueError, "generator", generator, "None without samples", "the largest entries are no matter of chance")
    if not isinstance(entropy, bool):
        fail(TypeError, "entropy", repr(entropy), "True or False")


def _check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """What one process may learn from ``torch.rand`` one of several ranks must know before."""
    if generator is not None and not isinstance(generator, torch.Generator):
        fail(TypeError, "generator", type(generator).__name__, "a torch.Generator or None")
    if generator is not None and generator.device.type != device.type:
        fail(ValueError, "generator device", generator.device, f"that of the logits, {device}")


def _check_temperatures(temperature: float, others: Sequence[float], samples: int | None) -> list[float]:
    if not isinstance(others, (list, tuple)):
        fail(TypeError, "other_temperatures", repr(others), "a list of temperatures", "[2.0]")
    for name, value in (("temperature", temperature), *(("other_temperatures", t) for t in others)):
        require_finite_number(name, value)
        if not _LEAST_T <= value <= _MOST_T:
            fail(ValueError, name, value, f"in [{_LEAST_T:g}, {_MOST_T:g}]")
    if others and samples is not None:
        fail(ValueError, "other_temperatures", list(others), "empty with samples", "draws hold at one temperature only")
    return [float(t) for t in dict.fromkeys(others) if t != temperature]


def _check_sizes(vocab_size: int | None, chunk_bytes: int | None) -> None:
    for name, value in (("vocab_size", vocab_size), ("chunk_bytes", chunk_bytes)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            fail(ValueError, name, repr(value), "an int > 0 or None")


def _check_logits(logits: Tensor | LinearLogits, sharded: bool) -> Tensor | LinearLogits:
    empty = sharded and isinstance(logits, Tensor | LinearLogits) and len(logits.shape) and not logits.shape[-1]
    if not empty:  # a shard of no entries is one
        arguments.check_side("logits", logits)
    name, constant = ("logits", logits) if isinstance(logits, Tensor) else ("logits.hidden", logits.hidden)
    if constant.requires_grad:
        remedy = "a teacher is a constant: call it under torch.no_grad() or pass .detach()"
        fail(ValueError, name, "a tensor that requires grad", "without gradient", remedy)
    return logits


def _check_rows(bad: Tensor, leading: torch.Size) -> None:
    """Where values are looked at, an error that names the first row that is no distribution."""
    if torch.compiler.is_compiling() or (bad.device.type != "cpu" and not values_checked()):
        return
    if not bool(bad.any()):
        return
    row = int(bad.nonzero()[0, 0])
    place = [int(i) for i in torch.unravel_index(torch.tensor(row), leading)] if len(leading) > 1 else row
    remedy = "mask it out before, or mend the teacher"
    fail(ValueError, f"logits row {place}", "a row with NaN or +inf, or nothing but -inf", "a distribution", remedy)
