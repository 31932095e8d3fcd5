"""What is said of a request that fails: one line of ours, or an id under which the log tells more."""

import logging
import re
import secrets
import traceback
from http import HTTPStatus
from pathlib import Path

from sae.base.errors import ConfigError, DataError
from sae.base.visible import visible

log = logging.getLogger(__name__)
LONGEST_CHARS = 500
_PLACE = re.compile(r"(?<![\w.:/~-])(?:~?/|[A-Za-z]:\\)(?:[^\s/\\'\"]+[/\\])+")  # of any path but its last part


class Refused(ConfigError):
    """A request that is not carried out, with the status of HTTP that says whose fault it is."""

    def __init__(self, status: int, line: str, wait_s: float = 0, field: str | None = None) -> None:
        """Says why; `wait_s` is after how many seconds to try again, `field` what is wrong of the request."""
        super().__init__(line)
        self.status, self.wait_s, self.field = status, wait_s, field


def told(error: BaseException, places: tuple[str, ...] = ()) -> Refused:
    """Returns what a client is told of an error: our own lines as they are, without the `places` of this machine.

    Of all other errors the kind and the frames, but no text, which may be of a request, go to the log under an id.
    """
    if isinstance(error, Refused):
        return error
    if isinstance(error, ConfigError | DataError):
        return Refused(400 if isinstance(error, ConfigError) else 500, one_line(str(error), places))
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        return Refused(503, "there is not enough memory for this; ask for less")
    number = secrets.token_hex(4)
    frames = "".join(
        f"\n  {Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)
    )
    log.error("internal error %s: %s%s", number, type(error).__name__, frames)
    return Refused(500, f"internal error {number}; the log of the server tells more")


def one_line(text: str, places: tuple[str, ...] = ()) -> str:
    """Returns a message on one line, in which a place of this machine is its last part alone."""
    for place in sorted(filter(None, places), key=len, reverse=True):
        text = text.replace(place, Path(place).name)
    text = visible(" ".join(_PLACE.sub("", text).split()))
    return text if len(text) <= LONGEST_CHARS else text[:LONGEST_CHARS] + " ..."


def of_status(status: int) -> str:
    """Returns the line of a status that needs no more words."""
    return HTTPStatus(status).phrase.lower()
