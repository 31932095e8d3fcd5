"""Where TransformerLens' names are in a model: measured in a pass over a few tokens, not guessed from module names."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from sae.lm.calls import TOKENS, Call, is_hollow, probe
from sae.lm.guesses import guessed_layers, guessed_places
from sae.lm.layer import NAMES, Layer, Place, Unserved, off, tolerance
from sae.lm.probing import reader_of


@dataclass(frozen=True)
class ResidualStream:
    """The places of a model's residual stream."""

    layers: tuple[str, ...]
    """Paths of its layers: the one list of modules of which each is given what the one before it made."""
    unlayered: str
    """Why there are none."""
    places: dict[tuple[int, str], Place | str]
    """By layer and name: the place, or why there is none."""
    embedding: Place | str
    """The same of "hook_embed": what a token alone adds to the stream."""


_measured: WeakKeyDictionary[nn.Module, ResidualStream] = WeakKeyDictionary()


def residual_of(model: nn.Module) -> ResidualStream:
    """Returns the places of a model's residual stream, measured once; ConfigError if it does not run on tokens alone.

    Kept by model and not by its configuration: what adds up with fresh weights may not with trained ones. Of a model
    without weights, the places that the names of its modules suggest.
    """
    if is_hollow(model):  # nothing to measure; what is estimated needs a place
        layers, embedding = guessed_layers(model), reader_of(model).get_input_embeddings()
        return ResidualStream(
            layers, "no list has many weights", guessed_places(model, layers), _path_of(model, embedding)
        )
    if model not in _measured:
        calls = probe(model)
        layers, unlayered = _layers(model, calls)
        places = {key: place for n, layer in enumerate(layers) for key, place in _places(model, n, layer, calls)}
        _measured[model] = ResidualStream(layers, unlayered, places, _embedding(calls, layers))
    return _measured[model]


def _path_of(model: nn.Module, module: nn.Module) -> Place:
    return next(path for path, other in model.named_modules() if other is module), "output"


def _places(
    model: nn.Module, number: int, layer: str, calls: dict[str, Call]
) -> Iterator[tuple[tuple[int, str], Place | str]]:
    measured = Layer(model, layer, calls)
    for name, place in NAMES.items():
        try:
            path, side = place(measured)
            if ("output" if side == "output" else "input") in calls[path].flat:
                raise Unserved(f"{path} holds it with rows and context as one axis; it cannot be read by token")
            yield (number, name), (path, side)
        except Unserved as reason:
            yield (number, name), str(reason)


def _layers(model: nn.Module, calls: dict[str, Call]) -> tuple[tuple[str, ...], str]:
    """Returns the outermost list of modules of which each is given what the last one made, or why there is none."""
    chains: list[tuple[str, ...]] = []
    repeated = ""
    for path, module in model.named_modules():
        chain = tuple(f"{path}.{n}" for n in range(len(module))) if isinstance(module, nn.ModuleList) else ()
        if any(path.startswith(f"{layer}.") for outer in chains for layer in outer):
            continue
        found = [calls[layer] for layer in chain if layer in calls]
        repeated = repeated or next((f"{path}.0 runs {c.runs} times" for c in found if c.runs > 1), "")
        streams = [(call.given, call.made) for call in found if call.runs == 1]
        if not chain or len(streams) < len(chain) or not all(map(_is_stream, streams)):
            continue
        pairs = itertools.pairwise(streams)
        if all(off(before[1], after[0]) <= tolerance(before[1]) for before, after in pairs):  # type: ignore[arg-type]
            chains.append(chain)
    chains = [chain for chain in chains if len(chain) > 1] or chains
    if len(chains) == 1:
        return chains[0], ""
    return (), ", ".join(chain[0].rpartition(".")[0] for chain in chains) or repeated or "none was found"


def _is_stream(ends: tuple[Tensor | None, Tensor | None]) -> bool:
    given, made = ends
    return given is not None and made is not None and given.shape == made.shape


def _embedding(calls: dict[str, Call], layers: tuple[str, ...]) -> Place | str:
    """Returns the place of what a token alone adds to the stream, beside which positions may add something."""
    pre = calls[layers[0]].given if layers else None
    for path, call in calls.items():
        made = call.made
        if pre is None or path.startswith(layers[0]):
            break
        if made is None or made.shape != pre.shape or call.runs > 1:
            continue
        rest = pre - made
        of_tokens = all(off(each, each[:1]) <= tolerance(made) for each in (made[t == TOKENS] for t in TOKENS.unique()))
        if of_tokens and off(made + rest[:1], pre) <= tolerance(made):
            return path, "output"
    return "no module makes what a token alone adds to the stream; write the module path"
