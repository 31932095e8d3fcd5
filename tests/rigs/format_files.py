"""What the tests of formats share: random tensors, and the comparison with an independent reference in NumPy.

A reference is `f(x) -> (acts, out, margin)` in float64: the latents, the output, and for each token how far it is from
where a latent would come or go (a threshold, or a tie for the last place). Tokens nearer than MARGIN are not compared.
"""

import json

import numpy as np
import torch

import sae

D_IN, D_SAE, D_OUT = 6, 20, 5
MARGIN, TOKENS = 1e-3, 64


class Draw:
    """Random float32 arrays: non-unit decoders, non-zero biases, positive thresholds."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def __call__(self, *shape, scale=1.0):
        return (scale * self.rng.standard_normal(shape)).astype(np.float32)

    def positive(self, *shape, low=0.2, high=1.0):
        return self.rng.uniform(low, high, shape).astype(np.float32)


def relu(h):
    return np.maximum(h, 0)


def top(h, k):
    """Zeroes all but the k largest of every row; returns that and each row's distance from a tie for the last place."""
    order = np.sort(h, axis=1)[:, ::-1]
    kept = np.where(h >= order[:, k - 1 : k], h, 0)
    margin = order[:, k - 1] - order[:, k] if k < h.shape[1] else np.full(len(h), np.inf)
    return kept, np.minimum(margin, np.abs(h).min(1))


def agrees(coder, reference, seed=1, tokens=TOKENS, x_scale=1.0):
    """Asserts that a coder's latents and output are those of the reference: equal supports, 1e-5 relative to 1."""
    x = x_scale * np.random.default_rng(seed).standard_normal((tokens, coder.spec.d_in)).astype(np.float32)
    acts, out, margin = reference(x.astype(np.float64))
    clear = margin > MARGIN
    assert clear.sum() >= 8, f"only {clear.sum()} of {tokens} tokens are clear of thresholds and ties"
    found = coder(torch.from_numpy(x[clear]))
    mine, acts, out = found.latents.to_dense().double().numpy(), acts[clear], out[clear]
    assert (acts != 0).any(), "the reference fires nowhere"
    assert (acts == 0).any(), "the reference fires everywhere"
    np.testing.assert_array_equal(mine != 0, acts != 0)
    for a, b in ((mine, acts), (found.out.double().numpy(), out)):
        assert a.shape == b.shape
        worst = np.max(np.abs(a - b) / np.maximum(1, np.abs(b)))
        assert worst <= 1e-5, worst
    decoded = coder.encode(torch.from_numpy(x[clear]))
    np.testing.assert_array_equal(decoded.to_dense().double().numpy(), mine)


def loads(folder, reference, seed=1, x_scale=1.0, **hints):
    """Loads what lies in a folder, asserts that it agrees with the reference, from disk as well, and returns it."""
    coder = sae.load(folder, **hints)
    agrees(coder, reference, seed, x_scale=x_scale)
    if not coder.spec.encoding.pursues:
        agrees(sae.load(folder, device_map={"cpu": 0.5, "disk": 0.5}, **hints), reference, seed, x_scale=x_scale)
    return coder


def write_json(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
