"""What a latent does rather than when: the tokens that its direction promotes, and the latents that point the same way.

    logits of a latent = W_U (g * M d)

d is what a unit of the latent adds to the residual stream, g the gain of the final norm, M subtracts the mean where
that norm does (LayerNorm), and W_U the unembedding: the direct path to the logits with the scale of the norm taken as
constant ("VocabProj", Gur-Arieh 2025, arXiv 2501.08319).

What is written reaches the stream as it is from layers, attention and MLPs; through W_O or W_out from their inner
vectors; through its gain where a norm follows (Gemma 2). Whatever lies before a nonlinearity has no such direction.
"""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.base.errors import ConfigError
from sae.coder.coder import CHUNK_ENTRIES, SparseCoder
from sae.coder.splicing import directions
from sae.lm.guesses import ATTENTION, ATTENTION_OUT, LAYER_LISTS, MLP_OUT, MLPS
from sae.lm.models import LanguageModel
from sae.lm.placement import present, without_hooks
from sae.lm.residual import residual_of
from sae.lm.site import Site, columns_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
LATENTS = 4096  # looked at together
PIECE = CHUNK_ENTRIES // LATENTS  # of the vocabulary

BEGIN, ATTENDED, MIDDLE, FED, END = range(5)  # the order within a layer
IN_STREAM = (BEGIN, MIDDLE, END)
AFTER = {ATTENDED: MIDDLE, FED: END}

Map = Callable[[Tensor], Tensor]
Tokens = tuple[tuple[str, ...], tuple[str, ...]]


class Path(NamedTuple):
    """How a site reaches the residual stream."""

    layer: int
    place: int
    """In the order within a layer; in `IN_STREAM` where the site is the stream itself."""
    projection: nn.Module | None = None
    """What is in between, if anything: first this,"""
    norm: nn.Module | None = None
    """then this."""

    def __call__(self, x: Float[Tensor, "m d"]) -> Float[Tensor, "m d_model"]:
        """Returns directions at the site as they are in the stream."""
        x = x if self.projection is None else through_projection(self.projection, x)
        return x if self.norm is None else through_norm(self.norm, x)


def promoted_tokens(lm: LanguageModel, coder: SparseCoder, latents: Sequence[int], count: int = 10) -> list[Tokens]:
    """Returns for each latent the `count` tokens whose logits it raises most, and those that it lowers most.

    Both are empty where its direction does not reach the residual stream linearly, where the parts of the model are
    not known, or where the latent writes nothing.
    """
    unembedding, norm, into = lm.model.get_output_embeddings(), _final_norm(lm.model), _stream(lm.model, coder)
    if unembedding is None or norm is None or into is None:
        return [((), ())] * len(latents)
    with present(unembedding):  # type: ignore[arg-type]
        weight: Tensor = unembedding.weight[: len(lm.tokenizer)]  # type: ignore[index]
    found: list[Tokens] = []
    for chosen in torch.tensor(list(latents), dtype=torch.long).split(LATENTS):
        stream = into(directions(coder, chosen).to(lm.device))
        read = through_norm(norm, stream)
        words = [
            [tuple(token_text(lm.tokenizer, token) for token in row) for row in _largest(side, weight, count).tolist()]
            for side in (read, -read)
        ]
        writes = (stream.norm(dim=1) > 0).tolist()
        found += [(up, down) if some else ((), ()) for up, down, some in zip(*words, writes, strict=True)]
    return found


def decoder_neighbors(coder: SparseCoder, latents: Sequence[int], count: int = 10) -> list[list[tuple[int, float]]]:
    """Returns for each latent the `count` others whose decoders point most nearly its way, as (latent, cosine)."""
    norms = coder.decoder_norms().detach().float().clamp_min(1e-30)
    found: list[list[tuple[int, float]]] = []
    for some in torch.tensor(list(latents), dtype=torch.long).split(max(1, CHUNK_ENTRIES // coder.spec.d_sae)):
        chosen = some.to(norms.device)
        rows = coder.decoder_rows(chosen)
        parts = zip(coder.blocks, coder.decoders(frozen=True), strict=True)
        products = torch.cat([rows[:, block.columns] @ weight.float().T for block, weight in parts], dim=1)
        cosines = products / norms / norms[chosen, None]
        cosines[torch.arange(len(chosen), device=norms.device), chosen] = -torch.inf  # itself
        best = cosines.topk(min(count, coder.spec.d_sae - 1), dim=1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found += [list(zip(ids, values, strict=True)) for ids, values in pairs]
    return found


def token_text(tokenizer: "PreTrainedTokenizerBase", token: int) -> str:
    """Returns a token as text, with the space before it that some tokenizers drop when they decode one alone."""
    name, text = tokenizer.convert_ids_to_tokens(token), tokenizer.decode([token])
    has_space = isinstance(name, str) and name.startswith("\u2581")
    return f" {text}" if has_space and not str(text).startswith(" ") else str(text)


@torch.no_grad()
def through_norm(norm: nn.Module, x: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
    """Returns what a norm makes of small changes x of its input while its scale stands: centering and gain.

    Both are read off what it makes of a vector of mean 0, so that no kind of norm need be known (Gemma's gain is
    1 + its weight).
    """
    norm, d = without_hooks(norm).float(), x.shape[1]
    probe = torch.ones(d, device=next((p.device for p in norm.parameters()), x.device))
    probe[::2] = -1
    if d % 2:
        probe[-3:] = probe.new_tensor([-1.0, -1.0, 2.0])
    up, down, shifted = norm(probe), norm(-probe), norm(probe + 1)
    gain = (up - down) / (2 * probe) * probe.square().mean().sqrt()
    x = x.to(gain)
    return gain * (x - x.mean(1, keepdim=True) if torch.allclose(up, shifted, atol=1e-3) else x)


@torch.no_grad()
def through_projection(projection: nn.Module, x: Float[Tensor, "m d"]) -> Float[Tensor, "m d_model"]:
    """Returns x times the weight of a projection, whichever way round it keeps it."""
    with present(projection):
        x = x.to(next(projection.parameters()))
    return (projection(x) - projection(torch.zeros_like(x[:1]))).float()


def _largest(x: Float[Tensor, "m d"], unembedding: Float[Tensor, "vocabulary d"], count: int) -> Int[Tensor, "m count"]:
    """Returns the tokens of the largest logits, the largest first, looking at a piece of the vocabulary at a time."""
    x = x.to(unembedding.device)
    values, ids = x.new_zeros(len(x), 0), torch.zeros(len(x), 0, dtype=torch.long, device=x.device)
    for start in range(0, len(unembedding), PIECE):
        logits = x @ unembedding[start : start + PIECE].float().T
        new = logits.topk(min(count, logits.shape[1]), dim=1)
        values, ids = torch.cat([values, new.values], 1), torch.cat([ids, new.indices + start], 1)
        kept = values.topk(min(count, values.shape[1]), dim=1)
        values, ids = kept.values, ids.gather(1, kept.indices)
    return ids


def _stream(model: nn.Module, coder: SparseCoder) -> Map | None:
    """Returns what takes directions at all written sites to the residual stream, or None where that is not linear.

    What several sites write adds up, save that a site in the stream itself holds all that was written before it. How
    much a norm scales what passes it is known of no token, so it is let pass only where nothing else is added to it.
    """
    sites = coder.spec.writes
    paths = [None if site.tag else _path(model, site) for site in sites]
    whole = [path for path in paths if path is not None]
    if not whole or len(whole) < len(sites) or (len(whole) > 1 and any(path.norm for path in whole)):
        return None
    ordered = sorted(zip(whole, columns_of(sites), strict=True), key=lambda pair: pair[0][:2])

    def into(x: Float[Tensor, "m d_out"]) -> Float[Tensor, "m d_model"]:
        stream: Tensor | None = None
        for path, part in ordered:
            added = path(x[:, part])
            stream = added if stream is None or path.place in IN_STREAM else stream + added
        assert stream is not None
        return stream

    return into


def _path(model: nn.Module, site: Site) -> Path | None:
    prefix = _layers(model)
    match = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)(?:\.(.+))?", site.hook) if prefix else None
    if match is None:
        return None
    number, name, is_input = int(match[1]), match[2] or "", site.side == "input"
    if not name:
        return Path(number, BEGIN if is_input else END)
    layer = model.get_submodule(f"{prefix}.{number}")
    module, norms = layer.get_submodule(name), _norms_after(layer)
    parts = ((ATTENDED, ATTENTION, ATTENTION_OUT), (FED, MLPS, MLP_OUT))
    for (place, owners, projections), after in zip(parts, norms, strict=True):
        norm = layer.get_submodule(after) if after else None
        if name == after:
            return Path(number, place, None, norm if is_input else None)
        if name in owners and not is_input:
            return Path(number, AFTER[place] if _adds_within(model, number, place, site.hook) else place, None, norm)
        if name in [f"{owner}.{projection}" for owner in owners for projection in projections]:
            return Path(number, place, module if is_input else None, norm)
    if is_input and "." not in name and _is_norm(module):  # it reads the stream
        first = next(name for name, child in layer.named_children() if _is_norm(child))
        return Path(number, BEGIN if name == first else MIDDLE)
    return None


def _adds_within(model: nn.Module, number: int, place: int, owner: str) -> bool:
    """Whether a module adds what it makes to the stream itself, as BLOOM's do: its output is the stream."""
    try:
        written = residual_of(model).places[number, "hook_attn_out" if place == ATTENDED else "hook_mlp_out"]
    except (ConfigError, KeyError):
        return False
    return isinstance(written, tuple) and written[0].startswith(f"{owner}.")


def _is_norm(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "ndim", 0) == 1


def _norms_after(layer: nn.Module) -> tuple[str, str]:
    """Returns the norm between attention and the stream, and that between the MLP and it; "" where there is none."""
    names = {name for name, _ in layer.named_children()}
    attention = "post_self_attn_layernorm" if "post_self_attn_layernorm" in names else ""
    if "post_feedforward_layernorm" in names:  # Gemma 2 and 3, OLMo 2; elsewhere it is the norm before the MLP
        attention = "post_attention_layernorm"
    mlp = next((name for name in ("post_feedforward_layernorm", "post_mlp_layernorm") if name in names), "")
    return attention, mlp


def _final_norm(model: nn.Module) -> nn.Module | None:
    parent = model.get_submodule(_layers(model).rpartition(".")[0])
    return next((getattr(parent, name) for name in FINAL_NORMS if hasattr(parent, name)), None)


def _layers(model: nn.Module) -> str:
    modules = dict(model.named_modules())
    return next((name for name in LAYER_LISTS if isinstance(modules.get(name), nn.ModuleList)), "")
