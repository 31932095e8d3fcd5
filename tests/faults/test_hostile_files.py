"""Row 20: what is no file, may not be read, or unpacks to far more than it is takes neither time nor memory."""

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
from rigs.children import Child
from rigs.hostile import (
    CENTRAL,
    END,
    LOCAL,
    TWICE,
    OlderPickler,
    Storage,
    W,
    archive,
    entry,
    imported,
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
from sae.base.errors import ConfigError, DataError
from sae.untrusted import weights
from sae.untrusted.pickles import read_pickle

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


def without_rights(folder):
    """Reads files as a user who may not, and prints what came of it."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    for act, name in (
        (weights.tensors, "sae.safetensors"),
        (weights.verify, "x.npz"),
        (weights.shapes, "x.pt"),
        (weights.tensors, "x.pkl.gz"),
        (weights.tensors, "locked/sae.safetensors"),
        (sae.load, ""),
        (sae.load, "locked"),
        (sae.load, "locked/coder"),
    ):
        try:
            act(folder / name)
        except (DataError, ConfigError, PermissionError) as error:
            print(error)
    return 0


def test_files_that_may_not_be_read_are_named(tmp_path):
    folder = tmp_path / "coder"
    (folder / "locked" / "coder").mkdir(parents=True)
    names = ("sae.safetensors", "x.npz", "x.pt", "x.pkl.gz", "cfg.json", "locked/sae.safetensors")
    for name in names:
        (folder / name).write_bytes(b"{}")
        (folder / name).chmod(0)
    (folder / "locked").chmod(0)
    for above in (folder, *folder.parents):
        if above.stat().st_uid == os.geteuid() and above != Path("/tmp"):
            above.chmod(above.stat().st_mode | 0o755)
    child = Child(tmp_path / "log.txt", partial(without_rights, folder))
    code, said = child.wait(), child.output.splitlines()
    (folder / "locked").chmod(0o755)
    assert code == 0, child.output
    assert said[:5] == [f"cannot read {folder / name}: Permission denied" for name in (*names[:4], names[5])]
    assert said[5] == f"cannot read {folder / 'cfg.json'}: Permission denied"
    assert len(said) == 8
    assert str(folder / "locked") in said[6]
    assert str(folder / "locked") in said[7]


# ---- bombs


GIB, MIB = 2**30, 2**20


def zeros(packer, size):
    """Yields the compressed bytes of so many zeros, a thousandth of their number."""
    for _ in range(size // MIB):
        yield packer.compress(bytes(MIB))
    yield packer.flush()


def deflated(size, head=b""):
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    return packer.compress(head) + b"".join(zeros(packer, size))


def gzipped(path, size, head=b""):
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    plain(path, packer.compress(head) + b"".join(zeros(packer, size)))


def by_hand(path, member, stream, declared, copies=1):
    """Writes an archive whose directory names a member some times over, and says what it unpacks to."""
    fields = (20, 0, 8, 0, 0x21, 0, len(stream), declared, len(member), 0)
    local = struct.pack("<4s5H3I2H", LOCAL, *fields) + member + stream
    entries = [member[:-6] + b"%06d" % i if copies > 1 else member for i in range(copies)]
    central = b"".join(struct.pack("<4s6H3I5H2I", CENTRAL, 20, *fields, 0, 0, 0, 0, 0) + name for name in entries)
    path.write_bytes(local + central + struct.pack("<4s4H2IH", END, 0, 0, copies, copies, len(central), len(local), 0))


def sparse(path, head, size=15 * GIB):
    """Writes a file that is as long as it says, and has room on the disk for its head only."""
    path.write_bytes(head)
    os.truncate(path, size)


def again_and_again(path, function, argument):
    """Writes a pickle that calls a function fifty thousand times on one argument, and keeps the results."""
    first = imported(function) + b"q\x01" + argument + b"q\x02R"
    plain(path, b"\x80\x03](" + first + b"h\x01h\x02R" * 50_000 + b"e.")


def of_storage(path):
    inner = older(pickled(Storage(2**18), OlderPickler), ["0"], struct.pack("<q", 2**18) + bytes(MIB))
    again_and_again(path, "torch.storage._load_from_bytes", b"B" + struct.pack("<I", len(inner)) + inner + b"\x85")


def of_fields(path):
    """Writes a pickle of objects that all get the same twenty thousand fields."""
    fields = b"}(" + b"".join(text(b"%d" % i) + b"N" for i in range(20_000)) + b"uq\x02"
    kind = imported("sae_training.config.Config") + b"q\x01"
    archive(path, b"\x80\x02" + fields + kind + b"(" + b"h\x01)\x81h\x02b" * 50_000 + b"t.")


def of_keys(path):
    """Writes a pickle of a dict whose keys all have one hash."""
    keys = b"".join(b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N" for i in range(1, 100_000))
    archive(path, b"\x80\x02}(" + keys + b"u.")


BIG = npy(W[:0], (2**25,))
OFTEN = {str(i): view((2**16,), (1,), storage=Storage(2**16)) for i in range(5000)}
BOMBS = {
    "unpacks.npz": lambda path: by_hand(path, b"W.npy", deflated(128 * MIB, BIG), 128 * MIB + len(BIG)),
    "lies.npz": lambda path: by_hand(path, b"W.npy", deflated(128 * MIB, BIG), 152),
    "overlaps.npz": lambda path: by_hand(path, b"W.npy000000", deflated(64 * MIB), MIB, copies=5000),
    "bzip2.npz": lambda path: npz(path, {"W.npy": bytes(16 * MIB)}, zipfile.ZIP_BZIP2),
    "declares.npz": lambda path: npz(path, {"W.npy": npy(W, (25 * 10**9,))}),
    "unpacks.pt": lambda path: by_hand(path, b"x/data.pkl", deflated(128 * MIB), 128 * MIB),
    "zeros.pkl.gz": lambda path: gzipped(path, 128 * MIB),
    "text.pkl.gz": lambda path: gzipped(path, 128 * MIB, b"\x80\x04X" + struct.pack("<I", 128 * MIB)),
    "declares.safetensors": lambda path: safetensors(path, {"W": entry((25, 10**9), 0, 10**11)}),
    "length.safetensors": lambda path: safetensors(path, b"{", length=2**63),
    "header.safetensors": lambda path: sparse(path, (14 * GIB).to_bytes(8, "little") + b'{"'),
    "sparse.safetensors": lambda path: sparse(path, b""),
    "sparse.pt": lambda path: sparse(path, b""),
    "sparse.npz": lambda path: sparse(path, LOCAL),
    "line.pt": lambda path: sparse(path, b"c", 2 * GIB),
    "value.pt": lambda path: sparse(path, b"\x80\x04\x8e" + (16 * GIB).to_bytes(8, "little"), 2 * GIB),
    "lists.pt": lambda path: archive(path, b"\x80\x02" + b"]" * 4_000_000 + b"."),
    "twice.pt": lambda path: archive(path, b"\x80\x02" + TWICE + b"."),
    "key.pt": lambda path: archive(path, b"\x80\x02" + TWICE + b"}h\x00Ns."),
    "keys.pt": of_keys,
    "fields.pt": of_fields,
    "view.pt": lambda path: of_views(path, "older", {"W": view((25 * 10**9,), (1,))}),
    "expanded.pt": lambda path: of_views(path, "archive", {"W": view((10**6, 10**6), (0, 0))}),
    "often.pt": lambda path: archive(path, pickled(OFTEN), {"data/0": bytes(2**18)}),
    "encoded.bin": lambda path: again_and_again(path, "_codecs.encode", text(b"x" * MIB) + text(b"latin1") + b"\x86"),
    "nested.bin": of_storage,
}


def status(field):
    """Returns a number of bytes that the kernel tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def defused(folder):
    """Reads every bomb, and prints what came of it: errors, MiB of memory at its peak, seconds of the processor."""
    room = status("VmSize") + 16 * GIB  # so that a bomb that goes off harms nothing else
    resource.setrlimit(resource.RLIMIT_AS, (room, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for bomb in BOMBS:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        start, peak, said = time.process_time(), status("VmHWM"), []
        for read in (weights.shapes, weights.tensors, weights.verify, partial(read_pickle, inert=("sae_training.",))):
            try:
                read(folder / bomb)
                said.append("")
            except DataError as error:
                said.append(str(error))
        print(json.dumps([bomb, said, (status("VmHWM") - peak) / MIB, time.process_time() - start]), flush=True)
    return 0


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bombs")
    for name, build in BOMBS.items():
        build(folder / name)
    child = Child(folder / "log.txt", partial(defused, folder))
    assert child.wait() == 0, child.output
    lines = [json.loads(line) for line in child.output.splitlines()]
    shutil.rmtree(folder)
    return {name: rest for name, *rest in lines}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_take_neither_memory_nor_time(outcomes, bomb):
    said, mebibytes, seconds = outcomes[bomb]
    for line in said[:2]:
        assert f"/{bomb}" in line
        assert line.isprintable()
    assert mebibytes < 160
    assert seconds < 10
