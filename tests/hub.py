"""A stand-in of the Hugging Face Hub's API on this machine: what the client asks to upload something, and no more."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = 10_000  # bytes from which a file goes the way of large files
TOKEN = "hf_of_the_test"


@dataclass
class Hub:
    """Its ``address``, and what it was given: repositories (whether each is private), files and messages of each."""

    address: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    forbidden: bool = False
    broken: bool = False

    @property
    def environment(self) -> dict[str, str]:
        """What makes the client talk to it."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "no_proxy": "127.0.0.1",
        }


@contextmanager
def standing_in() -> Iterator[Hub]:
    """The stand-in, which answers until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub

    def log_message(self, *_: object) -> None:
        """Nothing is said."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, code: int, value: Any = None) -> None:
        content = b"" if value is None else json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_PUT(self) -> None:
        self.state.large[self.path.rpartition("/")[2]] = self._body()
        self._answer(200)

    def do_POST(self) -> None:
        hub, body, path = self.state, self._body(), self.path.partition("?")[0]
        hub.asked.append(path)
        if path.startswith("/api/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "who are you?"})
        if hub.forbidden:
            return self._answer(403, {"error": "not yours"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in hub.private:
                return self._answer(409, {"error": "it is there", "url": f"{hub.address}/{name}"})
            # What is not said is public, as the real one has it.
            hub.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
            return self._answer(200, {"url": f"{hub.address}/{name}"})
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            asked = json.loads(body)["files"]
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["size"] > LARGE else "regular",
                    "shouldIgnore": False,
                }
                for one in asked
            ]
            return self._answer(200, {"files": modes})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": one["oid"],
                    "size": one["size"],
                    "actions": {"upload": {"href": f"{hub.address}/large/{one['oid']}"}},
                }
                for one in json.loads(body)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            if hub.broken:
                return self._answer(500, {"error": "out of order"})
            self._commit(found[1], [json.loads(line) for line in body.splitlines() if line.strip()])
            return self._answer(
                200, {"commitUrl": f"{hub.address}/{found[1]}/commit/1", "commitOid": "1" * 40}
            )
        return self._answer(404, {"error": path})

    def do_GET(self) -> None:
        self.state.asked.append(self.path)
        self._answer(404, {"error": self.path})

    def _commit(self, name: str, lines: list[Any]) -> None:
        files = self.state.files.setdefault(name, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.state.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.state.large[value["oid"]]
