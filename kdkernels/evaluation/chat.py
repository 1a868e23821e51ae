"""What answers conversations: a judge's model, the model under test, or a helper that rewrites templates."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from kdkernels.errors import UserError

Conversation = Sequence[Mapping[str, str]]
"""Messages {"role": "system" | "user" | "assistant", "content": text}, oldest first; the last is the user's."""


@dataclass(frozen=True)
class Reply:
    """One answer; token counts are 0 where nobody counted, `cached` where nobody was asked."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: bool = False


@dataclass(frozen=True)
class Usage:
    """What was asked and what it cost; `cost` is in the currency of the prices that were given, None without prices."""

    requests: int = 0
    retries: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Meter:
    """Counts usage from many threads. `prices`: (prompt, completion) per million tokens."""

    def __init__(self, prices: tuple[float, float] | None = None) -> None:
        self.prices = prices
        self._lock = threading.Lock()
        self._counts = {"requests": 0, "retries": 0, "cached": 0, "prompt_tokens": 0, "completion_tokens": 0}

    def add(self, reply: Reply | None = None, **counts: int) -> None:
        """Count a reply, or `requests`, `retries` by name."""
        with self._lock:
            if reply is not None and reply.cached:
                self._counts["cached"] += 1
            elif reply is not None:
                self._counts["prompt_tokens"] += reply.prompt_tokens
                self._counts["completion_tokens"] += reply.completion_tokens
            for name, value in counts.items():
                self._counts[name] += value

    def read(self) -> Usage:
        """The counts so far."""
        with self._lock:
            counts = dict(self._counts)
        cost = None
        if self.prices is not None:
            cost = (counts["prompt_tokens"] * self.prices[0] + counts["completion_tokens"] * self.prices[1]) / 1e6
        return Usage(**counts, cost=cost)


@runtime_checkable
class Chat(Protocol):
    """Answers conversations.

    `replies` yields (index, reply) as answers come in, in any order, each index once; `settings` is everything that
    determines an answer besides the conversation (plain values, no secrets): part of a cached answer's key.
    """

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    @property
    def usage(self) -> Usage: ...

    def replies(self, conversations: Sequence[Conversation]) -> Iterator[tuple[int, Reply]]: ...


class CallableChat:
    """A plain function of the last message's text as a chat, one call after the other."""

    def __init__(self, function: Callable[[str], str], name: str = "") -> None:
        self.function = function
        self.name = name or getattr(function, "__name__", type(function).__name__)
        self._meter = Meter()

    @property
    def settings(self) -> dict[str, Any]:
        """The name: a function's answers are not cached under anything better."""
        return {"kind": "callable", "name": self.name}

    @property
    def usage(self) -> Usage:
        """Requests so far."""
        return self._meter.read()

    def replies(self, conversations: Sequence[Conversation]) -> Iterator[tuple[int, Reply]]:
        """Call the function for each conversation's last message."""
        for index, conversation in enumerate(conversations):
            self._meter.add(requests=1)
            text = self.function(conversation[-1]["content"])
            if not isinstance(text, str):
                raise UserError(f"{self.name} returned a {type(text).__name__}; allowed: the answer's text, a str")
            yield index, Reply(storable(text))


def as_chat(what: str, value: Any) -> Chat:
    """A `Chat` from a chat, a function of the prompt, or a pair (transformers model, its tokenizer)."""
    if isinstance(value, Chat):
        return value
    if isinstance(value, tuple) and len(value) == 2 and hasattr(value[0], "generate"):
        from kdkernels.evaluation.local_chat import LocalChat

        return LocalChat(*value)
    if hasattr(value, "generate"):
        raise UserError(f"{what} is a model without its tokenizer; give the pair (model, tokenizer)")
    if callable(value):
        return CallableChat(value)
    raise UserError(
        f"{what} is {value!r}; allowed: a chat (LocalChat, EndpointChat), a pair (model, tokenizer), or a function "
        "from a prompt to its answer"
    )


def ask(chat: Chat, conversations: Sequence[Conversation]) -> list[Reply]:
    """All replies, in the order of the conversations."""
    found: dict[int, Reply] = dict(chat.replies(conversations))
    return [found[i] for i in range(len(conversations))]


def storable(text: str) -> str:
    """The text with lone surrogates (half an emoji, cut by a limit on tokens) as U+FFFD: no file can hold them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def user(text: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]
