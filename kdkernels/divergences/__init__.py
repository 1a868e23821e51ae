"""Divergences between the teacher's and the student's distribution over the vocabulary.

Theory. With `p` the teacher's and `q` the student's probabilities, both at temperature T, a separable divergence
is a sum over the vocabulary of one function of the two log-probabilities,

    D = sum_v term(lp_v, lq_v),        grad(lp, lq) = d term / d lq,

and those two functions are all there is to know about it. For logits z with q = softmax(z / T), where
d lq_v / d z_u = (1[u = v] - q_u) / T,

    dD / dz_v = (grad_v - q_v G) / T,  G = sum_v grad_v,

so a kernel needs two numbers a row, `D` and `G`, and every weight, mask and reduction is a factor per row.
Adding `c (q - p)` to a term changes neither D nor the gradient, as both distributions sum to one. The KL-like terms use
that freedom: each is >= 0 and of second order in `lp - lq`, which keeps three digits of a loss of 1e-7 nats in float32.
(A sparse teacher's ``truncate`` sums over a part of the vocabulary: `excess` says what c is.)

One file per divergence in this folder, found by name. README, "Add a divergence", has the steps.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from kdkernels.divergences._base import DIVERGENCES, ELEMENTS, Divergence, Elements, Kernel, parameter, tl
from kdkernels.divergences.adaptive_kl import AdaptiveKL
from kdkernels.divergences.alpha_beta import AlphaBeta
from kdkernels.divergences.forward_kl import ForwardKL
from kdkernels.divergences.jsd import JSD
from kdkernels.divergences.reverse_kl import ReverseKL
from kdkernels.divergences.skew_kl import SkewKL
from kdkernels.divergences.skew_reverse_kl import SkewReverseKL
from kdkernels.divergences.total_variation import TotalVariation

__all__ = [
    "JSD",
    "AdaptiveKL",
    "AlphaBeta",
    "Divergence",
    "Elements",
    "ForwardKL",
    "Kernel",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "TotalVariation",
    "elements",
    "get",
    "names",
    "parameter",
    "tl",
]

# The imports above give the published classes their types; files nobody imported are found here.
for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")


def names() -> list[str]:
    """The names of all divergences, sorted; a subclass of `Divergence` defined anywhere joins them."""
    return sorted(DIVERGENCES)


def get(divergence: str | Divergence) -> Divergence:
    """The divergence of that name with its default parameters; an object comes back as it is.

    Errors: ValueError for an unknown name, with the nearest known ones; TypeError for anything else.
    """
    if isinstance(divergence, Divergence):
        return divergence
    if isinstance(divergence, type) and issubclass(divergence, Divergence):
        raise TypeError(
            f"divergence is the class {divergence.__name__}; pass an object, such as {divergence.__name__}()"
        )
    if not isinstance(divergence, str):
        raise TypeError(
            f"divergence must be a name or a Divergence object, not {type(divergence).__name__} {divergence!r}; "
            f"names: {', '.join(names())}"
        )
    if divergence not in DIVERGENCES:
        near = difflib.get_close_matches(divergence.lower().replace("-", "_"), names(), n=2, cutoff=0.35)
        meant = f"did you mean {' or '.join(repr(name) for name in near)}? " if near else ""
        raise ValueError(f"divergence is {divergence!r}, which is unknown; {meant}known: {', '.join(names())}")
    return DIVERGENCES[divergence]()


def elements(kernel: str) -> type[Elements]:
    """The pair `.term`, `.grad` behind a kernel name (`Divergence.kernel().name`). KeyError lists the known names."""
    if kernel not in ELEMENTS:
        raise KeyError(f"no element functions are called {kernel!r}; known: {', '.join(sorted(ELEMENTS))}")
    return ELEMENTS[kernel]
