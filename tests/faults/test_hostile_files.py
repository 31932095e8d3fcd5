"""Row 20: what is no file, may not be read, or unpacks to far more than it is takes neither time nor memory."""

import gzip
import json
import os
import resource
import shutil
import struct
import time
import zipfile
import zlib
from functools import partial
from pathlib import Path

import pytest
from children import Child
from hostile import (
    CENTRAL,
    END,
    LOCAL,
    OlderPickler,
    Storage,
    W,
    archive,
    entry,
    name,
    npy,
    npz,
    of_views,
    older,
    pickled,
    plain,
    refused,
    safetensors,
    text,
    view,
)

import sae
from sae import weights
from sae.errors import ConfigError, DataError
from sae.places import LocalFiles
from sae.weights import read_pickle

KINDS = ["x.safetensors", "x.npz", "x.pt", "x.bin", "x.pkl.gz"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["empty", "short", "missing", "folder", "pipe", "device", "loop", "dangling", "zeros"])
def test_what_is_no_file_of_tensors_is_named_at_once(tmp_path, kind, what):
    path = tmp_path / kind
    make = {
        "empty": path.touch,
        "short": lambda: path.write_bytes(b"PK"),
        "missing": lambda: None,
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
        "dangling": lambda: path.symlink_to("nowhere"),
        "zeros": lambda: path.write_bytes(bytes(10_000)),
    }
    make[what]()
    message = {
        "folder": "not a file of tensors",
        "pipe": "not a file",
        "device": "not a file",
        "missing": "cannot read",
    }
    refused(path, message.get(what, "cannot read|damaged|refused"))
    if what in ("missing", "folder", "pipe", "device", "loop", "dangling"):
        refused(path, "not a file|cannot read", weights.verify)


def without_rights(folder, result):
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    said = []
    for act in (
        lambda: weights.tensors(folder / "x.safetensors"),
        lambda: weights.verify(folder / "x.npz"),
        lambda: weights.shapes(folder / "x.pt"),
        lambda: LocalFiles(folder).path("cfg.json").read_bytes() and sae.load(folder),
    ):
        try:
            act()
            said.append("nothing")
        except (DataError, ConfigError, PermissionError) as error:
            said.append(f"{type(error).__name__}: {error}")
    print(json.dumps(said))
    return 0


def test_files_that_may_not_be_read_are_named(tmp_path):
    folder = tmp_path / "coder"
    folder.mkdir()
    for name in ("x.safetensors", "x.npz", "x.pt", "cfg.json"):
        (folder / name).write_bytes(b"{}")
        (folder / name).chmod(0)
    for above in (folder, *folder.parents):
        if above == Path("/tmp"):
            break
        above.chmod(0o755)
    child = Child(tmp_path / "log.txt", partial(without_rights, folder, None))
    assert child.wait() == 0, child.output
    said = json.loads(child.output.splitlines()[-1])
    for line, name in zip(said, ("x.safetensors", "x.npz", "x.pt"), strict=False):
        assert line == f"DataError: cannot read {folder / name}: Permission denied"
    assert "Permission denied" in said[3]


# ---- bombs


GIB = 2**30


def deflated(size):
    """Returns a raw deflate stream of zeros, a thousandth of their size."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(size // 2**20)) + packer.flush()


def lying_archive(path, name, stream, declared, crc=0, copies=1):
    """Writes an archive by hand, whose directory says that a member unpacks to so many bytes, some times over."""
    fields = (20, 0, 8, 0, 0x21, crc, len(stream), declared, len(name), 0)
    local = struct.pack("<4s5H3I2H", LOCAL, *fields) + name + stream
    central = b"".join(
        struct.pack("<4s6H3I5H2I", CENTRAL, 20, *fields[:-1], 0, 0, 0, 0, 0, 0) + f"{i:06d}".encode() + name[6:]
        if copies > 1
        else struct.pack("<4s6H3I5H2I", CENTRAL, 20, *fields[:-1], 0, 0, 0, 0, 0, 0) + name
        for i in range(copies)
    )
    end = struct.pack("<4s4H2IH", END, 0, 0, copies, copies, len(central), len(local), 0)
    path.write_bytes(local + central + end)


def sparse(path, head, size):
    """Writes a file that is as long as it says, and has room on the disk for its head only."""
    path.write_bytes(head)
    os.truncate(path, size)


def bombs(folder):
    big = npy(np.zeros(0, np.float32), (2**26,))
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    stream = packer.compress(big) + b"".join(packer.compress(bytes(2**20)) for _ in range(256)) + packer.flush()
    lying_archive(folder / "deflated.npz", b"W.npy", stream, 2**28 + len(big))
    lying_archive(folder / "lying.npz", b"W.npy", stream, 152)
    lying_archive(folder / "over.npz", b"000000W.npy", stream[: 2**16], 2**20, copies=5000)
    lying_archive(folder / "deflated.pt", b"x/data.pkl", deflated(2**28), 2**28)
    npz(folder / "bzip2.npz", {"W.npy": bytes(2**24)}, zipfile.ZIP_BZIP2)
    npz(folder / "declared.npz", {"W.npy": npy(W, (25 * 10**9,))})
    with gzip.open(folder / "zeros.pkl.gz", "wb", 6) as file:
        for _ in range(256):
            file.write(bytes(2**20))
    with gzip.open(folder / "text.pkl.gz", "wb", 6) as file:  # one value of 256 MiB
        file.write(b"\x80\x04X" + struct.pack("<I", 2**28))
        for _ in range(256):
            file.write(bytes(2**20))
    safetensors(folder / "declared.safetensors", {"W": entry((25, 10**9), 0, 10**11)})
    safetensors(folder / "length.safetensors", b"{", length=2**63)
    sparse(folder / "header.safetensors", (90 * GIB).to_bytes(8, "little") + b'{"', 100 * GIB)
    sparse(folder / "zeros.safetensors", b"", 100 * GIB)
    sparse(folder / "zeros.pt", b"", 100 * GIB)
    sparse(folder / "zeros.npz", b"PK\x03\x04", 100 * GIB)
    sparse(folder / "line.pt", b"c", 100 * GIB)
    sparse(folder / "value.pt", b"\x80\x04\x8e" + (90 * GIB).to_bytes(8, "little"), 100 * GIB)
    sparse(folder / "archive.pt", LOCAL, 100 * GIB)
    archive(folder / "lists.pt", b"\x80\x02" + b"]" * 4_000_000 + b".")
    archive(folder / "twice.pt", b"\x80\x02" + TWICE + b".")
    archive(folder / "key.pt", b"\x80\x02}" + TWICE + b"h\x00Ns.")
    of_views(folder, "older", {"W": OUTSIDE["a hundred gigabytes"]}).rename(folder / "view.pt")
    of_views(folder, "archive", {"W": OUTSIDE["the same number"]}).rename(folder / "expanded.pt")
    often = {str(i): view((2**16,), (1,), storage=Storage(2**16)) for i in range(5000)}
    archive(folder / "often.pt", pickled(often), {"data/0": bytes(2**18)})
    again = b"h\x01h\x02R" * 50_000  # the same call on the same value
    packed = b"(" + text(b"x" * 2**20) + text(b"latin1") + b"tq\x02R"
    plain(folder / "encoded.bin", b"\x80\x02](" + name("_codecs.encode") + b"q\x01" + packed + again + b"e.")
    inner = older(pickled(Storage(2**18), OlderPickler), ["0"], struct.pack("<q", 2**18) + bytes(2**20))
    packed = b"B" + struct.pack("<I", len(inner)) + inner + b"\x85q\x02R"
    call = name("torch.storage._load_from_bytes") + b"q\x01"
    plain(folder / "nested.bin", b"\x80\x03](" + call + packed + again + b"e.")
    fields = b"}(" + b"".join(text(b"%d" % i) + b"N" for i in range(20_000)) + b"uq\x02"
    objects = b"(" + b"h\x01)\x81h\x02b" * 50_000 + b"t"
    archive(folder / "fields.pt", b"\x80\x02" + fields + name("sae_training.config.Config") + b"q\x01" + objects + b".")
    keys = b"".join(b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N" for i in range(1, 100_000))
    archive(folder / "keys.pt", b"\x80\x02}(" + keys + b"u.")  # all of one hash


BOMBS = [
    *(
        "deflated.npz",
        "lying.npz",
        "over.npz",
        "deflated.pt",
        "bzip2.npz",
        "declared.npz",
        "zeros.pkl.gz",
        "text.pkl.gz",
    ),
    *("declared.safetensors", "length.safetensors", "header.safetensors", "zeros.safetensors", "zeros.pt", "zeros.npz"),
    *("line.pt", "value.pt", "archive.pt", "lists.pt", "twice.pt", "key.pt", "view.pt", "expanded.pt", "often.pt"),
    *("encoded.bin", "nested.bin", "fields.pt", "keys.pt"),
]


def defused(folder, names):
    """Reads each file, in little room, and prints what came of it: error, MiB of memory at its peak, seconds."""
    memory = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in open("/proc/self/status") if " kB" in line}
    resource.setrlimit(resource.RLIMIT_AS, (memory["VmSize"] + 8 * GIB, resource.RLIM_INFINITY))
    for name in names:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        start, peak = time.process_time(), _peak()
        said = []
        for read in (weights.shapes, weights.tensors, weights.verify, partial(read_pickle, inert=("sae_training.",))):
            try:
                read(folder / name)
                said.append("")
            except DataError as error:
                said.append(str(error))
        print(json.dumps([name, said, (_peak() - peak) / 2**20, time.process_time() - start]), flush=True)
    return 0


def _peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bombs")
    print("START", time.time())
    bombs(folder)
    print("BUILT", time.time())
    child = Child(folder / "log.txt", partial(defused, folder, BOMBS))
    assert child.wait(100) == 0, child.output
    print(child.output)
    print("DONE", time.time())
    lines = [json.loads(line) for line in child.output.splitlines()]
    shutil.rmtree(folder, ignore_errors=True)
    return {name: rest for name, *rest in lines}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_take_neither_memory_nor_time(outcomes, bomb):
    said, mebibytes, seconds = outcomes[bomb]
    for line in said[:2]:
        assert f"/{bomb}" in line
        assert line.isprintable()
    assert mebibytes < 160
    assert seconds < 10
