"""Any endpoint that speaks OpenAI's chat protocol, through the `openai` client.

The client's own retries are off: they know nothing of answers that arrive broken, and two loops would multiply. One
loop here retries every fault that may pass: no connection, timeouts, 408, 409, 429, 5xx, bodies that are cut short or
are no answer.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any, NoReturn
from urllib.parse import urlsplit

from kdkernels.errors import UserError
from kdkernels.evaluation.chat import Conversation, Meter, Reply, Usage, storable
from kdkernels.evaluation.limits import RateLimits, Stopped, backoff
from kdkernels.optional import need

_RETRIED = (408, 409, 425, 429)
_NO_ANSWER = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError)


class _Passing(Exception):  # noqa: N818
    """A fault that may pass; `after` is how long the endpoint asked to wait, in seconds."""

    def __init__(self, text: str, after: float = 0.0) -> None:
        super().__init__(text)
        self.after = after


class EndpointChat:
    """A chat served by an OpenAI-compatible endpoint.

    model: its name there. base_url: e.g. http://localhost:8000/v1; None is the library's default. key_env: the
    environment variable that holds the key. The key is read from there alone, is never written anywhere and appears in
    no text or repr. temperature, max_tokens (None leaves either to the endpoint), options: more fields of the request.
    timeout: seconds for one request. retries: further attempts after a fault that may pass. concurrency: requests at a
    time. requests_per_minute, tokens_per_minute: limits kept here. prices: (prompt, completion) per million tokens.

    When a request fails for good, the answers of those in flight are still handed out, and then `UserError` is raised.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        key_env: str = "OPENAI_API_KEY",
        temperature: float | None = 0.0,
        max_tokens: int | None = 512,
        options: Mapping[str, Any] | None = None,
        timeout: float = 60.0,
        retries: int = 8,
        retry_delay: float = 0.5,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        prices: tuple[float, float] | None = None,
    ) -> None:
        _check_url(base_url)
        for name, value in (("timeout", timeout), ("concurrency", concurrency)):
            if not value > 0:
                raise UserError(f"{name} is {value}; allowed: above 0")
        if retries < 0:
            raise UserError(f"retries is {retries}; allowed: 0 or more")
        openai = need("openai", "a judge behind an endpoint")
        self.model, self.base_url, self.key_env = model, base_url, key_env
        self.request = {"temperature": temperature, "max_tokens": max_tokens, **(options or {})}
        self.request = {name: value for name, value in self.request.items() if value is not None}
        self.retries, self.retry_delay, self.concurrency = retries, retry_delay, concurrency
        self._limits = RateLimits(requests_per_minute, tokens_per_minute)
        self._meter = Meter(prices)
        self._errors = openai
        self._key = os.environ.get(key_env, "")
        if not self._key and base_url is None:
            raise UserError(f"environment variable {key_env} is not set; put the endpoint's key there")
        # local servers want no key, the client wants some
        self._client = openai.OpenAI(api_key=self._key or "none", base_url=base_url, timeout=timeout, max_retries=0)

    def __repr__(self) -> str:
        return f"EndpointChat({self.model!r}, {self.base_url!r}, key_env={self.key_env!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an EndpointChat holds a key and is never written; make it anew where it is needed")

    @property
    def name(self) -> str:
        """The model's name at the endpoint."""
        return self.model

    @property
    def settings(self) -> dict[str, Any]:
        """Endpoint, model and request options."""
        return {"kind": "endpoint", "base_url": self.base_url, "model": self.model, **self.request}

    @property
    def usage(self) -> Usage:
        """Requests, retries, tokens and cost so far."""
        return self._meter.read()

    def replies(self, conversations: Sequence[Conversation]) -> Iterator[tuple[int, Reply]]:
        """Ask for all, `concurrency` at a time; (index, reply) as answers arrive."""
        stop = threading.Event()
        failure: BaseException | None = None
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures: dict[Future[Reply], int] = {
                pool.submit(self._ask, conversation, stop): i for i, conversation in enumerate(conversations)
            }
            try:
                for future in as_completed(futures):
                    try:
                        reply = future.result()
                    except Stopped:
                        continue
                    except Exception as error:
                        failure = failure or error
                        stop.set()
                        continue
                    yield futures[future], reply
            finally:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        if failure is not None:
            raise failure

    def _ask(self, conversation: Conversation, stop: threading.Event) -> Reply:
        for attempt in range(self.retries + 1):
            self._limits.wait(stop)
            self._meter.add(requests=1, retries=int(attempt > 0))
            try:
                reply = self._once(conversation)
            except _Passing as fault:
                if attempt == self.retries:
                    raise self._given_up(str(fault)) from None
                if fault.after:
                    self._limits.pause(fault.after)
                elif stop.wait(backoff(attempt, self.retry_delay)):
                    raise Stopped from None
                continue
            self._meter.add(reply)
            self._limits.charge(reply.prompt_tokens + reply.completion_tokens)
            return reply
        raise AssertionError("unreachable")

    def _once(self, conversation: Conversation) -> Reply:
        """One request: a reply, `_Passing` for what may pass, `UserError` for what will not."""
        errors = self._errors
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=self.model, messages=[dict(m) for m in conversation], **_split(self.request)
            )
            return _reply(raw.content)
        except errors.APIStatusError as error:
            self._refused(error)
        except errors.APIConnectionError as error:
            raise _Passing(
                "no answer in time" if isinstance(error, errors.APITimeoutError) else _cause(error)
            ) from None
        except (errors.APIError, *_NO_ANSWER) as error:
            raise _Passing(f"what it sent is no answer ({type(error).__name__})") from None

    def _refused(self, error: Any) -> NoReturn:
        status = error.status_code
        text = self._redact(str(error.message).removeprefix(f"Error code: {status} - "))
        if (status in _RETRIED or status >= 500) and getattr(error, "code", None) != "insufficient_quota":
            raise _Passing(f"status {status}: {text}", _seconds(error.response.headers.get("retry-after"))) from None
        hints = {401: f"put a valid key into {self.key_env}", 403: f"the key in {self.key_env} may not do this"}
        hint = hints.get(status, "correct the model's name, the URL or the request's options")
        raise UserError(f"endpoint {self._where()}, model {self.model!r}: status {status}: {text}; {hint}") from None

    def _given_up(self, text: str) -> UserError:
        return UserError(
            f"endpoint {self._where()}, model {self.model!r}: {self._redact(text)}, {self.retries + 1} times; see that "
            "it is up and reachable, then run again (cached answers are not asked for twice)"
        )

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text

    def _where(self) -> str:
        return str(self._client.base_url)


def _split(request: Mapping[str, Any]) -> dict[str, Any]:
    """Fields the client knows by name, and the rest as its extra body."""
    known = ("temperature", "max_tokens", "max_completion_tokens", "seed", "top_p", "stop", "response_format")
    named: dict[str, Any] = {name: value for name, value in request.items() if name in known}
    extra = {name: value for name, value in request.items() if name not in known}
    return {**named, "extra_body": extra} if extra else named


def _reply(content: bytes) -> Reply:
    """The answer in a response's body; one of `_NO_ANSWER` where there is none."""
    data = json.loads(content)
    message = data["choices"][0]["message"]
    text, usage = message.get("content"), data.get("usage") or {}
    if text is None:
        text = message.get("refusal") or ""
    if not isinstance(text, str):
        raise TypeError("content is no text")
    return Reply(storable(text), int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))


def _seconds(header: str | None) -> float:
    try:
        seconds = float(header or 0)
    except ValueError:
        return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _cause(error: BaseException) -> str:
    inner = error.__cause__ or error
    return f"no connection, or one that broke ({type(inner).__name__}: {inner})"


def _check_url(base_url: str | None) -> None:
    if base_url is None:
        return
    parts = urlsplit(base_url)
    if parts.query or "@" in base_url:
        raise UserError("base_url holds a user, a password or a query; keys come from the environment alone (key_env)")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"base_url is {base_url!r}; allowed: http://HOST/... or https://HOST/...")
