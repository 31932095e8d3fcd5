"""Zip archives of others (npz, torch's .pt): what they declare is checked before memory is asked for."""

import zipfile
from pathlib import Path, PurePosixPath

import numpy as np

from sae.base.errors import DataError
from sae.untrusted.damage import printable

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
BOMB_BYTES, BOMB_RATIO = 64 * 2**20, 20  # weights do not shrink by more, when they are compressed
LOCAL_HEADER = 30  # bytes, before the member's name


def allowance(path: Path) -> int:
    """Returns how many bytes a compressed file may unpack to: far more than weights do is a bomb."""
    return BOMB_RATIO * path.stat().st_size + BOMB_BYTES


def is_archive(path: Path) -> bool:
    """Returns whether a file begins as a zip archive does."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


class Archive:
    """A zip archive that is open for reading: stored or deflated members, each once, none of which leads elsewhere."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, path.stat().st_size
        self._zip = zipfile.ZipFile(path)
        members = [info for info in self._zip.infolist() if not info.is_dir()]
        self.members = {info.filename: info for info in members}
        try:
            for info in members:
                self._check(info)
            if len(self.members) < len(members):
                raise DataError(f"{path} is refused: it holds two members of one name")
            if sum(info.compress_size for info in members) > self.size:
                raise DataError(f"{path} is refused: its members lie one over the other")
            unpacked = sum(info.file_size for info in members)
            if unpacked > allowance(path):
                raise DataError(
                    f"{path} is refused: {self.size:,} bytes unpack to {unpacked:,}, far more than weights can"
                )
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def _check(self, info: zipfile.ZipInfo) -> None:
        parts = PurePosixPath(info.filename).parts
        stored = info.compress_type == zipfile.ZIP_STORED
        wrong = {
            "leads out of it": ".." in parts or "/" in parts or "\\" in info.filename,
            "has a name that cannot be printed": not info.filename.isprintable(),
            "is encrypted": bool(info.flag_bits & 1),
            "is neither stored nor deflated": not stored and info.compress_type != zipfile.ZIP_DEFLATED,
            "has two sizes": stored and info.file_size != info.compress_size,
        }
        for what, is_so in wrong.items():
            if is_so:
                raise DataError(f"{self.path} is refused: its member {printable(info.filename)} {what}")

    def read(self, name: str) -> Bytes:
        """Returns a member's bytes, to be written to: memory-mapped, and copied where written, if it is stored."""
        info = self.members[name]
        with self._zip.open(info) as member:  # which compares the member's own header with the archive's
            if info.compress_type != zipfile.ZIP_STORED:
                found = np.frombuffer(bytearray(member.read(info.file_size)), np.uint8)
                if len(found) != info.file_size:
                    raise DataError(f"{self.path} is damaged: its member {name} is shorter than declared")
                return found
        with open(self.path, "rb") as file:  # of the two headers' lengths, the member's own count
            file.seek(info.header_offset)
            header = file.read(LOCAL_HEADER)
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = info.header_offset + LOCAL_HEADER + lengths
        if start + info.file_size > self.size:
            raise DataError(f"{self.path} is damaged: its member {name} ends beyond the file")
        return np.memmap(self.path, np.uint8, "c", start, info.file_size) if info.file_size else np.empty(0, np.uint8)

    def verify(self) -> None:
        """Raises DataError naming the first member whose bytes are not those that its checksum was made of."""
        for name, info in self.members.items():
            try:
                with self._zip.open(info) as member:
                    while member.read(2**20):
                        pass
            except Exception as error:
                raise DataError(f"{self.path} is damaged: its member {name}: {printable(error)}") from error
