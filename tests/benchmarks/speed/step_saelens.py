"""sae-lens' `TopKTrainingSAE`, one `SAETrainer.step` a step.

Its own: all of the step, with its counters, its clipping and its AuxK. Given here: Adam's fused kernel where it takes
the default one, and `rescale_acts_by_decoder_norm=False`, so that it selects by pre-activations. Its decoder is free:
it neither takes the parallel gradient out nor normalizes, which is less work.
"""

import sae_lens
import torch
import worker
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor


class SAELens(worker.Stepper):
    def __init__(self, options: dict, given: dict[str, Tensor]) -> None:
        W = given["W"]
        config = TopKTrainingSAEConfig(
            d_in=W.shape[1],
            d_sae=len(W),
            k=options["k"],
            rescale_acts_by_decoder_norm=False,
            use_sparse_activations=options["sparse"],
            normalize_activations="none",
            device="cpu",
        )
        self.coder = TopKTrainingSAE(config)
        with torch.no_grad():
            self.coder.W_enc.copy_(W.T)
            self.coder.W_dec.copy_(W)
            self.coder.b_dec.copy_(given["center"])
        tokens = options["tokens"]
        training = SAETrainerConfig(
            total_training_samples=tokens * 10_000,
            train_batch_size_samples=tokens,
            lr=options["lr"],
            lr_end=options["lr"],
            dead_feature_window=options["dead_after"] // tokens,
            device="cpu",
        )
        self.trainer = SAETrainer(training, self.coder, iter(()))
        worker.make_fused(self.trainer.optimizer)
        self.about = {"library": f"sae-lens {sae_lens.__version__}", "adam": "fused"}

    def step(self, x: Tensor) -> float:
        loss = self.trainer.step(x).loss
        self.trainer.n_training_steps += 1
        return float(loss.detach())

    def weights(self) -> dict[str, Tensor]:
        return dict(self.coder.named_parameters())

    def moments(self) -> dict[str, Tensor]:
        found = worker.of_optimizer(self.trainer.optimizer, self.weights())
        return found | {"W_enc": found["W_enc"].T}


if __name__ == "__main__":
    worker.serve(SAELens)
