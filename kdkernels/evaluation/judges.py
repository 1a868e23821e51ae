"""Judges: who compares answers (RSE) and who checks what a model says about itself (ICE)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from kdkernels.errors import UserError
from kdkernels.evaluation import instructions
from kdkernels.evaluation.chat import Chat, Conversation, Reply, Usage
from kdkernels.evaluation.verdicts import (
    IdentityCase,
    IdentityVerdict,
    SimilarityCase,
    SimilarityScores,
    Unparsable,
    read_identity,
    read_similarity,
)

Case = TypeVar("Case")
Verdict = TypeVar("Verdict")


@runtime_checkable
class Judge(Protocol):
    """Compares answers and checks identities; both methods yield (index, verdict) in any order, each index once.

    `proxy` is True for what only imitates a judge's understanding: results say so.
    """

    @property
    def name(self) -> str: ...

    @property
    def proxy(self) -> bool: ...

    @property
    def usage(self) -> Usage: ...

    def similarity(self, cases: Sequence[SimilarityCase]) -> Iterator[tuple[int, SimilarityScores | Unparsable]]: ...

    def identity(self, cases: Sequence[IdentityCase]) -> Iterator[tuple[int, IdentityVerdict | Unparsable]]: ...


class ChatJudge:
    """A language model as a judge: a chat (an endpoint, a local model) that is told what to compare.

    attempts: how often one case is put to it before its answer counts as unparsable; each further attempt shows it its
    last answer and asks for the JSON object alone.
    """

    proxy = False

    def __init__(self, chat: Chat, *, attempts: int = 2) -> None:
        if attempts < 1:
            raise UserError(f"attempts is {attempts}; allowed: 1 or more")
        self.chat = chat
        self.attempts = attempts

    @property
    def name(self) -> str:
        """The chat's."""
        return self.chat.name

    @property
    def usage(self) -> Usage:
        """The chat's."""
        return self.chat.usage

    def similarity(self, cases: Sequence[SimilarityCase]) -> Iterator[tuple[int, SimilarityScores | Unparsable]]:
        """Ask for scores."""
        return self._judge([instructions.similarity(case) for case in cases], lambda i, text: read_similarity(text))

    def identity(self, cases: Sequence[IdentityCase]) -> Iterator[tuple[int, IdentityVerdict | Unparsable]]:
        """Ask whether answers conflict with the facts."""
        return self._judge(
            [instructions.identity(case) for case in cases], lambda i, text: read_identity(text, cases[i].sources)
        )

    def _judge(
        self, conversations: list[list[dict[str, str]]], read: Callable[[int, str], Verdict | Unparsable]
    ) -> Iterator[tuple[int, Verdict | Unparsable]]:
        open_cases = list(range(len(conversations)))
        for attempt in range(self.attempts):
            again: dict[int, Reply] = {}
            batch: list[Conversation] = [conversations[i] for i in open_cases]
            for place, reply in self.chat.replies(batch):
                index = open_cases[place]
                verdict = read(index, reply.text)
                if isinstance(verdict, Unparsable) and attempt + 1 < self.attempts:
                    again[index] = reply
                    continue
                yield index, verdict
            open_cases = sorted(again)
            for index in open_cases:
                conversations[index] += [
                    {"role": "assistant", "content": again[index].text},
                    {"role": "user", "content": instructions.AGAIN},
                ]
            if not open_cases:
                return


class CallableJudge:
    """Plain functions as a judge; an exception they raise is passed on, what they return is read like a model's answer.

    similarity(prompt, reference, response): a mapping or a text of JSON with style, logic, content, overall; or the
    four numbers. identity(prompt, answer, facts): a bool (conflict), or a mapping or a text with conflict and claims.
    """

    def __init__(
        self,
        similarity: Callable[[str, str, str], Any] | None = None,
        identity: Callable[[str, str, tuple[str, ...]], Any] | None = None,
        *,
        name: str = "",
        proxy: bool = False,
    ) -> None:
        self._similarity, self._identity = similarity, identity
        self.name = name or getattr(similarity or identity, "__name__", "callable")
        self.proxy = proxy

    @property
    def usage(self) -> Usage:
        """Nothing is counted."""
        return Usage()

    def similarity(self, cases: Sequence[SimilarityCase]) -> Iterator[tuple[int, SimilarityScores | Unparsable]]:
        """Call the function for each case."""
        if self._similarity is None:
            raise UserError(f"judge {self.name!r} compares no answers; give CallableJudge(similarity=...)")
        for index, case in enumerate(cases):
            yield index, read_similarity(self._similarity(case.prompt, case.reference, case.response))

    def identity(self, cases: Sequence[IdentityCase]) -> Iterator[tuple[int, IdentityVerdict | Unparsable]]:
        """Call the function for each case."""
        if self._identity is None:
            raise UserError(f"judge {self.name!r} checks no identities; give CallableJudge(identity=...)")
        for index, case in enumerate(cases):
            yield index, read_identity(self._identity(case.prompt, case.answer, case.facts), case.sources)


def as_judge(judge: Any, task: str) -> Judge:
    """A `Judge` for `task` ("similarity" or "identity"): None is the offline proxy, a chat or a function is wrapped."""
    if judge is None:
        from kdkernels.evaluation.lexical import LocalLexicalJudge

        return LocalLexicalJudge()
    if isinstance(judge, Judge):
        return judge
    if isinstance(judge, Chat):
        return ChatJudge(judge)
    if callable(judge):
        return CallableJudge(**{task: judge})
    raise UserError(
        f"judge is {judge!r}; allowed: None (the offline proxy), a Judge, a chat, or a function of "
        + ("prompt, reference and response" if task == "similarity" else "prompt, answer and facts")
    )


def collect(
    verdicts: Iterator[tuple[int, Verdict]],
    count: int,
    judge: Judge,
    seen: Callable[[int, Verdict], None] | None = None,
) -> list[Verdict]:
    """All verdicts in order; a judge that leaves one out or gives one twice is an error."""
    found: dict[int, Verdict] = {}
    for index, verdict in verdicts:
        if index in found or not 0 <= index < count:
            raise UserError(
                f"judge {judge.name!r} gave verdict {index} twice or without a case; {count} were asked for"
            )
        found[index] = verdict
        if seen is not None:
            seen(index, verdict)
    if len(found) != count:
        raise UserError(f"judge {judge.name!r} gave {len(found)} verdicts for {count} cases; allowed: one each")
    return [found[i] for i in range(count)]


def describe(judge: Judge) -> Mapping[str, Any]:
    """What results keep of a judge."""
    return {"name": judge.name, "proxy": judge.proxy, "usage": judge.usage.to_dict()}
