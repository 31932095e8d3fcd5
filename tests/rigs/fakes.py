"""Stand-ins that cost nothing and need no network."""

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sae.base.settings import decode, merge, set_dotted
from sae.coder.normalization import Normalization
from sae.lm.masking import MaskSpec
from sae.lm.models import LanguageModel
from sae.lm.site import Site
from sae.training.config import TrainConfig
from sae.training.measuring import Recipe, Statistics, measure

SPECIAL = {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}


def tiny_tokenizer(
    bos: bool = True, eos: bool = True, pad: bool = True, words: tuple[str, ...] = (), **options: object
) -> PreTrainedTokenizerFast:
    """A fast tokenizer with one token per byte, or, given `words`, one per word and "<unk>" for all others.

    A word vocabulary spells the special tokens too, as those of Unigram models do: a trap for what reads plain text.
    `options` go to transformers, for example additional_special_tokens=["<|im_start|>"].
    """
    special = {f"{name}_token": SPECIAL[name] for name, has in zip(SPECIAL, (bos, eos, pad), strict=True) if has}
    names = list(special.values())
    if words:
        vocabulary = {word: number for number, word in enumerate([*names, "<unk>", *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special["unk_token"] = "<unk>"
    else:
        vocabulary = {
            byte: number for number, byte in enumerate([*names, *sorted(pre_tokenizers.ByteLevel.alphabet())])
        }
        tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **options)


def tiny_model_folder(path: Path, tokenizer: PreTrainedTokenizerFast | None = None, **options: Any) -> Path:
    """Saves a random Llama of 2 layers and width 16 with its tokenizer, and returns `path`.

    `options` are fields of LlamaConfig.
    """
    tokenizer = tokenizer or tiny_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    named = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(**{**sizes, **named, "vocab_size": len(tokenizer), "max_position_embeddings": 64, **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def tiny_lm(seed: int = 1, **options: Any) -> LanguageModel:
    """Returns a random Llama of 3 layers and width 16 in memory; its weights are large, so that layers matter."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlamaConfig(**{**sizes, "vocab_size": len(tokenizer), "initializer_range": 0.5, **options})
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return LanguageModel(model, tokenizer, "tiny", None, True)


class Rows:
    """Token rows in memory."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data, self.n_rows, self.context_length = data, *data.shape

    def tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the chosen rows."""
        return self.data[rows]


def sampled_rows(lm: LanguageModel, context: int = 12, count: int = 20) -> Rows:
    """Returns rows of the model's own samples, which it predicts better than it could with a layer gone."""
    torch.manual_seed(2)
    data = torch.full((count, 1), lm.tokenizer.bos_token_id)
    while data.shape[1] < context:
        with torch.no_grad():
            logits = lm.model(data).logits[:, -1]
        logits[:, :3] = -torch.inf
        data = torch.cat([data, torch.multinomial(logits.softmax(-1), 1)], 1)
    data[3, 8:] = -1
    return Rows(data.int())


def tiny_text_folder(path: Path, documents: int = 40, words: int = 150) -> Path:
    """Writes text files of random made-up words, always the same, and returns `path`: about 36,000 bytes by default."""
    draw = random.Random(0)
    path.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        text = " ".join("".join(draw.choices("abcdefgh", k=draw.randint(2, 8))) for _ in range(words))
        (path / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    return path


def measured(
    x: torch.Tensor,
    mask: MaskSpec | None = None,
    norm_filter: float = 10.0,
    normalization: Normalization | None = None,
    center: str = "mean",
    site: str = "x",
) -> Statistics:
    """Returns the statistics of an autoencoder of one site whose activations are `x`."""
    sites = (Site(site),)
    return measure(
        {site: x}, sites, sites, mask or MaskSpec(), Recipe(normalization or Normalization(), norm_filter, center)
    )


def tiny_config(model: Path, text: Path, changes: dict[str, Any] | None = None) -> TrainConfig:
    """Returns a run of a second: 20 steps of 128 tokens on the second layer, 64 latents, some dead from step 3 on.

    `changes` are fields by dotted name.
    """
    data: dict[str, Any] = {
        "name": "tiny",
        "model": {"name": str(model), "device": "cpu"},
        "text": {"source": str(text), "context_length": 32, "max_tokens": 10**6},  # all of it
        "activations": {"sites": ["layers.1"], "block_rows": 2, "statistics_tokens": 512},
        "coder": {"d_sae": 64, "selection": {"type": "topk", "k": 4}},
        "optim": {"lr": 1e-3},
        "tokens": 20 * 128,
        "batch_tokens": 128,
        "dead_after_tokens": 256,
        "eval": {"tokens": 256},
        "checkpoints": {"every_steps": 5},
        "log": {"every_steps": 1},
    }
    data = merge(data, {})
    for key, value in (changes or {}).items():
        set_dotted(data, key, value)
    return decode(TrainConfig, data)
