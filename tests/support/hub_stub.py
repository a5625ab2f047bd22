"""A model hub on this machine, as far as an upload needs it: repositories, preupload, LFS, commits."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HubStub(ThreadingHTTPServer):
    """repos: {name: whether it is private}; files: {(name, path): content}, as committed; keys: what the
    requests were authorised with."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.repos: dict[str, bool] = {}
        self.files: dict[tuple[str, str], bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.keys: set[str] = set()
        self.commits: list[str] = []
        self.fails = 0  # status of every answer, if any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running() -> Iterator[HubStub]:
    """Serve a hub while the block runs."""
    with HubStub() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Request(BaseHTTPRequestHandler):
    server: HubStub
    protocol_version = "HTTP/1.1"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, value: object, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        name = re.match(r"/api/models/([^/]+/[^/?]+)", self.path)[1]
        if self.server.fails:
            self._answer({"error": "no"}, self.server.fails)
            return
        self._answer({"id": name, "private": self.server.repos[name], "sha": "0" * 40, "siblings": []})

    def do_PUT(self) -> None:
        self.server.stored[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        hub, body = self.server, self._body()
        hub.keys.add(self.headers.get("Authorization", ""))
        if hub.fails:
            self._answer({"error": "no"}, hub.fails)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            there = name in hub.repos
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            hub.repos.setdefault(name, private)
            self._answer({"url": f"{hub.url}/{name}", "id": name}, 409 if there else 200)
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self._commit(re.match(r"/api/models/([^/]+/[^/]+)/commit/", self.path)[1], body)
        else:  # of the card's head
            self._answer({"errors": [], "warnings": []})

    def _commit(self, name: str, body: bytes) -> None:
        hub = self.server
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                hub.commits.append(value["summary"])
            elif line["key"] == "file":
                hub.files[name, value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[name, value["path"]] = hub.stored[value["oid"]]
        self._answer({"commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1" * 40, "success": True})

    def log_message(self, *_: object) -> None:
        pass
