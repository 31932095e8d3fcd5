"""eai-sparsify's TopK coder, trained by its own `Trainer.fit`.

Theirs: everything from the initialization to the saved checkpoint (b_dec = mean of the first batch, loss = FVU of the
batch, unit-norm decoder with the parallel gradient removed, signum + ScheduleFree or Adam, AuxK off by default).
Glue: the "language model" is a lookup table whose one module returns the stored activation of each row number, and the
"text" is row numbers in our order. The coder measured is the checkpoint `fit` saves (ScheduleFree's averaged weights).
Adam only: the default warm-up of 1,000 steps is longer than this run, so it is 5 % of the steps instead.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import common
import torch
from sparsify import SaeConfig, SparseCoder, TrainConfig, Trainer


class Table(torch.nn.Module):
    """What `Trainer` asks of a transformers model, around a table of activations [n, d_in]."""

    device = torch.device("cpu")
    dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    def __init__(self, x: torch.Tensor):
        super().__init__()
        self.site = torch.nn.Embedding.from_pretrained(x)

    @property
    def base_model(self) -> torch.nn.Module:
        return self

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.site(input_ids)


class Rows(torch.utils.data.Dataset):
    """Row numbers as token sequences: 8 per batch."""

    def __init__(self, order: torch.Tensor):
        self.sequences = order.reshape(order.shape[0] * 8, -1)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.sequences[i]}


def train(args, x):
    order = common.row_order(len(x), args.batch, args.epochs, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            SaeConfig(num_latents=args.d_sae, k=args.k),
            batch_size=8,  # sequences
            optimizer=args.optimizer,
            lr=args.lr,
            lr_warmup_steps=len(order) // 20,
            hookpoints=["site"],
            init_seeds=[args.seed],
            log_to_wandb=False,
            save_dir=folder,
        )
        trainer = Trainer(config, Rows(order), Table(x))
        trainer.fit()
        coder = SparseCoder.load_from_disk(Path(folder) / "unnamed" / "site")
    assert trainer.global_step == len(order)

    def reconstruct(part):
        values, indices, _ = coder.encode(part)
        codes = torch.zeros(len(part), args.d_sae).scatter_(1, indices, values)
        return coder.decode(values, indices), codes

    return reconstruct, len(order)


if __name__ == "__main__":
    arguments = common.parser()
    arguments.add_argument("--optimizer", default="signum", choices=("signum", "adam"))
    common.main("eai-sparsify", version("eai-sparsify"), train, arguments)
