"""Activations stored ahead of a run: by one process, or by many jobs of which each makes a shard of its own."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae.base import parts
from sae.base.arguments import wrong
from sae.base.errors import ConfigError, Stopped
from sae.base.files import FolderLock, cache_dir
from sae.base.parts import Part
from sae.base.paths import check_writable
from sae.base.progress import Display, Watch
from sae.base.units import data_size
from sae.lm.files import loading_bars
from sae.parallel.launch import launch
from sae.parallel.stopping import StopFlag, stop_flag
from sae.stream.sources import ACTIVATIONS
from sae.training import checkpoint
from sae.training.arguments import as_config, with_model
from sae.training.config import STORING, TrainConfig
from sae.training.estimate import token_bytes
from sae.training.planning import plan_run
from sae.training.preparing import Models, load_models, of_text, pinned
from sae.training.subject import Place

if TYPE_CHECKING:
    from sae.lm.models import LanguageModel, ModelLike, TokenizerLike

log = logging.getLogger(__name__)
LOCKS = ".locks"


def store_activations(
    config: TrainConfig | dict[str, Any] | Path | str,
    shard: tuple[int, int] = (1, 1),
    trust_remote_code: bool = False,
    repair: bool = False,
    *,
    model: "ModelLike | None" = None,
    tokenizer: "TokenizerLike | None" = None,
    progress: Display = True,
) -> Path:
    """Stores the activations that a run with `activations.source` disk reads, trains nothing, and returns the folder.

    With `shard` (i, n), the i-th of n equal parts, counted from 1: the jobs of an array fill one folder, or several
    that are then copied into one. The run that reads it refuses a store of which a shard is missing. What is there is
    kept, so the same call goes on after a stop; with `repair`, what is damaged of the shard is made again. Of several
    ranks each makes a shard of its own. The other arguments are those of `sae.train`.

    Raises ConfigError for what cannot be, before long work starts; Stopped after a signal.
    """
    if not (isinstance(shard, tuple) and len(shard) == 2):
        raise wrong("shard", shard, "(i, n): the i-th of n parts")
    part, found = Part.parse(f"{shard[0]}/{shard[1]}"), launch()
    own = part.among(found.rank, found.world_size)
    config, watch = as_config(config), Watch(repair=repair, display=progress)
    config.validate()
    check_storing(config)
    with loading_bars(shown=progress is True):
        config, given = with_model(config, model, tokenizer, trust_remote_code)
    config = checkpoint.placed_config(config)
    with torch.inference_mode(False), torch.enable_grad(), stop_flag() as stop:
        check_writable(cache_dir(), "SAE_CACHE")
        watch = replace(watch, should_stop=stop)
        models = _loaded(config, trust_remote_code, given, stop, progress)
        config = pinned(config, models[0])
        places = of_text(config, models, plan_run(config, *models)[0], watch).places(config)
        folder = places[0].folder
        with _held(folder, own):
            with FolderLock(folder / LOCKS, watch):  # one at a time begins the store
                begun = [_Begun(place, own) for place in places]
            try:
                for store in reversed(begun):  # what is held out first: it is little
                    store.fill(watch)
            except Stopped as stopped:
                raise Stopped(f"{stopped}; what is stored is kept, and the same command goes on") from None
        done = parts.parts_in(folder)[0]
        log.info("shard %s is complete, as are %d of %d in all, in %s", own, len(done), own.of, folder)
        return folder


def check_storing(config: TrainConfig) -> None:
    """Raises ConfigError unless a config is of a run that reads activations that were stored for it."""
    source = config.activations.source
    if source not in STORING:
        raise ConfigError(f"activations.source: {source} has nothing to store; set it to disk")


def size_told(config: TrainConfig, widths: dict[str, int], part: Part) -> str:
    """Returns how much is stored to train on, in all and in one shard, if the text is as long as is wanted."""
    tokens = config.max_text_tokens
    size = tokens * token_bytes(config, widths)
    return (
        f"store        {tokens:,} tokens, {data_size(size)} in all; in shard {part} {tokens // part.of:,} tokens, "
        f"{data_size(size / part.of)}"
    )


def _loaded(
    config: TrainConfig, trust_remote_code: bool, given: "LanguageModel | None", stop: StopFlag, progress: Display
) -> Models:
    try:
        with stop.lifted(), loading_bars(shown=progress is True):
            return load_models(config, trust_remote_code, given)
    except KeyboardInterrupt:  # so that a scheduler starts it again
        raise Stopped("while the model was loaded; the same command goes on") from None


@contextmanager
def _held(folder: Path, part: Part) -> Iterator[None]:
    """Keeps others from making the same shard."""
    with ExitStack() as held:
        try:
            held.enter_context(FolderLock(folder / LOCKS / part.name))
        except ConfigError as error:
            raise ConfigError(f"{parts.OPTION}: {part}: {error}") from error
        yield


class _Begun:
    """A shard of the blocks in a place."""

    def __init__(self, place: Place, part: Part) -> None:
        self.place, self.part, self.source = place, part, place.opened(part.name)
        self.doubtful = parts.begin(place.folder, ACTIVATIONS, part, len(self.source))

    def fill(self, watch: Watch) -> None:
        """Makes what is missing of it, and marks it as complete."""
        own = self.part.shards(len(self.source))
        if self.doubtful or watch.repair:
            self.place.remove_damaged(own)
            self.source.reload()
        self.source.fill(own, watch)
        parts.complete(self.place.folder, ACTIVATIONS, self.part, len(self.source))
