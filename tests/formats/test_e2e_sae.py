"""e2e_sae: coders by hook in one file, with decoders that are normalized on the way."""

import pytest
import torch
from rigs.format_files import D_SAE, loads
from rigs.released.e2e_sae import HOOK, write

import sae
from sae.base.errors import ConfigError, DataError


def test_the_decoder_is_normalized_and_the_encoder_is_not(tmp_path):
    folder, wanted = write(tmp_path)
    coder = loads(folder, wanted[HOOK])
    assert torch.allclose(coder.decoder_norms(), torch.ones(D_SAE))
    site = coder.spec.reads[0]
    assert (site.hook, site.model, coder.spec.context_length) == (HOOK, "openai-community/gpt2", 1024)


@pytest.mark.parametrize(
    ("hook", "model", "centered"),
    [
        ("blocks.6.hook_resid_pre", "tinystories-1m", True),
        ("blocks.6.mlp.hook_post", "gpt2-small", False),
        ("blocks.6.hook_resid_pre", "gemma-2b", False),
    ],
)
def test_the_mean_is_taken_out_where_transformerlens_does(tmp_path, hook, model, centered):
    folder, wanted = write(tmp_path, (hook,), model, centered)
    loads(folder, wanted[hook])


def test_of_a_model_that_is_not_known_the_user_says_it(tmp_path):
    folder, wanted = write(tmp_path / "raw", (HOOK,), None, False)
    with pytest.raises(ConfigError, match=r"^processed: .* does not say it .* if the model has layer norms"):
        sae.load(folder)
    loads(folder, wanted[HOOK], processed=False)
    folder, wanted = write(tmp_path / "centered", (HOOK,), None, True)
    loads(folder, wanted[HOOK], processed=True)
    loads(folder, wanted[HOOK], model="openai-community/gpt2")


def test_of_several_hooks_one_must_be_named(tmp_path):
    hooks = (HOOK, "blocks.2.hook_resid_pre")
    folder, wanted = write(tmp_path, hooks)
    with pytest.raises(ConfigError, match=rf"^site: .* holds coders of 2 hooks; say one of {HOOK}, {hooks[1]}"):
        sae.load(folder)
    with pytest.raises(ConfigError, match=r"^site: 'blocks\.3\.hook_resid_pre' is not in .* Did you mean"):
        sae.load(folder, site="blocks.3.hook_resid_pre")
    for hook in hooks:
        assert loads(folder, wanted[hook], site=hook).spec.reads[0].hook == hook


def test_a_tensor_more_or_a_config_less_is_refused(tmp_path):
    folder, _ = write(tmp_path / "a", **{"blocks-6-hook_resid_pre.encoder.2.weight": torch.ones(2)})
    with pytest.raises(DataError, match=r"encoder\.2\.weight is not part of this format"):
        sae.load(folder)
    folder, _ = write(tmp_path / "b")
    (folder / "final_config.yaml").unlink()
    with pytest.raises(DataError, match=r"final_config\.yaml is not beside it"):
        sae.load(folder)
