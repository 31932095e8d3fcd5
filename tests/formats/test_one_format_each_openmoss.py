"""sparsify, Llama Scope and Llamascopium share file names with others: each fixture is in one format alone."""

import pytest
from formats import test_llama_scope as llama_scope
from formats import test_openmoss as openmoss
from formats import test_sparsify as sparsify
from rigs.format_files import D_IN, D_SAE, Draw, write_json
from safetensors.numpy import save_file

import sae
from sae import formats
from sae.base.errors import ConfigError
from sae.formats.sparsify import write
from sae.loading.hub import save
from sae.untrusted.files import LocalFiles


def saelens(root):
    draw = Draw()
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    write_json(root / "cfg.json", {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "metadata": {}})
    save_file({name: draw(*shape) for name, shape in shapes.items()}, root / "sae_weights.safetensors")


FIXTURES = {
    "sparsify topk": sparsify.release,
    "sparsify transcoder": lambda root: sparsify.release(root, "layers.1.mlp", config=sparsify.SKIP),
    "sparsify old": lambda root: sparsify.release(root, old=("activation", "transcode"), config={"signed": True}),
    "sparsify written": lambda root: write(root / "x", sparsify.coder()),
    "native": lambda root: save(sparsify.coder(), root / "x"),
    "llama_scope final": llama_scope.release,
    "llama_scope pruned": lambda root: llama_scope.release(root, llama_scope.TRANSCODER, file="pruned"),
    "openmoss sae": openmoss.release,
    "openmoss linear": lambda root: openmoss.release(root, linear=True, sae_type="left out"),
    "openmoss transcoder": lambda root: openmoss.release(root, openmoss.TRANSCODER),
    "openmoss crosscoder": lambda root: openmoss.release(root, openmoss.CROSSCODER, act_fn="relu"),
    "openmoss clt": lambda root: openmoss.release(root, openmoss.CLT),
    "openmoss lorsa": lambda root: openmoss.release(root, sae_type="lorsa"),
    "saelens": saelens,
}


@pytest.mark.parametrize("name", FIXTURES)
def test_each_is_recognized_by_its_own_format_alone(tmp_path, name):
    FIXTURES[name](tmp_path)
    (place,) = formats.candidates(LocalFiles(tmp_path))
    assert formats.formats_of(place) == [name.split()[0]]


def test_a_coder_that_is_refused_is_still_one_of_its_format(tmp_path):
    openmoss.release(tmp_path, sae_type="molt")
    with pytest.raises(ConfigError, match=r"sae_type: .* is molt"):
        sae.load(tmp_path)


def test_weights_of_these_names_without_their_configs_are_in_no_format(tmp_path):
    for name in ("sae.safetensors", "sae_weights.safetensors", "checkpoints/final.safetensors", "pruned.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file({"encoder.weight": Draw()(D_SAE, D_IN)}, tmp_path / name)
    found = {place.weights: formats.formats_of(place) for place in formats.candidates(LocalFiles(tmp_path))}
    assert list(found.values()) == [[]] * 4
