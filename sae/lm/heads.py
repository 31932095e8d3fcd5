"""Where a tensor is the concatenation of attention heads, and of how many: by the numbers of the module that has it."""

import re
from typing import Any

from torch import nn

OUT = ("o_proj", "out_proj", "c_proj", "dense", "o", "Wo", "wo", "out_lin", "output_projection")
WORD = re.compile(r"\b(attn|attention)s?\b", re.IGNORECASE)
COUNT = re.compile(r"^(?!.*(k|kv|key|value)_).*heads?$")  # num_heads, n_head, num_v_heads; not those of the keys
SIZE = re.compile(r"head\w*(dim|size)|(dim|size)\w*head|key_value_proj_dim")


def attention_in(model: nn.Module, path: str, below: str = "") -> str | None:
    """Returns the innermost module of attention on a path below another: it or its class is called so.

    "layers.0.self_attn" of "layers.0.self_attn.o_proj"; None where there is none.
    """
    parts = path.split(".")
    for n in range(len(parts), below.count(".") + 1 if below else 0, -1):
        inner = ".".join(parts[:n])
        called = f"{parts[n - 1]} {type(model.get_submodule(inner)).__name__}"
        if WORD.search(re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", called)):
            return inner
    return None


def heads_at(model: nn.Module, path: str, side: str) -> int | None:
    """Returns the number of heads that are concatenated in the input of attention's output projection, else None.

    By the numbers of the attention module itself, whose heads times width are the projection's: models may have
    several kinds of attention, and a wrapper's config is not its text model's.
    """
    above, _, last = path.rpartition(".")
    owner = attention_in(model, above) if side == "input" and last in OUT and above else None
    width = width_in(model.get_submodule(path)) if owner else None
    if owner is None or not width:
        return None
    parts = path.split(".")
    owners = [model.get_submodule(".".join(parts[:n])) for n in range(owner.count(".") + 1, len(parts))]
    owners += [child for module in owners for child in module.children()]  # BERT's numbers stand beside its projection
    for module in owners:
        numbers = {name: value for name, value in vars(module).items() if type(value) is int and value > 0}
        sizes = [value for name, value in numbers.items() if SIZE.search(name)]
        counts = [value for name, value in numbers.items() if COUNT.search(name)]
        if not counts and sizes:  # Llama's has but the size of a head
            counts = [getattr(getattr(module, "config", None), "num_attention_heads", 0)]
        for count in counts:
            if count and (any(count * size == width for size in sizes) or not (sizes or width % count)):
                return count
    return None


def width_in(linear: nn.Module) -> int | None:
    """Returns the width of what a linear map is given, GPT-2's `Conv1D` included; None for other modules."""
    width: Any = getattr(linear, "in_features", None)
    if width is None and hasattr(linear, "nf"):
        width = linear.get_parameter("weight").shape[0]
    return width if isinstance(width, int) else None
