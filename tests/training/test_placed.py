"""An estimate says where the weights of a model go, and claims nothing of what is known only when it is loaded."""

import pytest
from rigs.fakes import tiny_config

from sae.base.errors import ConfigError
from sae.base.units import data_size
from sae.training.estimate import estimate

PLACES = {"model.embed_tokens": 0, "model.layers": "cuda:1", "model.layers.1": "disk", "model.norm": 0, "lm_head": 0}


def placed(model, text, **kwargs):
    found = estimate(tiny_config(model, text, {"model.device": "auto", "model.kwargs": kwargs}))
    (line,) = [line for line in found.lines() if line.startswith("placed ")] if kwargs else [found.placed]
    return line, found


@pytest.mark.slow
def test_a_map_says_what_goes_where(tiny_model, tiny_text):
    line, found = placed(tiny_model, tiny_text, device_map={**PLACES, "model.rotary_emb": "cpu"})
    block = 4 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16)
    rest = 4 * found.lm_parameters - 2 * block
    shares = (
        f"{data_size(rest)} of the model on 0, {data_size(block)} of the model on cuda:1, {data_size(block)} of the"
    )
    assert line == f"placed       {shares} model on disk; the memory above counts all of it as one"
    with pytest.raises(
        ConfigError, match=r"^model\.kwargs\.device_map: it does not say where these go: lm_head.weight"
    ):
        placed(tiny_model, tiny_text, device_map={"model": "cpu"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({}, ""),
        (
            {"device_map": "auto"},
            "by what is free when the model is loaded (device_map auto)",
        ),
        ({"quantization_config": {"load_in_8bit": True}}, "quantized when it is loaded, to a size that is not known"),
    ],
)
def test_what_is_not_known_is_said(tiny_model, tiny_text, kwargs, told):
    assert told in placed(tiny_model, tiny_text, **kwargs)[0]
