"""What a latent adds, at a token of a text, to the logits of the next one: directly, past the later layers.

    effect on token v = (u_v - mean u) . gain * M stream(a d) / spread

a d is what the latent adds to the coder's output at that token, in the units of the model; `stream` takes it to the
residual stream (`paths.py`), through a norm that follows with what that divides by at this token; spread is what the
final norm divides by there, u_v the row of the unembedding. So it is what the logit of v, above the average over the
vocabulary, loses when the latent is taken out while later layers see nothing of it and scales of norms stand. The
average is taken off as a constant added to all logits changes no probability. Effects are of logits before a softcap,
to which they add up: over all latents, the coder's bias and error, and the rest of the stream, to the logit itself.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.evidence.paths import Gain, NoPath, final_norm, gain_of, ways_of
from interp.evidence.promotes import Extremes, extremes
from sae.coder.coder import SparseCoder
from sae.lm.hooks import hooked
from sae.lm.intervene import next_logits
from sae.lm.models import LanguageModel
from sae.lm.norms import norm_of
from sae.lm.placement import present
from sae.lm.site import Site

HELD = 2**22  # numbers of written directions held at once: 16 MiB
PIECE = 2**14  # tokens of the vocabulary whose rows are summed together
EXACT, ROUNDED = 1e-3, 2e-2  # how far the logits may be off the model's own, in float32 and in half precision


class Entries(NamedTuple):
    """Latents that fire at tokens of a row."""

    tokens: Int[Tensor, "m"]
    ids: Int[Tensor, "m"]
    values: Float[Tensor, "m"]


class DirectEffects:
    """The direct effects of a coder's latents in a language model, in the row that it has `run` last."""

    def __init__(self, lm: LanguageModel, coder: SparseCoder) -> None:
        """Finds the way from the coder to the logits; NoPath if there is none, or it is not known."""
        unembedding = lm.model.get_output_embeddings()
        if not lm.is_causal or unembedding is None:
            raise NoPath("the model predicts no next token")
        self.lm, self.coder, self.unembedding = lm, coder, unembedding
        self.ways = ways_of(lm.model, coder)
        self.final = Site(final_norm(lm.model), "input")
        self.norms = [self.final, *(Site(path, "input") for path in self.ways.norms)]
        self._seen: dict[str, Tensor] = {}
        self._logits = torch.zeros(0)

    @torch.no_grad()
    def run(self, lm: LanguageModel, sites: list[Site], tokens: Int[Tensor, "1 context"]) -> dict[str, Tensor]:
        """Returns what is at some sites in a whole pass of the model over one row, as `capture` does."""
        seen: dict[str, Tensor] = {}
        asked = list({site.name: site for site in (*sites, *self.norms)}.values())
        with hooked(lm.model, asked, lambda site, x: seen.update({site.name: x.detach().clone()})):
            self._logits = next_logits(lm, tokens, torch.tensor([tokens.shape[1]]))[0]
        self._seen = {name: x.to(lm.device) for name, x in seen.items()}
        return {site.name: self._seen[site.name] for site in sites}

    @torch.no_grad()
    def measured(self) -> "Measured":
        """Returns the scales of the row that was run, which hold its effects; NoPath if the model makes something else
        of its final norm than logits by a matrix.
        """
        spreads: dict[str, Tensor] = {}
        for site in self.norms:
            x = self._seen[site.name][0]
            kind = norm_of(self.lm.model.get_submodule(site.hook), x.shape[-1])
            if kind is None:
                raise NoPath(f"{site.hook} computes no layer norm or RMS norm")
            spreads[site.hook] = kind.spread(x)
        reads = [self._seen[site.name][0].float() for site in self.coder.spec.reads if not site.tag]
        scale: Tensor | float = 1.0
        if len(reads) == len(self.coder.spec.reads):  # of two models, none is normalized by token
            scale = self.coder.spec.normalize(torch.cat(reads, dim=-1))[1][1]
        elif not self.coder.spec.normalization.per_token:
            scale = self.coder.spec.normalize(reads[0].new_zeros(len(reads[0]), self.coder.spec.d_in))[1][1]
        else:
            raise NoPath("the coder normalizes each token of two models by itself")
        stream = self.lm.model.get_submodule(self.final.hook)(self._seen[self.final.name][0])
        return Measured(self, spreads, torch.as_tensor(scale), stream, self._factor(stream[-1]))

    def _factor(self, stream: Float[Tensor, "d"]) -> float:
        """Returns what the model multiplies its logits by, told from those of the last token."""
        config = self.lm.model.config.get_text_config()
        cap = getattr(config, "final_logit_softcapping", None)
        made, found = self.unembedding(stream[None])[0].float(), self._logits.to(stream.device)
        plain = found if cap is None else cap * torch.atanh((found / cap).clamp(-1 + 1e-6, 1 - 1e-6))
        fitted = float(made @ plain / made.square().sum().clamp_min(1e-30))
        within = (EXACT if stream.dtype in (torch.float32, torch.float64) else ROUNDED) * float(found.norm())
        for factor in (1.0, fitted):
            own = made * factor if cap is None else cap * torch.tanh(made * factor / cap)
            if float((own - found).norm()) <= within:
                return factor
        raise NoPath("the model makes its logits of more than its final norm and unembedding")

    @property
    def likeliest(self) -> int:
        """Returns the token that the model holds likeliest behind the row."""
        return int(self._logits[: len(self.lm.tokenizer)].argmax())


class Measured:
    """The direct effects in one row."""

    def __init__(
        self,
        direct: DirectEffects,
        spreads: dict[str, Float[Tensor, "n 1"]],
        scale: Tensor,
        normed: Float[Tensor, "n d"],
        factor: float,
    ) -> None:
        """Takes what stands in the row: what each norm divides by, what the coder's output is multiplied by, what the
        final norm makes of the stream, and what multiplies the logits.
        """
        self.direct, self.spreads, self.scale, self.normed, self.factor = direct, spreads, scale, normed, factor
        norm = direct.lm.model.get_submodule(direct.final.hook)
        self.gain: Gain = gain_of(norm, normed.shape[-1])
        head: nn.Module = direct.unembedding
        with present(head):
            self.rows: Tensor = head.weight[: len(direct.lm.tokenizer)]  # type: ignore[index]
            self.bias: Tensor | None = getattr(head, "bias", None)
        parts = [part.float().sum(0) for part in self.rows.split(PIECE)]
        self.mean = torch.stack(parts).sum(0) / len(self.rows)

    @torch.no_grad()
    def on(self, entries: Entries, targets: Int[Tensor, "m"]) -> Float[Tensor, "m"]:
        """Returns what each entry adds to the logit of one token, above what it adds to the average one."""
        parts = []
        for some, own in zip(self._split(entries), targets.split(self._size), strict=False):
            rows = self.rows[own.to(self.rows.device)].float() - self.mean
            parts.append((self._added(some) * rows.to(self.gain.factor)).sum(1).cpu())
        return torch.cat(parts) if parts else torch.zeros(0)

    @torch.no_grad()
    def extremes(self, entries: Entries, count: int) -> tuple[Extremes, Extremes]:
        """Returns the `count` tokens whose logits each entry raises most, and those that it lowers most, above what it
        adds to the average one.
        """
        added = torch.cat([self._added(some) for some in self._split(entries)])
        average = (added.to(self.rows.device) * self.mean).sum(1, keepdim=True)
        up, down = extremes(added, self.rows, count)
        return up._replace(values=up.values - average), down._replace(values=down.values - average)

    @torch.no_grad()
    def logits(self, targets: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Returns the logit of one token behind each token of the row, above the average one, before a softcap."""
        targets = targets.to(self.rows.device)
        found = (self.normed.float().to(self.rows.device) * (self.rows[targets].float() - self.mean)).sum(1)
        if self.bias is not None:
            bias = self.bias[: len(self.rows)].float()
            found = found + bias[targets] - bias.mean()
        return (found * self.factor).cpu()

    @property
    def _size(self) -> int:
        return max(1, HELD // self.direct.coder.spec.d_out)

    def _split(self, entries: Entries) -> Iterator[Entries]:
        parts = (member.split(self._size) for member in entries)
        return (Entries(*some) for some in zip(*parts, strict=True)) if len(entries.ids) else iter(())

    def written(self, entries: Entries) -> Float[Tensor, "m d_out"]:
        """Returns what entries add to the coder's output, in the units of the model."""
        coder, device = self.direct.coder, self.direct.lm.device
        rows = coder.decoder_rows(entries.ids.to(coder.device)).to(device) * entries.values[:, None].to(device)
        by_token = self.scale.ndim == 2 and len(self.scale) > 1
        scale = self.scale[entries.tokens.to(self.scale.device)] if by_token else self.scale
        return rows * scale.to(rows)

    def _added(self, entries: Entries) -> Float[Tensor, "m d"]:
        """Returns what entries add to what the unembedding reads."""
        spreads = {path: spread[entries.tokens.to(spread.device)] for path, spread in self.spreads.items()}
        stream = self.direct.ways(self.written(entries), spreads)
        return self.gain(stream) / spreads[self.direct.final.hook] * self.factor
