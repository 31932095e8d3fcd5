"""Tokens -> activations: forward hooks, the early stop, and gradients of the loss."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from sae.base.errors import ConfigError
from sae.base.seeding import generator
from sae.lm.calls import first, key_of_input, probed, runs_of
from sae.lm.masking import MaskSpec, next_token_mask, token_mask
from sae.lm.models import ONE_AT_A_TIME, LanguageModel
from sae.lm.norms import norm_of
from sae.lm.placement import put_away
from sae.lm.probing import inputs_of, reader_of
from sae.lm.site import Site
from sae.lm.sites import find_module
from sae.text.packing import PADDING, token_ids

LOGITS_AT_ONCE = 2**21  # 8 MiB in float32


class _AllSeen(Exception):
    """Ends the language model's forward pass once every site has been seen."""


@contextmanager
def hooked(model: nn.Module, sites: list[Site], see: Callable[[Site, Tensor], Tensor | None]) -> Iterator[None]:
    """While open, calls `see(site, tensor)` whenever a site is computed; a returned tensor takes its place.

    Tensors come as [rows, context, d]: heads are flattened, and of a tuple the first member is meant. ConfigError for a
    site whose module runs several times in a pass, and so is not one tensor.
    """

    def swapped(site: Site, whole: Any) -> Any:
        x = first(whole)
        if not isinstance(x, Tensor):
            raise ConfigError(f"activations.sites: {site.name} is a {type(x).__name__}, not a tensor")
        if id(model) in probed:
            return None
        new = see(site, x.flatten(2) if x.dim() > 3 else x)
        if new is None:
            return None
        new = new.reshape(x.shape).to(x)
        return type(whole)((new, *whole[1:])) if isinstance(whole, (tuple, list)) else new

    def before(site: Site) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            key = key_of_input(args, kwargs)
            if key is None:
                raise ConfigError(f"activations.sites: {site.name}: this module is called without a tensor input")
            if isinstance(key, int):
                new = swapped(site, args)
                return None if new is None else (new, kwargs)
            new = swapped(site, kwargs[key])
            return None if new is None else (args, {**kwargs, key: new})

        return hook

    def inside(site: Site) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (*args, *kwargs.values())[0]
            if id(model) not in probed and see(site, before_gain(module, x, site)) is not None:
                raise ConfigError(f"site {site.name}: what a norm makes before its gain can be read, not replaced")

        return hook

    with ONE_AT_A_TIME:
        places = [find_module(model, site) for site in sites]  # all before the first hook: names may be measured
        _check_runs(model, sites, [module for module, _ in places])
        handles = []
        for site, (module, side) in zip(sites, places, strict=True):
            if side == "input":
                handles.append(module.register_forward_pre_hook(before(site), with_kwargs=True))
            elif side == "normalized":
                handles.append(module.register_forward_pre_hook(inside(site), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(lambda m, args, out, site=site: swapped(site, out)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _check_runs(model: nn.Module, sites: list[Site], modules: list[nn.Module]) -> None:
    """Refuses modules that run several times in a pass, as shared layers do: an early stop would hide it."""
    runs = runs_of(model)
    for site, module in zip(sites, modules, strict=True):
        if runs.get(module, 0) > 1:
            raise ConfigError(
                f"activations.sites: {site.name} runs more than once per pass ({runs[module]} times); "
                "its output is not one tensor"
            )


def before_gain(norm: nn.Module, x: Float[Tensor, "*shape d"], site: Site) -> Float[Tensor, "*shape d"]:
    """Returns what a layer norm or RMS norm makes of x before its gain and bias; ConfigError if it computes neither."""
    kind = norm_of(norm, x.shape[-1])
    if kind is None:
        raise ConfigError(
            f"site {site.name}: {type(norm).__name__} computes no layer norm or RMS norm; it has no side 'normalized'"
        )
    return kind(x)


def capture(
    lm: LanguageModel, sites: list[Site], tokens: Int[Tensor, "rows context"]
) -> dict[str, Shaped[Tensor, "..."]]:
    """Returns what is at every site by name: activations [rows, context, d], or what `site_widths` refuses.

    The model stops after the last of them. Raises ConfigError naming a site whose module did not run.
    """
    seen: dict[str, Tensor] = {}

    def see(site: Site, x: Tensor) -> None:
        if site.name in seen:
            raise ConfigError(
                f"activations.sites: {site.name} runs more than once per pass; its output is not one tensor"
            )
        if len(seen) + 1 == len(sites):
            seen[site.name] = x.detach()
            raise _AllSeen
        seen[site.name] = x.detach().clone()  # what follows may add to it in place

    with torch.no_grad(), hooked(lm.model, sites, see):
        try:
            reader_of(lm.model)(**model_inputs(lm, tokens))
        except _AllSeen:
            put_away(lm.model)
            return {name: x.to(lm.device) for name, x in seen.items()}  # a model may be spread over several
    missing = [site.name for site in sites if site.name not in seen]
    part = "" if reader_of(lm.model) is lm.model else ", of whose encoder and decoder (model.name) the first is read"
    raise ConfigError(f"activations.sites: {', '.join(missing)} never ran in a forward pass of {lm.name}{part}")


def sites_of_model(sites: Iterable[Site], tag: str) -> list[Site]:
    """Returns the sites of one model, each once."""
    return list({site.name: site for site in sites if site.tag == tag}.values())


def site_widths(lm: LanguageModel, sites: list[Site]) -> dict[str, int]:
    """Returns the width of every site by name, in the order in which the model computes them.

    ConfigError names one that does not give a vector per token.
    """
    tokens = torch.zeros(2, 3, dtype=torch.int32)
    seen = capture(lm, sites, tokens)
    for name, x in seen.items():
        if x.shape[:-1] != tokens.shape or not x.is_floating_point():
            what = f"{str(x.dtype).removeprefix('torch.')} of shape {list(x.shape)}"
            raise ConfigError(f"activations.sites: {name} gives {what} for 2 rows of 3 tokens, not a vector per token")
    return {name: x.shape[-1] for name, x in seen.items()}


def capture_with_gradients(
    lm: LanguageModel,
    sites: list[Site],
    tokens: Int[Tensor, "rows context"],
    mask: MaskSpec,
    loss: str = "next_token",
    seed: int = 0,
) -> tuple[dict[str, Float[Tensor, "rows context _d"]], dict[str, Float[Tensor, "rows context _d"]]]:
    """Returns activations and, by site, the gradient of the summed next-token cross-entropy over unmasked tokens.

    `loss` "next_token" takes the token that follows, "sampled" one drawn from the model's own prediction with `seed`
    (label-free, the gradient of Fisher's information). The model's weights are frozen, so the graph starts at the
    lowest site. The last position predicts nothing.
    """
    seen: dict[str, Tensor] = {}

    def see(site: Site, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        x.retain_grad()
        seen[site.name] = x
        return x.clone()  # what follows may add to it in place

    with torch.enable_grad(), hooked(lm.model, sites, see):
        logits = lm.model(**model_inputs(lm, tokens)).logits
        keep = token_mask(tokens, mask).to(lm.device)
        next_token_losses(logits, _labels(logits, tokens.to(lm.device), loss, seed), keep).sum().backward()
    gradients = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in seen.items()}
    return {name: x.detach().to(lm.device) for name, x in seen.items()}, {
        name: g.to(lm.device) for name, g in gradients.items()
    }


@torch.no_grad()
def _labels(logits: Tensor, tokens: Int[Tensor, "rows context"], loss: str, seed: int) -> Int[Tensor, "rows context"]:
    """Returns the tokens, or each drawn from what the model predicted for its place; padding stays."""
    if loss == "next_token":
        return token_ids(tokens)
    uniform = torch.rand(tokens[:, 1:].shape, generator=generator(seed, "sampled")).to(logits.device)
    drawn = (logits[:, :-1].float().softmax(-1).cumsum(-1) < uniform[..., None]).sum(-1).clamp_max(logits.shape[-1] - 1)
    labels = tokens.clone()
    labels[:, 1:] = torch.where(tokens[:, 1:] == PADDING, tokens[:, 1:], drawn.to(tokens))
    return labels


def next_token_losses(
    logits: Float[Tensor, "rows context vocabulary"],
    tokens: Int[Tensor, "rows context"],
    keep: Bool[Tensor, "rows context"],
) -> Float[Tensor, "counted"]:
    """Returns -log p(next token) in nats at every kept position but the last, which has no next token."""
    keep = next_token_mask(tokens, keep)
    labels = token_ids(tokens)[:, 1:][keep].long()
    parts = zip(kept_logits(keep, logits), labels.split(_at_once(logits, len(labels))), strict=True)
    return torch.cat([nn.functional.cross_entropy(one, own, reduction="none") for (one,), own in parts])


def kept_logits(
    keep: Bool[Tensor, "rows context_1"], *logits: Float[Tensor, "rows context vocabulary"]
) -> Iterator[tuple[Float[Tensor, "some vocabulary"], ...]]:
    """Yields the logits at the kept positions in float32, of some tokens at a time: what is made of them is larger."""
    places = keep.nonzero()
    for part in places.split(min(_at_once(one, len(places)) for one in logits)):
        yield tuple(one[part[:, 0], part[:, 1]].float() for one in logits)


def _at_once(logits: Float[Tensor, "rows context vocabulary"], tokens: int) -> int:
    """Returns how many tokens' logits to look at together: all, where a gradient is wanted, which is not made twice."""
    return max(1, tokens if logits.requires_grad else LOGITS_AT_ONCE // logits.shape[-1])


def model_inputs(lm: LanguageModel, tokens: Int[Tensor, "rows context"]) -> dict[str, Any]:
    """Returns the arguments of a forward pass. Padding lies behind the text, where only an encoder would see it."""
    there = None if lm.is_causal else (tokens != PADDING).to(lm.device).long()
    return inputs_of(token_ids(tokens).to(lm.device).clamp_min(0), there)
