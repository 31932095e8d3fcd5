"""Activations that many jobs store and another trains from: the same run, and nothing that does not belong to it."""

import shutil
from functools import partial

import pytest
from rigs.fakes import tiny_config
from rigs.runs import assert_equal, error_of, files

import sae
import sae.stream.sources
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
        patch.setattr("sae.training.loop.write_report", lambda run_dir, results: None)
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


def refused(tiny_train, folder, changes=None, options=()):
    """Returns why a run does not read a store; it leaves nothing behind."""
    before = files(folder)
    code, printed = tiny_train(stored(folder, changes), options, folder=folder.parent / "refused")
    assert code in (1, 2), printed
    assert not (folder.parent / "refused").exists()
    assert files(folder) == before
    return error_of(printed)


def block(index):
    return f"shard-{index:06d}.safetensors"


def test_a_store_of_three_jobs_trains_as_the_model_itself_bit_for_bit(made, tmp_path, tiny_train):
    code, printed = tiny_train(stored(made / "store"))
    assert code == 0, printed
    assert_equal(tmp_path / "run", made / "live")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    code, printed = tiny_train(options=("--resume", tmp_path / "run"))
    assert code == 0, printed


def test_it_holds_what_one_process_stores(made, tmp_path, tiny_train):
    code, printed = tiny_train(stored(tmp_path / "store"))
    assert code == 0, printed
    for part in ("", "held_out"):
        ours, theirs = (
            {p.name: p.read_bytes() for p in (f / "store" / part).glob("shard-*")} for f in (made, tmp_path)
        )
        assert ours == theirs
