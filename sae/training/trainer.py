"""One coder in training: losses, guards, the update, and the counters that a resume needs."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.base.errors import ConfigError
from sae.base.sums import in_float64, summed_on
from sae.coder.coder import Pass, SparseCoder
from sae.coder.initialization import initialize
from sae.coder.normalization import undo
from sae.kernels.codes import Support
from sae.loading import hub
from sae.objectives import Objective, Spliced, Step
from sae.parallel import collectives, ranks
from sae.selection import Selection
from sae.training.choosing import Chooser
from sae.training.config import CoderConfig
from sae.training.measuring import Statistics
from sae.training.optim import Average, OptimConfig, adam, normalize_decoder, project_decoder_gradient

SHAPES = ("d_in", "d_out", "d_sae", "encoder", "cross_layer", "skip")
STARTED_ALIKE = (*SHAPES, "pre_bias", "decoder_norm", "budget", "select_by_decoder_norm")
LEAST_RESIDUAL = 1e-6  # of the variance: a batch of one token has none, and AuxK divides by it


class NonFiniteError(RuntimeError):
    """A loss, gradient or activation is NaN or infinite; the step was not applied."""


@dataclass(frozen=True)
class Schedule:
    """The sizes a trainer needs of the run."""

    steps: int
    """Planned optimizer steps."""
    dead_after_tokens: int
    """A latent that has not fired for so many tokens is dead."""
    micro_batch_tokens: int = 0
    """Rows of one forward and backward pass; 0 takes the batch whole."""
    product_dtype: torch.dtype | None = None
    """Precision of the dense encoder product; None: that of the weights."""


@dataclass(frozen=True)
class Batch:
    """The unmasked tokens of this rank's share of a batch."""

    x: Float[Tensor, "n d_in"]
    """Raw activations at the sites read, side by side."""
    target: Float[Tensor, "n d_out"]
    """Raw activations at the sites written; of an autoencoder, x."""
    gradients: Float[Tensor, "n d_out"] | None = None
    """Of the loss, at the sites written, for a rule that looks at them."""
    sizes: tuple[int, ...] | None = None
    """Tokens of each micro-batch, where these must be whole rows of text."""
    spliced: Callable[[int, Float[Tensor, "m d_out"]], Spliced] | None = None
    """Runs the language model on micro-batch i with these raw outputs in place, for end-to-end terms."""


def new_coder(
    config: CoderConfig, found: Statistics, device: torch.device | str = "cpu", **described: Any
) -> SparseCoder:
    """Returns an untrained coder for activations with the measured statistics.

    `described` fills the fields of its spec that training does not need: context length, where it comes from.
    """
    spec = config.spec(
        found.reads, found.writes, found.normalization, mask=found.mask, variance=found.variance, **described
    )
    coder = SparseCoder(spec, device)
    if config.start_from:
        return _started(coder, Path(config.start_from))
    center, input_center = found.center.to(device), found.input_center.to(device)
    initialize(coder, center, config.seed, input_center=input_center, spread=found.input_spread)
    return coder


def _started(coder: SparseCoder, folder: Path) -> SparseCoder:
    """Returns the coder with the weights and the calibration of a trained one; scales were taken over when measuring.

    ConfigError names what makes them different coders.
    """
    trained, spec = hub.load(folder, coder.W_enc.device), coder.spec
    ours, theirs = (
        {
            **{name: getattr(s, name) for name in STARTED_ALIKE},
            "normalization.kind": s.normalization.kind,
            "selection.type": Selection.get_choice_name(type(s.selection)),
            "sites": [site.name for site in s.reads],
            "targets": [site.name for site in s.writes],
        }
        for s in (spec, trained.spec)
    )
    for name, value in ours.items():
        if value != theirs[name]:
            raise ConfigError(f"coder.start_from: {folder} has {name} {theirs[name]}, but this run {value}")
    coder.spec = spec.with_(calibration=trained.spec.calibration)
    coder.load_state_dict(trained.state_dict())
    return coder


@dataclass
class _Sums:
    """What adds up over the micro-batches of a step, and over ranks."""

    terms: dict[str, Tensor]
    """The loss terms, without their weights."""
    error: Float[Tensor, "d_out"]
    square: Float[Tensor, ""]
    fired: Int[Tensor, "d_sae"]

    @classmethod
    def zero(cls, names: Iterable[str], coder: SparseCoder) -> "_Sums":
        like = coder.W_enc
        zeros = partial(torch.zeros, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        terms = {name: zeros(()) for name in names}
        return cls(terms, zeros(coder.spec.d_out), zeros(()), zeros(coder.spec.d_sae, dtype=torch.int64))

    def spread(self, n_tokens: int) -> Float[Tensor, ""]:
        """Returns the variance of the error, in float64."""
        return in_float64(self.square) / n_tokens - (in_float64(self.error) / n_tokens).square().sum()


class _Figures(NamedTuple):
    """What the host knows of a step, read of the device all at once."""

    terms: dict[str, float]
    grad_norm: float
    square: float
    spread: float
    l0: float


class CoderTrainer:
    """Trains one coder. `step` consumes the (masked, raw) activations of one batch and returns its metrics."""

    def __init__(
        self, coder: SparseCoder, objectives: dict[str, Objective], optim: OptimConfig, schedule: Schedule
    ) -> None:
        self.coder, self.optim, self.schedule = coder, optim, schedule
        self.objectives = {name: term for name, term in objectives.items() if term.weight}
        self.chooser = Chooser(coder)
        self.optimizer = adam(coder, optim)
        self.average = Average(coder, optim.ema) if optim.ema else None
        device = coder.W_enc.device
        self.tokens_since_fired = torch.zeros(coder.spec.d_sae, dtype=torch.int64, device=device)
        self.density = torch.zeros(coder.spec.d_sae, dtype=torch.float64, device=summed_on(device))
        self.tokens_seen = 0
        self.residual_variance = coder.spec.variance or 1.0
        self.active_steps: dict[str, int] = dict.fromkeys(self.objectives, 0)
        self.multipliers: dict[str, float] = dict.fromkeys(self.objectives, 1.0)
        for parameter in coder.parameters():
            parameter.grad = torch.zeros_like(parameter)  # a rank may see no token and still takes part in the sums

    @property
    def dead(self) -> Bool[Tensor, "d_sae"]:
        """Returns which latents have not fired for `dead_after_tokens` tokens."""
        return self.tokens_since_fired >= self.schedule.dead_after_tokens

    def step(self, batch: Batch | Tensor, index: int) -> dict[str, float]:
        """Applies step `index` on this rank's tokens and returns its metrics, equal on every rank.

        Of an autoencoder the activations [n, d] alone will do.

        Raises NonFiniteError, with nothing changed, if an activation, a loss term or a gradient is not finite.
        """
        batch = batch if isinstance(batch, Batch) else Batch(batch, batch)
        before, n_tokens = self._counted(batch)
        progress = index / self.schedule.steps
        factors = {name: term.factor(progress, self.multipliers[name]) for name, term in self.objectives.items()}
        self.optimizer.zero_grad(set_to_none=False)
        self.chooser.begin(progress, n_tokens, before)
        sums = self._backward(batch, n_tokens, factors)
        collectives.total_(*self.summed(sums))
        found = self._checked(sums, max(1, n_tokens))  # the norm filter may leave nothing
        rate = self._update(found.grad_norm, index)
        self._learn(sums.fired, found, n_tokens)
        reports = dict(
            item for term in self.objectives.values() for item in term.report(self.density, self.dead).items()
        )
        return {
            "loss": sum(found.terms[name] * factors[name] for name in self.objectives),
            **{f"loss.{name}": loss for name, loss in found.terms.items()},
            **{f"weight.{name}": w for name, w in factors.items() if w != self.objectives[name].weight},
            "fvu": found.square / (max(1, n_tokens) * (self.coder.spec.variance or 1.0)),
            "l0": found.l0,
            "dead_share": float(self.dead.float().mean()),
            **reports,
            **self.chooser.report(),
            "lr": rate,
            "grad_norm": found.grad_norm,
            "tokens": n_tokens,
        }

    def summed(self, sums: "_Sums | None" = None) -> list[Tensor]:
        """Returns what is summed over ranks in a step: gradients, and what adds up beside them (or zeros)."""
        sums = sums or _Sums.zero(self.objectives, self.coder)
        gradients = [p.grad for p in self.coder.parameters() if p.grad is not None]
        return [*gradients, *sums.terms.values(), sums.error, sums.square, sums.fired]

    def _backward(self, batch: Batch, n_tokens: int, factors: dict[str, float]) -> "_Sums":
        """Adds the gradients of every micro-batch up, and what is reported of it."""
        spec, dead = self.coder.spec, self.dead
        sums = _Sums.zero(self.objectives, self.coder)
        for number, (run, target) in enumerate(self._passes(batch)):
            spliced = None
            if batch.spliced is not None:
                spliced = lambda made, i=number, how=run.how: batch.spliced(i, undo(made, how))  # type: ignore[misc]  # noqa: E731
            view = Step(
                self.coder,
                run,
                target,
                n_tokens,
                spec.variance or 1.0,
                self.residual_variance,
                dead,
                self.density,
                spliced,
            )
            losses = {name: objective.loss(view) for name, objective in self.objectives.items()}
            loss = torch.stack([losses[name] * factors[name] for name in self.objectives]).sum()
            if loss.requires_grad:  # a term that does not apply at this step is a constant
                loss.backward()
            with torch.no_grad():
                error = view.error(run.prediction)
                sums.error += error.sum(0)
                sums.square += error.square().sum()
                sums.fired += run.latents.fired()
                for name, loss in losses.items():
                    sums.terms[name] += loss.detach()
        return sums

    def _learn(self, fired: Tensor, found: _Figures, n_tokens: int) -> None:
        """Takes what a step has shown into the state that later steps, and a resume, start from."""
        for name, loss in found.terms.items():
            self.active_steps[name] += int(loss != 0)
        if not n_tokens:
            return
        self.chooser.finish()
        self._count(fired, n_tokens)
        self.residual_variance = max(found.spread, LEAST_RESIDUAL * (self.coder.spec.variance or 1.0))
        for name, term in self.objectives.items():
            self.multipliers[name] = term.adapted(self.multipliers[name], found.l0)

    def _counted(self, batch: Batch) -> tuple[int, int]:
        """Returns the numbers of tokens of the ranks before this one, and of all; they raise if one has a bad token."""
        parts = [part for part in (batch.x, batch.target, batch.gradients) if part is not None]
        bad = torch.stack([~torch.isfinite(part).all(1) for part in parts]).any(0).sum()
        every = collectives.of_every_rank(torch.stack([torch.full_like(bad, len(batch.x)), bad]))
        counts, n_bad = [own for own, _ in every], sum(bad for _, bad in every)
        if n_bad:
            raise NonFiniteError(f"NaN or Inf in what was streamed, at {n_bad} of {sum(counts)} tokens")
        return sum(counts[: ranks.rank()]), sum(counts)

    def _passes(self, batch: Batch) -> Iterator[tuple[Pass, Float[Tensor, "m d_out"]]]:
        """Yields one differentiable pass, with its target, for every micro-batch."""
        coder, dtype = self.coder, self.schedule.product_dtype
        exact = dtype in (None, coder.W_enc.dtype)
        size = self.schedule.micro_batch_tokens or max(1, len(batch.x))
        sizes = list(batch.sizes or [len(part) for part in batch.x.split(size)] if len(batch.x) else [])
        parts = list(batch.x.split(sizes))
        beside = [None] * len(parts) if batch.gradients is None else batch.gradients.split(sizes)
        first = coder.look(parts[0], dtype) if len(parts) == 1 else None
        supports: list[Support] | None = None
        if self.chooser.rule.batch_wide:
            supports = self.chooser.whole_batch(parts, lambda part: first or coder.look(part, dtype))
        for i, (part, target) in enumerate(zip(parts, batch.target.split(sizes), strict=True)):
            look = first or coder.look(part, dtype)
            support = supports[i] if supports else self.chooser.per_token(look, beside[i])
            yield coder.run(look, support, exact), coder.spec.normalize_target(target.to(look.x))

    def _count(self, fired: Tensor, n_tokens: int) -> None:
        """Takes in how often each latent has fired; densities run over about `dead_after_tokens` tokens."""
        self.tokens_since_fired = torch.where(fired > 0, 0, self.tokens_since_fired + n_tokens)
        decay = math.exp(-n_tokens / self.schedule.dead_after_tokens)
        decay = min(decay, self.tokens_seen / (self.tokens_seen + n_tokens))  # at first, all tokens alike
        self.density = torch.lerp(in_float64(fired) / n_tokens, self.density, decay)
        self.tokens_seen += n_tokens

    def _checked(self, sums: _Sums, n_tokens: int) -> _Figures:
        """Returns the figures of a step; NonFiniteError names a loss term or a gradient that is not finite."""
        gradients = {name: p.grad for name, p in self.coder.named_parameters() if p.grad is not None}
        norms = {name: torch.linalg.vector_norm(gradient) for name, gradient in gradients.items()}
        grad_norm = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        scalars = (grad_norm, sums.square, sums.spread(n_tokens), sums.fired.sum())
        found = torch.stack([in_float64(x) for x in (*sums.terms.values(), *norms.values(), *scalars)]).tolist()
        terms, found = dict(zip(sums.terms, found, strict=False)), found[len(sums.terms) :]
        for name, loss in terms.items():
            if not math.isfinite(loss):
                raise NonFiniteError(f"loss term {name} is {loss}")
        for name, norm in zip(norms, found, strict=False):
            if not math.isfinite(norm):
                raise NonFiniteError(f"gradient of {name} is not finite")
        norm, square, spread, fired = found[len(norms) :]
        return _Figures(terms, norm, square, spread, fired / n_tokens)

    def _update(self, grad_norm: float, index: int) -> float:
        unit = self.coder.spec.decoder_norm == "unit"
        if unit:
            project_decoder_gradient(self.coder)
        if self.optim.clip_norm and grad_norm > self.optim.clip_norm:
            for parameter in self.coder.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.optim.clip_norm / grad_norm)
        rate = self.optim.rate(self.coder.spec.d_sae, index, self.schedule.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if unit:
            normalize_decoder(self.coder)
        if self.average:
            self.average.update(self.coder)
        return rate

    def trained(self) -> SparseCoder:
        """Returns the coder to evaluate and save: a calibrated copy, with averaged weights if there is an average.

        It shares nothing with the coder in training.
        """
        numbers, thresholds = self.chooser.calibrated()
        spec = deepcopy(self.coder.spec).with_(calibration=numbers)
        copy = SparseCoder(spec, self.coder.W_enc.device, self.coder.W_enc.dtype)
        copy.load_state_dict(self.coder.state_dict())
        if thresholds is not None:
            copy.get_buffer("threshold").copy_(thresholds)
        if self.average and self.average.steps:
            copy.load_state_dict(self.average.weights(), strict=False)  # buffers are not averaged
            if copy.spec.decoder_norm == "unit":
                normalize_decoder(copy)
        return copy.requires_grad_(False)

    def replicated(self) -> dict[str, Tensor]:
        """Returns what must be equal on every rank: weights, and the counters that decide which latents are dead."""
        named = {name: parameter.detach() for name, parameter in self.coder.named_parameters()}
        return named | {"tokens_since_fired": self.tokens_since_fired, "density": self.density}

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Returns (tensors, plain values) from which `load_state` continues bit for bit."""
        tensors = {"tokens_since_fired": self.tokens_since_fired, "density": self.density}
        tensors |= {f"selection.{name}": value for name, value in self.chooser.state().items()}
        for name, parameter in self.coder.named_parameters():
            tensors[f"weight.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adam.{key}.{name}"] = value
        if self.average:
            tensors |= {f"average.{name}": value for name, value in self.average.sums.items()}
        values = {
            "residual_variance": self.residual_variance,
            "active_steps": self.active_steps,
            "multipliers": self.multipliers,
            "tokens_seen": self.tokens_seen,
            "average_steps": self.average.steps if self.average else 0,
        }
        return tensors, values

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], values: dict[str, object]) -> None:
        """Continues from what `state` returned."""
        self.tokens_since_fired = tensors["tokens_since_fired"].to(self.tokens_since_fired.device)
        self.density = tensors["density"].to(self.density.device)
        own = "selection."
        self.chooser.load_state({n.removeprefix(own): value for n, value in tensors.items() if n.startswith(own)})
        for name, parameter in self.coder.named_parameters():
            parameter.copy_(tensors[f"weight.{name}"])
            for key, value in self.optimizer.state[parameter].items():
                value.copy_(tensors[f"adam.{key}.{name}"])
        if self.average:
            for name, value in self.average.sums.items():
                value.copy_(tensors[f"average.{name}"])
            self.average.steps = int(values["average_steps"])  # type: ignore[call-overload]
        self.residual_variance = float(values["residual_variance"])  # type: ignore[arg-type]
        for own, saved in ((self.active_steps, values["active_steps"]), (self.multipliers, values["multipliers"])):
            own.update(saved)  # type: ignore[call-overload]  # in the order of the terms, which is that of the log
        self.tokens_seen = int(values["tokens_seen"])  # type: ignore[call-overload]
