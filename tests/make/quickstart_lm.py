"""The bundled language model's recipe: `python tests/make/quickstart_lm.py --out FOLDER` (an hour on two busy cores).

A byte-level BPE of 4,096 tokens and a Llama of 4.2M parameters (4 layers of width 256, context 256), trained on the
documents of `sae.text.python_docs` that are not held out. It is small enough to be shipped and to run anywhere, and an
ordinary Hugging Face model, so whatever works with it works with the large ones.
"""

import argparse
import json
import logging
import math
import platform
import time
from pathlib import Path

import torch
import transformers
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sae.text.python_docs import documents, fingerprint, is_held_out

BOS, EOS, PAD = SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")
BOS_ID, EOS_ID, PAD_ID = range(3)
VOCABULARY = 4096
CONTEXT = 256
BATCH_ROWS = 8  # small: in minutes of training, many noisy steps learn far more than few clean ones
PEAK_LR = 3e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1

log = logging.getLogger(__name__)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text round-trips, digits stand alone, and encoding a text puts BOS in front."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Int[Tensor, "rows context"]:
    """Documents as BOS text EOS, end to end, cut into rows that each begin with one more BOS.

    So the model knows both a BOS before every document and one before a text that starts anywhere.
    """
    stream = [token for ids in tokenizer(texts)["input_ids"] for token in (*ids, EOS_ID)]
    rows = len(stream) // (CONTEXT - 1)
    body = torch.tensor(stream[: rows * (CONTEXT - 1)]).view(rows, CONTEXT - 1)
    return torch.cat([torch.full((rows, 1), BOS_ID), body], dim=1)


def targets(rows: Int[Tensor, "rows context"]) -> Int[Tensor, "rows context"]:
    """The labels of rows: BOS, which always follows EOS, would only flatter the loss."""
    return rows.masked_fill(rows == BOS_ID, -100)


def build_model() -> LlamaForCausalLM:
    """The untrained model in float32."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, rows: Int[Tensor, "rows context"], steps: int, seed: int) -> None:
    """Trains in place with AdamW: linear warm-up, then linear decay to zero; rows in a fresh random order per epoch."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)
    warmup = min(WARMUP_STEPS, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    start = time.monotonic()
    model.train()
    for step in range(steps):
        if len(order) < BATCH_ROWS:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        batch, order = rows[order[:BATCH_ROWS]], order[BATCH_ROWS:]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=targets(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            log.info("step %d/%d  loss %.3f  %.1f min", step, steps, loss.item(), (time.monotonic() - start) / 60)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, rows: Int[Tensor, "rows context"]) -> float:
    """The mean cross-entropy per token, in nats."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for batch in rows.split(BATCH_ROWS):
        labels = targets(batch)
        total += model(input_ids=batch, labels=labels).loss.double() * (labels[:, 1:] != -100).sum()
    return (total / (targets(rows)[:, 1:] != -100).sum()).item()


def unigram_entropy(train_rows: Int[Tensor, "rows context"], rows: Int[Tensor, "others context"]) -> float:
    """What a model of nothing but the train tokens' frequencies (plus one each) loses on `rows`, in nats per token."""
    counts = torch.bincount(train_rows[train_rows != BOS_ID], minlength=VOCABULARY) + 1.0
    return -(counts / counts.sum()).log()[rows[rows != BOS_ID]].mean().item()


def main() -> None:
    """Trains tokenizer and model and saves both, with `training.json` beside them."""
    parser = argparse.ArgumentParser(
        prog="python tests/make/quickstart_lm.py", description="Trains the quickstart model."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for model, tokenizer and training.json")
    parser.add_argument("--epochs", type=float, default=1.25, help="passes over the train documents")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start = time.monotonic()
    torch.manual_seed(args.seed)

    corpus = list(documents())
    train_texts = [text for document_id, text in corpus if not is_held_out(document_id)]
    held_out_texts = [text for document_id, text in corpus if is_held_out(document_id)]
    tokenizer = train_tokenizer(train_texts)
    train_rows, held_out_rows = pack(train_texts, tokenizer), pack(held_out_texts, tokenizer)
    steps = math.ceil(args.epochs * len(train_rows) / BATCH_ROWS)
    model = build_model()
    log.info("%d documents, %d train tokens, %d parameters", len(corpus), train_rows.numel(), model.num_parameters())

    train(model, train_rows, steps, args.seed)
    tokenizer.save_pretrained(args.out)
    model.bfloat16().save_pretrained(args.out)
    shipped = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)  # rounded, as users get it
    report = {
        "held_out_loss_nats": round(held_out_loss(shipped, held_out_rows), 4),
        "unigram_entropy_nats": round(unigram_entropy(train_rows, held_out_rows), 4),
        "parameters": model.num_parameters(),
        "documents": len(corpus),
        "train_tokens": train_rows.numel(),
        "held_out_tokens": held_out_rows.numel(),
        "steps": steps,
        "batch_tokens": BATCH_ROWS * CONTEXT,
        "epochs": args.epochs,
        "seed": args.seed,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "corpus": fingerprint(),
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    log.info("%s", json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
