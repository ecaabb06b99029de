# SPDX-License-Identifier: Apache-2.0
"""A small server with the OpenAI chat API on this machine, which does what a test says: answers, fails, cuts, dies.

An answer depends on the conversation alone, so whoever asks twice is told the same.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from specforge_core.testing.tiny_plugin import TURN_END
from specforge_core.testing.tiny_tokenizer import TinyTokenizer

Json = dict[str, Any]
TOKENIZER = TinyTokenizer()


def answer_to(body: Json) -> str:
    """What the service says to a conversation."""
    asked = json.dumps([body["messages"], body.get("chat_template_kwargs")], sort_keys=True)
    return f"answer {hashlib.sha256(asked.encode()).hexdigest()[:12]}"


def complete(body: Json, *, content: str | None = None, finish_reason: str = "stop", **message: Any) -> Json:
    """A chat completion, with token ids where they are asked for."""
    said = answer_to(body) if content is None else content
    choice: Json = {
        "index": 0,
        "message": {"role": "assistant", "content": said, **message},
        "finish_reason": finish_reason,
    }
    result: Json = {"id": "x", "object": "chat.completion", "model": body["model"], "choices": [choice]}
    shown = [{**turn, "content": turn.get("content") or ""} for turn in body["messages"]]
    prompt_ids = TOKENIZER.encode(TOKENIZER.render(shown, add_generation_prompt=True).text).input_ids
    token_ids = [*TOKENIZER.encode(said).input_ids, *([TURN_END] if finish_reason != "length" else [])]
    if body.get("return_token_ids"):
        choice["token_ids"], result["prompt_token_ids"] = token_ids, list(prompt_ids)
    result["usage"] = {"prompt_tokens": len(prompt_ids), "completion_tokens": len(token_ids), "total_tokens": 0}
    return result


Behaviour = Callable[["ChatService", Json], tuple[int, Json | bytes]]


def answers(service: ChatService, body: Json) -> tuple[int, Json | bytes]:
    return 200, complete(body)


class ChatService:
    """One server.

    :ivar behave: what it does with a request; may sleep.
    :ivar asked: the bodies of the requests, in the order in which they came.
    """

    def __init__(self, port: int = 0, *, models: tuple[str, ...] = ("tiny",), key: str | None = None) -> None:
        self.behave: Behaviour = answers
        self.asked: list[Json] = []
        self.most_at_once = 0
        self.models = models
        self.key = key
        self._at_once = 0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                service._open.add(self.connection)

            def do_GET(self) -> None:
                if self.path == "/version":
                    self._reply(200, {"version": "7.8.9"})
                elif not self._is_allowed():
                    self._reply(401, {"error": {"message": "wrong key"}})
                elif self.path == "/v1/models":
                    self._reply(200, {"object": "list", "data": [{"id": name} for name in service.models]})
                else:
                    self._reply(404, {"detail": "Not Found"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not self._is_allowed():
                    self._reply(401, {"error": {"message": "wrong key"}})
                    return
                with service._lock:
                    service.asked.append(body)
                    service._at_once += 1
                    service.most_at_once = max(service.most_at_once, service._at_once)
                try:
                    status, said = service.behave(service, body)
                finally:
                    with service._lock:
                        service._at_once -= 1
                self._reply(status, said)

            def _is_allowed(self) -> bool:
                return service.key is None or self.headers["Authorization"] == f"Bearer {service.key}"

            def _reply(self, status: int, said: Json | bytes) -> None:
                content = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 1024

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that left, or a connection that the test cut."""

        self._server = Server(("127.0.0.1", port), Handler)
        self.port: int = self._server.server_address[1]
        self.address = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def die(self) -> None:
        """As if it were killed: nobody listens any more, and open connections break."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


@contextmanager
def chat_service(**settings: Any) -> Iterator[ChatService]:
    service = ChatService(**settings)
    try:
        yield service
    finally:
        service.die()


def wait_until(condition: Callable[[], bool], *, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
