"""How fast an endpoint may be asked, and how long to wait after a fault. Shared by the threads of one client."""

from __future__ import annotations

import random
import threading
import time

LONGEST_WAIT = 60.0  # seconds; the client libraries' own bound for Retry-After


class Stopped(Exception):  # noqa: N818
    """The run ends: whoever waits for a place gives up."""


class RateLimits:
    """Requests and tokens a minute, and pauses that an endpoint asks for; None is no limit.

    Requests are spaced evenly. Tokens are known only afterwards: they are charged then, and whoever comes next waits
    until the debt is paid off.
    """

    def __init__(self, requests_per_minute: float | None = None, tokens_per_minute: float | None = None) -> None:
        self._spacing = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._seconds_per_token = 60.0 / tokens_per_minute if tokens_per_minute else 0.0
        self._lock = threading.Lock()
        self._next = self._solvent = 0.0

    def wait(self, stop: threading.Event) -> None:
        """Return when a request may be sent; raise `Stopped` when `stop` is set meanwhile."""
        with self._lock:
            start = max(time.monotonic(), self._next)
            self._next = start + self._spacing
        while not stop.is_set():
            with self._lock:
                delay = max(start, self._solvent) - time.monotonic()
            if delay <= 0:
                return
            stop.wait(delay)
        raise Stopped

    def charge(self, tokens: int) -> None:
        """Count the tokens of an answer."""
        if self._seconds_per_token:
            with self._lock:
                self._solvent = max(self._solvent, time.monotonic()) + tokens * self._seconds_per_token

    def pause(self, seconds: float) -> None:
        """No request of any thread for so long (the endpoint said so)."""
        with self._lock:
            self._solvent = max(self._solvent, time.monotonic() + min(seconds, LONGEST_WAIT))


def backoff(attempt: int, base: float) -> float:
    """Seconds before attempt number `attempt` + 2: doubling, with a random half taken off so that threads spread."""
    return min(base * 2.0**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
