"""A model of which a part lies on a second device, the pretended one, joined by hooks of accelerate's."""

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import find_device, send_to_device
from rigs.pretended import DEVICE
from torch import nn

PARTS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")


class Bringing(ModelHook):
    """Brings what a module is given to a device and, of the whole model, what it makes back to where that came from."""

    def __init__(self, device, back: bool = False) -> None:
        self.execution_device, self.back = device, back

    def pre_forward(self, module, *args, **kwargs):
        self.came_from = find_device([args, kwargs])
        return tuple(self._brought((args, kwargs)))

    def post_forward(self, module, output):
        return send_to_device(output, self.came_from) if self.back else output

    def _brought(self, given):
        return (send_to_device(each, self.execution_device, skip_keys="past_key_values") for each in given)


def spread_over_two(model: nn.Module, away: tuple[str, ...]) -> None:
    """Puts parts of a Llama on the second device, the others stay; all within a block in which there is one."""
    first = DEVICE if PARTS[0] in away else torch.device("cpu")
    add_hook_to_module(model, Bringing(first, back=True))
    for part in PARTS:
        device = DEVICE if part in away else torch.device("cpu")
        for module in model.get_submodule(part).to(device).modules():
            add_hook_to_module(module, Bringing(device))
    model.hf_device_map = {part: DEVICE if part in away else "cpu" for part in PARTS}
