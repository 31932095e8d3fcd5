"""`model.kwargs`: what transformers' `from_pretrained` is given beside what a config has fields of its own for."""

import re
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from sae.base.errors import ConfigError, nearest
from sae.base.settings import shown
from sae.lm.devices import DEVICE, MAPS, spread

FIELD = "model.kwargs"
IMPLEMENTATION = re.compile(r"\w+")  # "owner/name" is code on the hub, which would be fetched and run
CHANGING = ("attn_implementation", "quantization_config")
"""Those that change what the model computes."""
ELSEWHERE = {
    "revision": "model.revision says it",
    "device": "model.device says it",
    "trust_remote_code": "code of a model's own runs only if you type --trust-remote-code",
    "token": "a config is kept on disk; log in with `hf auth login`, or set HF_TOKEN",
    "use_safetensors": "weights are read from safetensors alone, as a pickle runs what its writer likes",
    "weights_only": "weights are read from safetensors alone, as a pickle runs what its writer likes",
    "cache_dir": "HF_HOME says it",
    "local_files_only": "HF_HUB_OFFLINE=1 says it",
    "subfolder": "download it, and name the folder",
    "gguf_file": "name the .gguf file as model.name",
    "use_kernels": "kernels are code on the hub, which would be fetched and run",
}


def plain(value: Any) -> Any:
    """Returns a value as a config file can hold it: a dtype, device, path or config of quantization by what it says."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device | Path):
        return str(value)
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return plain(value.to_dict()) if hasattr(value, "to_dict") else value


def _is_map(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(isinstance(path, str) and _is_device(device) for path, device in value.items())
    return value in MAPS or _is_device(value)


def _is_device(value: Any) -> bool:
    return _is_number(value) or (isinstance(value, str) and DEVICE.fullmatch(value) is not None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_memory(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(_is_place(key) and _is_size(value[key]) for key in value)


def _is_place(key: Any) -> bool:
    return _is_device(key) or (isinstance(key, str) and key.isdecimal())


def _is_size(size: Any) -> bool:
    return _is_number(size) or (isinstance(size, str) and re.fullmatch(r"[\d.]+ ?[KMGT]i?B", size) is not None)


def _is_implementation(value: Any) -> bool:
    found = value.values() if isinstance(value, dict) else [value]
    return all(isinstance(name, str) and IMPLEMENTATION.fullmatch(name) for name in found)


KNOWN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "device_map": (_is_map, f"one of {', '.join(MAPS)}, a device, or a mapping of modules to devices, cpu or disk"),
    "max_memory": (_is_memory, "a mapping of devices to sizes, such as {0: 20GiB, cpu: 60GiB}"),
    "offload_folder": (lambda value: isinstance(value, str) and bool(value), "a folder"),
    "offload_buffers": (lambda value: isinstance(value, bool), "true or false"),
    "quantization_config": (
        lambda value: isinstance(value, dict) and bool(value),
        "a mapping, such as {load_in_4bit: true, bnb_4bit_quant_type: nf4}",
    ),
    "attn_implementation": (_is_implementation, "a name, such as eager, sdpa or flash_attention_2, and no hub id"),
    "dtype": (lambda value: isinstance(value, str), "a name, such as bfloat16"),
    "variant": (lambda value: isinstance(value, str) and bool(value), "a name, such as fp16"),
}
"""Of each: whether a value is one, and what it may be."""
KNOWN["torch_dtype"] = KNOWN["dtype"]  # as older versions call it


def check(kwargs: Mapping[str, Any], dtype: str, device: str) -> None:
    """Raises ConfigError for an argument that is not taken, says otherwise than a field, or has no such value."""
    for name, value in kwargs.items():
        if name in ELSEWHERE:
            raise ConfigError(f"{FIELD}.{name}: {ELSEWHERE[name]}")
        if name not in KNOWN:
            allowed = ", ".join(KNOWN)
            raise ConfigError(f"{FIELD}.{name}: no such argument.{nearest(name, KNOWN)} Allowed: {allowed}")
        fits, wanted = KNOWN[name]
        if not fits(value):
            raise ConfigError(f"{FIELD}.{name}: {shown(value)} is not {wanted}")
        if name in ("dtype", "torch_dtype") and value != dtype:
            raise ConfigError(f"{FIELD}.{name}: {value}, but model.dtype is {dtype}; say it there alone")
    if "device_map" in kwargs and device != "auto":
        raise ConfigError(f"{FIELD}.device_map: model.device is {device}; say one of them")
    for name in ("max_memory", "offload_folder", "offload_buffers"):
        if name in kwargs and "device_map" not in kwargs:
            raise ConfigError(f"{FIELD}.{name}: it is for a device_map; say that too, such as auto")
    places = kwargs.get("device_map")
    if isinstance(places, dict) and len(places) > 1 and "" in places and "disk" in places.values():
        raise ConfigError(f"{FIELD}.device_map: '' names all of the model; where weights go to disk, name its parts")


def ready(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `from_pretrained` takes: configs of quantization as transformers' own, devices of this rank."""
    found = {name: value for name, value in kwargs.items() if name not in ("dtype", "torch_dtype")}
    if "quantization_config" in found:
        from transformers.quantizers.auto import AutoQuantizationConfig

        try:
            found["quantization_config"] = AutoQuantizationConfig.from_dict(dict(found["quantization_config"]))
        except Exception as error:  # a package that is not there, or values that do not go together
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{FIELD}.quantization_config: {reason}") from error
    return spread(found) if "device_map" in found else found
