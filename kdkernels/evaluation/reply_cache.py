"""Answers kept on disk by what was asked, so that a rerun asks only for what is missing."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kdkernels.errors import UserError
from kdkernels.evaluation.chat import Chat, Conversation, Meter, Reply, Usage

_SCHEMA = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, request TEXT NOT NULL, reply TEXT NOT NULL)"


class ReplyCache:
    """An SQLite file of replies; the key is the SHA-256 of the chat's settings and the conversation.

    Each reply is committed as it arrives: a kill loses only what was under way. Several processes may share a file.
    It holds questions and answers in plain text, and no key.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(self.path, timeout=30.0, isolation_level=None, check_same_thread=False)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=NORMAL")
            self._file.execute(_SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"cache is {str(path)!r}; it cannot be opened as a cache of replies: {error}") from error

    def __len__(self) -> int:
        return int(self._file.execute("SELECT COUNT(*) FROM replies").fetchone()[0])

    def get(self, key: str) -> Reply | None:
        """The reply under `key`, marked as cached."""
        row = self._file.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return Reply(**json.loads(row[0]), cached=True) if row else None

    def put(self, key: str, request: str, reply: Reply) -> None:
        """Keep a reply; the first one under a key stays."""
        kept = {"text": reply.text, "prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
        self._file.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", (key, request, json.dumps(kept)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class CachedChat:
    """A chat whose replies are kept: equal conversations are asked once, in this run and in later ones.

    That holds for sampled answers too: give the chat another seed, or another file, for new draws.
    """

    def __init__(self, chat: Chat, cache: ReplyCache | str | Path) -> None:
        self.chat = chat
        self.cache = cache if isinstance(cache, ReplyCache) else ReplyCache(cache)
        self._meter = Meter()

    @property
    def name(self) -> str:
        """The chat's own."""
        return self.chat.name

    @property
    def settings(self) -> dict[str, Any]:
        """The chat's own."""
        return self.chat.settings

    @property
    def usage(self) -> Usage:
        """The chat's own, and how many replies came from the cache."""
        inner = self.chat.usage.to_dict()
        return Usage(**{**inner, "cached": inner["cached"] + self._meter.read().cached})

    def replies(self, conversations: Sequence[Conversation]) -> Iterator[tuple[int, Reply]]:
        """Known replies first, then the missing ones as they arrive."""
        waiting: dict[str, list[int]] = {}
        requests: dict[str, str] = {}
        settings = self.settings
        for index, conversation in enumerate(conversations):
            request = _canonical({"settings": settings, "messages": [dict(m) for m in conversation]})
            key = hashlib.sha256(request.encode()).hexdigest()
            reply = self.cache.get(key)
            if reply is None:
                waiting.setdefault(key, []).append(index)
                requests[key] = request
                continue
            self._meter.add(reply)
            yield index, reply
        keys = list(waiting)
        for number, reply in self.chat.replies([conversations[waiting[key][0]] for key in keys]):
            key = keys[number]
            self.cache.put(key, requests[key], reply)
            for index in waiting[key]:
                yield index, reply


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
