"""Draws from domains by weight, an interval at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, Sampler

from kdkernels._checks import fail


class DomainSampler(Sampler[int]):
    """Indices into the domains laid end to end (``sampler.dataset``), drawn by weight and shuffled in each interval.

    One pass over the sampler is one interval: a loader that fetches ahead never reaches into the next one, whose
    weights are not known yet. An interval of I draws takes from every domain its share of I, rounded so that the sum
    is I (largest remainders), from a shuffle of the domain that is taken up where the last interval left it and begins
    again when it runs out; then all I are shuffled. Everything follows from the seed, the interval's number and the
    weights: all ranks agree without talking.

    Args:
        datasets: map-style dataset (or its length) by domain; a Hugging Face dataset is one.
        interval: draws per interval, over all ranks: steps times the samples of a step.
        weights: share of each domain, made to sum to 1; equal if None.
        seed: of all shuffles.
        rank, world_size: this process draws numbers ``rank, rank + world_size, ...`` of each interval, so that the
            ranks' draws, taken in turn, are those of one process. Default: those of torch.distributed if it is set up.
            Under a Trainer, whose loader splits batches itself, leave world_size = 1.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset[Any] | Sized | int],
        *,
        interval: int,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if not isinstance(datasets, Mapping) or not datasets:
            fail(TypeError, "datasets", repr(datasets), "a mapping from domain to dataset or length, not empty")
        self._datasets = dict(datasets)
        self.sizes = {name: _length(name, data) for name, data in datasets.items()}
        self.domains = tuple(self.sizes)
        self._begins = np.concatenate([[0], np.cumsum(list(self.sizes.values()))]).astype(np.int64)
        self.rank, self.world_size = _place(rank, world_size)
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1 or interval % self.world_size:
            allowed = f"a positive multiple of world_size = {self.world_size}"
            fail(ValueError, "interval", interval, allowed, "steps times the samples of a step")
        self.interval_length, self.seed = interval, int(seed)
        self.interval = 0
        """Number of the interval that the next draw belongs to."""
        self._position = 0  # draws of this interval that this rank has yielded
        self._cursors = [0] * len(self.domains)  # draws of each domain before this interval
        self._shares = self._checked(weights or dict.fromkeys(self.domains, 1.0))
        self._pending: list[float] | None = None

    # --- what the loader sees ---

    def __len__(self) -> int:
        """Draws of this rank in an interval."""
        return self.interval_length // self.world_size

    def __iter__(self) -> Iterator[int]:
        """The rest of this interval, or, if nothing is left of it, the next one."""
        if self.finished:
            self.next_interval()
        draws = self.plan()[self.rank :: self.world_size]
        while self._position < len(draws):
            self._position += 1
            yield int(draws[self._position - 1])

    @property
    def dataset(self) -> ConcatDataset[Any]:
        """The datasets end to end, to which the indices refer."""
        lengths = sorted(name for name, data in self._datasets.items() if isinstance(data, int))
        if lengths:
            fail(TypeError, f"datasets[{lengths[0]!r}]", "a length", "a dataset, to make one of all domains")
        return ConcatDataset([self._datasets[name] for name in self.domains])  # type: ignore[misc]

    def locate(self, index: int) -> tuple[str, int]:
        """(domain, index in it) of one of the sampler's indices."""
        place = int(np.searchsorted(self._begins, index, side="right")) - 1
        if not 0 <= place < len(self.domains):
            fail(IndexError, "index", index, f"in [0, {int(self._begins[-1])})")
        return self.domains[place], int(index - self._begins[place])

    # --- weights ---

    @property
    def weights(self) -> dict[str, float]:
        """Shares of the current interval; between intervals, of the next one."""
        shares = self._pending if self._pending is not None and self.finished else self._shares
        return dict(zip(self.domains, shares, strict=True))

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Shares from the next interval on; an interval that has begun (or been fetched ahead) keeps its own."""
        shares = self._checked(weights)
        if self._position == 0:
            self._shares, self._pending = shares, None
        else:
            self._pending = shares

    def _checked(self, weights: Mapping[str, float]) -> list[float]:
        if set(weights) != set(self.domains):
            fail(ValueError, "weights", dict(weights), f"one number for each of {list(self.domains)}")
        for name, weight in weights.items():
            if not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0:
                fail(ValueError, f"weights[{name!r}]", weight, "a finite number >= 0")
            if weight > 0 and self.sizes[name] == 0:
                fail(
                    ValueError, f"datasets[{name!r}]", "empty", "not empty where the weight is above 0", "leave it out"
                )
        total = math.fsum(weights.values())
        if total <= 0:
            fail(ValueError, "weights", dict(weights), "not all 0")
        return [weights[name] / total for name in self.domains]

    # --- an interval ---

    @property
    def finished(self) -> bool:
        """Whether every draw of the current interval has been yielded: the next pass is the next interval."""
        return self._position >= len(self)

    def counts(self) -> dict[str, int]:
        """Draws of each domain in the current interval, over all ranks."""
        return dict(zip(self.domains, _apportion(self._shares, self.interval_length), strict=True))

    def plan(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """All draws of the current interval in order, over all ranks: int64 ``[interval]``."""
        parts = []
        for number, (name, count) in enumerate(self.counts().items()):
            parts.append(self._begins[number] + self._stream(number, self.sizes[name], self._cursors[number], count))
        draws = np.concatenate(parts)
        return draws[np.random.default_rng([self.seed, 0, self.interval]).permutation(len(draws))]

    def _stream(self, domain: int, size: int, begin: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Draws ``begin .. begin + count`` of a domain's endless sequence of shuffles."""
        if count == 0:
            return np.zeros(0, dtype=np.int64)
        first, last = begin // size, (begin + count - 1) // size
        rngs = (np.random.default_rng([self.seed, 1 + domain, epoch]) for epoch in range(first, last + 1))
        shuffles = np.concatenate([rng.permutation(size) for rng in rngs])
        return shuffles[begin - first * size :][:count].astype(np.int64)

    def next_interval(self) -> None:
        """Go on to the next interval, with the weights set for it."""
        self._cursors = [c + n for c, n in zip(self._cursors, self.counts().values(), strict=True)]
        self.interval, self._position = self.interval + 1, 0
        if self._pending is not None:
            self._shares, self._pending = self._pending, None

    # --- state ---

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Everything `load_state_dict` needs, as plain JSON values.

        Args:
            consumed: draws of this interval that this rank has trained on. Default: all that were yielded, which is
                more where a loader's workers fetch ahead.
        """
        position = self._position if consumed is None else consumed
        if not 0 <= position <= self._position:
            fail(ValueError, "consumed", consumed, f"in [0, {self._position}], the draws yielded in this interval")
        return {
            "sizes": dict(self.sizes),
            "interval_length": self.interval_length,
            "seed": self.seed,
            "interval": self.interval,
            "position": position * self.world_size,
            "cursors": list(self._cursors),
            "shares": list(self._shares),
            "pending": None if self._pending is None else list(self._pending),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the middle of an interval; the number of ranks may have changed.

        Raises:
            ValueError: other domains, sizes, interval or seed, or a position that these ranks cannot share.
        """
        for name in ("sizes", "interval_length", "seed"):
            if state[name] != getattr(self, name):
                fail(
                    ValueError,
                    f"state[{name!r}]",
                    state[name],
                    repr(getattr(self, name)),
                    "build the sampler as it was",
                )
        if list(state["sizes"]) != list(self.domains):
            fail(ValueError, "state['sizes']", list(state["sizes"]), f"domains in the order {list(self.domains)}")
        if state["position"] % self.world_size:
            allowed = f"a multiple of world_size = {self.world_size}"
            fail(ValueError, "state['position']", state["position"], allowed, "resume with the ranks it had")
        self.interval, self._position = int(state["interval"]), int(state["position"]) // self.world_size
        self._cursors, self._shares = [int(c) for c in state["cursors"]], [float(s) for s in state["shares"]]
        self._pending = None if state["pending"] is None else [float(s) for s in state["pending"]]


def _length(name: str, data: Any) -> int:
    size = data if isinstance(data, int) and not isinstance(data, bool) else None
    if size is None:
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            allowed = "a map-style dataset (with __len__ and __getitem__) or a length"
            fail(TypeError, f"datasets[{name!r}]", type(data).__name__, allowed, "streams have no order to resume in")
        size = len(data)
    if size < 0:
        fail(ValueError, f"datasets[{name!r}]", size, ">= 0")
    return size


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        fail(ValueError, "rank, world_size", f"{rank}, {world_size}", "both given or neither")
    if rank is None or world_size is None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    if world_size < 1 or not 0 <= rank < world_size:
        fail(ValueError, "rank, world_size", f"{rank}, {world_size}", "0 <= rank < world_size")
    return rank, world_size


def _apportion(shares: list[float], total: int) -> list[int]:
    """Whole numbers in proportion to ``shares`` (sum 1) with sum ``total``: largest remainders, ties to the first."""
    exact = [share * total for share in shares]
    counts = [math.floor(value) for value in exact]
    order = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in [i for i in order if shares[i] > 0][: total - sum(counts)]:
        counts[i] += 1
    return counts
