# SPDX-License-Identifier: Apache-2.0
"""A hub of one data set on this machine: the few requests that fetching files takes, answered from a table of files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import unquote, urlsplit

NAME = "org/talks"
COMMIT = hashlib.sha1(b"the only commit").hexdigest()
REVISIONS = ("main", "v1", COMMIT)


class _Handler(BaseHTTPRequestHandler):
    files: ClassVar[Mapping[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(f"{self.command} {path}")
        api, files = f"/api/datasets/{NAME}", f"/datasets/{NAME}/resolve/"
        if path == api or (path.startswith(f"{api}/revision/") and path.rpartition("/")[2] in REVISIONS):
            siblings = [{"rfilename": name} for name in self.files]
            self._send({"id": NAME, "sha": COMMIT, "siblings": siblings, "tags": []}, body=body)
        elif path.startswith(f"{api}/tree/"):
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files.items()
            ]
            self._send(listed, body=body)
        elif path.startswith(files) and path.removeprefix(files).partition("/")[2] in self.files:
            self._send_file(self.files[path.removeprefix(files).partition("/")[2]], body=body)
        else:
            self._send({"error": "not found"}, status=404, body=body, code="RepoNotFound")

    def _send_file(self, content: bytes, *, body: bool) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _send(self, value: object, *, body: bool, status: int = 200, code: str = "") -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


@contextmanager
def hub(files: Mapping[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Its address, and what it was asked for so far."""
    handler = type("Handler", (_Handler,), {"files": dict(files), "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", handler.asked
        finally:
            server.shutdown()
            thread.join(10)
