"""A hub on loopback that serves folders: the few requests that the Hugging Face clients make to download a repository.

The folders are root/models/OWNER/NAME and root/datasets/OWNER/NAME.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", COMMIT)


class _Handler(BaseHTTPRequestHandler):
    root: Path
    asked: list[str]

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = self.headers.get("Content-Type", "")
        fields = json.loads(sent) if "json" in kind else parse_qs(sent.decode())
        self._answer(body=True, wanted=fields.get("paths"))

    def _answer(self, body: bool, wanted: list[str] | None = None) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.asked.append(f"{self.command} {self.path}")
        if parts[0] == "api":
            return self._about(parts[1:], wanted)
        kind = parts.pop(0) if parts[0] == "datasets" else "models"
        owner, name, _, revision, *path = parts
        return self._file(self.root / kind / owner / name, revision, "/".join(path), body)

    def _about(self, parts: list[str], wanted: list[str] | None) -> None:
        kind, owner, name, *rest = parts
        repo = self.root / kind / owner / name
        what, revision, *path = rest or ["revision", "main"]
        if not repo.is_dir():
            return self._error("RepoNotFound")
        if revision not in REVISIONS:
            return self._error("RevisionNotFound")
        files = sorted(p for p in repo.rglob("*") if p.is_file())
        if what == "revision":
            siblings = [{"rfilename": p.relative_to(repo).as_posix()} for p in files]
            return self._json({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings, "private": False})
        if what == "paths-info":
            found = [repo / name for name in wanted or [] if (repo / name).exists()]
        elif not (folder := repo.joinpath(*path)).is_dir():
            return self._error("EntryNotFound")
        else:
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
            found = sorted(folder.rglob("*") if recursive else folder.iterdir())
        return self._json([_entry(p, repo) for p in found])

    def _file(self, repo: Path, revision: str, path: str, body: bool) -> None:
        if not repo.is_dir():
            return self._error("RepoNotFound")
        if revision not in REVISIONS:
            return self._error("RevisionNotFound")
        if not (repo / path).is_file():
            return self._error("EntryNotFound")
        content = (repo / path).read_bytes()
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        part = content[int(first or 0) : int(last) + 1 if last else None]
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{_oid(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.end_headers()
        if body:
            self.wfile.write(part)

    def _json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _error(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _entry(path: Path, repo: Path) -> dict:
    name = path.relative_to(repo).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": _oid(name.encode()), "size": 0, "path": name}
    content = path.read_bytes()
    return {"type": "file", "oid": _oid(content), "size": len(content), "path": name}


def _oid(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@contextmanager
def fake_hub(root: Path, home: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Serves `root`; yields (the environment of a process that uses it, the requests so far)."""
    asked: list[str] = []
    handler = type("Handler", (_Handler,), {"root": root, "asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        try:
            yield environment, asked
        finally:
            server.shutdown()
