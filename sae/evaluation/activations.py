"""What a coder makes of some text: which latents fire where, with the tokens that training masked marked as such."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.base.arguments import described, whole
from sae.base.errors import ConfigError
from sae.coder.arguments import as_coder
from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.evaluation.evaluation import models_of, with_special_tokens_masked
from sae.kernels.codes import SparseLatents
from sae.lm.hooks import capture, sites_of_model
from sae.lm.masking import norm_mask, token_mask
from sae.lm.models import LanguageModel
from sae.lm.site import Site
from sae.pages.marks import marked
from sae.pages.notebook import Html, table, text_lines
from sae.text.decode import Decoder
from sae.text.given import as_documents
from sae.text.packing import PADDING, added, same, token_ids
from sae.text.tokenizing import encode_texts

if TYPE_CHECKING:
    from sae.coder.arguments import CoderLike
    from sae.lm.models import ModelLike

ROWS = 16  # of one pass of the model
BESIDE = 5  # tokens shown on each side of one,
AROUND = 24  # and in a notebook
Run = Callable[[LanguageModel, list[Site], Tensor], dict[str, Tensor]]
COLUMNS = ("latent", "value", "fires", "row", "position", "token", "where")


class Strongest(NamedTuple):
    """A latent at the token where it fires most."""

    latent: int
    value: float
    fires: int
    """At how many tokens that count it fires."""
    row: int
    position: int
    token: str
    where: str
    """The token among those around it, in angle quotes."""


class Top(list[Strongest]):
    """The latents that fire most, as a table; `pandas.DataFrame(top)` takes it as it is."""

    def __repr__(self) -> str:
        cells = [COLUMNS, *(tuple(_cell(value) for value in row) for row in self)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)
        return "\n".join(lines) if self else "no latent fires at a token that counts"

    def _repr_html_(self) -> str:
        return table(COLUMNS, (map(_cell, row) for row in self))


@dataclass(frozen=True, repr=False)
class Activations:
    """What a coder makes of some rows of tokens."""

    tokens: Int[Tensor, "rows context"]
    """Token ids; -1 behind a row that is shorter than the longest."""
    strings: list[list[str]]
    """The text of each token, by row."""
    mask: Bool[Tensor, "rows context"]
    """Which tokens count, by the mask of training: no special token, not the first of a row, no outlier by norm."""
    latents: SparseLatents
    """The codes of all tokens [rows, context], masked ones too."""
    title: str = ""

    def of(self, latent: int) -> Float[Tensor, "rows context"]:
        """Returns what a latent is at every token; at a masked one as well (`mask`)."""
        latent = whole("latent", latent, least=0)
        if latent >= self.latents.d_sae:
            raise ValueError(f"latent: {latent} is none of this coder's {self.latents.d_sae}")
        mine = self.latents.ids == latent
        found = self.latents.values.new_zeros(self.tokens.numel())
        found[self.latents.tokens[mine]] = self.latents.values[mine]
        return found.reshape(self.tokens.shape)

    def top(self, n: int = 10) -> Top:
        """Returns the n latents that fire most at tokens that count, each with the token where it does.

        Most is by size: a rule that keeps negative values may put one first.
        """
        n, latents, counts = whole("n", n), self.latents, self._counting()
        tokens, ids, values = latents.tokens[counts], latents.ids[counts], latents.values[counts].float()
        fires = torch.bincount(ids, minlength=latents.d_sae)
        found, seen = Top(), set[int]()
        for entry in values.abs().argsort(descending=True, stable=True).tolist():
            latent = int(ids[entry])
            if len(found) == n:
                break
            if latent not in seen:
                seen.add(latent)
                row, position = divmod(int(tokens[entry]), self.tokens.shape[1])
                where = self._where(row, position)
                own = self.strings[row][position]
                found.append(Strongest(latent, float(values[entry]), int(fires[latent]), row, position, own, where))
        return found

    def _counting(self) -> Bool[Tensor, "nnz"]:
        """Which entries of the codes are of tokens that count, and fire."""
        return self.mask.flatten()[self.latents.tokens] & (self.latents.values != 0)

    def _where(self, row: int, position: int) -> str:
        text = self.strings[row]
        before, after = text[max(0, position - BESIDE) : position], text[position + 1 : position + 1 + BESIDE]
        own = text[position]
        inner = own.lstrip(" ")
        return f"{''.join(before)}{own[: len(own) - len(inner)]}«{inner}»{''.join(after)}"

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"{self._head()}\n{self.top(5)!r}"

    def _repr_html_(self) -> str:
        top = self.top(5)
        rows = [(*map(_cell, one[:5]), Html(self._marked(one))) for one in top]
        return text_lines([self._head()]) + table((*COLUMNS[:5], "where"), rows)

    def _marked(self, one: Strongest) -> str:
        """Returns the text around the token where a latent fires most, shaded where it fires, as HTML."""
        around = slice(max(0, one.position - AROUND), one.position + AROUND + 1)
        values = self.of(one.latent)[one.row].float() * self.mask[one.row]
        return marked(self.strings[one.row][around], values.tolist()[around], abs(one.value))

    def _head(self) -> str:
        n, counted = int((self.tokens != PADDING).sum()), int(self.mask.sum())
        l0 = int(self._counting().sum()) / max(1, counted)
        rows = f"{len(self)} row{'s' * (len(self) != 1)}"
        return f"{self.title}: {rows}, {n:,} tokens, {n - counted:,} of them masked, L0 {l0:.1f}"


def activations(lm: "ModelLike", coder: "CoderLike", text: Any, second: "ModelLike | None" = None) -> Activations:
    """Returns what a coder makes of some text in a language model: latents by token, and those that fire most.

        sae.activations("quickstart", coder, "def f(x):").top(5)

    `lm` is a loaded model or its name, `coder` one or its address as of `sae.load`. `text` is one text or a list of
    them, a chat (a list of messages with role and content) or a list of chats, or token ids, which are taken as they
    are. Around a text stands what stood around one in training (BOS). Nothing is cut: ConfigError if a row is longer
    than the model has positions for. `second` is the second model of a crosscoder of two, by default the one that its
    spec names.

    Raises ConfigError for a coder of no known site, or that looks at gradients of what follows.
    """
    return codes_of(*reading(lm, coder, text, second))


class Reading(NamedTuple):
    """What is to be read, and by what."""

    coder: SparseCoder
    models: dict[str, LanguageModel]
    """By the tag of the sites that they have."""
    rows: Int[Tensor, "rows context"]


def reading(
    lm: "ModelLike | None",
    coder: "CoderLike",
    text: Any,
    second: "ModelLike | None" = None,
    as_trained: bool = False,
) -> Reading:
    """Returns coder, models and rows of tokens of what `activations` takes; errors as there.

    With `as_trained`, a row that is longer than those that a model was trained on is an error too, and is not tried.
    """
    coder = as_coder(coder)
    if coder.spec.selection.looks_at_gradients:
        raise ConfigError("coder: its selection looks at gradients of what follows; sae.evaluate gives its figures")
    models = models_of({"": coder}, lm, second)
    own = models[""]
    coder = with_special_tokens_masked(coder, own.tokenizer)
    rows = _rows(own, coder.spec, text)
    n = rows.shape[1]
    for model in models.values():
        if as_trained and n > (model.trained_length or n):
            raise ConfigError(
                f"text: {n:,} tokens; {model.name} was trained on at most {model.trained_length:,} together"
            )
        model.check_context(n, "text")
    return Reading(coder, models, rows)


def codes_of(
    coder: SparseCoder, models: dict[str, LanguageModel], rows: Int[Tensor, "rows context"], run: Run = capture
) -> Activations:
    """Returns what a coder makes of rows of tokens; `run` is how a model's tensors are had, `capture` or the like."""
    own, reads, limits = models[""], coder.spec.reads, coder.spec.mask.norm_limits
    sites = [*reads, *(site for site in coder.spec.writes if site.name in limits)]
    parts, masks = [], []
    for batch in rows.split(ROWS):
        seen: dict[str, Tensor] = {}
        for tag, model in models.items():
            seen |= {name: x.cpu() for name, x in run(model, sites_of_model(sites, tag), batch).items()}
        masks.append(token_mask(batch, coder.spec.mask) & norm_mask(seen, coder.spec.mask))
        parts.append(torch.cat([seen[site.name].float() for site in reads], dim=-1))
    z = coder.encode(torch.cat(parts))
    z = replace(z, offsets=z.offsets.cpu(), ids=z.ids.cpu(), values=z.values.cpu())
    ids, title = token_ids(rows).long(), f"{', '.join(site.name for site in reads)} of {own.name}"
    return Activations(ids, _strings(own, ids), torch.cat(masks), z, title)


def _rows(lm: LanguageModel, spec: CoderSpec, text: Any) -> Int[Tensor, "rows context"]:
    """Returns what was given as rows of tokens, as training would have made them, each to its end."""
    documents = as_documents("text", text)
    before, behind = added(lm.tokenizer, spec.bos)
    found: list[list[int]] = []
    roles = tuple(spec.training.get("text", {}).get("roles", ()))
    try:
        encoded = encode_texts(lm.tokenizer, documents, roles)
        for document, ids in zip(documents, encoded, strict=True):
            if isinstance(document, str):
                found.append([*before, *ids.tolist(), *behind])
            elif document and isinstance(document[0], dict):
                found.append([*([] if same(ids[: len(before)], before) else before), *ids.tolist()])
            else:
                found.append([token for token in document if isinstance(token, int)])  # special ones too
    except ConfigError as error:
        told = str(error).replace("text.column", "text", 1).replace("name a column of text", "give plain text", 1)
        raise ConfigError(told) from error
    longest = max(map(len, found), default=0)
    if not all(found) or not longest:
        raise ValueError(f"text: there are no tokens in {described(text)}")
    return torch.tensor([row + [PADDING] * (longest - len(row)) for row in found])


def _strings(lm: LanguageModel, ids: Int[Tensor, "rows context"]) -> list[list[str]]:
    decoder, found = Decoder(lm.tokenizer), []
    for row in ids.tolist():
        text, bounds = decoder.window([token for token in row if token != PADDING])
        found.append([text[a:b] for a, b in pairwise(bounds)])
    return found


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else repr(value)
