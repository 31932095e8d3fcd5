"""Where a model's weights are: on one device, or spread by accelerate over several, CPU memory and disk.

What is spread has hooks of accelerate's that bring weights and inputs together when a module runs. Between runs the
weights of an offloaded module are not there, so whoever looks at them does so here.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

HOOK = "_hf_hook"
OWN = (HOOK, "_old_forward", "forward")
"""What accelerate puts on a module."""
SCALES = ("absmax", "SCB")
"""What bitsandbytes calls that by which weights are scaled, in 4 and in 8 bits."""


def _hooks(module: nn.Module) -> list[Any]:
    """Returns accelerate's hooks on a module, those that it runs one after the other included."""
    found = [hook for hook in [getattr(module, HOOK, None)] if hook is not None]
    while any(hasattr(hook, "hooks") for hook in found):
        found = [inner for hook in found for inner in getattr(hook, "hooks", [hook])]
    return found


def _keepers(module: nn.Module) -> list[Any]:
    """Returns the hooks that take a module's weights away between runs."""
    return [hook for hook in _hooks(module) if getattr(hook, "offload", False)]


def input_device(model: Any) -> torch.device:
    """Returns where a model's inputs go: to its first weights or, of one that is spread, where its embeddings run."""
    if not _hooks(model):
        return next(model.parameters()).device
    embeddings = model.get_input_embeddings()
    said = (getattr(hook, "execution_device", None) for hook in (*_hooks(embeddings), *_hooks(model)))
    found = next((device for device in said if device is not None), None)
    return next(embeddings.parameters()).device if found is None else torch.device(found)


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """While open, a module's own weights are there, on the device on which it runs."""
    with ExitStack() as stack:
        for hook in _keepers(module):
            hook.pre_forward(module)
            stack.callback(hook.post_forward, module, None)
        yield


def put_away(model: nn.Module) -> None:
    """Takes away what a pass that did not run to its end has left there: the weights of modules it ended within."""
    if not _hooks(model):
        return
    for module in model.modules():
        for hook in _keepers(module):
            if any(not x.is_meta for x in module.parameters(recurse=hook.place_submodules)):
                hook.post_forward(module, None)


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields every weight of a model by name, one at a time from where it is kept, tied ones once.

    Of a model that is quantized also what its weights are scaled by, which is no parameter.
    """
    tied: Any = getattr(model, "all_tied_weights_keys", None) or {}
    for name, weight in model.named_parameters():
        keeper = _keeper(model, name) if weight.is_meta else None
        if keeper is None:
            yield from _parts(name, weight)
        elif name not in tied:
            with present(keeper):
                yield from _parts(name, model.get_parameter(name))
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        yield from _scales(model)


def bytes_by_device(model: nn.Module, places: Mapping[str, Any]) -> dict[str, int]:
    """Returns the bytes of a model's weights by the devices that a device map names; the innermost module counts."""
    found: dict[str, int] = {}
    for name, weight in model.named_parameters():
        path = name
        while path not in places and path:
            path = path.rpartition(".")[0]
        device = str(places[path])
        found[device] = found.get(device, 0) + weight.nbytes
    return found


def out_of_reach(model: nn.Module) -> bool:
    """Returns whether there is a weight that is not there, and that nothing brings when its module runs."""
    return any(weight.is_meta and _keeper(model, name) is None for name, weight in model.named_parameters())


def _keeper(model: nn.Module, name: str) -> nn.Module | None:
    """Returns the module that takes a weight away between runs: its own, or one around it, or none."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        if _keepers(model.get_submodule(path)):
            return model.get_submodule(path)
    return None


def _parts(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields a weight or, of one that is made of several tensors, as torchao's are, those."""
    if not is_traceable_wrapper_subclass(weight):
        yield name, weight
        return
    for own in weight.__tensor_flatten__()[0]:
        yield from _parts(f"{name}.{own}", getattr(weight, own))


def _scales(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the buffers of a quantized model that are saved, and what bitsandbytes keeps beside its weights.

    The model is not asked to save them: bitsandbytes changes its weights for that, on a CPU not back to what they were.
    """
    for path, module in model.named_modules():
        with present(module):
            for name, x in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    yield from _parts(f"{path}.{name}", x)
            weight = module._parameters.get("weight")
            for holder in (getattr(weight, "quant_state", None), weight, getattr(module, "state", None)):
                found = {name: getattr(holder, name, None) for name in SCALES}
                yield from ((f"{path}.{name}", x) for name, x in found.items() if isinstance(x, Tensor))


def without_hooks(module: nn.Module) -> nn.Module:
    """Returns a copy of a module, with its weights and without what accelerate put on it."""
    hooks = [getattr(part, HOOK) for part in module.modules() if hasattr(part, HOOK)]
    with present(module):
        made = copy.deepcopy(module, {id(hook): hook for hook in hooks})  # they may hold all weights of the model
    for part in made.modules():
        if HOOK in vars(part):
            for name in OWN:
                vars(part).pop(name, None)
    return made
