"""What is needed to ask the model about a run: its coder and language model, and what is explained of it so far."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

from interp.run.preparing import load_coder
from interp.run.rundir import coder_digest, digest_in, explained_folders, run_folder, saved_config
from interp.view.explained import ExplainedRun
from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.lm.models import LanguageModel, ModelConfig, load_language_model
from sae.loading import hub
from sae.steering.strengths import Largest


@dataclass
class Opened:
    """A run that the model can be asked about."""

    coder: SparseCoder
    run: ExplainedRun | None
    """What is explained; None where nothing is yet."""
    hint: str
    """What would label its latents, where nothing is explained."""
    load: Callable[[], LanguageModel] = field(repr=False)

    @cached_property
    def lm(self) -> LanguageModel:
        """Returns the language model, loaded when first asked for: what is wrong with a question is told before. The
        coder is on its device from then on.
        """
        lm = self.load()
        self.coder.to(lm.device)
        return lm

    def largest(self, latents: Iterable[int]) -> Largest:
        """Returns the largest activations of latents, as far as the run keeps them, for strengths in units of them."""
        known = self.run.largest(set(latents)) if self.run else {}
        return Largest(known, f"in the evidence of {self.run.run_dir}" if self.run else "")


def open_run(path: Path | str, model: str = "", device: str = "auto", trust_remote_code: bool = False) -> Opened:
    """Returns coder and labels of a run, and what loads its language model.

    Args:
        path: an explained run, the folder of its coder or of the run that trained that, or whatever else `sae.load`
            takes.
        model: the language model, in place of the one that the run or the coder names.
        device: where both go, as in `ModelConfig`.
        trust_remote_code: whether the model may run code that it ships.

    Raises ConfigError in one line if there is no coder or several, it names no model, or it is not the explained one;
    DataError if what is explained is of a newer version.
    """
    there = Path(path).expanduser()
    if not there.is_dir() or not explained_folders(there):
        coder = hub.load(str(path))
        load = _load(coder, ModelConfig(""), model, device, trust_remote_code)
        return Opened(coder, None, f"sae-explain {path} labels latents", load)
    run = ExplainedRun(run_folder(there))
    if not run.known:
        raise ConfigError(f"RUN: {run.run_dir} is an imported run, which names no coder; give the folder of the coder")
    config = saved_config(run.run_dir)
    if config.coder.baseline != "none":
        raise ConfigError(f"RUN: {run.run_dir} is of a baseline, {config.coder.baseline}; give the run of a coder")
    known = digest_in(run.run_dir)
    if known and known != coder_digest(load_coder(config, lazy=True)):
        raise ConfigError(
            f"RUN: {config.coder.path} has other weights than the coder that {run.run_dir} is of; explain it again "
            "in another folder: sae-explain --run-dir"
        )
    _ = run.journals  # rows of another version are told of before a model is loaded
    coder = load_coder(config)
    return Opened(coder, run, "", _load(coder, config.model, model, device, trust_remote_code))


def _load(
    coder: SparseCoder, said: ModelConfig, model: str, device: str, trust_remote_code: bool
) -> Callable[[], LanguageModel]:
    """Returns what loads the language model that was named, else that of the run, else that of the coder."""
    if not coder.spec.is_placed:
        raise ConfigError("coder: it names no site to read; load it with sae.load(..., site=...)")
    site = coder.spec.reads[0]
    if model:
        said = replace(said, name=model, revision=None)
    elif not said.name:
        if not site.model:
            raise ConfigError("--model: the coder does not say which language model it reads; name it")
        said = replace(said, name=site.model, revision=site.revision)
    if device != "auto":
        said = replace(said, device=device)
    return partial(_loaded, said, trust_remote_code)


def _loaded(said: ModelConfig, trust_remote_code: bool) -> LanguageModel:
    try:
        return load_language_model(**vars(said), trust_remote_code=trust_remote_code)
    except ConfigError as error:
        told = str(error).replace("model.name", "--model", 1).replace("model.device", "--device", 1)
        raise ConfigError(told) from None
