"""What a training run is: frozen dataclasses, one docstring a field, checked before anything loads."""

import itertools
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import draccus

from sae import kernels
from sae.base.errors import ConfigError
from sae.base.plugins import names
from sae.base.settings import at_least, choose, decode, merge, set_dotted
from sae.coder.normalization import Normalization
from sae.coder.spec import BUDGETS, DECODER_NORMS, PRE_BIASES, CoderSpec
from sae.encoders import Encoder
from sae.lm.models import ModelConfig
from sae.lm.site import Site
from sae.objectives import Objective
from sae.objectives.auxk import AuxK
from sae.objectives.reconstruction import Reconstruction
from sae.parallel.mesh import ParallelConfig
from sae.parallel.ranks import ALONE, RanksConfig, Share
from sae.selection import Selection, trainable
from sae.selection.topk import TopK
from sae.stream.batch import LANES
from sae.text.documents import TextConfig
from sae.training.names import TRAINING_ARGUMENTS
from sae.training.optim import OptimConfig

STORING = ("disk", "write_through")  # of activations.source
LAYOUTS = ("per_site", "crosscoder", "cross_layer")
OBJECTIVES: dict[str, Objective] = {"reconstruction": Reconstruction(), "auxk": AuxK()}


@dataclass(frozen=True)
class ActivationConfig:
    """Where activations come from and which of them count."""

    sites: tuple[str, ...] = ("layers.2",)
    """Module paths, globs ("layers.*.mlp") or TransformerLens names; ":input" reads the module's input."""
    targets: tuple[str, ...] = ()
    """What is predicted from each of `sites`, in their order: transcoders. None: the sites themselves, autoencoders."""
    source: str = "live"
    """live (recompute), disk (compute all first, then read), write_through (compute once, store, then read), or
    tensors (read what is stored in `path`, of any model: docs/tensors.md)."""
    path: str = ""
    """Of tensors, the folder, file or glob of safetensors to read. Of disk and write_through, a folder to store them in
    instead of the cache, with held-out ones below, for tensors to read later."""
    block_rows: int = 8
    """Rows of text in one pass of the language model. 64 lanes shuffle 64 x block_rows rows at a time."""
    lanes: int = LANES
    """Blocks that are shuffled at a time, of which a batch takes equally; ranks share them, at least one each."""
    dtype: str = "float32"
    """Precision in which activations are kept and stored: float32, bfloat16 or float16."""
    skip_positions: int = 1
    """First positions of every row that are masked, whatever token stands there."""
    norm_filter: float = 10.0
    """Tokens whose activation norm exceeds this multiple of the median are masked; 0 keeps all."""
    statistics_tokens: int = 32_768
    """Tokens from which mean, variance, median norm and input scale are measured before step 0."""
    prefetch_blocks: int | None = None
    """Blocks that a rank reads ahead in a thread; none: one for each of its lanes, which run dry together, or 0 where
    model and coder share the CPU and would only compete."""

    def blocks_ahead(self, on_cpu: bool, share: Share = ALONE) -> int:
        """Returns how many blocks a rank reads ahead where the model is, or is not, on the coder's own CPU."""
        if self.prefetch_blocks is not None:
            return self.prefetch_blocks
        return 0 if self.source in ("live", "write_through") and on_cpu else len(share.of(self.lanes))

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        choose("activations.source", self.source, ("live", *STORING, "tensors"))
        if self.path and self.source == "live":
            raise ConfigError(
                f"activations.path: {self.path!r} is not read by source live; set activations.source tensors"
            )
        choose("activations.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        at_least("activations.block_rows", self.block_rows, 1)
        at_least("activations.lanes", self.lanes, 1)
        at_least("activations.skip_positions", self.skip_positions, 0)
        at_least("activations.norm_filter", self.norm_filter, 0)
        at_least("activations.statistics_tokens", self.statistics_tokens, 1)
        if self.prefetch_blocks is not None:
            at_least("activations.prefetch_blocks", self.prefetch_blocks, 0)
        if not self.sites:
            raise ConfigError("activations.sites: empty; name at least one module, for example layers.2")
        if self.targets and len(self.targets) != len(self.sites):
            raise ConfigError(
                f"activations.targets: {len(self.targets)} for {len(self.sites)} sites; name one for each, or none"
            )


@dataclass(frozen=True)
class CoderConfig:
    """The coder: its width, how it selects, what it minimizes."""

    d_sae: int = 0
    """Number of latents; 0 means expansion x d_in."""
    expansion: int = 8
    """Latents per input dimension where d_sae is 0."""
    encoder: str = "linear"
    """How latents see their input (`sae/encoders/`)."""
    selection: Selection = field(default_factory=TopK)
    """The sparsifying rule."""
    objectives: dict[str, Objective] = field(default_factory=lambda: dict(OBJECTIVES))
    """Terms of the loss by name; the weight 0 leaves a term out."""
    normalization: Normalization = field(default_factory=Normalization)
    """What is done to activations before the encoder and undone after the decoder."""
    layout: str = "per_site"
    """per_site: a coder for each site; crosscoder: one that reads and writes all of them; cross_layer: one with a block
    of latents for each site, which writes to its target and all later ones."""
    budget: str = "block"
    """Of a cross_layer coder: block selects in every block by itself, shared in all blocks together."""
    skip: bool = False
    """Whether a linear map of the input is added to the output (skip transcoder)."""
    balance_sites: bool = True
    """Of several written sites: whether the loss weights them so that the FVU of each counts alike."""
    pre_bias: str | None = None
    """What is subtracted before the encoder: decoder (the decoder bias), own (a bias of its own), or none; left out,
    decoder for an autoencoder and own for a transcoder."""
    center: str = "mean"
    """Where b_dec starts: mean or geometric_median of the training activations, or zero."""
    decoder_norm: str | None = None
    """unit keeps each latent's decoder at norm 1, free does not; left out, unit for an autoencoder, free for a
    transcoder."""
    select_by_decoder_norm: bool = False
    """Whether selection compares pre-activations times decoder norms."""
    start_from: str = ""
    """Folder of a trained coder of the same shape to go on from, for example with an end-to-end term."""
    seed: int = 0
    """Seed of the weights; the order of data has its own."""

    def width(self, d_in: int) -> int:
        """Returns d_sae for activations of width d_in."""
        return self.d_sae or self.expansion * d_in

    def validate(self, d_in: int | None = None) -> None:
        """Raises ConfigError naming the field whose value is not allowed; widths are checked once d_in is known."""
        choose("coder.encoder", self.encoder, [name for name, kind in names(Encoder).items() if kind.trainable])
        choose("coder.layout", self.layout, LAYOUTS)
        choose("coder.budget", self.budget, BUDGETS)
        choose("coder.center", self.center, ("mean", "geometric_median", "zero"))
        if self.pre_bias is not None:
            choose("coder.pre_bias", self.pre_bias, PRE_BIASES)
        if self.decoder_norm is not None:
            choose("coder.decoder_norm", self.decoder_norm, DECODER_NORMS)
        if self.budget == "shared" and self.layout != "cross_layer":
            raise ConfigError("coder.budget: 'shared' is for coder.layout cross_layer; other coders have one block")
        self.normalization.validate("coder.normalization")
        if not self.normalization.undone:
            raise ConfigError("coder.normalization.undone: false is for coders that are loaded; training undoes it")
        at_least("coder.d_sae", self.d_sae, 0)
        at_least("coder.expansion", self.expansion, 1)
        if not any(term.weight for term in self.objectives.values()):
            raise ConfigError("coder.objectives: no term has a weight; at least one is needed, such as reconstruction")
        terms = [Objective.get_choice_name(type(term)) for term in self.objectives.values() if term.weight]
        if self.selection.encoder is not None:
            raise ConfigError(
                f"coder.selection.type: {Selection.get_choice_name(type(self.selection))!r} is for coders that are "
                f"loaded; training takes {', '.join(trainable())}"
            )
        for group in self.selection.needs:
            if not set(group) & set(terms):
                rule = Selection.get_choice_name(type(self.selection))
                raise ConfigError(
                    f"coder.objectives: selection {rule} needs the term {' or '.join(group)}; add it, for example "
                    f"--coder.objectives.{group[0]}.type {group[0]}"
                )
        d_sae = self.width(d_in or 0)
        if d_sae:
            try:
                self.selection.validate(d_sae)
                for objective in self.objectives.values():
                    objective.validate(d_sae, self.selection)
            except ConfigError as error:
                raise ConfigError(f"coder.{error}") from None

    def spec(
        self, reads: tuple[Site, ...], writes: tuple[Site, ...], normalization: Normalization, **described: Any
    ) -> CoderSpec:
        """Returns the spec of a coder of these sites, of known widths; ConfigError for what does not go together.

        `normalization` is the one measured; `described` are fields that say where the coder comes from.
        """
        cross_layer = self.layout == "cross_layer"
        tied = reads == writes and not cross_layer
        d_in = sum(site.width for site in reads)
        return CoderSpec(
            d_in=d_in,
            d_out=sum(site.width for site in writes),
            d_sae=self.width(d_in),
            selection=self.selection,
            reads=reads,
            writes=writes,
            encoder=self.encoder,
            pre_bias=self.pre_bias or ("decoder" if tied else "own"),
            normalization=normalization,
            cross_layer=cross_layer,
            budget=self.budget,
            select_by_decoder_norm=self.select_by_decoder_norm,
            decoder_norm=self.decoder_norm or ("unit" if tied else "free"),
            skip=self.skip,
            **described,
        )


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation."""

    tokens: int = 16_384
    """Held-out tokens for the final evaluation."""
    every_steps: int = 0
    """Also evaluate every so many steps; 0 only at the end."""

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        at_least("eval.tokens", self.tokens, 1)
        at_least("eval.every_steps", self.every_steps, 0)


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and how many to keep."""

    every_steps: int = 1000
    """A checkpoint every so many steps; one is always written at the end and on a signal."""
    keep: int = 2
    """Newest checkpoints kept."""

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        at_least("checkpoints.every_steps", self.every_steps, 1)
        at_least("checkpoints.keep", self.keep, 1)


@dataclass(frozen=True)
class LogConfig:
    """What is written while training runs."""

    every_steps: int = 10
    """A line of metrics.jsonl every so many steps."""
    tracker: str = "none"
    """Also send metrics to: none, wandb or trackio."""
    project: str = "sae-interp"
    """The tracker's project."""

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        at_least("log.every_steps", self.every_steps, 1)
        choose("log.tracker", self.tracker, ("none", "wandb", "trackio"))


@dataclass(frozen=True)
class TrainConfig:
    """One training run: text -> activations -> one coder per site and grid point."""

    name: str = "run"
    """Name of the run; its folder is runs/<name> unless run_dir says otherwise."""
    run_dir: str | None = None
    """Folder of the run."""
    seed: int = 0
    """Seed of the data order."""
    model: ModelConfig = field(default_factory=ModelConfig)
    second_model: ModelConfig = field(default_factory=lambda: ModelConfig(name=""))
    """A model with the same tokenizer whose activations at the same sites are read too, for a crosscoder."""
    text: TextConfig = field(default_factory=TextConfig)
    activations: ActivationConfig = field(default_factory=ActivationConfig)
    coder: CoderConfig = field(default_factory=CoderConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    grid: dict[str, Any] = field(default_factory=dict)
    """Several coders from one pass: {"coder.selection.k": [16, 32], "optim.lr": [...]} trains every combination. Values
    that are mappings have names: {"coder": {"wide": {"d_sae": 8192}, "narrow": {"d_sae": 1024}}}."""
    tokens: int = 1_000_000
    """Training tokens, repeats over several epochs counted."""
    batch_tokens: int = 1024
    """Tokens of one optimizer step, over all ranks; a multiple of `activations.lanes`."""
    micro_batch_tokens: int = 0
    """Tokens of one forward and backward pass; 0 takes the batch whole. Changes memory, not results."""
    precision: str = "float32"
    """Precision of the dense encoder product: float32 or bfloat16. Everything else is float32."""
    kernels: str = "auto"
    """What computes the sparse products: native (C++, on a CPU), triton (on an NVIDIA card), torch or reference; auto,
    the fastest that can be had here. Changes speed, and results by rounding."""
    max_bad_steps: int = 0
    """Steps with NaN or Inf that are skipped before the run stops."""
    dead_after_tokens: int | None = None
    """A latent silent for so many tokens is dead; none: a tenth of the tokens, at most 10 million."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    ranks: RanksConfig = field(default_factory=RanksConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    ALSO_CALLED: ClassVar[dict[str, str]] = TRAINING_ARGUMENTS

    @property
    def steps(self) -> int:
        """Returns the number of optimizer steps."""
        return self.tokens // self.batch_tokens

    @property
    def max_text_tokens(self) -> int:
        """Returns how many tokens of text are wanted at most: no more than will be trained on."""
        return self.text.max_tokens or max(self.tokens, self.text.context_length)

    @property
    def needs_rows(self) -> bool:
        """Returns whether some coder has an end-to-end term, so that batches are whole rows of text."""
        return any(t.needs_rows for _, c, _ in self.points() for t in c.objectives.values() if t.weight)

    @property
    def gradient_loss(self) -> str | None:
        """Returns the loss whose gradients some coder's selection looks at, or None; ConfigError if they differ."""
        losses = {loss for _, c, _ in self.points() if (loss := c.selection.gradient_loss)}
        if len(losses) > 1:
            raise ConfigError(f"grid: selections with the losses {', '.join(sorted(losses))} cannot share one pass")
        return next(iter(losses), None)

    @property
    def dead_after(self) -> int:
        """Returns after how many silent tokens a latent is dead."""
        return self.dead_after_tokens or min(10_000_000, max(1, self.tokens // 10))

    def validate(self) -> None:
        """Raises ConfigError naming the first field whose value is not allowed."""
        for part in (self.model, self.second_model, self.text, self.activations, self.optim, self.eval):
            part.validate()
        for part in (self.checkpoints, self.log, self.ranks, self.parallel):
            part.validate()
        lanes = self.activations.lanes
        at_least("batch_tokens", self.batch_tokens, lanes)
        if self.batch_tokens % lanes:
            raise ConfigError(f"batch_tokens: {self.batch_tokens} is not a multiple of {lanes}, the number of lanes")
        if self.tokens < self.batch_tokens:
            raise ConfigError(f"tokens: {self.tokens} is less than one batch ({self.batch_tokens} tokens)")
        at_least("micro_batch_tokens", self.micro_batch_tokens, 0)
        at_least("max_bad_steps", self.max_bad_steps, 0)
        if self.dead_after_tokens is not None:
            at_least("dead_after_tokens", self.dead_after_tokens, 1)
        choose("precision", self.precision, ("float32", "bfloat16"))
        choose("kernels", self.kernels, ("auto", *kernels.PATHS))
        for _, coder, optim in self.points():
            coder.validate()
            optim.validate()
            if self.second_model.name and coder.layout != "crosscoder":
                raise ConfigError(
                    f"second_model: read by crosscoders only; set coder.layout crosscoder, not {coder.layout}"
                )
        loss = self.gradient_loss  # refused here if two coders disagree
        if self.second_model.name and self.needs_rows:
            raise ConfigError("second_model: end-to-end terms (kl, ce) run one model; drop them or the second model")
        if self.needs_rows:
            if loss or self.activations.source != "live":
                what = "a selection that looks at gradients" if loss else "stored activations"
                raise ConfigError(f"coder.objectives: end-to-end terms (kl, ce) run the model live; drop {what}")
            if self.batch_tokens % self.text.context_length:
                length = self.text.context_length
                raise ConfigError(
                    f"batch_tokens: {self.batch_tokens} is not whole rows of text.context_length {length}"
                )

    def points(self) -> list[tuple[str, CoderConfig, OptimConfig]]:
        """Returns (label, coder, optim) of every grid point; a run without a grid is one point with an empty label."""
        if not self.grid:
            return [("", self.coder, self.optim)]
        named = {key: _named(key, values) for key, values in self.grid.items()}
        base = {"coder": draccus.encode(self.coder), "optim": draccus.encode(self.optim)}
        found = []
        for chosen in itertools.product(*(values.items() for values in named.values())):
            data = merge({}, base)
            for key, (_, value) in zip(named, chosen, strict=True):
                set_dotted(data, key, value)
            coder, optim = decode(CoderConfig, data["coder"], "coder"), decode(OptimConfig, data["optim"], "optim")
            found.append((",".join(label for label, _ in chosen), coder, optim))
        return found


def _named(key: str, values: Any) -> dict[str, Any]:
    """Returns a field's values by their part of a coder's name: their own, or the field's last part and the value."""
    if key.split(".")[0] not in ("coder", "optim"):
        raise ConfigError(f"grid: {key!r} is not coder, optim or a field below them")
    if isinstance(values, dict) and values:
        for name in values:
            if not re.fullmatch(r"[\w.+=-]+", str(name)):
                raise ConfigError(f"grid.{key}: {name!r} names a folder; use letters, digits and . _ + = - only")
        return {str(name): value for name, value in values.items()}
    if not isinstance(values, list | tuple) or len(set(map(str, values))) < max(1, len(values)):
        raise ConfigError(f"grid.{key}: {values} must hold at least one value, and none twice")
    if any(isinstance(value, dict | list) for value in values):
        raise ConfigError(f"grid.{key}: give mappings and lists a name: {{{key}: {{first: ..., second: ...}}}}")
    return {f"{key.split('.')[-1]}={value}": value for value in values}
