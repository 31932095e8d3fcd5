"""sae-lens' TopK coder, trained by its own `SAETrainer.fit`.

Theirs: `TopKTrainingSAE` and `SAETrainer` with their defaults (decoder norm 0.1 at the start and free afterwards, b_dec
from zero, sum of squared errors, gradient norm clipped at 1, Adam, constant lr without warm-up) and the saved inference
form. Glue: an endless iterator over the rows in our order. Their default leaves the input unscaled;
`--normalize expected_average_only_in` is their option that scales it to a mean norm of sqrt(d_in), estimated here on
100 batches (theirs: 1,000, more than this run has). `--decay` is their `lr_decay_steps` over the last fifth of the
steps. AuxK starts after `--dead-window` silent steps: with the default of 1,000 it never acts in a run this short.
"""

import tempfile

import common
import sae_lens
import torch
from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer


def train(args, x):
    torch.manual_seed(args.seed)
    batches = common.Batches(x, common.row_order(len(x), args.batch, args.epochs, args.seed))
    config = TopKTrainingSAEConfig(
        d_in=x.shape[1], d_sae=args.d_sae, k=args.k, normalize_activations=args.normalize, device="cpu"
    )
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=len(batches) * args.batch,
            train_batch_size_samples=args.batch,
            lr=args.lr,
            lr_end=args.lr / 10,
            lr_decay_steps=len(batches) // 5 if args.decay else 0,
            dead_feature_window=args.dead_window,
            device="cpu",
            n_batches_for_norm_estimate=100,
        ),
        sae=TopKTrainingSAE(config),
        data_provider=batches.forever(),
    )
    trained = trainer.fit()
    assert trainer.n_training_steps == len(batches)
    with tempfile.TemporaryDirectory() as folder:
        trained.save_inference_model(folder)
        coder = SAE.load_from_disk(folder, device="cpu")

    def reconstruct(part):
        codes = coder.encode(part)
        return coder.decode(codes), codes

    return reconstruct, len(batches)


if __name__ == "__main__":
    arguments = common.parser()
    arguments.add_argument("--normalize", default="none", choices=("none", "expected_average_only_in"))
    arguments.add_argument("--decay", action="store_true")
    arguments.add_argument("--dead-window", type=int, default=1000, help="steps")
    common.main("sae-lens", sae_lens.__version__, train, arguments)
