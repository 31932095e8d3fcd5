"""e2e_sae: coders by hook in one file, with decoders that are normalized on the way."""

import numpy as np
import pytest
import torch
import yaml
from rigs.format_files import D_IN, D_SAE, Draw, loads, relu

import sae
from sae.base.errors import ConfigError, DataError

HOOK = "blocks.6.hook_resid_pre"


def write(folder, hooks=(HOOK,), model="gpt2-small", centered=True, **more):
    tensors, wanted = {}, {}
    for seed, hook in enumerate(hooks):
        draw, name = Draw(seed), hook.replace(".", "-")
        parts = [draw(D_SAE, D_IN), draw(D_SAE), draw(D_IN, D_SAE), draw(D_IN)]
        names = ("encoder.0.weight", "encoder.0.bias", "decoder.weight", "decoder.bias")
        tensors |= {f"{name}.{part}": torch.from_numpy(array) for part, array in zip(names, parts, strict=True)}
        arrays = [array.astype(np.float64) for array in parts]
        wanted[hook] = lambda x, arrays=arrays: reference(x, centered, *arrays)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({**tensors, **more}, folder / "samples_400000.pt")
    config = {"tlens_model_name": model, "tlens_model_path": None, "saes": {"sae_positions": list(hooks)}}
    data = {"dataset_name": "openwebtext", "n_ctx": 1024}
    (folder / "final_config.yaml").write_text(yaml.safe_dump({**config, "train_data": data}))
    return folder, wanted


def reference(x, centered, W_enc, b_enc, W_dec, b_dec):
    mean = x.mean(1, keepdims=True) if centered else 0
    h = (x - mean) @ W_enc.T + b_enc
    columns = W_dec / np.linalg.norm(W_dec, axis=0)
    return relu(h), relu(h) @ columns.T + b_dec + mean, np.abs(h).min(1)


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
