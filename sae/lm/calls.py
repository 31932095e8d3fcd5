"""A pass over a few tokens: what every module of a model was given and what it made, and how often it ran."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sae.base.errors import ConfigError
from sae.lm.models import ONE_AT_A_TIME
from sae.lm.probing import plain_ids, reader_of

TOKENS = torch.tensor([[0, 1, 2, 0, 3, 4], [2, 1, 3, 4, 0, 2]])
"""The pass: the same token at several places, and other tokens at the same place."""
STREAMS = ("hidden_states", "x", "input", "inputs", "hidden_state")
"""What models call the tensor that a module is given."""

probed: set[int] = set()
"""Ids of the models that are being probed: whoever has hooks on one takes no notice of the pass."""


@dataclass
class Call:
    """What one module did in a pass."""

    runs: int = 0
    given: Tensor | None = None
    """Its first tensor argument, as a copy [rows, context, width] on the CPU, where it is a vector per token."""
    made: Tensor | None = None
    """Its first result, likewise."""
    flat: tuple[str, ...] = ()
    """The sides ("input", "output") on which the model holds rows and context as one axis."""


def key_of_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str | None:
    """Returns where a module's input stands among its arguments: 0, a keyword, or None if it has none."""
    return 0 if args else next((key for key in STREAMS if key in kwargs), None)


def first(result: Any) -> Any:
    """Returns the first member of a tuple or list, and anything else as it is."""
    return result[0] if isinstance(result, (tuple, list)) and result else result


def is_hollow(model: nn.Module) -> bool:
    """Returns whether a model has shapes and no weights, so that nothing can be measured on it."""
    return isinstance(next(model.parameters(), None), FakeTensor)


@torch.no_grad()
def probe(model: nn.Module, keep: bool = True) -> dict[str, Call]:
    """Returns what the modules did by path, in the order in which they finished; those that did not run are left out.

    With `keep` copies of their tensors, else how often they ran alone. ConfigError if the pass fails.
    """
    calls: dict[str, Call] = {}
    begun: dict[str, Call] = {}
    copies: dict[tuple[torch.Size, torch.dtype, bytes], Tensor] = {}

    def copied(call: Call, side: str, x: Any) -> Tensor | None:
        """Returns a copy, the same for equal tensors: modules may change what they are given, or pass it on."""
        if not (keep and isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1):
            return None
        if x.dim() == 2 and len(x) == TOKENS.numel():
            call.flat += (side,)
            x = x.unflatten(0, TOKENS.shape)
        if x.dim() < 3 or x.shape[:2] != TOKENS.shape:
            return None
        copy = x.detach().to("cpu", copy=True).flatten(2).contiguous()
        return copies.setdefault((copy.shape, copy.dtype, copy.view(torch.uint8).numpy().tobytes()), copy)

    def before(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = begun.setdefault(path, Call())
        call.runs += 1
        key = key_of_input(args, kwargs)
        call.given = None if key is None else copied(call, "input", args[key] if isinstance(key, int) else kwargs[key])

    def after(path: str, result: Any) -> None:
        call = calls[path] = begun[path]
        call.made = copied(call, "output", first(result))

    handles = []
    with ONE_AT_A_TIME:
        probed.add(id(model))
        try:
            for path, module in model.named_modules():
                handles += [
                    module.register_forward_pre_hook(lambda _, a, k, path=path: before(path, a, k), with_kwargs=True),
                    module.register_forward_hook(lambda _, a, out, path=path: after(path, out)),
                ]
            reader_of(model)(**_inputs(model))
        except Exception as error:  # anything that a model's own code may raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
            raise ConfigError(f"a pass over a few tokens fails ({reason})") from error
        finally:
            probed.discard(id(model))
            for handle in handles:
                handle.remove()
    return calls


def _inputs(model: Any) -> dict[str, Any]:
    kinds = int(TOKENS.max()) + 1
    ids = plain_ids(model, kinds)[0] if hasattr(model, "get_input_embeddings") else torch.arange(kinds)
    known = inspect.signature(reader_of(model).forward).parameters
    return {"input_ids": ids[TOKENS.to(ids.device)]} | ({"use_cache": False} if "use_cache" in known else {})


_runs: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, int]] = WeakKeyDictionary()


def runs_of(model: nn.Module) -> WeakKeyDictionary[nn.Module, int]:
    """Returns how often each module of a model runs in a pass, counted once; nothing of a model without weights.

    ConfigError if the pass fails: then nobody knows which modules are safe to read.
    """
    if is_hollow(model):
        return WeakKeyDictionary()
    if model not in _runs:
        calls = probe(model, keep=False)
        _runs[model] = WeakKeyDictionary({model.get_submodule(path): call.runs for path, call in calls.items()})
    return _runs[model]
