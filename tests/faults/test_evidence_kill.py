"""Both passes of evidence, killed with SIGKILL or out of disk at any moment, end bit for bit like undisturbed ones."""

import signal
from functools import partial
from pathlib import Path

import pytest
from rigs.children import Child, die
from rigs.interp_evidence import PlantedCodes, passes, planted, result, write_documents

import interp.evidence.first_pass
import sae.base.files
import sae.base.store

LENGTHS = [30, 64, 100, 500] * 10


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("text") / "text.jsonl", LENGTHS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, source):
    """What a run that nothing disturbed has found."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAE_CACHE", str(folder / "cache"))
        assert passes(source, folder / "run") == 0
    return result(folder / "run")


def run(tmp_path: Path, source: Path, first=None) -> Child:
    return Child(tmp_path / "log.txt", partial(passes, source, tmp_path / "run", first))


def nth(number: int, act) -> object:
    """Returns a function that acts when it is called for the given time."""
    calls = []

    def called() -> None:
        calls.append(None)
        if len(calls) == number:
            act()

    return called


def at_block(number: int, module: str, patch) -> None:
    """Dies when a pass is about to read a block for the given time."""
    hit = nth(number, die)

    def read(codes, rows):
        if codes.reader == module:
            hit()
        return planted(codes.rows.tokens(rows))

    patch.setattr(PlantedCodes, "read", read)


def at_call(where: object, name: str, number: int, chosen, patch) -> None:
    """Dies when a function is about to be called with certain arguments for the given time."""
    where = sae.base.files if where == "files" else where  # a module cannot be sent to a child
    original, hit = getattr(where, name), nth(number, die)

    def dying(*args, **kwargs):
        if chosen(*args):
            hit()
        return original(*args, **kwargs)

    patch.setattr(where, name, dying)


def is_pass(path: Path, *_: object) -> bool:
    return path.name.startswith("pass-") and path.name.endswith(".safetensors")


def is_all(path: Path, *_: object) -> bool:
    return path.name.startswith("shard-") and "latents" in str(path)


def of_latents(writer: sae.base.store.ShardWriter, *_: object) -> bool:
    return writer.folder.name == "latents"


MOMENTS = {
    "the first block": partial(at_block, 1, "evidence"),
    "a block": partial(at_block, 9, "evidence"),
    "the last block": partial(at_block, 15, "evidence"),
    "saving": partial(at_call, "files", "sync", 6, is_pass),
    "writing all": partial(at_call, "files", "sync", 1, is_all),
    "all written, not finished": partial(at_call, sae.base.store.ShardWriter, "finish", 1, of_latents),
    "all finished, deleting parts": partial(at_call, Path, "unlink", 1, is_pass),
    "the first window": partial(at_block, 1, "windows"),
    "a window": partial(at_block, 6, "windows"),
}
QUICK = ("a block", "all finished, deleting parts", "a window")


@pytest.mark.parametrize("moment", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in MOMENTS])
def test_killed_at_a_moment_it_goes_on(tmp_path, source, whole, moment):
    child = run(tmp_path, source, MOMENTS[moment])
    assert child.wait() == -9, child.output
    assert passes(source, tmp_path / "run") == 0
    assert result(tmp_path / "run") == whole
    assert not list((tmp_path / "run").rglob(".tmp-*"))  # what the dead one left


def counting(reads: Path, patch) -> None:
    """Notes every block that is read; after the fourth, waits to be killed."""

    def read(codes, rows):
        with reads.open("ab") as file:
            file.write(b".")
        while reads.stat().st_size > 4:
            signal.pause()
        return planted(codes.rows.tokens(rows))

    patch.setattr(PlantedCodes, "read", read)


def test_killed_again_and_again_at_any_moment(tmp_path, source, whole):
    for number in range(5):
        reads = tmp_path / f"reads-{number}"
        reads.touch()
        child = run(tmp_path, source, partial(counting, reads))
        child.wait_for(lambda reads=reads, number=number: reads.stat().st_size >= number)
        child.kill()
        assert child.wait() == -9, child.output
    assert passes(source, tmp_path / "run") == 0
    assert result(tmp_path / "run") == whole


def test_killed_between_merging_and_deleting_the_parts_of_ranks(tmp_path, source, whole):
    """A second rank's part is merged into the first one's, and still there when it dies."""
    assert run(tmp_path, source, MOMENTS["a block"]).wait() == -9
    folder = tmp_path / "run" / "evidence"
    mine = folder / "pass-0.safetensors"
    before = mine.read_bytes()
    mine.rename(folder / "pass-1.safetensors")  # as if another rank had done it
    child = run(tmp_path, source, partial(at_call, Path, "unlink", 1, is_pass))
    assert child.wait() == -9, child.output
    assert (folder / "pass-1.safetensors").read_bytes() == before
    assert mine.exists()  # merged into it, not deleted yet
    assert passes(source, tmp_path / "run") == 0
    assert result(tmp_path / "run") == whole


@pytest.mark.parametrize("number", [1, 4, 17])
def test_a_full_disk_is_a_clean_error_and_it_goes_on(tmp_path, source, whole, monkeypatch, number):
    original, calls = sae.base.files.write_tensors, []

    def full(path, tensors, metadata):
        calls.append(None)
        if len(calls) == number:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return original(path, tensors, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(sae.base.files, "write_tensors", full)
        with pytest.raises(OSError, match=r"cannot write .*safetensors: No space left on device"):
            passes(source, tmp_path / "run")
    assert not [f for f in (tmp_path / "run").rglob("*.safetensors") if f.read_bytes() == b"half"]
    assert passes(source, tmp_path / "run") == 0
    assert result(tmp_path / "run") == whole
    assert interp.evidence.first_pass.SAVE_EVERY_S == 60
