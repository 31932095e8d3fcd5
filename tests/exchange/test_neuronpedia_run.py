"""An explained run of a tiny model as a source of Neuronpedia's."""

import gzip
import json

import pytest
from rigs.interp_runs import explain_config, prepare_apart, run, tiny_coder

from interp.exchange.neuronpedia_run import export_explained
from sae.base.errors import Stopped
from sae.base.progress import Watch


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(config, what is prepared) of a run without a language model that explains."""
    folder = tmp_path_factory.mktemp("exported")
    coder = tiny_coder(folder)
    config, prepared = explain_config(coder, folder / "run"), prepare_apart(coder, folder / "apart")
    run(config, prepared)
    return config, prepared


def one(path):
    return json.loads(path.read_text())


def test_what_latents_stand_in_is_told_of_the_model_and_no_path_is(made, tmp_path):
    config, prepared = made
    names, counts = export_explained(config, prepared, tmp_path / "out", labels={int(prepared.latents[0]): "mine"})
    assert (names.model_id, names.source_id) == ("model", "1-res-topk-48")
    folder = tmp_path / "out" / "model" / "1-res-topk-48"
    assert counts.latents == len(prepared.latents)
    assert counts.activations > counts.latents
    model, source = one(folder / "model.jsonl"), one(folder / "source.jsonl")
    assert (model["layers"], model["dimension"], model["owner"]) == (2, 16, "unknown")
    assert model["neuronsPerLayer"] == prepared.subject.lm.model.config.intermediate_size
    assert (source["dataset"], source["num_prompts"]) == ("text", prepared.corpus.n_rows)
    assert source["num_tokens_in_prompt"] == prepared.corpus.context_length
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            assert str(tmp_path.parent.parent).encode() not in data, path


def test_names_are_those_that_were_given(made, tmp_path):
    config, prepared = made
    names, _ = export_explained(config, prepared, tmp_path, "tiny-llama", "1-my-res")
    assert (tmp_path / "tiny-llama" / "1-my-res" / "features" / "batch-0.jsonl.gz").is_file()
    assert names.set == "my-res"


def test_one_who_stops_it_leaves_nothing(made, tmp_path):
    config, prepared = made
    with pytest.raises(Stopped, match="while exporting"):
        export_explained(config, prepared, tmp_path, watch=Watch(lambda: True))
    assert list(tmp_path.iterdir()) == []
