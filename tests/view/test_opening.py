"""What is needed to ask the model about a run: from the folder of each kind, or one line that says what is wrong."""

import json
import shutil

import pytest
import torch

from interp.view.opening import open_run
from sae.base.errors import ConfigError, DataError
from sae.loading import hub


@pytest.fixture
def copy(explained_coder, tmp_path):
    """A copy of an explained coder that may be spoilt; its model stays where it was."""
    shutil.copytree(explained_coder, tmp_path / "coder")
    return tmp_path / "coder"


def test_a_run_its_coder_and_a_coder_without_one(explained_coder, copy):
    for path in (explained_coder, explained_coder / "explain"):
        opened = open_run(path, device="cpu")
        assert opened.run.run_dir == explained_coder / "explain"
        assert opened.hint == ""
        assert torch.equal(opened.coder.W_dec, hub.load(explained_coder).W_dec)
        assert opened.lm.name == opened.coder.spec.reads[0].model
    shutil.rmtree(copy / "explain")
    opened = open_run(copy)
    assert opened.run is None
    assert opened.hint == f"sae-explain {copy} labels latents"
    assert opened.lm.model.config.hidden_size == opened.coder.spec.d_in


def test_the_model_and_its_device_may_be_named(explained_coder):
    model = explained_coder.parent / "model"
    assert open_run(explained_coder, str(model), "cpu").lm.name == str(model)
    for options, why in (
        ({"model": "/nowhere"}, "--model: "),
        ({"device": "cpus"}, "--device: 'cpus' is not available here"),
    ):
        with pytest.raises(ConfigError, match=why):
            _ = open_run(explained_coder, **options).lm


def test_what_is_wrong_with_a_run_is_one_line(copy, tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        open_run(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty"):
        open_run(tmp_path / "empty")
    config = copy / "explain" / "config.yaml"
    said = config.read_text()
    config.write_text(said.replace("baseline: none", "baseline: random_direction"))
    with pytest.raises(ConfigError, match="of a baseline, random_direction; give the run of a coder"):
        open_run(copy)
    config.write_text(f"{said}\nfrom_a_later_version: 1\n")
    with pytest.raises(ConfigError, match="from_a_later_version"):
        open_run(copy)
    config.unlink()
    with pytest.raises(ConfigError, match="an imported run, which names no coder; give the folder of the coder"):
        open_run(copy)
    config.write_text(said)
    coder = hub.load(copy)
    hub.save(coder.with_spec(coder.spec.with_(reads=(), writes=())), tmp_path / "bare")
    with pytest.raises(ConfigError, match="names no site to read"):
        open_run(tmp_path / "bare")
    site = coder.spec.reads[0]
    anonymous = tuple(type(site)(site.hook) for _ in range(1))
    hub.save(coder.with_spec(coder.spec.with_(reads=anonymous, writes=anonymous)), tmp_path / "modelless")
    with pytest.raises(ConfigError, match="--model: the coder does not say which language model it reads; name it"):
        open_run(tmp_path / "modelless")


@pytest.mark.parametrize("name", ["journal-explain", "journal-score"])
def test_rows_of_a_newer_version_are_told_of_before_a_model_is_loaded(copy, name):
    (journal,) = (copy / "explain").glob(f"shards/*/{name}.jsonl")
    journal.write_text(journal.read_text().replace('"version":1', '"version":9', 1))
    with pytest.raises(DataError, match=rf"{name}.jsonl: version 9 is newer than 1; upgrade sae-interp$"):
        open_run(copy)


def test_labels_of_another_coder_are_not_told(copy):
    coder = hub.load(copy)
    coder.W_dec.data[0] *= 2
    shutil.copytree(copy / "explain", copy.parent / "kept")
    hub.save(coder, copy)
    assert json.loads((copy / "explain" / "env.json").read_text())["coder"]
    with pytest.raises(ConfigError, match="explain it again in another folder: sae-explain --run-dir"):
        open_run(copy)
