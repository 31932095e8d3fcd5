"""Row 20: what is no file, may not be read, or unpacks to far more than it is takes neither time nor memory."""

import contextlib
import os
import resource
import struct
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
    memory,
    memory_at_peak,
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
def test_what_is_no_file_of_tensors_is_named_at_once(tmp_path, kind):
    path = tmp_path / kind
    cases = {
        "empty": (path.touch, "cannot read|damaged|refused"),
        "short": (lambda: path.write_bytes(b"PK"), "cannot read|damaged|refused"),
        "zeros": (lambda: path.write_bytes(bytes(10_000)), "cannot read|damaged|refused"),
        "missing": (lambda: None, "cannot read"),
        "pipe": (lambda: os.mkfifo(path), "not a file"),
        "device": (lambda: path.symlink_to("/dev/zero"), "not a file"),
        "loop": (lambda: path.symlink_to(path), "cannot read"),
        "folder": (path.mkdir, "not a file of tensors"),
    }
    for what, (make, message) in cases.items():
        path.unlink(missing_ok=True)
        make()
        refused(path, message)
        if what not in ("empty", "short", "zeros"):
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
    """Returns the compressed bytes of so many zeros, a thousandth of their number: those of a MiB, again and again."""
    head = packer.flush(zlib.Z_FULL_FLUSH)
    return head + (packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)) * (size // MIB)


def deflated(size, head=b""):
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    return packer.compress(head) + zeros(packer, size)


def gzipped(path, size, head=b""):
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    plain(path, packer.compress(head) + zeros(packer, size))


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
UNPACKS, SMALLER, STEPS = "unpacks? to", "its tensors are far larger than the file", "more than 500,000 instructions"
BOMBS = {  # what writes it, and by what it is refused: a limit that is counted, so that no machine is too slow
    "unpacks.npz": (lambda p: by_hand(p, b"W.npy", deflated(128 * MIB, BIG), 128 * MIB + len(BIG)), UNPACKS),
    "lies.npz": (lambda p: by_hand(p, b"W.npy", deflated(128 * MIB, BIG), 152), "Bad CRC-32"),
    "overlaps.npz": (lambda p: by_hand(p, b"W.npy000000", deflated(64 * MIB), MIB, copies=5000), "one over the other"),
    "bzip2.npz": (lambda p: npz(p, {"W.npy": bytes(16 * MIB)}, zipfile.ZIP_BZIP2), "neither stored nor deflated"),
    "declares.npz": (lambda p: npz(p, {"W.npy": npy(W, (25 * 10**9,))}), "declares 100000000000 bytes but holds 24"),
    "unpacks.pt": (lambda p: by_hand(p, b"x/data.pkl", deflated(128 * MIB), 128 * MIB), UNPACKS),
    "zeros.pkl.gz": (lambda p: gzipped(p, 128 * MIB), UNPACKS),
    "text.pkl.gz": (lambda p: gzipped(p, 128 * MIB, b"\x80\x04X" + struct.pack("<I", 128 * MIB)), UNPACKS),
    "declares.safetensors": (lambda p: safetensors(p, {"W": entry((25, 10**9), 0, 10**11)}), "not what follows"),
    "length.safetensors": (lambda p: safetensors(p, b"{", length=2**63), "longer than the file"),
    "header.safetensors": (lambda p: sparse(p, (14 * GIB).to_bytes(8, "little") + b'{"'), "4,194,304 are plenty"),
    "sparse.safetensors": (lambda p: sparse(p, b""), "header cannot be read"),
    "sparse.pt": (lambda p: sparse(p, b""), "damaged"),
    "sparse.npz": (lambda p: sparse(p, LOCAL), "not a zip file"),
    "line.pt": (lambda p: sparse(p, b"c", 2 * GIB), "damaged"),
    "value.pt": (lambda p: sparse(p, b"\x80\x04\x8e" + (16 * GIB).to_bytes(8, "little"), 2 * GIB), "too early"),
    "lists.pt": (lambda p: archive(p, b"\x80\x02" + b"]" * 4_000_000 + b"."), STEPS),
    "twice.pt": (lambda p: archive(p, b"\x80\x02" + TWICE + b"."), "too deep or too often"),
    "key.pt": (lambda p: archive(p, b"\x80\x02" + TWICE + b"}h\x00Ns."), "a tuple is no name"),
    "keys.pt": (of_keys, "a int is no name"),
    "fields.pt": (of_fields, STEPS),
    "view.pt": (lambda p: of_views(p, "older", {"W": view((25 * 10**9,), (1,))}), "lies outside of its storage"),
    "expanded.pt": (lambda p: of_views(p, "archive", {"W": view((10**6, 10**6), (0, 0))}), SMALLER),
    "often.pt": (lambda p: archive(p, pickled(OFTEN), {"data/0": bytes(2**18)}), SMALLER),
    "encoded.bin": (
        lambda p: again_and_again(p, "_codecs.encode", text(b"x" * MIB) + text(b"latin1") + b"\x86"),
        SMALLER,
    ),
    "nested.bin": (of_storage, SMALLER),
}


def unclassed(path):
    """Reads a pickle with objects of a package whose classes are not imported, as one format does."""
    return weights.flatten(read_pickle(path, ("sae_training.",)), str(path))


@pytest.mark.slow
def test_bombs_are_refused_by_what_they_count_and_take_no_memory(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_AS)
    room = memory("VmSize") + 16 * GIB  # so that a bomb that goes off harms nothing else
    resource.setrlimit(resource.RLIMIT_AS, (room, limit[1]))
    try:
        for name, (build, message) in BOMBS.items():
            build(tmp_path / name)
            before = memory_at_peak(anew=True)
            with pytest.raises(DataError, match=message) as error:
                (unclassed if name == "fields.pt" else weights.tensors)(tmp_path / name)
            with contextlib.suppress(DataError):
                weights.verify(tmp_path / name)
            assert memory_at_peak() - before < 160 * MIB, name
            assert f"/{name}" in str(error.value)
            assert str(error.value).isprintable()
            (tmp_path / name).unlink()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
