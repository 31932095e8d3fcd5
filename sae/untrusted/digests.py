"""Digests that came with a download: the hub names what it stores by them, so that damage can be told."""

import hashlib
import os
import re
from pathlib import Path

from sae.base.errors import DataError
from sae.base.files import sha256_file

SHA256, SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
HOPS = 3  # snapshot -> blob -> blob that several repositories share


def verify(path: Path) -> None:
    """Raises DataError if a file that came from the hub is not what the hub stores, by the digest that came with it.

    That is the sha256 of large files and git's sha1 of small ones. In the hub's cache it is the name of the blob that
    the file links to; in a downloaded folder it lies in .cache/huggingface. Files that came without one pass.
    """
    digest, stored = _recorded(path)
    if SHA256.fullmatch(digest):
        found, kind = sha256_file(path), "sha256"
    elif SHA1.fullmatch(digest):
        found, kind = _git_sha1(path), "git sha1"
    else:
        return
    if found != digest:
        raise DataError(
            f"{path} is damaged: its {kind} is {found[:12]}..., that of the hub {digest[:12]}...; delete {stored} and "
            "load again"
        )


def _recorded(path: Path) -> tuple[str, Path]:
    """Returns (the digest that came with a file or "", the file to delete if it is another)."""
    link = path
    for _ in range(HOPS):
        if link.parent.name == "blobs":
            return link.name, link
        if not link.is_symlink():
            break
        link = Path(os.path.normpath(link.parent / os.readlink(link)))
    for folder in path.absolute().parents:
        name = f"{path.absolute().relative_to(folder).as_posix()}.metadata"
        beside = folder / ".cache" / "huggingface" / "download" / name
        if beside.is_file():
            lines = beside.read_text(encoding="utf-8", errors="replace").split()  # commit, digest, time
            return (lines[1] if len(lines) > 1 else ""), path
    return "", path


def _git_sha1(path: Path) -> str:
    raw = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw, usedforsecurity=False).hexdigest()
