"""Names on Neuronpedia: of a released coder, made of what a coder is, and those that are none."""

from types import SimpleNamespace

import pytest

from interp.exchange.neuronpedia_names import Names, hook_of, names_of
from sae.base.errors import ConfigError
from sae.coder.spec import CoderSpec
from sae.lm.site import Site
from sae.selection.topk import TopK
from sae.selection.unrectified_topk import UnrectifiedTopK

PLACES = {
    (5, "hook_resid_post"): ("model.layers.5", "output"),
    (6, "hook_resid_pre"): ("model.layers.6", "input"),
    (6, "hook_mlp_out"): ("model.layers.6.mlp", "output"),
    (6, "mlp.hook_out"): ("model.layers.6.mlp", "output"),
    (6, "attn.hook_z"): ("model.layers.6.self_attn.o_proj", "input"),
    (6, "hook_resid_mid"): "it has none",
}
STREAM = SimpleNamespace(places=PLACES, layers=("model.layers.5", "model.layers.6"))


def spec(read: Site, written: Site | None = None, width: int = 16_384, rule=None) -> CoderSpec:
    sites = {"reads": (read,), "writes": (written or read,)}
    return CoderSpec(d_in=8, d_out=8, d_sae=width, selection=rule or TopK(k=4), **sites)


def several(**how) -> CoderSpec:
    sites = tuple(Site(f"model.layers.{layer}", width=8) for layer in (5, 6))
    made = CoderSpec(d_in=16, d_out=16, d_sae=16_384, selection=TopK(k=4), reads=sites, writes=sites, **how)
    assert made.is_autoencoder
    return made


def test_a_coder_is_named_by_place_rule_and_width():
    z, mlp = Site("model.layers.6.self_attn.o_proj", "input"), Site("model.layers.6.mlp")
    for given, wanted in (
        (spec(Site("model.layers.5")), "5-res-topk-16k"),
        (spec(mlp, width=500), "6-mlp-topk-500"),
        (spec(z, rule=UnrectifiedTopK(k=4), width=2_000_000), "6-att-unrectifiedtopk-2m"),
        (spec(Site("model.layers.5"), mlp), "6-transcoder-topk-16k"),
        (spec(Site("transformer.h.11")), "11-res-topk-16k"),
        (several(), "5-crosscoder-topk-16k"),
        (several(cross_layer=True, pre_bias="none"), "5-clt-topk-16k"),
    ):
        assert names_of(given, "google/Gemma-2 2B", STREAM).source_id == wanted
    found = names_of(spec(mlp), "google/Gemma-2 2B", STREAM)
    assert (found.model_id, found.set, found.release) == ("gemma-2-2b", "mlp-topk-16k", "gemma-2-2b-mlp-topk-16k")


def test_what_is_known_there_comes_before_and_what_is_given_first():
    one = spec(Site("model.layers.5"))
    known = names_of(one, "google/gemma-2-2b", STREAM, known="gemma-2-2b/20-gemmascope-res-16k")
    assert (known.model_id, known.source_id, known.set) == ("gemma-2-2b", "20-gemmascope-res-16k", "gemmascope-res-16k")
    given = names_of(one, "m", STREAM, "mine", "3-a-b__twice", known="gemma-2-2b/20-gemmascope-res-16k")
    assert (given.model_id, given.source_id, given.set) == ("mine", "3-a-b__twice", "a-b")


def test_a_site_has_the_name_of_the_end_of_a_layer_first():
    assert hook_of(Site("model.layers.5"), STREAM) == (5, "hook_resid_post")
    assert hook_of(Site("model.layers.6", "input"), STREAM) == (6, "hook_resid_pre")
    assert hook_of(Site("model.layers.6.mlp"), STREAM) == (6, "hook_mlp_out")
    assert hook_of(Site("model.norm"), STREAM) is None


@pytest.mark.parametrize(
    "wrong", [".", "..", "a/b", "a\\b", "google/gemma", "a b", "x\n", "../x", ".hidden", "a.", "x" * 129, "é"]
)
def test_what_is_no_id_or_no_folder_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"^--model-id: .* letters, digits"):
        Names(wrong, "6-a")
    for source in (wrong, f"6-{wrong}", "res-6", "6", "6-", "-6-a"):
        with pytest.raises(ConfigError, match=r"^--source-id: .* LAYER-SET") as error:
            Names("gpt2", source)
        assert str(error.value).isprintable()
