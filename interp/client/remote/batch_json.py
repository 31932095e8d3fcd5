"""What a Batch API says, as plain values: its objects, its pages and the lines of its files, none of them believed."""

import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from interp.client.shapes import listed, number, record, told
from sae.base.lines import lines_of

FULL = "token_limit_exceeded"
"""The organization's queue is full: wait until another batch has ended."""
_NAME = re.compile(r"\w[\w.:-]*")


@dataclass(frozen=True)
class Batch:
    """A batch as its server tells of it; the package's own models take anything for one."""

    id: str
    status: str
    endpoint: str
    input: str
    outputs: tuple[str, ...]
    """The files of answers and of errors that there are."""
    metadata: dict[str, Any]
    created_at: float
    errors: tuple[tuple[str, str], ...]
    """(code, message) of what made it fail."""
    counts: Any

    @property
    def full(self) -> bool:
        """Returns whether it found no place in the queue."""
        return any(code == FULL for code, _ in self.errors)

    @property
    def told(self) -> str:
        """Returns why it failed, in the server's words."""
        return "; ".join(f"{code}: {message}" for code, message in self.errors) or "the batch failed"


def parsed(raw: bytes) -> Any:
    """Returns the value that JSON spells; None where it is none."""
    try:
        return json.loads(raw.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None


def name_of(body: Any, field: str = "id") -> str | None:
    """Returns the name of a file or a batch, which goes into an address; None where there is none."""
    name = record(body).get(field)
    return name if isinstance(name, str) and _NAME.fullmatch(name) else None


def batch_of(body: Any) -> Batch | None:
    """Returns a batch; None of what is none."""
    name, status, body = name_of(body), record(body).get("status"), record(body)
    files = [name_of(body, field) for field in ("output_file_id", "error_file_id") if body.get(field)]
    if name is None or not isinstance(status, str) or None in files:
        return None
    created = number(body.get("created_at"))
    errors = map(record, listed(record(body.get("errors")).get("data")))
    return Batch(
        id=name,
        status=status,
        endpoint=told(body.get("endpoint")),
        input=name_of(body, "input_file_id") or "",
        outputs=tuple(file for file in files if file),
        metadata=record(body.get("metadata")),
        created_at=time.time() if created is None else created,
        errors=tuple((told(error.get("code")), told(error.get("message"))) for error in errors),
        counts=body.get("request_counts"),
    )


def page_of(body: Any) -> dict[str, Any] | None:
    """Returns a page of a list."""
    return body if isinstance(record(body).get("data"), list) else None


def entries(raw: bytes) -> Iterable[dict[str, Any]]:
    """Yields the lines of a file; what is no JSON object with an id answers nothing."""
    for line in lines_of(raw, errors="replace"):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("custom_id"), str):
            yield entry
