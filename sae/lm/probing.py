"""What a model does with a few tokens: whether it looks ahead, how long its rows may be, which tensors it is made of.

Asked of the loaded model itself, since neither the name of its class nor its config says it reliably.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from sae.base.seeding import generator
from sae.lm.placement import input_device, present

CLEARLY = 0.1  # of a token's vector: what moves by more does not by rounding
TOKENS = 5
"""Tokens of a probe: more than a table of token types has rows, few enough that one of them matters to all."""
TRIED = 64  # tokens of all the vocabulary, of which those for a probe are taken
ROWS_READ = {  # operations that read rows of a table -> which of their arguments names the rows
    torch.ops.aten.embedding.default: 1,
    torch.ops.aten.index_select.default: 2,
    torch.ops.aten.gather.default: 2,
    torch.ops.aten.index.Tensor: 1,
}


@dataclass(frozen=True)
class Nature:
    """What a model was found to be."""

    looks_ahead: bool
    """Whether what it makes of a token depends on later ones."""
    predicts: bool
    """Whether it has a head that scores every token of the vocabulary, and does not look ahead."""
    positions: int | None
    """The longest row that its tables of positions allow; None where it has none."""


def reader_of(model: nn.Module) -> Any:
    """Returns the part of a model that takes text alone: all of it or, of an encoder and a decoder, the encoder."""
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return model.get_encoder() if two else model  # type: ignore[operator]


def inputs_of(ids: Int[Tensor, "rows n"], there: Int[Tensor, "rows n"] | None) -> dict[str, Any]:
    """Returns the arguments of a pass; `there` is 1 where no padding is, None of a model that does not look ahead."""
    return {"input_ids": ids, "use_cache": False} if there is None else {"input_ids": ids, "attention_mask": there}


def vocabulary_of(model: Any) -> int:
    """Returns how many tokens a model has embeddings of."""
    return model.get_input_embeddings().weight.shape[0]


@torch.no_grad()
def nature_of(model: Any) -> Nature:
    """Returns what a model is found to be: the last of a few tokens is changed, and the earlier places are compared.

    Where tokens are sorted by expert they differ by rounding; what is not clearly more than that is decided by
    gradients, which do not round to what is not there. Errors of the model's come as they are; ValueError if it makes
    NaN of the tokens, or has one embedding for all of them.
    """
    ids = plain_ids(model)
    if ids[0, -1] == ids[0, -2]:
        raise ValueError("its embeddings of all tokens are alike, so its weights are damaged")
    with _Tables(vocabulary_of(model)) as tables:
        scores, before = _output(model, ids[:, :-1])
    after = _output(model, ids[:, [*range(TOKENS - 1), TOKENS]])[1]
    if before.isnan().any():
        raise ValueError("it makes NaN of them, so its weights are damaged or too large for their precision")
    was, now = before[:, :-1].float(), after[:, :-1].float()
    moved = float(((was - now).norm(dim=-1) / was.norm(dim=-1).clamp_min(1e-30)).max())
    looks_ahead = moved > 0
    if 0 < moved < CLEARLY:
        by_gradient = _last_reaches_others(model, ids[:, :-1])
        looks_ahead = moved > torch.finfo(before.dtype).eps ** 0.5 / 4 if by_gradient is None else by_gradient
    return Nature(looks_ahead, scores and not looks_ahead, tables.limit)


def _last_reaches_others(model: Any, ids: Int[Tensor, "1 n"]) -> bool | None:
    """Returns whether what a model makes of earlier tokens has a gradient with respect to the last one.

    None where no gradient can be taken.
    """
    leaves: list[Tensor] = []

    def leaf(_module: nn.Module, _inputs: Any, made: Tensor) -> Tensor:
        leaves.append(made.detach().requires_grad_())
        return leaves[-1]

    handle = model.get_input_embeddings().register_forward_hook(leaf)
    try:
        with torch.enable_grad():
            earlier = _output(model, ids)[1][:, :-1].float()
            weights = torch.randn(earlier.shape, generator=generator(0, "probe")).to(earlier.device)
            total = (earlier * weights).sum()  # a plain sum is constant behind a norm
            found = torch.autograd.grad(total, leaves)[0]
    except (RuntimeError, NotImplementedError):
        return None
    finally:
        handle.remove()
    return bool(found[:, -1].any()) if found.any() else None


@torch.no_grad()
def positions_of(model: Any) -> int | None:
    """Returns the longest row that a model's tables of positions allow, also of one whose weights are not there."""
    with _Tables(vocabulary_of(model)) as tables, suppress(RuntimeError):  # what takes values cannot run without
        _output(model, plain_ids(model)[:, :-1])
    return tables.limit


def depended_on(model: Any, names: Iterable[str]) -> list[str]:
    """Returns which of a model's tensors bear on what it makes of text, in order.

    What has no gradient from the output does not (a pooler), unless its values move the output all the same, as those
    that only choose an expert; nor does a part that does not run (an image tower), but one expert of a list may run
    for other tokens. Where no gradient can be had, all do.
    """
    tensors, ran = dict(model.named_parameters()), set[str]()
    asked = {name: tensors[name].requires_grad_() for name in sorted(names) if name in tensors}
    hooks = [m.register_forward_hook(lambda *_, path=path: ran.add(path)) for path, m in model.named_modules()]
    try:
        with torch.enable_grad():
            made = _output(model, plain_ids(model)[:, :-1])[1]
            if made.requires_grad:
                made.float().sum().backward()
    except (RuntimeError, NotImplementedError):
        return sorted(names)
    finally:
        for hook in hooks:
            hook.remove()
    idle = {name for name, tensor in asked.items() if tensor.grad is None and not _one_of_a_list(name, ran)}
    for tensor in asked.values():
        tensor.grad = None
        tensor.requires_grad_(False)
    near = {name for name in idle if not ran.isdisjoint((name.rpartition(".")[0], name.rsplit(".", 2)[0]))}
    return sorted(set(names) - {name for name in idle if name not in near or not _moves(model, asked[name])})


@torch.no_grad()
def _moves(model: Any, tensor: Tensor) -> bool:
    """Whether a model makes something else of a few tokens when one of its tensors has other values."""
    ids, kept = plain_ids(model)[:, :-1], tensor.clone()
    was = _output(model, ids)[1]
    tensor.copy_(torch.linspace(100, -100, tensor.numel()).reshape(tensor.shape))
    now = _output(model, ids)[1]
    tensor.copy_(kept)
    return not torch.equal(was, now)


def _one_of_a_list(name: str, ran: set[str]) -> bool:
    """Whether the outermost module around a tensor in which nothing ran is a member of a list."""
    parts = name.split(".")[:-1]
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    quiet = [part for part, path in zip(parts, paths, strict=True) if not any(_within(p, path) for p in ran)]
    return bool(quiet) and quiet[0].isdecimal()


def _within(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.")


def _output(model: Any, ids: Int[Tensor, "1 n"]) -> tuple[bool, Float[Tensor, "1 n _d"]]:
    """Returns what a model makes of each token, and whether that is the scores of a head."""
    head = model.get_output_embeddings() is not None
    found = reader_of(model)(**inputs_of(ids, None if head else torch.ones_like(ids)))
    logits = getattr(found, "logits", None)
    made = found[0] if logits is None else logits
    if not isinstance(made, Tensor) or made.shape[:2] != ids.shape:
        raise ValueError("it does not make a vector of each token")
    return logits is not None, made


def plain_ids(model: Any, n: int = TOKENS + 1) -> Int[Tensor, "1 n"]:
    """Returns a few token ids, descending, to which the config gives no meaning: no padding, no place of an image.

    Their embeddings are apart, as those of rows that a vocabulary was padded or resized with are not: of these the one
    may be changed for the other, and nothing moves. They repeat where there are too few.
    """
    said = model.config.to_dict()
    flat = [*said.items(), *(item for part in said.values() if isinstance(part, dict) for item in part.items())]
    taken = {value for name, value in flat if str(name).endswith(("_id", "_index")) and isinstance(value, int)}
    free = [number for number in range(vocabulary_of(model) * 2 // 3, -1, -1) if number not in taken]
    ids = (_apart(model, free[:: len(free) // TRIED + 1], n) * n)[:n]
    return torch.tensor([ids], device=input_device(model))


def _apart(model: Any, ids: list[int], most: int) -> list[int]:
    """Returns the first of some token ids whose embeddings differ by a tenth from one another."""
    embeddings, found = model.get_input_embeddings(), list[int]()
    with present(embeddings):
        table = embeddings.weight
    for number in ids:
        row = table[number]
        if isinstance(table, FakeTensor) or all((row - table[m]).norm() > 0.1 * row.norm() for m in found):
            found.append(number)
        if len(found) == most:
            break
    return found


class _Tables(TorchDispatchMode):
    """Watches a pass of one row: a table of which consecutive rows are read, one a token, is one of positions."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.limit: int | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ROWS_READ and len(args) > ROWS_READ[func]:
            rows = args[ROWS_READ[func]]
            dim = 0 if func in (torch.ops.aten.embedding.default, torch.ops.aten.index.Tensor) else args[1]
            rows = rows[0] if isinstance(rows, list | tuple) else rows
            if func == torch.ops.aten.embedding.default and rows.numel() == rows.shape[-1] > TOKENS:
                rows = rows.flatten()[:TOKENS]  # of a row that a model pads to a multiple of its window
            self._look(args[0], dim, rows)
        return func(*args, **(kwargs or {}))

    def _look(self, table: Tensor, dim: int, rows: Tensor | None) -> None:
        if rows is None or rows.is_floating_point() or rows.dtype == torch.bool or rows.numel() % TOKENS:
            return
        first, size = 0, table.shape[dim]
        if size <= 2 * TOKENS or not rows.numel():  # no table: something of the tokens, or of their distances
            return
        if isinstance(rows, FakeTensor):  # which rows is not known
            if rows.numel() != TOKENS or table.dim() != 2 or size == self.vocabulary:
                return
        else:
            places = rows.reshape(TOKENS, -1)
            first = int(places[0, 0])
            if not torch.equal(places, torch.arange(first, first + TOKENS).to(places)[:, None].expand_as(places)):
                return
        self.limit = min(self.limit or size, size - first)
