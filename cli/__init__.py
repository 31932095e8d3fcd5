"""Command lines: thin wrappers over the library."""

import os
import signal
import sys

NOTHING_LOST = "stopped by {}; no file is left half written, and the same command begins again"


def _end(number: int, _frame: object) -> None:
    os.write(2, f"{NOTHING_LOST.format(signal.Signals(number).name)}\n".encode())
    os._exit(128 + number)


if sys.argv[0] == "-m" or os.path.basename(sys.argv[0]).startswith("sae-"):  # one of our commands, as it is imported
    for _name in ("SIGINT", "SIGTERM"):  # an exception may get lost in an import
        signal.signal(getattr(signal, _name), _end)
