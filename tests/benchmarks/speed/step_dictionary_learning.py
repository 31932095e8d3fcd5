"""dictionary-learning's TopK coder, one `TopKTrainer.update` a step.

Its own: all of the step, with its clipping, unit-norm decoder and AuxK. Given here: Adam's fused kernel where it takes
the default one, and no first step, in which it would set b_dec to a geometric median.
"""

from importlib.metadata import version

import torch
import worker
from dictionary_learning.trainers.top_k import TopKTrainer
from torch import Tensor


class DictionaryLearning(worker.Stepper):
    def __init__(self, options: dict, given: dict[str, Tensor]) -> None:
        W = given["W"]
        self.trainer = TopKTrainer(
            steps=10_000,
            activation_dim=W.shape[1],
            dict_size=len(W),
            k=options["k"],
            layer=0,
            lm_name="given activations",
            lr=options["lr"],
            warmup_steps=0,
            device="cpu",
        )
        with torch.no_grad():
            self.trainer.ae.encoder.weight.copy_(W)
            self.trainer.ae.decoder.weight.copy_(W.T)
            self.trainer.ae.b_dec.copy_(given["center"])
        self.trainer.dead_feature_threshold = options["dead_after"]
        worker.make_fused(self.trainer.optimizer)
        self.steps = 0
        self.about = {"library": f"dictionary-learning {version('dictionary-learning')}", "adam": "fused"}

    def step(self, x: Tensor) -> float:
        self.steps += 1
        return self.trainer.update(self.steps, x)

    def weights(self) -> dict[str, Tensor]:
        ae = self.trainer.ae
        return {"W_enc": ae.encoder.weight, "b_enc": ae.encoder.bias, "W_dec": ae.decoder.weight, "b_dec": ae.b_dec}

    def moments(self) -> dict[str, Tensor]:
        found = worker.of_optimizer(self.trainer.optimizer, self.weights())
        return found | {"W_dec": found["W_dec"].T}


if __name__ == "__main__":
    worker.serve(DictionaryLearning)
