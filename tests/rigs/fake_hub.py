"""A hub on loopback that serves folders: the few requests that the Hugging Face clients make of repositories.

The folders are root/models/OWNER/NAME and root/datasets/OWNER/NAME. `Faults` are what can go wrong.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".npz", ".pt", ".pth", ".bin", ".gz")  # stored by their sha256


@dataclass
class Faults:
    """What goes wrong; a test may change it at any time."""

    commit: str = COMMIT
    """Where main is; no other commit is known."""
    gated: set[str] = field(default_factory=set)
    """Repositories whose files need terms to be accepted."""
    cut: dict[str, int] = field(default_factory=dict)
    """Bytes of a file after which the connection ends, at every request."""
    flipped: set[str] = field(default_factory=set)
    """Files of which one bit arrives otherwise."""
    listed: list[str] = field(default_factory=list)
    """Names in listings beside those that are there."""
    down: bool = False
    """Whether all requests fail."""


class _Handler(BaseHTTPRequestHandler):
    root: Path
    asked: list[str]
    faults: Faults

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = self.headers.get("Content-Type", "")
        parts = urlsplit(self.path).path.strip("/").split("/")
        if "branch" in parts:
            self.asked.append(f"POST {self.path}")
            return self._json({})
        if parts[:3] == ["api", "repos", "create"] or parts[-1:] == ["validate-yaml"] or "commit" in parts:
            return self._write(parts, sent.decode())
        fields = json.loads(sent) if "json" in kind else parse_qs(sent.decode())
        if "preupload" in parts:
            self.asked.append(f"POST {self.path}")
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in fields["files"]]
            return self._json({"files": modes})
        self._answer(body=True, wanted=fields.get("paths"))

    def _answer(self, body: bool, wanted: list[str] | None = None) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.asked.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".rstrip())
        if self.faults.down:
            return self._error("Down", 500)
        if parts[0] == "api":
            return self._about(parts[1:], wanted)
        kind = parts.pop(0) if parts[0] == "datasets" else "models"
        owner, name, _, revision, *path = parts
        if f"{owner}/{name}" in self.faults.gated:
            return self._error("GatedRepo", 403)
        self._file(self.root / kind / owner / name, revision, "/".join(path), body)

    def _about(self, parts: list[str], wanted: list[str] | None) -> None:
        if parts == ["whoami-v2"]:
            return self._json({"name": "me", "type": "user"})
        if len(parts) < 3:  # what the client wants to know of the hub itself
            return self._json({})
        kind, owner, name, *rest = parts
        repo = self.root / kind / owner / name
        what, revision, *path = rest or ["revision", "main"]
        if not repo.is_dir():
            return self._error("RepoNotFound")
        if revision not in ("main", self.faults.commit):
            return self._error("RevisionNotFound")
        files = sorted(p for p in repo.rglob("*") if p.is_file())
        if what == "revision":
            names = [p.relative_to(repo).as_posix() for p in files] + self.faults.listed
            siblings = [{"rfilename": name} for name in names]
            about = {"id": f"{owner}/{name}", "sha": self.faults.commit, "siblings": siblings, "private": False}
            return self._json(about)
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
        if revision not in ("main", self.faults.commit):
            return self._error("RevisionNotFound")
        if not (repo / path).is_file():
            return self._error("EntryNotFound")
        content = (repo / path).read_bytes()
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        part = content[int(first or 0) : int(last) + 1 if last else None]
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{digest(path, content)}"')
        self.send_header("X-Repo-Commit", self.faults.commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.end_headers()
        if path in self.faults.flipped:
            part = part[:-1] + bytes([part[-1] ^ 1])
        if body:
            self.wfile.write(part[: max(0, self.faults.cut.get(path, len(content)) - int(first or 0))])

    def _write(self, parts: list[str], sent: str) -> None:
        """Takes a new repository, or a commit of files that come in the request itself."""
        self.asked.append(f"POST {self.path} {self.headers.get('Authorization', '')}")
        if parts[-1] == "validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if parts[1] == "repos":
            fields = json.loads(sent)
            self.asked.append(f"private: {fields.get('private') or fields.get('visibility') == 'private'}")
            repo = self.root / "models" / fields.get("organization", "me") / fields["name"]
            repo.mkdir(parents=True, exist_ok=True)
            name = "/".join(repo.parts[-2:])
            return self._json({"url": f"http://{self.headers['Host']}/{name}", "name": name})
        repo = self.root.joinpath(*parts[1:4])
        for line in map(json.loads, sent.splitlines()):
            if line["key"] == "file":
                path = repo / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
        url = f"http://{self.headers['Host']}/{'/'.join(parts[2:4])}/commit/{COMMIT}"
        self._json({"success": True, "commitUrl": url, "commitOid": COMMIT})

    def _json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _error(self, code: str, status: int = 404) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _entry(path: Path, repo: Path) -> dict:
    name = path.relative_to(repo).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": digest(name, b""), "size": 0, "path": name}
    content = path.read_bytes()
    return {"type": "file", "oid": digest("", content), "size": len(content), "path": name}


def digest(name: str, content: bytes) -> str:
    """Returns what the hub calls a stored file by: sha256 of large ones, git's sha1 of others."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def fetched(asked):
    """The names of the files that were fetched whole."""
    gets = [request.split() for request in asked if request.startswith("GET") and "/resolve/" in request]
    return sorted({words[1].partition(f"/resolve/{COMMIT}/")[2] for words in gets if len(words) == 2})


@contextmanager
def fake_hub(root: Path, home: Path, faults: Faults | None = None) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Serves `root`; yields (the environment of a process that uses it, the requests so far)."""
    asked: list[str] = []
    handler = type("Handler", (_Handler,), {"root": root, "asked": asked, "faults": faults or Faults()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
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


def reached_from_here(monkeypatch: Any, environment: dict[str, str]) -> None:
    """Points the clients in this process, which have read their environment already, to a fake hub."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import disable_progress_bars

    endpoint, home = environment["HF_ENDPOINT"], environment["HF_HOME"]
    changes = {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": f"{home}/hub",
        "HF_TOKEN_PATH": f"{home}/token",
    }
    for name, value in changes.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)  # between attempts
    disable_progress_bars()
