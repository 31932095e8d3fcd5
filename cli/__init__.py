"""Command lines: thin wrappers over the library."""

import os
import signal
import sys


def ended_by(number: int) -> str:
    """Returns what is said when a signal comes before there is anything to keep."""
    name = signal.Signals(number).name
    return f"stopped by {name}; no file is left half written, and the same command begins again"


def _end(number: int, _frame: object) -> None:
    os.write(2, f"{ended_by(number)}\n".encode())
    os._exit(128 + number)


if sys.argv[0] == "-m" or os.path.basename(sys.argv[0]).startswith("sae-"):  # one of our commands, as it is imported
    for _name in ("SIGINT", "SIGTERM"):  # an exception may get lost in an import
        signal.signal(getattr(signal, _name), _end)
