"""Write one shuffled activation tensor of a real model, the common input of every driver here.

Documents (one file each) are tokenized, split into train and held-out by a hash of their name, packed with EOS between
them into rows of `--context` tokens; rows are drawn at random, the LM runs up to the hooked layer and no further.
Dropped: position 0 of every row, special tokens, and tokens whose norm exceeds 10 x the median (counted in the header).
"""

import argparse
import hashlib
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


class Reached(Exception):
    """Raised by the hook once the wanted layer has run."""


def is_held_out(name: str, percent: int = 15) -> bool:
    """Whether the document of this name belongs to the held-out part."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < percent


def packed_rows(paths: list[Path], tokenizer, context: int, seed: int) -> torch.Tensor:
    """All documents in a random order, joined by EOS and cut into [rows, context]; the last incomplete row is lost."""
    generator = torch.Generator().manual_seed(seed)
    stream: list[int] = []
    for i in torch.randperm(len(paths), generator=generator).tolist():
        text = paths[i].read_text(encoding="utf-8", errors="replace")
        stream += [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    rows = torch.tensor(stream[: len(stream) // context * context]).view(-1, context)
    return rows[torch.randperm(len(rows), generator=generator)]


@torch.no_grad()
def activations(model, layer: int, rows: torch.Tensor, special: torch.Tensor, wanted: int, batch: int) -> torch.Tensor:
    """Residual output of `layer` at the valid tokens of as many rows as give `wanted` tokens: [>= wanted, d]."""
    caught: list[torch.Tensor] = []

    def hook(module, args, output):
        caught.append(output[0] if isinstance(output, tuple) else output)
        raise Reached

    handle = model.model.layers[layer].register_forward_hook(hook)
    kept, count = [], 0
    for ids in rows.split(batch):
        try:
            model(input_ids=ids, use_cache=False)
        except Reached:
            valid = ~torch.isin(ids, special)
            valid[:, 0] = False
            kept.append(caught.pop()[valid].clone())
            count += len(kept[-1])
        if count >= wanted:
            break
    else:
        raise SystemExit(f"only {count} tokens for {wanted} wanted: give more text")
    handle.remove()
    return torch.cat(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="local folder of the model and its tokenizer")
    parser.add_argument("--text", required=True, type=Path, help="folder searched for documents")
    parser.add_argument("--glob", default="**/*.rst.txt")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--train", type=int, default=200_000)
    parser.add_argument("--held-out", type=int, default=20_000)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="rows per forward pass")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    special = torch.tensor(sorted({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}))
    paths = sorted(args.text.glob(args.glob))
    split = {"train": [], "held_out": []}
    for path in paths:
        split["held_out" if is_held_out(str(path.relative_to(args.text))) else "train"].append(path)

    tensors, header, median = {}, {"layer": args.layer, "eos": tokenizer.eos_token, "context": args.context}, None
    for name, wanted in (("train", args.train), ("held_out", args.held_out)):
        start = time.perf_counter()
        rows = packed_rows(split[name], tokenizer, args.context, args.seed)
        found = activations(model, args.layer, rows, special, round(wanted * 1.01) + args.context, args.batch)
        norms = found.norm(dim=1)
        median = norms.median() if median is None else median  # of the train part, for both
        heavy = norms > 10 * median
        found = found[~heavy]
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(args.seed))
        assert len(found) >= wanted
        tensors[name] = found[order[:wanted]].contiguous()
        seconds = time.perf_counter() - start
        header |= {f"{name}_documents": len(split[name]), f"{name}_rows_available": len(rows)}
        header |= {f"{name}_heavy_dropped": int(heavy.sum()), f"{name}_tokens_seen": len(heavy)}
        print(f"{name}: {len(heavy)} tokens in {seconds:.0f} s, {int(heavy.sum())} over 10 x median norm {median:.2f}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.out, {key: str(value) for key, value in header.items()})
    print({name: tuple(tensor.shape) for name, tensor in tensors.items()}, header)


if __name__ == "__main__":
    main()
