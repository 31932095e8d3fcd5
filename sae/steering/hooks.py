"""Edited latents in a language model, in delta form:

    x <- x + sum over edited latents i of (a'_i - a_i) d_i        at every site that the coder writes, at every token

a_i is the latent as the coder's inference rule has it, a'_i what the edit makes of it, and d_i its row of the decoder
in the model's units, a per-token normalization's factor included. What the coder does not reconstruct stays as it is,
and a token at which no edit changes anything is not touched at all: without an edit the model is bitwise itself.

a_i is read in the same pass, below the edits at other sites. A coder whose writing depends on a site that comes only
later (a crosscoder) reads the model as it is without edits, in a pass of its own over the same tokens. Tokens that
training masked (BOS, special tokens, outliers by norm) are left alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.base.errors import ConfigError
from sae.coder.arguments import as_coder
from sae.coder.spec import CoderSpec
from sae.coder.splicing import reads_ahead
from sae.evaluation.evaluation import with_special_tokens_masked
from sae.evaluation.models import models_of
from sae.lm.hooks import hooked, site_widths
from sae.lm.masking import norm_mask, token_mask
from sae.lm.reading import Row
from sae.lm.site import Site, tagged_columns
from sae.steering.edits import Edit, check_latents

if TYPE_CHECKING:
    from sae.coder.arguments import CoderLike
    from sae.lm.models import ModelLike


def check_steers(spec: CoderSpec) -> None:
    """Raises ConfigError for a coder that cannot steer, saying why."""
    if not spec.writes:
        raise ConfigError("coder: it writes nothing, so that there is nothing to steer with")
    if not spec.is_placed:
        raise ConfigError("coder: it does not say where it reads and writes; say it when loading: site=...")
    if spec.selection.looks_at_gradients:
        raise ConfigError("coder: its selection looks at gradients of what follows, which is not there yet")
    if any(site.tag for site in (*spec.reads, *spec.writes)):
        raise ConfigError("coder: it is of two models, and one model is steered")
    for site in spec.writes:
        if site.side == "normalized":
            raise ConfigError(f"coder: it writes {site.name}, which can be read, not replaced")


class Steering:
    """A coder in the language model that it steers; several rows may be edited through it at once.

    Args:
        lm: a model that predicts the next token, loaded or by name; None: the one that the coder names.
        coder: one, or its address as of `sae.load`. ConfigError says why it cannot steer, or does not fit the model.
    """

    def __init__(self, lm: "ModelLike | None", coder: "CoderLike") -> None:
        coder = as_coder(coder)
        check_steers(coder.spec)
        if lm is None and not coder.spec.reads[0].model:
            raise ConfigError("lm: the coder does not say which model it is of; pass it")
        self.lm = lm = models_of({"": coder}, lm)[""]
        if not lm.is_causal:
            raise ConfigError(f"lm: {lm.name} does not predict the next token, so it cannot be steered")
        self.coder = with_special_tokens_masked(coder, lm.tokenizer)
        self.spec = spec = self.coder.spec
        order = list(site_widths(lm, _once(*spec.reads, *spec.writes)))
        read, written = ([order.index(site.name) for site in sites] for sites in (spec.reads, spec.writes))
        self.ahead = reads_ahead(spec) or (not spec.cross_layer and max(read) > min(written))
        """Whether it reads a site that the model computes after one that it writes."""
        limited = [site for site in spec.writes if site.name in spec.mask.norm_limits]
        self.seen = _once(*spec.reads, *(limited if self.ahead else ()))
        """The sites that are read; of those that are written, those whose norms are looked at before."""
        self.measured: dict[int, tuple[float, str]] = {}
        """Largest activations that no run told, and where they were looked for: a text is read once for a latent."""

    def during(self, edits: Sequence[Edit], prompt: int) -> "Editing":
        """Returns what is open while a row is read (`sae.lm.reading.Row`) whose prompt has so many tokens.

        Strengths are values: ConfigError for one that is missing or in another unit.
        """
        check_latents(edits, self.spec.d_sae)
        for edit in edits:
            if edit.unit != "value" or (edit.strength is None and edit.how != "ablate"):
                raise ConfigError(f"edits: {edit}: its strength is to be a value here")
        return Editing(self, tuple(edits), prompt)

    def reads_later(self, edits: Sequence[Edit]) -> bool:
        """Returns whether an edit waits for a latent of a layer above it, as a cross-layer coder may have them."""
        size = self.spec.d_sae // self.spec.n_blocks
        return any(edit.when and edit.when.latent // size > edit.latent // size for edit in edits)


class Editing:
    """Edits acting on one row of tokens while it is read, pass after pass."""

    def __init__(self, steering: Steering, edits: tuple[Edit, ...], prompt: int) -> None:
        self.steering, self.coder, self.spec = steering, steering.coder, steering.spec
        self.edits, self.prompt = edits, prompt
        named = sorted({edit.latent for edit in edits} | {edit.when.latent for edit in edits if edit.when})
        self.column = {latent: place for place, latent in enumerate(named)}
        self.ids = torch.tensor(named, dtype=torch.long, device=self.coder.device)
        self.decoder = self.coder.decoder_rows(self.ids)
        self.ahead = steering.ahead or steering.reads_later(edits)
        self.tokens = self.masked = self.changed = 0
        """How many were read, how many of them are left alone as in training, and at how many something changed."""
        self._plain: Row | None = None
        self._seen: dict[str, Tensor] = {}

    @contextmanager
    def __call__(self, tokens: Int[Tensor, "1 n"], start: int) -> Iterator[None]:
        """While open, the model computes with the edits at these tokens, of which the first has place `start`."""
        if not self.edits:
            yield
            return
        model = self.steering.lm.model
        if not start:
            self.tokens = self.masked = self.changed = 0
        if self.ahead:
            self._read_plain(tokens, start)
        now = _Pass(self, tokens, start, self._seen if self.ahead else {})
        with ExitStack() as stack:
            if not self.ahead and not self.spec.is_autoencoder:
                stack.enter_context(hooked(model, self.steering.seen, now.see))
            stack.enter_context(hooked(model, list(self.spec.writes), now.write))
            yield
        self.tokens += tokens.shape[1]
        self.masked += int((~now.keep).sum())
        self.changed += int(now.changed.sum())

    def _read_plain(self, tokens: Int[Tensor, "1 n"], start: int) -> None:
        """Reads the model as it is, in a row of its own over the same tokens."""

        def see(site: Site, x: Tensor) -> None:
            self._seen[site.name] = x[0].to(self.coder.device, copy=True)

        if self._plain is None or not start:
            lm = self.steering.lm
            self._plain = Row(lm, lambda *_: hooked(lm.model, self.steering.seen, see))
        self._plain.read(tokens[0].tolist())


class _Pass:
    """One pass of the model over some tokens of a row."""

    def __init__(self, of: Editing, tokens: Int[Tensor, "1 n"], start: int, seen: dict[str, Tensor]) -> None:
        device = of.coder.device
        self.of, self.seen, mask = of, seen, of.spec.mask
        self.mask = replace(mask, skip_positions=max(0, mask.skip_positions - start), next_token=False)
        self.keep = token_mask(tokens.to(device), self.mask)[0]
        self.answer = start + torch.arange(tokens.shape[1], device=device) >= of.prompt - 1
        self.changed = torch.zeros_like(self.keep)
        self._inputs: Tensor | None = None
        self._changes = self.keep[:, None]

    def see(self, site: Site, x: Float[Tensor, "1 n d"]) -> None:
        """Remembers what is at a site that the coder reads."""
        self.seen[site.name] = x[0].to(self.of.coder.device, copy=True)  # what follows may add to it in place
        self._inputs = None

    def write(self, site: Site, x: Float[Tensor, "1 n d"]) -> Float[Tensor, "1 n d"] | None:
        """Returns what is at a site with the edits, None where they change nothing."""
        of = self.of
        if of.spec.is_autoencoder and not of.ahead:
            self.see(site, x)
        if self._inputs is None:
            self._read()
        part = next(columns for other, columns in tagged_columns(of.spec.writes, "") if other.name == site.name)
        keep = self.keep & self._norms(site, x[0])
        delta = (self._changes * keep[:, None]) @ of.decoder[:, part] * self._spread[:, part]
        touched = (delta != 0).any(1)
        if not touched.any():
            return None
        self.changed |= touched
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch.where(touched.to(x.device)[:, None], wide + delta.to(wide), wide).to(x)

    def _norms(self, site: Site, x: Float[Tensor, "n d"]) -> Bool[Tensor, "n"]:
        """Returns at which tokens nothing that is known is an outlier by norm; sites that come later are not known."""
        known = {site.name: x.to(self.keep.device), **self.seen}
        limits = {name: limit for name, limit in self.mask.norm_limits.items() if name in known}
        return norm_mask(known, replace(self.mask, norm_limits=limits))

    def _read(self) -> None:
        """Makes of what was seen by how much each latent changes, and what undoes the normalization of an output."""
        of, n = self.of, len(self.keep)
        like = next(iter(self.seen.values()))
        parts = [self.seen.get(s.name, like.new_zeros(n, s.width or like.shape[-1])) for s in of.spec.reads]
        self._inputs = torch.cat([part.float() for part in parts], dim=-1)
        values = of.coder.encode(self._inputs, latents=of.ids)
        dense = of.decoder.new_zeros(n, len(of.ids))
        dense[values.tokens, torch.searchsorted(of.ids, values.ids)] = values.values.to(dense)
        self._changes = self._edited(dense)
        spread = torch.as_tensor(of.spec.normalize(self._inputs)[1][1], device=dense.device, dtype=dense.dtype)
        self._spread = spread.expand(n, of.spec.d_out)

    def _edited(self, values: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """Returns by how much the edits change each latent; of two of one latent the first that acts counts."""
        changes, free = torch.zeros_like(values), torch.ones_like(values, dtype=torch.bool)
        for edit in self.of.edits:
            column, strength = self.of.column[edit.latent], edit.strength or 0.0
            own = values[:, column]
            here = free[:, column].clone()
            if edit.where != "both":
                here &= self.answer if edit.where == "answer" else ~self.answer
            if edit.when:
                other = values[:, self.of.column[edit.when.latent]]
                here &= other > edit.when.threshold if edit.when.than == ">" else other < edit.when.threshold
            by = {
                "clamp": strength - own,
                "add": own.new_full((), strength),
                "scale": (strength - 1) * own,
                "ablate": -own,
            }
            changes[:, column] = torch.where(here, by[edit.how], changes[:, column])
            free[:, column] &= ~here
        return changes


def _once(*sites: Site) -> list[Site]:
    return list({site.name: site for site in sites}.values())
