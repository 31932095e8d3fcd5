"""sparsify: both activations, autoencoders and transcoders with and without skip, and coders of ours."""

from itertools import product

import torch
from common import D_IN, D_SAE, TOKENS, draw, randomize, run, store
from sparsify import SparseCoder, SparseCoderConfig


def result(coder, x):
    """Returns (acts, out): sparsify's kept values in their places, and its forward."""
    found = coder(x)
    acts = torch.zeros(len(x), coder.num_latents).scatter(1, found.latent_indices, found.latent_acts)
    return acts, found.sae_out


def make(folder):
    """Saves one coder of each kind with what it makes of activations."""
    x = 1.5 * draw(TOKENS, D_IN, seed=7)
    for rule, transcode, skip in product(("topk", "groupmax"), (False, True), (False, True)):
        config = SparseCoderConfig(
            activation=rule, k=8, num_latents=D_SAE, transcode=transcode, skip_connection=skip, normalize_decoder=False
        )
        coder = randomize(SparseCoder(D_IN, config, dtype=torch.float32))
        kind = ("transcoder" if transcode else "autoencoder") + (" with skip" if skip else "")
        place = folder / f"{rule}, {kind}"
        coder.save_to_disk(place / "coder" / "layers.1.mlp")
        store(place, x, *result(coder, x))


def load(folder, x):
    """What sparsify makes of a coder of ours."""
    return result(SparseCoder.load_from_disk(folder), x)


if __name__ == "__main__":
    run(make, load)
