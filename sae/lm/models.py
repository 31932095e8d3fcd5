"""The language model: a hub id, a local folder, a .gguf file or the embedded quickstart model."""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae.assets import QUICKSTART_LM
from sae.base.errors import ConfigError
from sae.base.files import cache_dir, publish, sha256_file
from sae.base.network import hub_or_cache
from sae.base.paths import near
from sae.base.progress import on_terminal
from sae.base.settings import choose
from sae.lm import probing, weights
from sae.text.tokenizing import special_ids, tokenizer_digest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelConfig:
    """The language model whose activations are read."""

    name: str = "quickstart"
    """"quickstart" (the model shipped with this package), a Hugging Face hub id, a folder, or a .gguf file."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: str = "auto"
    """Precision of the model: auto (float32 on CPU, the checkpoint's on GPU), float32, bfloat16 or float16."""
    device: str = "auto"
    """auto (a GPU if there is one, its own for each rank), cpu, cuda, or cuda:1 ..."""

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        choose("model.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))


ONE_AT_A_TIME = threading.RLock()
"""Held by whoever runs a language model: hooks belong to it and not to a thread, so that reading ahead must not meet an
evaluation."""


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model with its tokenizer, frozen and in evaluation mode."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    name: str
    revision: str | None
    is_causal: bool
    """Whether it predicts the next token, so that cross-entropy and splicing can be measured."""
    positions: int | None = None
    """The longest row that its table of positions allows; None where it has none."""

    @property
    def device(self) -> torch.device:
        """Returns where its inputs go."""
        return next(self.model.parameters()).device

    def check_context(self, length: int) -> None:
        """Raises ConfigError if the model cannot read rows of a length; warns where it was trained on shorter ones.

        Where only the config says so, and no table of positions, it is tried.
        """
        text, most = self.model.config.get_text_config(), self.positions or length
        names = ("max_position_embeddings", "max_seq_len", "max_encoder_position_embeddings")
        told = (getattr(text, name, None) for name in names)
        trained = next(filter(None, told), length)
        if length > trained and length <= most and self.tokenizer is not None:
            try:
                with torch.no_grad():
                    ids = probing.plain_ids(self.model, length)  # tokens of padding may have no positions
                    there = None if self.is_causal else torch.ones_like(ids)
                    probing.reader_of(self.model)(**probing.inputs_of(ids, there))
            except (RuntimeError, IndexError, ValueError):
                most = trained
        if length > most:
            raise ConfigError(
                f"text.context_length: {length} is more than {self.name} has positions for; at most {most} are allowed"
            )
        if length > trained:
            log.warning("text.context_length: %d is more than %s was trained on (%d)", length, self.name, trained)

    def source(self) -> dict[str, Any]:
        """Returns which model it is: name and revision."""
        return {"model": self.name, "revision": self.revision}

    def fingerprint(self) -> dict[str, Any]:
        """Returns what decides its activations: name, revision, precision, and hashes of config, weights, tokenizer."""
        weights = next(self.model.parameters())
        return {
            **self.source(),
            "config": _config_digest(self.model.config),
            "weights": _weights_digest(self.model),
            "dtype": str(weights.dtype).removeprefix("torch."),
            "tokenizer": tokenizer_digest(self.tokenizer),
        }


def _config_digest(config: "PretrainedConfig") -> str:
    """Returns a hash of what the model computes by; where it was loaded from, and by which version, does not count."""
    volatile = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    settings = {key: value for key, value in config.to_dict().items() if key not in volatile}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _weights_digest(model: "PreTrainedModel") -> str:
    """Returns a hash over a sample of every weight: other weights under the same name must not share a cache."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def resolve_device(device: str) -> torch.device:
    """Returns the torch device for "auto" or an explicit name; ConfigError if this machine lacks it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":  # one GPU per rank, as launchers number them
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        found = torch.device(device)
        torch.empty(0, dtype=torch.float64, device=found)  # statistics and metrics are summed in float64
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"model.device: {device!r} is not available here ({reason}); try cpu") from error
    return found


def load_language_model(
    name: str, revision: str | None = None, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> LanguageModel:
    """Returns the model called `name`, loaded for reading activations.

    Raises ConfigError in one line if it cannot be had: no such folder, a hub id that is not cached while offline, or a
    model that ships code of its own, which runs only if the user typed `--trust-remote-code`.
    """
    where = resolve_device(device)
    folder = local_folder(name)
    config = load_config(name, revision, trust_remote_code)
    tokenizer = load_tokenizer(name, revision, trust_remote_code)
    chosen: Any = DTYPES.get(dtype) or (torch.float32 if where.type == "cpu" else "auto")
    with _readable_errors(name):
        model, nature = weights.read_model(
            name,
            config,
            str(folder or name),
            where,
            revision=None if folder else revision,
            dtype=chosen,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    _check_vocabulary(name, model, tokenizer)
    commit = None if folder else commit_of(name, revision)
    return LanguageModel(model, tokenizer, name, commit or revision, nature.predicts, nature.positions)


def _check_vocabulary(name: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuses a tokenizer with tokens of which the model has no embedding; those that text never holds may be."""
    rows = probing.vocabulary_of(model)
    added: Any = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    unused = special_ids(tokenizer).difference(added)
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: -1 if item[1] in unused else item[1])
    if number >= rows:
        raise ConfigError(
            f"model.name: the model of {name!r} has embeddings of {rows} tokens, but its tokenizer gives {token!r} the "
            f"id {number}; they do not belong together"
        )


def untrained(model: ModelConfig, trust_remote_code: bool = False) -> LanguageModel:
    """Returns the architecture of a model with weights that mean nothing, for shapes; it has no tokenizer.

    Whether it predicts the next token is not known of it; the class that would be tried first is taken at its word.
    """
    config = load_config(model.name, model.revision, trust_remote_code)
    auto = weights.auto_classes(config)[0]
    with _readable_errors(model.name):
        made = auto.from_config(config, trust_remote_code=trust_remote_code).eval()
        positions = probing.positions_of(made)
    causal = auto.__name__ != weights.BASE
    return LanguageModel(made, None, model.name, model.revision, causal, positions)  # type: ignore[arg-type]


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
    with _readable_errors(name):
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
        with _readable_errors(name):  # the header says it; converting is for when the weights are wanted
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    folder = local_folder(name)
    with _readable_errors(name):
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
        with publish(folder) as draft, _readable_errors(str(path)):
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
def _bars_on_terminals() -> Iterator[None]:
    """Keeps the loaders' bars, of which a log would keep every state, to where they can be watched."""
    from transformers.utils import logging as bars

    hide = bars.is_progress_bar_enabled() and not on_terminal()
    if hide:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            bars.enable_progress_bar()


@contextmanager
def _readable_errors(name: str) -> Iterator[None]:
    """Turns the loaders' long errors into one line that names the model and the way out."""
    on_disk = name == "quickstart" or Path(name).expanduser().exists()
    try:
        with nullcontext() if on_disk else hub_or_cache(), _bars_on_terminals():
            yield
    except ConfigError:
        raise
    except Exception as error:  # files of strangers fail in many ways
        reason = " ".join(str(error).split())[:300]
        ways = "a hub id needs the network or a cached copy; a local folder or .gguf file needs neither"
        out = "" if on_disk else f" ({ways}){near(name)}"
        raise ConfigError(f"model.name: {name!r} could not be loaded: {reason}{out}") from error
