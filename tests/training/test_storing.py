"""Activations that many jobs store and another trains from: the same run, and nothing that does not belong to it."""

import os
import shutil
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from rigs.children import Child, die, ranks, sae_train
from rigs.fakes import tiny_config
from rigs.runs import assert_equal, error_of, files

import sae
from sae.base import parts
from sae.base.errors import ConfigError, DataError
from sae.base.files import FolderLock, read_json, write_json
from sae.base.parts import Part
from sae.base.settings import to_yaml
from sae.base.store import ShardWriter
from sae.stream.sources import LiveSource
from sae.training.run import train

CHANGES = {"text.max_tokens": 8000, "tokens": 12 * 128}


def stored(folder, changes=None):
    """The changes of a config whose activations are stored in a folder."""
    return {**CHANGES, "activations.source": "disk", "activations.path": str(folder), **(changes or {})}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model, tiny_text):
    """A live run, and a store that three jobs have filled, in no order; as they are stored by one, beside it."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAE_CACHE", str(folder / "cache"))
        patch.setattr("os.fsync", lambda descriptor: None)
        patch.setattr("sae.training.loop.write_report", lambda run_dir: None)
        train(tiny_config(tiny_model, tiny_text, CHANGES), run_dir=folder / "live")
        for number in (2, 3, 1):
            store(tiny_model, tiny_text, folder / "store", number)
    return folder


def store(model, text, folder, number=1, of=3, changes=None, **options):
    return sae.store_activations(tiny_config(model, text, stored(folder, changes)), (number, of), **options)


@pytest.fixture
def copy(made, tmp_path):
    """A copy of the store that three jobs have filled."""
    shutil.copytree(made / "store", tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def again(copy, tiny_model, tiny_text, quick):
    """Makes one of the three shards, of that copy, again."""
    return partial(store, tiny_model, tiny_text, copy)


def block(index):
    return f"shard-{index:06d}.safetensors"


def check(folder):
    for place in (folder, folder / "held_out"):
        parts.check_whole(place, "activations", "--store-only --shard")


@pytest.fixture
def reads(monkeypatch):
    """What is computed by the model, block by block."""
    seen, original = [], LiveSource.read

    def read(self, number):
        seen.append((len(self), number))
        return original(self, number)

    monkeypatch.setattr(LiveSource, "read", read)
    return seen


# The same run


def test_a_store_of_three_jobs_trains_as_the_model_itself_bit_for_bit(made, tmp_path, tiny_train, reads):
    code, printed = tiny_train(stored(made / "store"))
    assert code == 0, printed
    assert_equal(tmp_path / "run", made / "live")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000000012")
    code, printed = tiny_train(options=("--resume", tmp_path / "run"))
    assert code == 0, printed
    assert_equal(tmp_path / "run", made / "live")
    assert not reads


def test_it_is_what_one_process_stores_and_is_read_as_tensors(made, tmp_path, tiny_train):
    code, printed = tiny_train(stored(tmp_path / "store"))
    assert code == 0, printed
    for part in ("", "held_out"):
        ours, theirs = (
            {p.name: p.read_bytes() for p in (f / "store" / part).glob("shard-*")} for f in (made, tmp_path)
        )
        assert ours == theirs
    code, printed = tiny_train(stored(made / "store", {"activations.source": "tensors"}), folder=tmp_path / "tensors")
    assert code == 0, printed
    assert (tmp_path / "tensors" / "metrics.jsonl").read_bytes() == (made / "live" / "metrics.jsonl").read_bytes()


def test_folders_that_were_filled_apart_are_copied_into_one_twice_without_harm(
    made, tmp_path, tiny_model, tiny_text, quick
):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, number in ((a, 1), (b, 3), (b, 2)):
        store(tiny_model, tiny_text, folder, number)
    with pytest.raises(DataError, match=r"b: not complete, shard 1/3 is missing; make each: --store-only --shard 1/3"):
        check(b)
    for source in (b, b, made / "store"):
        shutil.copytree(source, a, dirs_exist_ok=True)
        check(a)
    assert {path for path in files(a) if ".lock" not in path} == {
        path for path in files(made / "store") if ".lock" not in path
    }


@pytest.mark.slow
def test_a_store_in_the_cache_is_one_too(tiny_model, tiny_text, tiny_train, reads):
    changes = stored("")
    for number in (1, 2):
        folder = sae.store_activations(tiny_config(tiny_model, tiny_text, changes), (number, 2))
        assert folder.parent.name == "activations"
        if number == 1:
            assert "not complete, shard 2/2 is missing" in error_of(tiny_train(changes)[1])
    reads.clear()
    assert tiny_train(changes)[0] == 0
    assert not reads


# Stopped and going on


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stopped_shard_keeps_its_blocks_and_goes_on(made, tmp_path, tiny_train, reads, monkeypatch, number):
    folder, options = tmp_path / "store", ("--store-only", "--shard", "2/3")
    with monkeypatch.context() as patch:
        original = LiveSource.read

        def read(self, index):
            if len(reads) == 9:
                signal.raise_signal(number)
            return original(self, index)

        patch.setattr(LiveSource, "read", read)
        code, printed = tiny_train(stored(folder), options)
    assert code == 75
    assert printed.splitlines()[-1].startswith("stopped while storing activations; what is stored is kept")
    kept = list(reads)
    code, printed = tiny_train(stored(folder), options)
    assert code == 0, printed
    assert sorted(reads) == sorted(set(reads)), "nothing is computed twice"
    assert kept == reads[:10]
    computed = len(reads)
    assert tiny_train(stored(folder), options)[0] == 0
    assert len(reads) == computed > 10
    assert not (tmp_path / "run").exists()
    journal = "shards-2-of-3.jsonl"
    assert (folder / journal).read_bytes() == (made / "store" / journal).read_bytes()


def test_a_signal_while_the_model_is_loaded_is_75_too(tmp_path, tiny_train, monkeypatch):
    monkeypatch.setattr("sae.training.preparing.load_language_model", lambda **_: signal.raise_signal(signal.SIGTERM))
    code, printed = tiny_train(stored(tmp_path / "store"), ["--store-only"])
    assert (code, printed.splitlines()[-1][:35]) == (75, "stopped while the model was loaded;")
    assert not (tmp_path / "store").exists()


def test_every_rank_makes_a_shard_of_its_own(tmp_path, tiny_model, tiny_text, quick, monkeypatch):
    environments = ranks(2)
    for rank in (1, 0):
        for name, value in environments[rank].items():
            monkeypatch.setenv(name, value)
        store(tiny_model, tiny_text, tmp_path / "store", 1, 1)
    check(tmp_path / "store")
    assert parts.parts_in(tmp_path / "store")[0] == {Part(1, 2), Part(2, 2)}


# Refused


def copied(folder, name, to):
    shutil.copy(folder / name, folder / to)


def foreign(folder):
    """As if a shard of another config had been copied there."""
    journal = folder / "shards-2-of-3.jsonl"
    journal.write_text(journal.read_text().replace(read_json(folder / "complete-2-of-3.json")["store"], "f" * 16))


def foreign_mark(folder):
    mark = folder / "complete-2-of-3.json"
    write_json(mark, read_json(mark) | {"store": "f" * 16})


def lost_line(folder):
    journal = folder / "shards-2-of-3.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[1:]))


def others_block(folder):
    writer = ShardWriter(folder, "activations", read_json(folder / "header.json")["fingerprint"], "2-of-3")
    writer.write(3, {"activations/model.layers.1": torch.zeros(2, 16)})


def listed_twice(folder):
    writer = ShardWriter(folder, "activations", read_json(folder / "header.json")["fingerprint"], "0")
    writer.write(4, {"activations/model.layers.1": torch.zeros(2, 16)})


DAMAGE = {
    "no mark": (
        lambda f: (f / "complete-2-of-3.json").unlink(),
        r"not complete, shard 2/3 is missing; make each: .*2/3$",
    ),
    "no journal": (
        lambda f: (f / "shards-2-of-3.jsonl").unlink(),
        r"shard 2/3 lacks shard-000001.* and \d+ more; make",
    ),
    "a lost line": (lost_line, r"shard 2/3 lacks shard-000001.safetensors; make it again: --store-only --shard 2/3$"),
    "a lost block": (lambda f: (f / block(1)).unlink(), r"shard 2/3 lacks shard-000001.safetensors; make it again: "),
    "a torn mark": (
        lambda f: (f / "complete-2-of-3.json").write_text("{"),
        r"2/3 is not what complete-2-of-3.json tells",
    ),
    "another's mark": (foreign_mark, r"shard 2/3 was made with other settings; make it again: .*2/3$"),
    "another's journal": (foreign, r"shards-2-of-3.jsonl: lists what was made with other settings; delete it"),
    "a block of another": (others_block, r"-2-of-3.jsonl: lists shard-000003.*, which is not of shard 2/3; delete it"),
    "two digests": (
        listed_twice,
        r"shards-0.jsonl and shards-2-of-3.jsonl list shard-000004.* with different digests;",
    ),
    "another division": (
        lambda f: copied(f, "complete-2-of-3.json", "complete-2-of-8.json"),
        "shards of 3 and of 8; del",
    ),
}
DELETED = {
    "another's journal": "shards-2-of-3.jsonl",
    "a block of another": "shards-2-of-3.jsonl",
    "two digests": "shards-0.jsonl",
    "another division": "complete-2-of-8.json",
}
"""What the error says is to be deleted first."""


@pytest.mark.parametrize("part", ["", "held_out"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_missing_doubled_or_foreign_is_named_and_its_remedy_holds(copy, again, made, kind, part):
    damage, told = DAMAGE[kind]
    damage(copy / part)
    with pytest.raises(DataError, match=told):
        check(copy)
    if kind in DELETED:
        with pytest.raises((DataError, ConfigError)):
            again(2)
        (copy / part / DELETED[kind]).unlink()
    again(2)
    if kind == "a block of another":  # whose file it had replaced
        again(1, repair=True)
    if kind == "two digests":
        again(2, repair=True)
    check(copy)
    for path in (made / "store").rglob("shard-*.safetensors"):
        assert (copy / path.relative_to(made / "store")).read_bytes() == path.read_bytes()


def test_a_run_is_refused_before_a_model_is_loaded_and_leaves_nothing(copy, tmp_path, tiny_train, no_model):
    (copy / "complete-1-of-3.json").unlink()
    for source in ("disk", "write_through"):
        before = files(copy)
        code, printed = tiny_train(stored(copy, {"activations.source": source}))
        assert code == 1
        assert f"{copy}: not complete, shard 1/3 is missing; make each: --store-only --shard 1/3" in error_of(printed)
        assert not (tmp_path / "run").exists()
        assert files(copy) == before


def test_what_a_checksum_finds_is_made_again_by_its_shard_alone(copy, again, made, tiny_train, reads):
    data = bytearray((copy / block(5)).read_bytes())
    data[-1] ^= 1
    (copy / block(5)).write_bytes(data)
    code, printed = tiny_train(stored(copy))
    assert code == 1
    assert "shard-000005.safetensors: changed since it was written (checksum); run again with --repair" in printed
    code, printed = tiny_train(stored(copy), ["--repair"], folder=copy.parent / "repair")
    assert error_of(printed).endswith(
        "shard 3/3 lacks shard-000005.safetensors; make it again: --store-only --shard 3/3"
    )
    again(3)
    assert [number for _, number in reads] == [5]
    check(copy)
    assert (copy / block(5)).read_bytes() == (made / "store" / block(5)).read_bytes()


def test_a_job_is_refused_what_is_not_its_own(copy, again, made, tiny_model, tiny_text):
    before = files(copy)
    with pytest.raises(
        ConfigError, match=r"^--shard: 3/8, but .* is made in 3; go on with --shard I/3, or name another"
    ):
        again(3, 8)
    with pytest.raises(ConfigError, match=r"was made with other settings \(seed: 0 there, 1 wanted\); name another"):
        again(3, changes={"seed": 1})
    with FolderLock(copy / ".locks" / "2-of-3"):
        with pytest.raises(ConfigError, match=rf"^--shard: 2/3: .* is in use by process {os.getpid()} "):
            again(2)
        again(1)
    assert {name for name in files(copy) if ".lock" not in name} == {name for name in before if ".lock" not in name}
    check(copy)
    (copy.parent / "mine").mkdir()
    (copy.parent / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(ConfigError, match="mine: holds other files"):
        store(tiny_model, tiny_text, copy.parent / "mine")
    assert files(copy.parent / "mine") == {"thesis.txt"}


@pytest.mark.parametrize(
    ("options", "changes", "told"),
    [
        (["--shard", "1/2"], {}, "--shard: goes with --store-only"),
        (["--store-only", "--shard", "0/2"], {}, "--shard: '0/2' is not I/N with I from 1 to N, such as 3/16"),
        (["--store-only", "--shard", "3/2"], {}, "--shard: '3/2' is not I/N with I from 1 to N, such as 3/16"),
        (["--store-only", "--shard", "a"], {}, "--shard: 'a' is not I/N with I from 1 to N, such as 3/16"),
        (
            ["--store-only"],
            {"activations.source": "live", "activations.path": ""},
            "activations.source: live has nothing to store; set it to disk",
        ),
        (
            ["--store-only"],
            {"activations.source": "tensors"},
            "activations.source: tensors has nothing to store; set it to disk",
        ),
    ],
)
def test_options_that_do_not_go_together(tmp_path, tiny_train, no_model, options, changes, told):
    code, printed = tiny_train(stored(tmp_path / "store", changes), options)
    assert (code, error_of(printed)) == (2, told)
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "run").exists()


def test_an_estimate_tells_of_the_store_and_makes_none(tmp_path, tiny_train, no_model, monkeypatch):
    found = SimpleNamespace(widths={"a": 16, "b": 8}, lines=list, to_json=dict)
    monkeypatch.setattr("sae.training.estimate.estimate", lambda *_: found)
    options = ["--store-only", "--shard", "2/4", "--dry-run"]
    code, printed = tiny_train(stored(tmp_path / "store"), options)
    assert (code, printed) == (0, "store        8,000 tokens, 768 kB in all; in shard 2/4 2,000 tokens, 192 kB\n")
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_a_resumed_run_stores_nothing(made, tiny_train, no_model):
    code, printed = tiny_train(options=("--resume", made / "live", "--store-only"))
    assert (code, error_of(printed)) == (2, "--resume: goes without --store-only")


# In processes of their own


def dying(where, name, call):
    """Has this process die when a method is about to be called for the given time."""
    original, calls = getattr(where, name), []

    def method(self, *arguments):
        calls.append(None)
        if len(calls) == call:
            die()
        return original(self, *arguments)

    setattr(where, name, method)


@pytest.mark.slow
def test_an_array_of_which_a_task_is_killed_fills_one_store_that_two_ranks_read(made, tmp_path, tiny_model, tiny_text):
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(tiny_config(tiny_model, tiny_text, stored(tmp_path / "store"))), encoding="utf-8")

    def task(number, first=None):
        argv = ["--config", str(config), "--store-only", "--shard", f"{number}/3"]
        return Child(tmp_path / f"{number}.txt", partial(sae_train, argv, first))

    def run(name, of):
        argv = ["--config", str(of), "--run-dir", str(tmp_path / name)]
        made = [Child(tmp_path / f"{name}-{i}.txt", partial(sae_train, argv), e) for i, e in enumerate(ranks(2))]
        assert [child.wait() for child in made] == [0, 0], made[0].output

    draw = torch.randint(1, 8, (3,)).tolist()
    tasks = [task(1), task(2, partial(dying, LiveSource, "read", draw[0])), task(3)]
    assert [child.wait() for child in tasks] == [0, -9, 0], tasks[0].output + tasks[2].output
    with pytest.raises(DataError, match="not complete, shard 2/3 is missing"):
        check(tmp_path / "store")
    assert task(2, partial(dying, ShardWriter, "_append", draw[1])).wait() == -9, "its file is there, unlisted"
    last = task(2)
    assert last.wait() == 0, last.output
    check(tmp_path / "store")
    live = tmp_path / "live.yaml"
    live.write_text(to_yaml(tiny_config(tiny_model, tiny_text, CHANGES)), encoding="utf-8")
    run("stored", config)
    run("live", live)
    assert_equal(tmp_path / "stored", tmp_path / "live")
