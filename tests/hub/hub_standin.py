# SPDX-License-Identifier: Apache-2.0
"""A local HTTP server with the Hub's addresses and headers, for tiny repositories, and faults.

What huggingface_hub uses of the Hub: the revision and tree API, and files behind `resolve`, where
large ones redirect to another address that takes byte ranges.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


def commit_of(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


@dataclass
class Repository:
    """Revisions (branch or tag -> commit) and the files of each commit."""

    revisions: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    error: tuple[int, str] | None = None

    def push(self, files: dict[str, bytes], branch: str = "main") -> str:
        commit = commit_of(f"{branch}{len(self.commits)}{sorted(files)}")
        self.revisions[branch] = commit
        self.commits[commit] = dict(files)
        return commit


@dataclass
class Standin:
    """The server's state, changed by tests while it runs.

    Attributes:
        storage: where large files are, under another host name as with the Hub.
        cut: file -> the transfer breaks off after so many bytes, once.
        spoil: file -> how many times a byte of it is changed on the way.
        missing: files whose storage answers with an error.
        log: (method, file, Range header) of each request for a file.
    """

    url: str = ""
    storage: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    spoil: dict[str, int] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    log: list[tuple[str, str, str | None]] = field(default_factory=list)

    def add(self, name: str, folder: Path, extra: dict[str, bytes] | None = None) -> str:
        """Push a folder's files, and return the commit."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        return self.repositories.setdefault(name, Repository()).push(files | (extra or {}))

    def reset(self) -> None:
        """Forget all repositories, faults and requests."""
        for kept in (self.repositories, self.cut, self.spoil, self.missing, self.log):
            kept.clear()

    def transfers(self) -> list[tuple[str, str | None]]:
        """Large files that were asked for, with the range."""
        return [(file, span) for method, file, span in self.log if method == "GET"]


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


@contextmanager
def serve() -> Iterator[Standin]:
    """Run the server on a free port of this machine."""
    state = Standin()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            for pattern, method in (
                (r"/api/models/([^/]+/[^/]+?)(?:/revision/([^/]+))?", self.revision),
                (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self.tree),
                (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
                (r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", self.cdn),
            ):
                if found := re.fullmatch(pattern, path):
                    return method(*found.groups())
            self.fail(404, "EntryNotFound")

        def commit(self, name: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
            repository = state.repositories.get(name)
            if repository is None:
                return self.fail(404, "RepoNotFound")
            if repository.error:
                return self.fail(*repository.error)
            commit = repository.revisions.get(revision or "main", revision)
            if commit not in repository.commits:
                return self.fail(404, "RevisionNotFound")
            return commit, repository.commits[commit]

        def revision(self, name: str, revision: str | None) -> None:
            if found := self.commit(name, revision):
                commit, files = found
                siblings = [{"rfilename": file} for file in files]
                self.json({"id": name, "modelId": name, "sha": commit, "siblings": siblings})

        def tree(self, name: str, revision: str) -> None:
            if found := self.commit(name, revision):
                self.json([self.entry(file, data) for file, data in found[1].items()])

        def entry(self, file: str, data: bytes) -> dict:
            entry = {"type": "file", "path": file, "size": len(data), "oid": git_sha1(data)}
            if is_large(file):
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
            return entry

        def resolve(self, name: str, revision: str, file: str) -> None:
            if not (found := self.commit(name, revision)):
                return
            commit, files = found
            if file not in files:
                return self.fail(404, "EntryNotFound")
            data = files[file]
            headers = {"X-Repo-Commit": commit}
            if not is_large(file):
                return self.send(200, data, headers | {"ETag": f'"{git_sha1(data)}"'})
            sha256 = hashlib.sha256(data).hexdigest()
            headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
            self.send(
                302, b"", headers | {"Location": f"{state.storage}/cdn/{name}/{commit}/{file}"}
            )

        def cdn(self, name: str, commit: str, file: str) -> None:
            if file in state.missing:
                return self.fail(503, "Unavailable")
            data = state.repositories[name].commits[commit][file]
            span = self.headers.get("Range")
            state.log.append((self.command, file, span))
            if state.spoil.get(file, 0) > 0 and self.command == "GET":
                state.spoil[file] -= 1
                data = data[:-1] + bytes([data[-1] ^ 1])
            headers, status, whole = {"Accept-Ranges": "bytes"}, 200, len(data)
            if span:
                begin = int(re.fullmatch(r"bytes=(\d+)-", span)[1])
                data, status = data[begin:], 206
                headers["Content-Range"] = f"bytes {begin}-{whole - 1}/{whole}"
            cut = state.cut.pop(file, None) if self.command == "GET" else None
            self.send(status, data, headers, cut)

        def json(self, value: object) -> None:
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def fail(self, status: int, code: str) -> None:
            self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

        def send(self, status: int, data: bytes, headers: dict, cut: int | None = None) -> None:
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data if cut is None else data[:cut])
            if cut is not None:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    state.storage = state.url.replace("127.0.0.1", "localhost")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
