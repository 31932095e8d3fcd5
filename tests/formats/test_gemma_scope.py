"""Gemma Scope 1, from its paths and archives alone."""

import pytest
from rigs.format_files import D_IN, D_SAE, loads
from rigs.released.gemma_scope import write

import sae
from sae.base.errors import ConfigError, DataError
from sae.loading import hub


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize(
    ("kind", "hook"),
    [
        ("res", "blocks.12.hook_resid_post"),
        ("mlp", "blocks.12.hook_mlp_out"),
        ("att", "blocks.12.attn.hook_z"),
    ],
)
def test_sites_come_from_the_path(tmp_path, kind, hook, upper):
    folder, wanted = write(tmp_path, f"google/gemma-scope-9b-it-{kind}/layer_12/width_16k/average_l0_82", upper=upper)
    coder = loads(folder, wanted)
    site = coder.spec.reads[0]
    assert (site.hook, site.model) == (hook, "google/gemma-2-9b-it")
    assert coder.spec.writes == coder.spec.reads
    assert coder.spec.metrics["advertised"] == {"l0": 82.0}


def test_the_factor_of_embeddings_is_asked_for(tmp_path):
    folder, wanted = write(tmp_path, "google/gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6")
    with pytest.raises(ConfigError, match=r"^scale: .*params\.npz does not say it .*pass scale=1 or 0\.408248"):
        sae.load(folder)
    assert loads(folder, wanted, scale=1).spec.reads[0].hook == "hook_embed"

    def scaled(x):
        acts, out, margin = wanted(x * D_IN**-0.5)
        return acts, out * D_IN**0.5, margin

    loads(folder, scaled, scale=D_IN**-0.5)


def test_the_side_of_a_transcoders_gain_is_asked_for(tmp_path):
    path = "google/gemma-scope-2b-pt-transcoders/layer_7/width_16k/average_l0_11"
    folder, wanted = write(tmp_path, path, d_out=5)
    coder = loads(folder, wanted)  # its map does not need it
    assert not coder.spec.is_placed
    assert coder.spec.writes[0].hook == "blocks.7.hook_mlp_out"
    place = hub.find_place(folder)
    hub.read_coder(place)
    (question,) = place.unsaid
    assert question.choices == ("blocks.7.ln2.hook_normalized", "model.layers.7.pre_feedforward_layernorm")
    with pytest.raises(ConfigError, match=r"site: 'layers\.7' is not where"):
        sae.load(folder, site="layers.7")
    coder = loads(folder, wanted, site="blocks.7.ln2.hook_normalized")
    assert coder.spec.writes[0].hook == "blocks.7.hook_mlp_out"


def test_a_square_coder_is_read_as_documented(tmp_path):
    folder, wanted = write(tmp_path, "x", d_in=D_SAE, d_out=D_SAE)
    assert loads(folder, wanted).spec.reads == ()


def test_what_the_user_says_of_the_site_stands_and_what_is_not_needed_is_refused(tmp_path):
    folder, wanted = write(tmp_path, "mine", d_out=5)
    assert loads(folder, wanted).spec.reads == ()
    spec = loads(folder, wanted, site="layers.3.mlp:input->layers.3.mlp", model="some/model").spec
    assert [(s.hook, s.side, s.model) for s in (*spec.reads, *spec.writes)] == [
        ("layers.3.mlp", "input", "some/model"),
        ("layers.3.mlp", "output", "some/model"),
    ]
    for name, value in (("scale", 2.0), ("pre_bias", "decoder"), ("processed", True), ("normalization", "none")):
        with pytest.raises(ConfigError, match=rf"^{name}: .*params\.npz is complete without it; leave it out"):
            sae.load(folder, **{name: value})
    with pytest.raises(ConfigError, match=r"sight: not something to say of a coder.*Did you mean 'site'"):
        sae.load(folder, sight="layers.3")


def test_an_autoencoder_has_one_width(tmp_path):
    folder, _ = write(tmp_path, "google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", d_out=5)
    with pytest.raises(
        DataError, match=r"params\.npz: w_enc has width 6 and b_dec 5, but an autoencoder has one width"
    ):
        sae.load(folder)


def test_folders_above_the_repository_may_be_called_anything(tmp_path):
    path = "embedding/layer_3/average_l0_7/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"
    spec = loads(*write(tmp_path, path)).spec
    assert (spec.reads[0].hook, spec.metrics["advertised"]) == ("blocks.12.hook_resid_post", {"l0": 82.0})
