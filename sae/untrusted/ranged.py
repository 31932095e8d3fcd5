"""Headers of npz files on the hub: a few requests for the bytes that are looked at, instead of the file."""

import io
import os
import zipfile
from typing import Any

import numpy as np

from sae.base.errors import DataError
from sae.untrusted.weights import NPY_VERSIONS

TIMEOUT_S = 10
BLOCK_BYTES = 2**16
Header = dict[str, tuple[str, tuple[int, ...]]]
"""{tensor: (dtype, shape)}."""


def npz_header(url: str, size: int, token: str | bool | None = None) -> Header:
    """Returns the dtypes and shapes of the arrays in an npz file of `size` bytes at a URL of the hub."""
    found: Header = {}
    file = _Ranged(url, size, token)
    try:
        with zipfile.ZipFile(io.BufferedReader(file, BLOCK_BYTES)) as archive:
            for info in archive.infolist():
                with archive.open(info) as member:
                    shape, _, dtype = NPY_VERSIONS[np.lib.format.read_magic(member)](member)
                    found[info.filename.removesuffix(".npy")] = (dtype.name, tuple(shape))
    except zipfile.BadZipFile:
        raise file.error or DataError(f"{url} is damaged or no npz file") from None
    return found


class _Ranged(io.RawIOBase):
    """A file at a URL, of which only what is read is fetched."""

    def __init__(self, url: str, size: int, token: str | bool | None) -> None:
        self.url, self.size, self.token, self.at = url, size, token, 0
        self.error: Exception | None = None
        """Why bytes could not be had, which the reader of archives takes for the end of the file."""

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        try:
            return self._read(buffer)
        except Exception as error:
            self.error = error
            raise

    def _read(self, buffer: Any) -> int:
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        stop = min(self.at + len(buffer), self.size)
        if stop <= self.at:
            return 0
        headers = {**build_hf_headers(token=self.token), "Range": f"bytes={self.at}-{stop - 1}"}
        answer = get_session().get(self.url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S)
        hf_raise_for_status(answer)
        got = stop - self.at
        if answer.status_code != 206 or len(answer.content) != got:
            raise OSError("the server does not send parts of files")
        buffer[:got] = answer.content
        self.at = stop
        return got
