"""dictionary-learning's TopK coder, trained by its own `trainSAE` (which calls `TopKTrainer.update`).

Theirs: the whole loop (b_dec = geometric median of the first batch, sum of squared errors, unit-norm decoder with the
parallel gradient removed, gradient norm clipped at 1, Adam, linear warm-up, AuxK weight 1/32), the saved `ae.pt`.
Glue: the rows in our order. The default warm-up of 1,000 steps is refused for a run this short, so it is 5 % of the
steps; the lr then stays constant as by default, or with `--decay` falls to 0 over the last fifth. `--normalize` is
their `normalize_activations` (unit mean squared norm, folded back into the biases). AuxK starts after 10M silent
tokens and so never acts here.
"""

import tempfile
from importlib.metadata import version

import common
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE


def train(args, x):
    batches = common.Batches(x, common.row_order(len(x), args.batch, args.epochs, args.seed))
    steps = len(batches)
    recipe = {
        "trainer": TopKTrainer,
        "steps": steps,
        "activation_dim": x.shape[1],
        "dict_size": args.d_sae,
        "k": args.k,
        "lr": args.lr,
        "warmup_steps": steps // 20,
        "decay_start": steps * 4 // 5 if args.decay else None,
        "seed": args.seed,
        "device": "cpu",
        "layer": 0,
        "lm_name": "stored activations",
    }
    with tempfile.TemporaryDirectory() as folder:
        trainSAE(batches, [recipe], steps, save_dir=folder, normalize_activations=args.normalize, device="cpu")
        coder = AutoEncoderTopK.from_pretrained(f"{folder}/trainer_0/ae.pt")
    return lambda part: coder(part, output_features=True), steps


if __name__ == "__main__":
    arguments = common.parser()
    arguments.add_argument("--normalize", action="store_true")
    arguments.add_argument("--decay", action="store_true")
    common.main("dictionary-learning", version("dictionary-learning"), train, arguments)
