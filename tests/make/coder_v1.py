"""Makes tests/golden/coder-v1: a coder as version 1 of the format wrote it, and what it computed then.

Run with the `sae` of commit e95203f, the last whose FORMAT_VERSION is 1 and whose modules are imported here:

    mkdir OLD; git archive e95203f | tar -x -C OLD
    PYTHONPATH=OLD python tests/make/coder_v1.py tests/golden/coder-v1
"""

import json
import sys
from pathlib import Path

import torch
from sae.normalization import Normalization
from sae.spec import FORMAT_VERSION, CoderSpec, MaskSpec, Site

import sae
from sae.coder import SparseCoder
from sae.selection.topk import TopK


def main(folder: Path) -> None:
    assert FORMAT_VERSION == 1
    site = Site("model.layers.1", model="some/model", revision="0123abc")
    spec = CoderSpec(
        6,
        6,
        20,
        TopK(3),
        reads=(site,),
        writes=(site,),
        normalization=Normalization("layer_norm", eps=1e-3),
        decoder_norm="free",
        skip=True,
        mask=MaskSpec((0, 2), 1, {"model.layers.1": 34.5}),
        context_length=128,
        variance=2.5,
        training={"tokens": 1000, "seed": 0},
        metrics={"reconstruction": {"fvu": 0.25}},
    )
    coder, generator = SparseCoder(spec), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    sae.save(coder, folder)
    x = torch.randn(5, 6, generator=generator)
    made = coder(x)
    expected = {"x": x.tolist(), "latents": made.latents.to_dense().tolist(), "out": made.out.tolist()}
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
