"""Where a model's weights are: on one device, or spread by accelerate over several, CPU memory and disk.

What is spread has hooks of accelerate's that bring weights and inputs together when a module runs. Between runs the
weights of an offloaded module are not there, so whoever looks at them does so here.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HOOK = "_hf_hook"
OWN = (HOOK, "_old_forward", "forward")
"""What accelerate puts on a module."""


def input_device(model: Any) -> torch.device:
    """Returns where a model's inputs go: to its first weights or, of one that is spread, where its embeddings run."""
    if getattr(model, "hf_device_map", None):
        embeddings = model.get_input_embeddings()
        said = getattr(getattr(embeddings, HOOK, None), "execution_device", None)
        return next(embeddings.parameters()).device if said is None else torch.device(said)
    return next(model.parameters()).device


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """While open, a module's own weights are there, on the device on which it runs."""
    if hasattr(module, HOOK):
        from accelerate.utils import align_module_device

        with align_module_device(module):
            yield
    else:
        yield


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields every weight of a model by name, one at a time from where it is kept, tied ones once."""
    tied: Any = getattr(model, "all_tied_weights_keys", None) or {}
    for name, weight in model.named_parameters():
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        if not weight.is_meta or not hasattr(module, HOOK):
            yield name, weight
        elif name not in tied:
            with present(module):
                yield name, module.get_parameter(own)


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
