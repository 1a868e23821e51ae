"""The offline judge of identities: looks for first-person claims of known names. It understands nothing.

A sentence counts when it speaks of the speaker ("I", "my", "we", "我", ...), or is a bare name in answer to the
question. In it, a name of another model or its makers conflicts with the facts unless the clause denies it or only
compares; so does a maker or a name that is stated by a usual phrase and is not the model's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from kdkernels.evaluation.text import words
from kdkernels.evaluation.verdicts import IdentityCase, IdentityVerdict

_SENTENCES = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")
_CLAUSES = re.compile(
    r"[;；]|,?\s+but\s+|,\s+(?=not\b)|，?\s*(?:而是|但是?|不过)|,\s+(?:and\s+)?(?=I\b)|，(?=我)", re.IGNORECASE
)
_SPEAKER = re.compile(
    r"\b(?:I|I['’]\w+|[Mm]e|[Mm]y|[Mm]ine|[Mm]yself|[Ww]e|[Oo]ur|[Uu]s|[Tt]his (?:model|assistant|system))\b"
    r"|我|本模型|本助手"
)
_DENIED = re.compile(r"\b(?:not|never|no|nor|neither|nothing|without|cannot)\b|n['’]t\b|不|没|非|无关")
_COMPARED = re.compile(
    r"\b(?:like|unlike|as|than|about|of course|compared (?:to|with)|different from|heard of|know of"
    r"|instead of|rather than)"
    r"[^.,;]{0,24}$|(?:像|类似于?|例如|比如|不同于|关于|相比|比|听说过?|了解)[^，。；]{0,6}$",
    re.IGNORECASE,
)
_MADE_BY = (
    re.compile(
        r"\b(?:made|created|developed|built|trained|designed|released|owned)(?: \w+ly)? by "
        r"(?:the |a team (?:at|from) |researchers (?:at|from) |engineers (?:at|from) )?"
        r"((?-i:[A-Z])[\w&.\-]*(?: (?:of |for )?(?-i:[A-Z])[\w&.\-]*)*)",
        re.IGNORECASE,
    ),
    re.compile(
        r"\b(?:my name is|I am called|I['’]m called|I am named|(?:assistant|model|AI|chatbot|bot),? (?:called|named))"
        r" [\"“”'‘*]*((?-i:[A-Z])[\w.\-]*)",
        re.IGNORECASE,
    ),
    re.compile(r"由([^，。；、\s]{2,16}?)(?:公司|团队)?(?:所?(?:独立|自主)?(?:开发|研发|训练|创建|打造|制作|创造))"),
    re.compile(r"(?:我叫|我的名字(?:叫|是))([^，。；、！\s]{1,12})"),
)


def verdict(case: IdentityCase) -> IdentityVerdict:
    """Conflict and claims, by names alone."""
    claims: dict[str, None] = {}
    conflict = False
    for sentence in _about_speaker(case.answer, case):
        for clause in _CLAUSES.split(sentence):
            rest = _without(clause, case.names.own)
            for source, names in case.names.sources.items():
                if _claimed(rest, names):
                    claims[source] = None
            conflict = conflict or _claimed(rest, case.names.wrong) or _other_maker(clause, case.names.own)
    return IdentityVerdict(conflict or bool(claims), tuple(claims))


def _about_speaker(answer: str, case: IdentityCase) -> Iterator[str]:
    """Sentences about the speaker; questions are none."""
    every = [name for names in case.names.sources.values() for name in names] + [*case.names.wrong]
    for number, sentence in enumerate(filter(None, (s.strip() for s in _SENTENCES.split(answer)))):
        if sentence.endswith(("?", "？")):
            continue
        if _SPEAKER.search(sentence) or (number == 0 and _is_bare(sentence, every)):
            yield sentence


def _is_bare(sentence: str, names: Iterable[str]) -> bool:
    """Hardly more than a name: "OpenAI.", "By the OpenAI team.", "由 OpenAI 开发。"."""
    rest = words(_without(sentence, names))
    small = {
        "by",
        "the",
        "team",
        "from",
        "at",
        "in",
        "it",
        "was",
        "made",
        "developed",
        "created",
        "company",
        "a",
        "of",
        "lab",
    }
    return len(rest) < len(words(sentence)) and all(word in small or word in "由是的开发公司团队研在" for word in rest)


def _claimed(clause: str, names: Iterable[str]) -> bool:
    """One of the names, neither denied nor compared with."""
    for name in names:
        for match in _pattern(name).finditer(clause):
            before = clause[: match.start()]
            if not _DENIED.search(before) and not _COMPARED.search(before) and "无关" not in clause:
                return True
    return False


def _other_maker(clause: str, own: Iterable[str]) -> bool:
    """A maker or a name that is stated by a usual phrase and is none of `own`."""
    for pattern in _MADE_BY:
        match = pattern.search(clause)
        if match and not _DENIED.search(clause[: match.start()]):
            return not any(_pattern(name).search(match[1]) for name in own)
    return False


def _without(text: str, names: Iterable[str]) -> str:
    for name in sorted(names, key=len, reverse=True):
        text = _pattern(name).sub(" ", text)
    return text


def mentions(text: str, names: Iterable[str]) -> bool:
    """True where one of the names stands in a text, however it is written: "are you qwen?" names Qwen."""
    return any(re.search(_pattern(name).pattern, text, re.IGNORECASE) for name in names)


def _pattern(name: str) -> re.Pattern[str]:
    """A name as a word of its own; short ones (Meta, Phi) only as they are written."""
    edge = (r"(?<![A-Za-z0-9])", r"(?![A-Za-z])") if name.isascii() else ("", "")
    return re.compile(edge[0] + re.escape(name) + edge[1], re.IGNORECASE if len(name) > 5 else 0)
