"""A stand-in for the Hugging Face hub: the few endpoints that an upload takes."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_standin"


class Hub:
    """What the stand-in knows: one user, and repositories as dictionaries of files."""

    def __init__(self) -> None:
        self.user: dict[str, Any] = {
            "name": "me",
            "orgs": [{"name": "us"}],
            "auth": {"accessToken": {"role": "write"}},
        }
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        # Paths that are answered with this status.
        self.refuse: dict[str, int] = {}
        self.url = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        for pattern, status in self.refuse.items():
            if re.search(pattern, path):
                return status, {"error": "refused"}
        if path == "/api/whoami-v2":
            return 200, self.user
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.match(r"/api/models/([^/]+/[^/]+)(/\w+)?", path):
            name, action = found[1], found[2]
            if action == "/preupload":
                listed = json.loads(body)["files"]
                files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in listed]
                return 200, {"files": files}
            if action == "/commit":
                return self._commit(name, body)
            if name in self.repositories:
                return 200, [{"type": "file", "path": path, "size": 1, "oid": "0"} for path, _ in self.files(name)]
        return 404, {"error": f"{method} {path}"}

    def files(self, name: str) -> list[tuple[str, bytes]]:
        return sorted(self.repositories[name].items())

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked.get('organization') or self.user['name']}/{asked['name']}"
        status = 409 if name in self.repositories else 200
        self.repositories.setdefault(name, {})
        self.private.setdefault(name, asked.get("private") or asked.get("visibility") == "private")
        return status, {"url": f"{self.url}/{name}", "name": name}

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        for operation in map(json.loads, body.splitlines()):
            value = operation["value"]
            if operation["key"] == "file":
                self.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                del self.repositories[name][value["path"]]
        return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/{name}/commit/{'0' * 40}"}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            path = self.path.partition("?")[0]
            status, value = hub.answer(self.command, path, body) if known else (401, {"error": "who are you?"})
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_HEAD = _handle

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
