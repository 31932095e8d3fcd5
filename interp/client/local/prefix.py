"""Next-token distributions of many texts at once: what texts begin with in common is computed once.

Texts are sorted, so that those which begin alike lie side by side, and cut into groups. Of a group's common beginning
(from 32 tokens on) keys and values are computed in a pass of one row, repeated for all rows, and the rest of every text
goes on from there. The repeated cache belongs to its group alone, for a model adds to the cache that it is given.
Right padding is never seen: causal models do not look ahead, and positions are those of the text.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEAST_SHARED = 32
SLACK = 1.25
"""How much more than alone a text may cost in a group: padding, against one pass more."""
CACHED_ROWS = 8
"""Room for keys and values of the rows of a group, as a multiple of the tokens that it computes."""
SHAREABLE = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""Layers of a cache that can be repeated; the states of recurrent models cannot."""


@dataclass(frozen=True)
class Text:
    """A text as tokens, and what is wanted of it."""

    ids: tuple[int, ...]
    places: tuple[int, ...]
    """The tokens, ascending, of whose successors the distribution is wanted."""


def token_budget(vocabulary: int, device: torch.device) -> int:
    """Returns how many tokens to compute at once; their logits take 1 GiB at most, or 4 GiB on a GPU."""
    logits, most = (2**28, 8192) if device.type == "cpu" else (2**30, 65_536)
    return min(most, logits // vocabulary)


def groups(texts: Sequence[Text], budget: int) -> list[list[int]]:
    """Returns the texts in groups to be computed together, each of at most `budget` tokens unless it is one text."""
    order = sorted(range(len(texts)), key=lambda number: texts[number].ids)
    found: list[list[int]] = []
    group: list[int] = []
    shared = longest = cost = 0
    for number in order:
        ids = texts[number].ids
        if group:
            common = min(shared, _common(texts[group[-1]].ids, ids), len(ids) - 1)
            widest = max(longest, len(ids))
            joint = _cost(len(group) + 1, common, widest)
            fits = joint <= budget and (len(group) + 1) * widest <= CACHED_ROWS * budget
            if fits and joint <= SLACK * (cost + len(ids)):
                group.append(number)
                shared, longest, cost = common, widest, joint
                continue
            found.append(group)
        group, shared, longest, cost = [number], len(ids) - 1, len(ids), len(ids)
    return [*found, group] if group else found


def distributions(model: Any, texts: Sequence[Text]) -> Iterator[Tensor]:
    """Yields, for each text of a group, the log-probabilities [places, vocabulary] in float32 that come after it."""
    shared = _shared(texts)
    cache, head, heads = None, [], torch.empty(0)
    if shared:
        head = sorted({place for text in texts for place in text.places if place < shared} | {shared - 1})
        ids = torch.tensor([texts[0].ids[:shared]])
        heads, cache = _forward(model, ids, torch.ones_like(ids), 0, head, None)
        if cache is None or any(type(layer).__name__ not in SHAREABLE for layer in cache.layers):
            shared, cache, head = 0, None, []
        else:
            cache.batch_repeat_interleave(len(texts))
    width = max(len(text.ids) for text in texts) - shared
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros(len(texts), shared + width, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text.ids) - shared] = torch.tensor(text.ids[shared:])
        mask[row, : len(text.ids)] = 1
    tail = sorted({place - shared for text in texts for place in text.places if place >= shared} or {0})
    tails, _ = _forward(model, ids, mask, shared, tail, cache)
    of_head = {place: number for number, place in enumerate(head)}
    of_tail = {place + shared: number for number, place in enumerate(tail)}
    for row, text in enumerate(texts):
        rows = [heads[0, of_head[p]] if p < shared else tails[row, of_tail[p]] for p in text.places]
        yield torch.log_softmax(torch.stack(rows).float(), -1).cpu()


def _forward(model: Any, ids: Tensor, mask: Tensor, start: int, keep: list[int], cache: Any) -> tuple[Tensor, Any]:
    """Returns (logits [rows, keep, vocabulary], the cache as the model left it)."""
    device = next(model.parameters()).device
    kept = torch.tensor(keep, device=device)
    accepted = _parameters(type(model).forward)
    kept_as = "cache" if "cache" in accepted else "past_key_values"  # as older versions call it
    options: dict[str, Any] = {"attention_mask": mask.to(device), "use_cache": True}
    if "position_ids" in accepted:
        options["position_ids"] = torch.arange(start, start + ids.shape[1], device=device).expand_as(ids)
    if cache is not None:
        options[kept_as] = cache
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = kept
    with torch.inference_mode():
        out = model(input_ids=ids.to(device), **options)
    logits = out.logits if "logits_to_keep" in accepted else out.logits[:, kept]
    left = getattr(out, kept_as, None)
    return logits, left if hasattr(left, "layers") and hasattr(left, "batch_repeat_interleave") else None


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def _cost(rows: int, shared: int, width: int) -> int:
    shared = shared if shared >= LEAST_SHARED and rows > 1 else 0
    return shared + rows * (width - shared)


def _shared(texts: Sequence[Text]) -> int:
    """Returns how many tokens all texts begin with, but the last of each; 0 where sharing them is not worth it."""
    low, high = min(text.ids for text in texts), max(text.ids for text in texts)
    common = min(_common(low, high), min(len(text.ids) for text in texts) - 1)
    return common if common >= LEAST_SHARED and len(texts) > 1 else 0


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
