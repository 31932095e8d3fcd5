"""What Neuronpedia shows of a latent beside its windows, from the evidence of a run, its coder and its model.

    frac_nonzero                 share of tokens on which it fires
    freq_hist_data_bar_*         tokens by activation: the counted half octaves, told by their middles
    logits_hist_data_bar_*       tokens of the vocabulary by what a unit of the latent adds to their logits, in 40 bins
    pos_str/values neg_str/...   the tokens whose logits it raises and lowers most, with what it adds
    neuron_alignment_*           the largest entries of its decoder row, and their shares of the row's l1 norm
    topkCosSim*                  the latents whose decoders point the same way
    decoder_weights_dist         of attention heads side by side, the share of its decoder row's norms in each
    maxActApprox                 its largest activation by magnitude
    vector hookName              what a unit of it adds at one site of TransformerLens' names, for steering; by default
                                 as strong as it ever was (vectorDefaultSteerStrength)

Empty lists are what is not known: logits and tokens where the direction does not reach the logits linearly, the vector
where the coder writes several sites or one without such a name; correlated_* always, as a run keeps neither activations
of neurons nor of pairs of latents.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.evidence.promotes import Readout, readout, token_text
from interp.evidence.tally import bin_edges
from interp.exchange.neuronpedia import rounded
from interp.exchange.neuronpedia_names import hook_of
from interp.records import Facts
from sae.coder.coder import SparseCoder
from sae.coder.splicing import directions
from sae.lm.models import LanguageModel
from sae.lm.residual import ResidualStream

BINS = 40
TOKENS = 10
ALIGNED = 3
HELD = 2**26  # logits held at once: 256 MiB

Row = dict[str, Any]


class Featured:
    """Tells of a coder's latents in a language model."""

    def __init__(self, lm: LanguageModel, coder: SparseCoder, stream: ResidualStream) -> None:
        self.lm, self.coder, self.readout = lm, coder, readout(lm, coder)
        found = hook_of(coder.spec.writes[0], stream) if len(coder.spec.writes) == 1 else None
        self.hook = found and f"blocks.{found[0]}.{found[1]}"

    def rows(self, facts: Sequence[tuple[int, Facts]]) -> list[Row]:
        """Returns a row for each latent that comes with its facts."""
        ids = torch.tensor([latent for latent, _ in facts])
        vectors = directions(self.coder, ids.to(self.coder.device)).float().cpu()
        logits = [self._logits(part) for part in ids.split(self._size)]
        parts = zip(facts, vectors, [row for rows in logits for row in rows], strict=True)
        return [self._row(latent, known, vector) | effects for (latent, known), vector, effects in parts]

    @property
    def _size(self) -> int:
        return max(1, HELD // max(1, len(self.lm.tokenizer)))

    def _row(self, latent: int, facts: Facts, vector: Float[Tensor, "d_out"]) -> Row:
        strongest = vector.topk(min(ALIGNED, len(vector)))
        l1 = float(vector.abs().sum()) or 1.0
        heights, middles = activation_bars(facts.histogram)
        heads = self.coder.spec.writes[0].heads if len(self.coder.spec.writes) == 1 else None
        shares = vector.view(heads, -1).norm(dim=1) if heads else torch.zeros(0)
        return {
            "index": str(latent),
            "maxActApprox": rounded([facts.largest])[0],
            "frac_nonzero": facts.rate,
            "freq_hist_data_bar_heights": heights,
            "freq_hist_data_bar_values": middles,
            "neuron_alignment_indices": strongest.indices.tolist(),
            "neuron_alignment_values": rounded(strongest.values.tolist()),
            "neuron_alignment_l1": rounded((strongest.values.abs() / l1).tolist()),
            "correlated_neurons_indices": [],
            "correlated_neurons_l1": [],
            "correlated_neurons_pearson": [],
            "decoder_weights_dist": rounded((shares / shares.sum().clamp_min(1e-30)).tolist()),
            "topkCosSimIndices": [other for other, _ in facts.neighbors],
            "topkCosSimValues": rounded(cosine for _, cosine in facts.neighbors),
            "vector": rounded(vector.tolist()) if self.hook else [],
            "vectorLabel": None,
            "hookName": self.hook,
            "vectorDefaultSteerStrength": rounded([facts.largest])[0],
            "hasVector": self.hook is not None,
        }

    @torch.no_grad()
    def _logits(self, ids: Tensor) -> list[Row]:
        if self.readout is None:
            return [_effects([], [], [], [], [], []) for _ in range(len(ids))]
        added = added_logits(self.readout, self.coder, ids)
        count = min(TOKENS, added.shape[1])
        up, down = added.topk(count, dim=1), added.topk(count, dim=1, largest=False)
        found = []
        for row, *sides in zip(added.cpu(), up.values, up.indices, down.values, down.indices, strict=True):
            raised, up_ids, lowered, down_ids = (side.tolist() for side in sides)
            if not row.any():  # it writes nothing
                found.append(_effects([], [], [], [], [], []))
                continue
            words = [[token_text(self.lm.tokenizer, token) for token in some] for some in (up_ids, down_ids)]
            found.append(_effects(words[0], rounded(raised), words[1], rounded(lowered), *logit_bars(row)))
        return found


def added_logits(found: Readout, coder: SparseCoder, ids: Tensor) -> Float[Tensor, "m vocabulary"]:
    """Returns what a unit of each latent adds to the logits, as `promoted_tokens` ranks them."""
    return found.read(directions(coder, ids.to(coder.device))) @ found.weight.float().T


def activation_bars(histogram: Sequence[int]) -> tuple[list[int], list[float]]:
    """Returns the counts from the first bin in which a latent fires to the last, and the middles of these bins."""
    there = [i for i, count in enumerate(histogram) if count]
    if not there:
        return [], []
    edges = bin_edges()
    edges.append(2 * edges[-2])
    chosen = range(there[0], there[-1] + 1)
    return [histogram[i] for i in chosen], [(edges[i] + edges[i + 1]) / 2 for i in chosen]


def logit_bars(logits: Float[Tensor, "vocabulary"]) -> tuple[list[int], list[float]]:
    """Returns how many tokens are in each of some bins of equal width, and the middles of the bins."""
    low, high = float(logits.min()), float(logits.max())
    if low == high:
        return [len(logits)], [low]
    width = (high - low) / BINS
    bins = ((logits.double() - low) / width).long().clamp(0, BINS - 1)
    return torch.bincount(bins, minlength=BINS).tolist(), rounded(low + (i + 0.5) * width for i in range(BINS))


def _effects(
    up: list[str], raised: list[float], down: list[str], lowered: list[float], heights: list[int], middles: list[float]
) -> Row:
    words = {"pos_str": up, "pos_values": raised, "neg_str": down, "neg_values": lowered}
    return words | {"logits_hist_data_bar_heights": heights, "logits_hist_data_bar_values": middles}
