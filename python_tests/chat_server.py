"""A real HTTP server that speaks OpenAI's chat protocol, and fails on purpose."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("timeout", "429", "500", "malformed", "truncated", "truncated chunks", "no answer", "hang up")


class ChatServer:
    """Answers with `answer(messages)`; a share `faults` of the requests goes wrong, by a hash of prompt and attempt.

    asked: requests by the last message's text; served: those that were answered whole. most: requests at one moment.
    """

    def __init__(
        self,
        answer: Callable[[list[dict[str, str]]], str],
        *,
        faults: float = 0.0,
        delay: float = 0.0,
        hang: float = 0.5,
    ) -> None:
        self.answer, self.faults, self.delay, self.hang = answer, faults, delay, hang
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.keys: set[str] = set()
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.now = self.most = 0
        self.status: int | None = None  # every request is refused with it
        self.body: bytes | None = None  # every request is answered with it
        self.url = ""
        self.turn = itertools.cycle(FAULTS)

    def fault(self, prompt: str, attempt: int) -> str:
        """The fault of an attempt, "" for none: kinds in turn; of five in a row the last is always served."""
        draw = int.from_bytes(hashlib.sha256(f"{prompt} {attempt}".encode()).digest()[:4], "little") / 2**32
        if attempt >= 4 or draw >= self.faults:
            return ""
        with self.lock:
            return next(self.turn)

    @contextlib.contextmanager
    def running(self) -> Iterator[ChatServer]:
        """Serve on a free port of this machine."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


def _handler(state: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][-1]["content"]
            with state.lock:
                attempt = state.asked[prompt]
                state.asked[prompt] += 1
                state.keys.add(self.headers.get("Authorization", ""))
                state.requests.append(body)
                state.times.append(time.monotonic())
                state.now += 1
                state.most = max(state.most, state.now)
            try:
                time.sleep(state.delay)
                self.respond(body, prompt, "refused" if state.status else state.fault(prompt, attempt))
            finally:
                with state.lock:
                    state.now -= 1

        def respond(self, body: dict[str, Any], prompt: str, fault: str) -> None:
            with state.lock:
                state.kinds[fault] += 1
            if fault == "refused":
                text = f"key {self.headers.get('Authorization', '').removeprefix('Bearer ')} is no good"
                return self.send(state.status or 0, json.dumps({"error": {"message": text}}).encode())
            if fault == "429":
                return self.send(429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0.01"})
            if fault == "500":
                return self.send(500, b"<html>oops</html>", kind="text/html")
            if state.body is not None:
                return self.send(200, state.body)
            answer = json.dumps(
                {
                    "id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
                    "choices": [{"index": 0, "finish_reason": "stop",
                                 "message": {"role": "assistant", "content": state.answer(body["messages"])}}],
                    "usage": {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13},
                }
            ).encode()  # fmt: skip
            if fault == "malformed":
                return self.send(200, answer[:-7])
            if fault == "no answer":
                return self.send(200, b'{"id": "x", "choices": []}')
            if fault:
                return self.break_off(fault, answer)
            with state.lock:
                state.served[prompt] += 1
            return self.send(200, answer)

        def break_off(self, fault: str, answer: bytes) -> None:
            """The connection ends before the answer does."""
            self.close_connection = True
            if fault == "timeout":
                time.sleep(state.hang)
            elif fault == "truncated":
                self.send(200, answer[: len(answer) // 2], {"Content-Length": str(len(answer))})
            elif fault == "truncated chunks":
                self.send(200, b"%x\r\n%s\r\n" % (40, answer[:40]), {"Transfer-Encoding": "chunked"})

        def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, kind: str = "") -> None:
            self.send_response(status)
            sent = {"Content-Type": kind or "application/json", **(headers or {})}
            if "Transfer-Encoding" not in sent:
                sent.setdefault("Content-Length", str(len(body)))
            for name, value in sent.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

    return Handler
