"""How much a student has taken over: answers compared (RSE), identities checked (ICE), logits side by side.

Importing this package is cheap: torch, PyYAML and the endpoint's client come in with the first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdkernels.evaluation.chat import CallableChat as CallableChat
    from kdkernels.evaluation.chat import Chat as Chat
    from kdkernels.evaluation.compare import compare_models as compare_models
    from kdkernels.evaluation.compare_result import ComparisonResult as ComparisonResult
    from kdkernels.evaluation.diversity import DiversityResult as DiversityResult
    from kdkernels.evaluation.diversity import response_diversity as response_diversity
    from kdkernels.evaluation.endpoint import EndpointChat as EndpointChat
    from kdkernels.evaluation.identity import identity_consistency as identity_consistency
    from kdkernels.evaluation.identity_result import IdentityResult as IdentityResult
    from kdkernels.evaluation.judges import CallableJudge as CallableJudge
    from kdkernels.evaluation.judges import ChatJudge as ChatJudge
    from kdkernels.evaluation.judges import Judge as Judge
    from kdkernels.evaluation.lexical import LocalLexicalJudge as LocalLexicalJudge
    from kdkernels.evaluation.local_chat import LocalChat as LocalChat
    from kdkernels.evaluation.reply_cache import CachedChat as CachedChat
    from kdkernels.evaluation.similarity import response_similarity as response_similarity
    from kdkernels.evaluation.similarity_result import SimilarityResult as SimilarityResult

_HOMES = {
    "CachedChat": "reply_cache",
    "CallableChat": "chat",
    "CallableJudge": "judges",
    "Chat": "chat",
    "ChatJudge": "judges",
    "ComparisonResult": "compare_result",
    "DiversityResult": "diversity",
    "EndpointChat": "endpoint",
    "IdentityResult": "identity_result",
    "Judge": "judges",
    "LocalChat": "local_chat",
    "LocalLexicalJudge": "lexical",
    "SimilarityResult": "similarity_result",
    "compare_models": "compare",
    "identity_consistency": "identity",
    "response_diversity": "diversity",
    "response_similarity": "similarity",
}

__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """A public name, imported on first use (PEP 562)."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
