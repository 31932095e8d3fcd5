"""Where a language model's files are: a hub id, a local folder, a .gguf file or the embedded quickstart model."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae.assets import QUICKSTART_LM
from sae.base.errors import ConfigError
from sae.base.files import cache_dir, publish, sha256_file
from sae.base.network import hub_or_cache
from sae.base.paths import near
from sae.base.progress import watched
from sae.lm import weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

NAMELESS = "object:"
"""What the name of a model begins with that was given as an object and says no name."""


def commit_of(name: str, revision: str | None = None) -> str | None:
    """Returns the commit of a hub model that has been loaded, or None: its cached files lie below it."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


def load_tokenizer(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """Returns the model's tokenizer."""
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    folder = local_folder(name)
    with readable_errors(name):
        if not trust_remote_code:
            _refuse_code(name, get_tokenizer_config(folder or name, revision=None if folder else revision))
        return AutoTokenizer.from_pretrained(
            folder or name, revision=None if folder else revision, trust_remote_code=trust_remote_code
        )


def load_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> "PretrainedConfig":
    """Returns the model's configuration without loading weights; refuses a model that wants to run its own code."""
    from transformers import AutoConfig, PretrainedConfig

    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file() and not _converted_folder(path).is_dir():
        with readable_errors(name):  # the header says it; converting is for when the weights are wanted
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    folder = local_folder(name)
    with readable_errors(name):
        raw, _ = PretrainedConfig.get_config_dict(folder or name, revision=None if folder else revision)
        if not trust_remote_code:
            _refuse_code(name, raw)
        return AutoConfig.from_pretrained(
            folder or name, revision=None if folder else revision, trust_remote_code=trust_remote_code
        )


def _refuse_code(name: str, raw: dict[str, Any]) -> None:
    if raw.get("auto_map"):
        raise ConfigError(
            f"model.name: {name!r} ships its own code ({', '.join(sorted(raw['auto_map']))}), which would run on "
            "this machine; read it, then type --trust-remote-code"
        )


def local_folder(name: str) -> Path | None:
    """Returns the folder that holds model `name`, or None for a hub id. A .gguf file is converted once and cached."""
    if name == "quickstart":
        return QUICKSTART_LM
    if name.startswith(NAMELESS):
        kind = name.removeprefix(NAMELESS)
        raise ConfigError(f"model.name: this was a loaded {kind} that has no name; pass it again, as an object")
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"model.name: no such file: {name}")
        return _converted(path)
    if path.is_file():
        raise ConfigError(f"model.name: {name} is a file; name the folder of a saved model, or a .gguf file")
    if path.is_dir():
        if (path / "adapter_config.json").is_file():  # which counts only where another package is installed
            raise ConfigError(
                f"model.name: the folder {name} holds an adapter; merge it into its model (peft: merge_and_unload) and "
                "name the folder where you save that"
            )
        if not (path / "config.json").is_file():
            raise ConfigError(f"model.name: the folder {name} holds no config.json, so it is no saved model")
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ConfigError(f"model.name: no such folder: {name}.{near(name)}")
    return None


def _converted(path: Path) -> Path:
    """Returns the folder of the dequantized float32 copy of a .gguf file, made at first use."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _converted_folder(path)
    if not folder.is_dir():
        with publish(folder) as draft, readable_errors(str(path)):
            options = {"gguf_file": path.name, "dtype": torch.float32}
            read, lacks = weights.read(AutoModelForCausalLM, str(path), str(path.parent), **options)
            weights.refuse_missing(str(path), lacks)
            if hasattr(read.config, "quantization_config"):  # or it counts as quantized, which cannot be saved
                delattr(read.config, "quantization_config")
            plain = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
            plain.load_state_dict(read.state_dict())
            plain.save_pretrained(draft)
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(draft)
    return folder


def _converted_folder(path: Path) -> Path:
    stat = path.stat()
    return cache_dir() / "models" / f"{path.stem}-{_file_digest(path, stat.st_size, stat.st_mtime_ns)[:16]}"


@lru_cache
def _file_digest(path: Path, _size: int, _mtime_ns: int) -> str:
    return sha256_file(path)


@contextmanager
def loading_bars(shown: bool = True) -> Iterator[None]:
    """Keeps the loaders' bars, of which a log would keep every state, to where they can be watched, and are wanted."""
    from transformers.utils import logging as bars

    hide = bars.is_progress_bar_enabled() and not (shown and watched())
    if hide:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            bars.enable_progress_bar()


@contextmanager
def readable_errors(name: str) -> Iterator[None]:
    """Turns the loaders' long errors into one line that names the model and the way out."""
    on_disk = name == "quickstart" or Path(name).expanduser().exists()
    try:
        with nullcontext() if on_disk else hub_or_cache(), loading_bars():
            yield
    except ConfigError:
        raise
    except Exception as error:  # files of strangers fail in many ways
        reason = " ".join(str(error).split())[:300]
        ways = "a hub id needs the network or a cached copy; a local folder or .gguf file needs neither"
        out = "" if on_disk else f" ({ways}){near(name)}"
        raise ConfigError(f"model.name: {name!r} could not be loaded: {reason}{out}") from error
