"""What a run reads: a language model over text, or stored activations. Either says what the run asks about it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import draccus
import torch

from sae.base import parts
from sae.base.errors import ConfigError, DataError
from sae.base.files import cache_dir, save_tensors
from sae.base.progress import Watch
from sae.base.store import HEADER, check_header, fingerprint_key, remove_damaged
from sae.lm.masking import MaskSpec
from sae.lm.models import DTYPES
from sae.parallel import agreement, ranks
from sae.parallel.ranks import Share
from sae.stream.drawn import Drawn, DrawnStream
from sae.stream.lanes import Stream
from sae.stream.rows import RowStream
from sae.stream.sources import ACTIVATIONS, Blocks, CachedSource, LiveSource, Reading, Source
from sae.stream.tensors import FIELD, GRADIENTS, HELD_OUT, Stored, TensorSource, cut, divided, stored_at
from sae.text.tokenizing import TokenizedText, TokenRows
from sae.training.config import STORING, TrainConfig

MAKE = f"--store-only {parts.OPTION}"


@dataclass(frozen=True)
class OfText:
    """A language model, or two, over text."""

    reading: Reading
    text: TokenizedText
    fingerprint: dict[str, Any]
    """What decides the activations; a run goes on with the same alone."""
    config: TrainConfig

    @property
    def device(self) -> torch.device:
        """Returns where coders are trained: where the model is."""
        return self.reading.lm.device

    @property
    def mask(self) -> MaskSpec:
        """Returns which tokens count, before norms are measured."""
        return self.reading.mask

    @property
    def described(self) -> dict[str, Any]:
        """Returns what the spec of a coder says of its data."""
        text = self.config.text
        training = {"text": draccus.encode(text)}
        if self.reading.lm.given:
            training["weights"] = {"": self.fingerprint["weights"]}
        return {"context_length": self.text.train.context_length, "bos": text.bos, "training": training}

    @property
    def measured_on(self) -> dict[str, Any]:
        """Returns, as arguments of `evaluate`, what is held out."""
        return {"lm": self.reading.lm, "rows": self.text.held_out, "second": self.reading.second}

    def sampled(self, source: Source, tokens: int) -> Source:
        """Returns the blocks that statistics are taken from."""
        return source

    def open_source(self, config: TrainConfig, watch: Watch) -> Source:
        """Returns the model's blocks, or those on disk; a folder that is named gets held-out ones too.

        What is made in shards must be whole: nothing of it is made here.
        """
        if config.activations.source == "live":
            return self._live(config, self.text.train)
        source, *apart = [_opened(place, watch) for place in self.places(config)]
        for held_out in apart:
            _fill(held_out, watch)
        if config.activations.source == "disk":
            _fill(source, watch)
        return source

    def places(self, config: TrainConfig) -> list["Place"]:
        """Returns where blocks are stored: those to train on and, in a folder that is named, held-out ones.

        ConfigError if that folder holds anything else.
        """
        settings = config.activations
        live = self._live(config, self.text.train)
        fingerprint = {
            **self.fingerprint,
            "sites": [site.name for site in self.reading.sites],
            "block_rows": settings.block_rows,
            "seed": config.seed,
            "kept_as": settings.dtype,
            "gradients": self.reading.loss,
            "special_ids": list(self.mask.special_ids),
            "skip_positions": self.mask.skip_positions,
        }
        if not settings.path:
            return [Place(live, cache_dir() / "activations" / fingerprint_key(fingerprint), fingerprint)]
        folder, fingerprint = Path(settings.path).expanduser(), fingerprint | {"blocks": len(live)}
        with agreement.together():
            if ranks.rank() == 0:
                _check_free(folder, fingerprint)
        apart = self._live(config, self.text.held_out)
        about = fingerprint | {"part": HELD_OUT, "blocks": len(apart)}
        return [Place(live, folder, fingerprint), Place(apart, folder / HELD_OUT, about)]

    def _live(self, config: TrainConfig, rows: TokenRows) -> LiveSource:
        return LiveSource(self.reading, Blocks(rows, config.activations.block_rows, config.seed))

    def open_stream(self, config: TrainConfig, source: Source, share: Share) -> Stream | RowStream:
        """Returns a share of single tokens of many rows, or of whole rows for losses that run the model."""
        if config.needs_rows:
            return RowStream(self.reading, self.text.train, config.batch_tokens, config.seed, share)
        return _stream(config, source, self.device, share)


@dataclass(frozen=True)
class OfTensors:
    """Stored activations, of which a part is held out."""

    label: str
    train: TensorSource
    held_out: TensorSource
    device: torch.device
    mask: MaskSpec
    fingerprint: dict[str, Any]
    described: dict[str, Any]

    @property
    def measured_on(self) -> dict[str, Any]:
        """Returns, as arguments of `evaluate`, what is held out."""
        return {"activations": self.held_out}

    def hold_out(self, folder: Path, begun: bool) -> None:
        """Does nothing: what is held out lies where it is."""

    def sampled(self, source: Source, tokens: int) -> Source:
        """Returns the blocks that statistics are taken from."""
        return source

    def open_source(self, config: TrainConfig, watch: Watch) -> Source:
        """Returns the part to train on."""
        return self.train

    def open_stream(self, config: TrainConfig, source: Source, share: Share) -> Stream:
        """Returns a share of single vectors of many blocks."""
        return _stream(config, source, self.device, share)

    def __str__(self) -> str:
        """Returns what there is, for people."""
        skipped = self.train.skip_positions if self.train.has_rows else 0
        less = f", less the first {skipped} of every row (activations.skip_positions)" if skipped else ""
        train, held_out = (f"{part.vectors:,}" for part in (self.train, self.held_out))
        return f"activations: {train} vectors to train on, {held_out} held out, of {self.label}{less}"


@dataclass
class OfIterator:
    """Activations as they are drawn, of which the first are held out, and kept in the run's folder."""

    drawn: Drawn
    names: list[str]
    device: torch.device
    mask: MaskSpec
    held_out_tokens: int
    held_out: TensorSource | None = None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Returns that the activations are drawn: whose they are is the caller's to know."""
        return {"data": "an iterator"}

    @property
    def described(self) -> dict[str, Any]:
        """Returns what the spec of a coder says of its data."""
        return {"training": {"tensors": {"source": "an iterator"}}}

    @property
    def measured_on(self) -> dict[str, Any]:
        """Returns, as arguments of `evaluate`, what is held out."""
        return {"activations": self.held_out}

    def hold_out(self, folder: Path, begun: bool) -> None:
        """Draws the first vectors, to be measured on, into the run's folder, where those of one that has begun are."""
        path = folder / f"{HELD_OUT}.safetensors"
        if not begun:
            blocks = self.drawn.take(self.held_out_tokens)
            joined = {name: torch.cat([b.activations[name] for b in blocks]) for name in blocks[0].activations}
            graded = {name: torch.cat([b.gradients[name] for b in blocks]) for name in blocks[0].gradients}
            save_tensors(path, joined | {f"{GRADIENTS}{name}": x for name, x in graded.items()})
        self.held_out = cut(stored_at(str(path)).shards, self.names, self.drawn.most, **self.drawn.how)

    def sampled(self, source: Source, tokens: int) -> Source:
        """Returns the blocks that statistics are taken from: the next ones, which are trained on as well."""
        return self.drawn.peek(tokens)

    def open_source(self, config: TrainConfig, watch: Watch) -> Source:
        """Returns what is drawn."""
        return self.drawn

    def open_stream(self, config: TrainConfig, source: Source, share: Share) -> Stream:
        """Returns single vectors of many blocks, all of them: one process draws them."""
        return DrawnStream(self.drawn, config.batch_tokens, config.seed, n_lanes=config.activations.lanes)

    def __str__(self) -> str:
        """Returns what there is, for people."""
        held_out = f"{self.held_out.vectors:,}" if self.held_out else "none"
        exact = "" if self.drawn.resumable else "; it has no state() and load_state(), so the run cannot be resumed"
        return f"activations: of an iterator, the first {held_out} vectors held out{exact}"


Subject = OfText | OfTensors | OfIterator


def drawn_from(config: TrainConfig, iterator: Any) -> Drawn:
    """Returns what an iterator gives, in blocks; ConfigError if it gives nothing, or if there are several ranks."""
    if ranks.world_size() > 1:
        raise ConfigError(
            f"activations: an iterator is drawn by one process, and there are {ranks.world_size()}; store what "
            "it gives as safetensors and name the folder"
        )
    settings = config.activations
    how = {
        "with_gradients": config.gradient_loss is not None,
        "dtype": DTYPES[settings.dtype],
        "skip_positions": settings.skip_positions,
    }
    most = min(settings.block_rows * config.text.context_length, max(1, config.tokens // (4 * settings.lanes)))
    return Drawn(iterator, settings.sites[0], most, **how)  # lanes hold no more than a quarter of what is trained on


def of_iterator(config: TrainConfig, drawn: Drawn, names: list[str], device: torch.device) -> OfIterator:
    """Returns what an iterator gives as what a run reads."""
    drawn.names = names
    mask = MaskSpec((), config.activations.skip_positions, next_token=config.gradient_loss is not None)
    cut([drawn.like], names, drawn.most, **drawn.how)  # refused before anything is written
    return OfIterator(drawn, names, device, mask, config.eval.tokens)


def of_tensors(config: TrainConfig, stored: Stored, names: list[str], device: torch.device) -> OfTensors:
    """Returns stored activations as what a run reads; ConfigError if they do not fit the config."""
    settings, about, loss = config.activations, stored.about, config.gradient_loss
    if loss and about.get("gradients", loss) != loss:
        raise ConfigError(f"{FIELD}: {stored.label} has gradients of {about['gradients']}, not of {loss}")
    most, share = settings.block_rows * config.text.context_length, config.text.held_out_share
    how = {"with_gradients": loss is not None, "dtype": DTYPES[settings.dtype]}
    train, held_out = divided(stored, names, most, share, settings.skip_positions, **how)
    if train.vectors < config.batch_tokens:
        there = f"the {train.vectors:,} vectors to train on in {stored.label}"
        raise ConfigError(f"batch_tokens: {config.batch_tokens} is more than {there}")
    tensors = {
        "source": stored.label,
        "fingerprint": stored.fingerprint,
        "block": most,
        "held_out_share": share,
        "skip_positions": settings.skip_positions,
    }
    skipped = about.get("skip_positions", settings.skip_positions)
    mask = MaskSpec(tuple(about.get("special_ids", ())), skipped, next_token=loss is not None)
    fingerprint = {"data": stored.fingerprint}
    return OfTensors(stored.label, train, held_out, device, mask, fingerprint, {"training": {"tensors": tensors}})


def _stream(config: TrainConfig, source: Source, device: torch.device, share: Share) -> Stream:
    settings = config.activations
    ahead = settings.blocks_ahead(device.type == "cpu", share)
    return Stream(source, config.batch_tokens, config.seed, ahead, share, settings.lanes)


@dataclass(frozen=True)
class Place:
    """Where the model's blocks are stored, or are to be."""

    live: LiveSource
    folder: Path
    fingerprint: dict[str, Any]

    def opened(self, part: str) -> CachedSource:
        """Returns them as they lie there."""
        return CachedSource(self.live, self.folder, self.fingerprint, part)

    def remove_damaged(self, among: range | None = None) -> None:
        """Deletes what is damaged of all, or `among` some blocks."""
        remove_damaged(self.folder, ACTIVATIONS, self.fingerprint, among)


def check_store(config: TrainConfig) -> None:
    """Raises DataError if the folder that a run reads is made in shards, of which not all are there and whole."""
    settings = config.activations
    if settings.path and settings.source in STORING:
        folder = Path(settings.path).expanduser()
        with agreement.together():
            if ranks.rank() == 0:
                for place in (folder, folder / HELD_OUT):
                    parts.check_whole(place, ACTIVATIONS, MAKE)


def _check_free(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Refuses a folder, named by hand, that holds anything but these very activations: nothing of it may be lost."""
    if not folder.exists() or (folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())):
        return
    try:
        if not (folder / HEADER).is_file():
            raise DataError(f"{folder}: holds other files")
        check_header(folder, ACTIVATIONS, fingerprint)
    except DataError as error:
        reason = str(error).rpartition(";")[0] or str(error)
        raise ConfigError(f"{FIELD}: {reason}; name another folder") from None


def _opened(place: Place, watch: Watch) -> CachedSource:
    """Returns the blocks as they lie in a folder, or are to lie there, of which no shard of a job array is missing."""
    with agreement.together():
        if ranks.rank() == 0:
            if watch.repair:
                place.remove_damaged()
            parts.check_whole(place.folder, ACTIVATIONS, MAKE)
    return place.opened(str(ranks.rank()))


def _fill(source: CachedSource, watch: Watch) -> None:
    """Stores all blocks, each rank its share."""
    share = ranks.own_share()
    with agreement.together():
        source.fill(range(share.rank, len(source), share.world_size), watch)
    source.reload()
