"""eai-sparsify's `SparseCoder`: what its `Trainer.fit` does in a step of one coder on one process.

Its own: forward with FVU and AuxK, unit-norm decoder, the parallel gradient taken out, zero_grad, counters. Given here:
`torch.optim.Adam(fused=True)` where it takes Adam without `fused`. It clips nothing.
"""

from importlib.metadata import version

import torch
import worker
from sparsify import SaeConfig, SparseCoder
from torch import Tensor

AUXK_WEIGHT = 1 / 32


class Sparsify(worker.Stepper):
    def __init__(self, options: dict, given: dict[str, Tensor]) -> None:
        W = given["W"]
        self.coder = SparseCoder(W.shape[1], SaeConfig(num_latents=len(W), k=options["k"]))
        with torch.no_grad():
            self.coder.encoder.weight.copy_(W)
            self.coder.W_dec.copy_(W)
            self.coder.b_dec.copy_(given["center"])
        self.optimizer = torch.optim.Adam(self.coder.parameters(), lr=options["lr"], fused=True)
        self.silent = torch.zeros(len(W), dtype=torch.long)
        self.dead_after = options["dead_after"]
        self.about = {"library": f"eai-sparsify {version('eai-sparsify')}", "adam": "fused"}

    def step(self, x: Tensor) -> float:
        coder = self.coder
        coder.set_decoder_norm_to_unit_norm()
        fired = torch.zeros(len(self.silent), dtype=torch.bool)
        variance = (x - x.mean(0)).pow(2).sum()
        out = coder(x, x, dead_mask=self.silent > self.dead_after, total_variance=variance)
        fired[out.latent_indices.flatten()] = True
        loss = out.fvu + AUXK_WEIGHT * out.auxk_loss + out.multi_topk_fvu / 8
        loss.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.silent += len(x)
        self.silent[fired] = 0
        return float(loss.detach())

    def weights(self) -> dict[str, Tensor]:
        coder = self.coder
        return {"W_enc": coder.encoder.weight, "b_enc": coder.encoder.bias, "W_dec": coder.W_dec, "b_dec": coder.b_dec}

    def moments(self) -> dict[str, Tensor]:
        return worker.of_optimizer(self.optimizer, self.weights())


if __name__ == "__main__":
    worker.serve(Sparsify)
