"""Files of others, which may be damaged or made to do harm: each ends in a value or in one line that names it."""

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae.base.errors import DataError


@contextmanager
def naming_damage(path: Path, what: str) -> Iterator[None]:
    """Makes whatever goes wrong inside one DataError that names the file; one that is no file is not opened."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path} is a folder, a device or a pipe, not a file of tensors")
        yield
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file breaks its reader in any way
        why = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} is damaged or no {what}: {printable(why)}") from error


def printable(value: object) -> str:
    """Returns something that a file says as a short piece of one line."""
    text = str(value)
    return text if text.isprintable() and len(text) <= 200 else ascii(text)[:200]
