# SPDX-License-Identifier: Apache-2.0
"""A small real HTTP server that speaks the OpenAI API, and misbehaves where it is told to."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class ChatService:
    """What it does. Answers repeat the last question in capitals.

    :ivar fail: statuses that the next requests get, one each.
    :ivar unknown: a field that it refuses.
    """

    models: list[str] = field(default_factory=lambda: ["tiny"])
    key: str | None = None
    ids: bool = True
    fail: list[int] = field(default_factory=list)
    retry_after: str | None = None
    unknown: str | None = None
    finish_reason: str = "stop"
    body: bytes | None = None
    seconds: float = 0.0
    drop: int = 0
    address: str = ""
    asked: Counter[str] = field(default_factory=Counter)
    most_at_once: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        said = str(body["messages"][-1]["content"]).upper()
        message = {"role": "assistant", "content": said, "reasoning": "I shout."}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        answered = {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": len(said)}}
        if self.ids and body.get("return_token_ids"):
            choice["token_ids"] = [*said.encode(), 257]
            answered["prompt_token_ids"] = [1, *str(body["messages"]).encode()]
        return answered


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    service: ChatService

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._allowed() and self._send(200, {"data": [{"id": name} for name in self.service.models]})
        elif self.path == "/version":
            self._send(200, {"version": "1.2.3"})
        else:
            self._send(404, {"error": {"message": "no such path"}})

    def do_POST(self) -> None:
        service = self.service
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with service._lock:
            service.bodies.append(body)
            service.asked[str(body["messages"][-1]["content"])] += 1
            service._now += 1
            service.most_at_once = max(service.most_at_once, service._now)
            status = service.fail.pop(0) if service.fail else 200
            dropped = service.drop > 0
            service.drop -= dropped
        time.sleep(service.seconds)
        with service._lock:
            service._now -= 1
        if dropped:
            self.close_connection = True
            self.connection.close()
        elif not self._allowed():
            pass
        elif service.unknown in body:
            self._send(400, {"error": {"message": f"Unrecognized request argument: {service.unknown}"}})
        elif status != 200:
            self._send(status, {"error": {"message": f"told to say {status}"}})
        elif service.body is not None:
            self._send_bytes(200, service.body)
        else:
            self._send(200, service.answer(body))

    def _allowed(self) -> bool:
        if self.service.key is not None and self.headers.get("Authorization") != f"Bearer {self.service.key}":
            self._send(401, {"error": {"message": "a key is needed"}})
            return False
        return True

    def _send(self, status: int, value: Any) -> None:
        self._send_bytes(status, json.dumps(value).encode())

    def _send_bytes(self, status: int, content: bytes) -> None:
        self.send_response(status)
        if self.service.retry_after is not None:
            self.send_header("Retry-After", self.service.retry_after)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving(service: ChatService, *, port: int = 0) -> Iterator[ChatService]:
    """The service at ``service.address`` while the block runs."""
    handler = type("Handler", (_Handler,), {"service": service})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    service.address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
