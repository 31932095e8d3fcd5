"""A store gives back what was written, or says which file is wrong."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.base import store
from sae.base.errors import DataError
from sae.base.files import atomic_write, read_json, save_tensors, sha256_file, write_json
from sae.base.store import Shards, ShardWriter, fingerprint_key

ROOT = Path(store.__file__).parents[1]
FINGERPRINT = {"model": "gpt2", "revision": None, "text": {"context_length": 256, "bos": "row"}, "sites": ("a", "b")}


def shard(index: int) -> dict[str, torch.Tensor]:
    return {
        "tokens": torch.arange(6, dtype=torch.int32).reshape(2, 3) + 100 * index,
        "acts/layers.2": torch.full((4,), index, dtype=torch.bfloat16),
        "none": torch.zeros(0, 8),
    }


def file_of(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:06d}.safetensors"


def written(folder: Path, n: int = 3, finish: bool = True) -> Path:
    writer = ShardWriter(folder, "test", FINGERPRINT)
    for index in range(n):
        writer.write(index, shard(index))
    if finish:
        writer.finish({"note": "done"})
    return folder


def assert_shard(tensors: dict[str, torch.Tensor], index: int) -> None:
    assert tensors.keys() == shard(index).keys()
    for name, tensor in shard(index).items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_round_trip_in_a_folder_with_space_and_unicode(tmp_path):
    shards = Shards(written(tmp_path / "my st\u00f6re \u6587"), "test", FINGERPRINT)
    assert len(shards) == 3
    assert shards.meta == {"note": "done", "n_shards": 3}
    assert 2 in shards
    assert 3 not in shards
    for index in (2, 0, 1, 2):
        assert_shard(shards.read(index), index)
    assert shards.bad() == []
    with pytest.raises(DataError, match="no shard 3"):
        shards.read(3)


def test_an_empty_store_is_a_store(tmp_path):
    assert len(Shards(written(tmp_path, 0), "test")) == 0


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(4)), again=st.integers(0, 3), split=st.integers(0, 4))
def test_any_order_of_writing_by_any_writers_gives_the_same_store(tmp_path_factory, order, again, split):
    folder = tmp_path_factory.mktemp("store")
    writers = [ShardWriter(folder, "test", FINGERPRINT, part=part) for part in ("0", "1")]
    for place, index in enumerate(order):
        writers[place >= split].write(index, shard(index))
    writers[0].write(again, shard(again))
    writers[0].finish({})
    shards = Shards(folder, "test", FINGERPRINT)
    assert list(shards.entries) == [0, 1, 2, 3]
    for index in range(4):
        assert_shard(shards.read(index), index)


# Beginning, stopping, going on


def test_a_partial_store_goes_on_where_it_stopped(tmp_path):
    written(tmp_path, 2, finish=False)
    with pytest.raises(DataError, match="incomplete"):
        Shards(tmp_path, "test", FINGERPRINT)
    writer = ShardWriter(tmp_path, "test", FINGERPRINT)
    assert writer.done == {0, 1}
    writer.write(2, shard(2))
    writer.finish({})
    assert_shard(Shards(tmp_path, "test").read(2), 2)


def test_a_partial_store_can_be_read_while_it_grows(tmp_path):
    written(tmp_path, 1, finish=False)
    shards = Shards(tmp_path, "test", FINGERPRINT, partial=True)
    other = ShardWriter(tmp_path, "test", FINGERPRINT, part="1")
    shards.add(5, other.write(5, shard(5)))
    other.write(7, shard(7))
    assert list(shards.entries) == [0, 5]
    assert_shard(shards.read(5), 5)
    shards.reload()
    assert_shard(shards.read(7), 7)


def test_a_lost_shard_of_a_partial_store_is_one_to_write_again(tmp_path):
    written(tmp_path, 2, finish=False)
    file_of(tmp_path, 0).unlink()
    assert list(Shards(tmp_path, "test", partial=True).entries) == [1]
    assert ShardWriter(tmp_path, "test", FINGERPRINT).done == {1}


def test_a_store_with_gaps_cannot_be_finished(tmp_path):
    writer = ShardWriter(tmp_path, "test", FINGERPRINT)
    writer.write(0, shard(0))
    writer.write(2, shard(2))
    with pytest.raises(ValueError, match=r"shards \[1\] were not written"):
        writer.finish({})


@pytest.mark.parametrize("torn", ['{"index": 2, "fi', "[1]\n", '"x"', "{}", '{"index": "../../x"}', "\x00\x00"])
def test_a_line_that_a_crash_tore_costs_one_shard(tmp_path, torn):
    written(tmp_path, 2, finish=False)
    with open(tmp_path / "shards-0.jsonl", "a") as journal:
        journal.write(torn)
    save_tensors(file_of(tmp_path, 2), shard(0))  # its file may be there
    writer = ShardWriter(tmp_path, "test", FINGERPRINT)
    assert writer.done == {0, 1}
    writer.write(2, shard(2))
    writer.finish({})
    assert_shard(Shards(tmp_path, "test").read(2), 2)


def test_a_shard_that_no_manifest_names_goes_when_the_store_is_finished(tmp_path):
    written(tmp_path, 2, finish=False)
    save_tensors(file_of(tmp_path, 2), shard(2))
    ShardWriter(tmp_path, "test", FINGERPRINT).finish({})
    assert len(Shards(tmp_path, "test")) == 2
    assert not file_of(tmp_path, 2).exists()


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_full_disk_leaves_the_shards_before_it(tmp_path, monkeypatch, place):
    writer = ShardWriter(tmp_path, "test", FINGERPRINT)
    writer.write(0, shard(0))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, place, full)
    with pytest.raises(OSError, match=r"cannot write .*shard-000001.*No space left"):
        writer.write(1, shard(1))
    monkeypatch.undo()
    assert not file_of(tmp_path, 1).exists()
    again = ShardWriter(tmp_path, "test", FINGERPRINT)
    assert again.done == {0}
    again.finish({})
    assert_shard(Shards(tmp_path, "test").read(0), 0)


def test_a_disk_that_fills_up_at_the_manifest_is_named(tmp_path, monkeypatch):
    writer = ShardWriter(tmp_path, "test", FINGERPRINT)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, "save_tensors", lambda path, tensors: (save_tensors(path, tensors), block())[0])

    def block() -> None:
        monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(OSError, match=r"cannot write .*shards-0\.jsonl: No space left"):
        writer.write(0, shard(0))
    assert writer.done == set()


KILLED_WRITER = """
import os, signal, sys, time, random
from pathlib import Path
import torch
from sae.base.store import Shards, ShardWriter

folder, random_delays = Path(sys.argv[1]), random.Random(0)
torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # a kill loses nothing that was written
total, kills = 600, 0
while True:
    child = os.fork()
    if child == 0:
        writer = ShardWriter(folder, "test", {"a": 1})
        for index in range(total):
            if index not in writer.done:
                writer.write(index, {"x": torch.full((1000,), index)})
        writer.finish({})
        os._exit(0)
    if kills < 20:
        time.sleep(random_delays.uniform(0.002, 0.03))
        os.kill(child, signal.SIGKILL)
    kills += 1
    if os.waitpid(child, 0)[1] == 0:
        break
shards = Shards(folder, "test", {"a": 1})
assert len(shards) == total
assert all((shards.read(index)["x"] == index).all() for index in range(total))
assert not list(folder.glob(".tmp-*")), "a temporary was left"
print(kills)
"""


@pytest.mark.slow
def test_a_writer_that_is_killed_again_and_again_ends_with_a_whole_store(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED_WRITER, str(tmp_path / "store")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert not done.stderr, done.stderr
    assert int(done.stdout) >= 2


# Damage


def flip_a_bit(folder: Path) -> None:
    data = bytearray(file_of(folder, 1).read_bytes())
    data[-1] ^= 1
    file_of(folder, 1).write_bytes(data)


def other_contents(folder: Path) -> None:
    save_tensors(file_of(folder, 1), {**shard(1), "tokens": shard(1)["tokens"] + 1})


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        other_contents,
        lambda folder: os.truncate(file_of(folder, 1), file_of(folder, 1).stat().st_size - 1),
        lambda folder: os.truncate(file_of(folder, 1), 0),
        lambda folder: file_of(folder, 1).unlink(),
        lambda folder: atomic_write(file_of(folder, 1), file_of(folder, 2).read_bytes()),  # swapped with another
    ],
)
def test_a_damaged_shard_is_named_with_the_remedy_and_can_be_rebuilt_alone(tmp_path, damage):
    folder = written(tmp_path / "store")
    untouched = sha256_file(file_of(folder, 0))
    damage(folder)
    shards = Shards(folder, "test", FINGERPRINT)
    assert_shard(shards.read(0), 0)
    with pytest.raises(DataError, match=r"shard-000001\.safetensors: .*run again with --repair"):
        shards.read(1)
    assert shards.bad() == [1]
    ShardWriter(folder, "test", FINGERPRINT).write(1, shard(1))
    repaired = Shards(folder, "test", FINGERPRINT)
    assert repaired.bad() == []
    assert_shard(repaired.read(1), 1)
    assert sha256_file(file_of(folder, 0)) == untouched


def test_a_shard_of_another_run_is_told_from_ours(tmp_path):
    first, second = written(tmp_path / "a"), written(tmp_path / "b")
    ShardWriter(second, "test", FINGERPRINT).write(1, shard(7))
    mine = file_of(first, 1).read_bytes()
    atomic_write(file_of(first, 1), file_of(second, 1).read_bytes())
    atomic_write(file_of(second, 1), mine)
    assert Shards(first, "test").bad() == Shards(second, "test").bad() == [1]


def test_an_extra_shard_is_named(tmp_path):
    folder = written(tmp_path)
    save_tensors(file_of(folder, 9), shard(9))
    with pytest.raises(DataError, match=r"shard-000009\.safetensors: does not belong"):
        Shards(folder, "test")


@pytest.mark.parametrize("changed", [torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.int32)])
def test_other_types_or_shapes_are_named_even_with_matching_checksums(tmp_path, changed):
    folder = written(tmp_path)
    path = file_of(folder, 0)
    save_tensors(path, {**shard(0), "tokens": changed})
    entries = [json.loads(line) for line in (folder / "shards-0.jsonl").read_text().splitlines()]
    entries[0] |= {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    (folder / "shards-0.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with pytest.raises(DataError, match=r"shard-000000\.safetensors: holds .* expected"):
        Shards(folder, "test").read(0)


def test_checksums_are_compared_once_a_process_and_only_if_wanted(tmp_path):
    folder = written(tmp_path)
    shards = Shards(folder, "test")
    shards.read(1)
    flip_a_bit(folder)
    shards.read(1)
    Shards(folder, "test", verify=False).read(1)
    assert Shards(folder, "test", verify=False).bad() == [1]


def test_a_lost_line_of_the_manifest_is_noticed(tmp_path):
    folder = written(tmp_path)
    journal = folder / "shards-0.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-1]))
    file_of(folder, 2).unlink()
    with pytest.raises(DataError, match="lists 2 shards"):
        Shards(folder, "test")


def test_a_manifest_cannot_point_out_of_its_folder(tmp_path):
    folder = written(tmp_path / "store")
    save_tensors(tmp_path / "secret.safetensors", shard(1))
    journal = folder / "shards-0.jsonl"
    journal.write_text(journal.read_text().replace("shard-000001", "../secret"))
    assert_shard(Shards(folder, "test").read(1), 1)
    assert Shards(folder, "test").entries[1]["file"] == "shard-000001.safetensors"


# Whose store it is


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "pythia"}, r"\(model: 'gpt2' there, 'pythia' wanted\)"),
        ({"revision": "abc"}, r"\(revision: None there, 'abc' wanted\)"),
        (
            {"text": {"context_length": 512, "bos": "none"}},
            r"text\.bos: 'row' .*, text\.context_length: 256 there, 512",
        ),
        ({"new": 1}, r"\(new: None there, 1 wanted\)"),
    ],
)
def test_other_settings_are_refused_with_both_values(tmp_path, change, named):
    folder = written(tmp_path)
    for opened in (Shards, ShardWriter):
        with pytest.raises(DataError, match=named):
            opened(folder, "test", {**FINGERPRINT, **change})


def test_foreign_folders_are_refused_in_one_line(tmp_path):
    folder = written(tmp_path / "store")
    with pytest.raises(DataError, match="holds test, not tokens"):
        Shards(folder, "tokens", FINGERPRINT)
    with pytest.raises(DataError, match=r"header\.json"):
        Shards(tmp_path, "test")
    header = read_json(folder / "header.json")
    for content in ([], {"kind": "test"}, {"files": {}, "version": "1"}):
        write_json(folder / "header.json", content)
        with pytest.raises(DataError, match="not the header of a store"):
            Shards(folder, "test")
    write_json(folder / "header.json", {**header, "version": store.VERSION + 1, "kind": "of the future"})
    with pytest.raises(DataError, match=r"newer than .*upgrade sae-interp"):
        Shards(folder, "test")
    (folder / "header.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        Shards(folder, "test")


def test_keys_depend_on_content_and_not_on_order():
    key = fingerprint_key(FINGERPRINT)
    assert len(key) == 16
    assert int(key, 16) >= 0
    assert key == fingerprint_key(dict(reversed(FINGERPRINT.items())))
    assert key != fingerprint_key({**FINGERPRINT, "revision": "main"})
    with pytest.raises(ValueError, match="JSON"):
        fingerprint_key({"loss": float("nan")})
