"""Coders that nobody trained, for the same pipeline: what a score is worth is seen beside theirs.

    neurons             latent i is coordinate i of what is read, where it is positive
    topk_neurons        of these, the k largest of every token (arXiv 2410.13928 takes 32 and 256)
    random_direction    latent i is a random direction, and fires as often as the trained latent i
    random_init         an untrained TopK coder with as many active latents as the trained one

A random direction takes over neither the selection rule nor the values of the
trained latent: a bias sets how often it fires, token by token, and a rule that lets latents compete would undo that.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.evidence.codes import read_activations, row_blocks
from interp.evidence.corpus import Corpus
from interp.evidence.subject import Subject
from sae.base.errors import ConfigError
from sae.base.seeding import generator
from sae.base.settings import choose
from sae.coder.coder import CHUNK_ENTRIES, SparseCoder
from sae.coder.initialization import initialize
from sae.coder.spec import CoderSpec
from sae.selection import Selection
from sae.selection.relu import ReLU
from sae.selection.topk import TopK

BASELINES = ("neurons", "topk_neurons", "random_direction", "random_init")
SAMPLE_TOKENS = 8192


def baseline_coder(
    name: str, coder: SparseCoder, seed: int = 0, sample: Float[Tensor, "n d_in"] | None = None, k: int = 32
) -> SparseCoder:
    """Returns the stand-in called `name` for a trained coder; it reads the same sites of the same tokens.

    `sample` holds activations such as the coder reads (`activation_sample`); the random ones fire as often on it as
    the trained ones. `k` is that of topk_neurons. What it is stands in its spec, under training["baseline"].
    """
    choose("coder.baseline", name, BASELINES)
    if not name.startswith("random"):
        return _neurons(name, coder, k)
    if sample is None or not len(sample):
        raise ConfigError(f"coder.baseline: {name!r} needs activations to go by, and there are none")
    sample = sample.to(coder.like)
    return _directions(coder, sample, seed) if name == "random_direction" else _untrained(coder, sample, seed)


def activation_sample(subject: Subject, corpus: Corpus, tokens: int = SAMPLE_TOKENS) -> Float[Tensor, "n d_in"]:
    """Returns what the coder reads at about `tokens` tokens, of rows taken evenly from a corpus."""
    each = corpus.n_tokens / max(1, len(corpus.kept))
    rows = corpus.kept[:: max(1, round(len(corpus.kept) * each / tokens))]
    parts = [read_activations(subject, corpus.tokens(group))[0] for group in row_blocks(corpus, rows)]
    return torch.cat(parts)[:tokens]


def _labeled(coder: SparseCoder, name: str) -> dict[str, Any]:
    return {**coder.spec.training, "baseline": name}


def _neurons(name: str, coder: SparseCoder, k: int) -> SparseCoder:
    spec, d = coder.spec, coder.spec.d_in
    limits = {site.name: spec.mask.norm_limits[site.name] for site in spec.reads if site.name in spec.mask.norm_limits}
    made = SparseCoder(
        CoderSpec(
            d,
            d,
            d,
            TopK(min(k, d)) if name == "topk_neurons" else ReLU(),
            spec.reads,
            spec.reads,
            pre_bias="none",
            mask=replace(spec.mask, norm_limits=limits),
            context_length=spec.context_length,
            bos=spec.bos,
            training=_labeled(coder, name),
        ),
        coder.device,
    )
    with torch.no_grad():
        made.W_enc.copy_(torch.eye(d))
        made.W_dec.copy_(torch.eye(d))
    return made


def _like(name: str, coder: SparseCoder, rule: Selection) -> SparseCoder:
    """Returns an empty coder of the same form that selects by `rule`, without a skip path."""
    spec = coder.spec.with_(
        selection=rule,
        calibration=(),
        budget="block",
        select_by_decoder_norm=False,
        skip=False,
        variance=None,
        training=_labeled(coder, name),
        metrics={},
    )
    return SparseCoder(spec, coder.device)


@torch.no_grad()
def _directions(coder: SparseCoder, sample: Float[Tensor, "n d_in"], seed: int) -> SparseCoder:
    made = _like("random_direction", coder, ReLU())
    source = generator(seed, "random directions")
    rows = torch.nn.functional.normalize(torch.randn(made.W_enc.shape, generator=source), dim=1)
    made.W_enc.copy_(rows)
    tied = coder.spec.is_autoencoder and not coder.spec.cross_layer
    others = torch.nn.functional.normalize(torch.randn(made.W_dec.shape, generator=source), dim=1)
    made.W_dec.copy_(rows if tied else others)
    made.b_dec.copy_(coder.b_dec)
    if coder.spec.pre_bias == "own":
        made.b_pre.copy_(coder.b_pre)
    fired, n, layers = coder.encode(sample).fired(), len(sample), coder.spec.n_blocks
    rows_at_once = max(1, CHUNK_ENTRIES // coder.spec.d_sae)
    y = torch.cat([made.look(part).y for part in sample.split(rows_at_once)]).view(n, layers, -1)
    for number, block in enumerate(made.blocks):
        for ids in torch.arange(block.latents.start, block.latents.stop).split(max(1, CHUNK_ENTRIES // n)):
            products = (y[:, number] @ made.W_enc[ids].T).sort(0, descending=True).values
            made.b_enc[ids] = -_thresholds(products, fired[ids])
    return made


def _thresholds(products: Float[Tensor, "n m"], fired: Int[Tensor, "m"]) -> Float[Tensor, "m"]:
    """Returns for each column, sorted downwards, what exactly so many of its values are above."""
    room = products[:1] - products[-1:] + 1e-6
    ends = torch.cat([products[:1] + room, products, products[-1:] - room])
    return (ends.gather(0, fired[None]) + ends.gather(0, fired[None] + 1))[0] / 2


def _untrained(coder: SparseCoder, sample: Float[Tensor, "n d_in"], seed: int) -> SparseCoder:
    layers = coder.spec.n_blocks
    k = round(float(coder.encode(sample).l0().mean()) / layers)
    made = _like("random_init", coder, TopK(max(1, min(k, coder.spec.d_sae // layers))))
    mean = coder.spec.normalize(sample)[0].mean(0)
    if coder.spec.is_autoencoder:
        initialize(made, mean, seed, "baseline")
    else:
        initialize(made, coder.b_dec.detach(), seed, "baseline", input_center=mean)
    return made
