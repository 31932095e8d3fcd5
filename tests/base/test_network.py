"""A hub that cannot be reached is known at once: one line, or the cached copy, instead of tries for half a minute."""

import re
import socket
from collections import Counter

import pytest
from huggingface_hub import constants, utils
from rigs.fake_hub import fake_hub, reached_from_here
from rigs.fakes import tiny_model_folder
from rigs.runs import error_of

from sae.base import network
from sae.base.errors import ConfigError, DataError
from sae.base.files import write_json
from sae.lm.models import load_language_model
from sae.loading.remote import HubFiles


@pytest.fixture
def waits(monkeypatch):
    """Counts how often the hub's client waits before it tries again."""
    found = Counter()
    monkeypatch.setattr(utils._http.time, "sleep", lambda seconds: found.update(["waited"]))
    return found


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """Points the hub's clients to a port that nothing listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        reached_from_here(monkeypatch, {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf")})
        yield endpoint


def test_a_model_of_the_hub_is_refused_in_one_line_before_anything_is_tried_again(nobody, waits, tiny_train):
    code, printed = tiny_train({"model.name": "some/model"})
    assert code == 2
    assert error_of(printed).startswith(f"model.name: 'some/model' could not be loaded: {nobody} cannot be reached (")
    assert not waits
    assert not constants.HF_HUB_OFFLINE, "the next load asks again"


def test_a_data_set_of_the_hub_too(nobody, waits, tiny_train):
    code, printed = tiny_train({"text.source": "some/dataset"})
    assert code == 2
    assert error_of(printed).startswith("text.source: 'some/dataset' is no local path, nor a data set to be loaded (")
    assert f"{nobody} cannot be reached (" in error_of(printed)
    assert not waits


def test_what_is_cached_is_read_at_once_from_the_cache(tmp_path, monkeypatch, waits):
    tiny_model_folder(tmp_path / "hub" / "models" / "some" / "model")
    with fake_hub(tmp_path / "hub", tmp_path / "home") as (environment, asked), monkeypatch.context() as patch:
        reached_from_here(patch, environment)
        loaded = load_language_model("some/model")
        assert asked, "it came over the network"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", f"{environment['HF_HOME']}/hub")
    monkeypatch.setattr(constants, "ENDPOINT", environment["HF_ENDPOINT"] + "0")
    again = load_language_model("some/model")
    assert again.revision == loaded.revision
    assert again.fingerprint() == loaded.fingerprint()
    assert not waits


def test_an_error_of_what_is_cached_stays_as_it_is(nobody):
    with pytest.raises(ConfigError, match="its own code"), network.hub_or_cache():
        raise ConfigError("its own code")
    assert not constants.HF_HUB_OFFLINE


def test_files_of_a_commit_that_is_known_are_not_waited_for(nobody, waits, tmp_path):
    """Its listing is cached, so that the hub is asked for the file alone."""
    commit = "a" * 40
    write_json(tmp_path / "hub" / "models--some--coder" / "sae-interp" / f"{commit}.json", ["cfg.json"])
    with pytest.raises(DataError, match=f"cannot be fetched \\({re.escape(nobody)} cannot be reached"):
        HubFiles("some/coder", commit, tmp_path / "hub").path("cfg.json")
    assert not waits
