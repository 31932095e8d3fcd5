"""One coder in training: losses, guards, the update, and the counters that a resume needs."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae import distributed
from sae.activations import Statistics
from sae.coder import SparseCoder, initialize
from sae.config import CoderConfig
from sae.objectives import Objective, Step
from sae.optim import Average, OptimConfig, adam, normalize_decoder, project_decoder_gradient
from sae.spec import CoderSpec

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


def new_coder(
    config: CoderConfig, found: Statistics, device: torch.device | str = "cpu", **described: Any
) -> SparseCoder:
    """Returns an untrained coder for activations with the measured statistics.

    `described` fills the fields of its spec that training does not need: sites, context length, where it comes from.
    """
    d = len(found.center)
    spec = CoderSpec(
        d_in=d,
        d_out=d,
        d_sae=config.width(d),
        selection=config.selection,
        pre_bias=config.pre_bias,
        normalization=found.normalization,
        select_by_decoder_norm=config.select_by_decoder_norm,
        decoder_norm=config.decoder_norm,
        mask=found.mask,
        variance=found.variance,
        **described,
    )
    coder = SparseCoder(spec, device)
    initialize(coder, found.center.to(device), config.seed)
    return coder


class CoderTrainer:
    """Trains one coder. `step` consumes the (masked, raw) activations of one batch and returns its metrics."""

    def __init__(
        self, coder: SparseCoder, objectives: dict[str, Objective], optim: OptimConfig, schedule: Schedule
    ) -> None:
        self.coder, self.optim, self.schedule = coder, optim, schedule
        self.objectives = {name: term for name, term in objectives.items() if term.weight}
        self.optimizer = adam(coder, optim)
        self.average = Average(coder, optim.ema) if optim.ema else None
        device = coder.W_enc.device
        self.tokens_since_fired = torch.zeros(coder.spec.d_sae, dtype=torch.int64, device=device)
        self.residual_variance = coder.spec.variance or 1.0
        self.active_steps: dict[str, int] = dict.fromkeys(self.objectives, 0)
        for parameter in coder.parameters():
            parameter.grad = torch.zeros_like(parameter)  # a rank may see no token and still takes part in the sums

    @property
    def dead(self) -> Bool[Tensor, "d_sae"]:
        """Returns which latents have not fired for `dead_after_tokens` tokens."""
        return self.tokens_since_fired >= self.schedule.dead_after_tokens

    def step(self, x: Float[Tensor, "n d_in"], index: int) -> dict[str, float]:
        """Applies step `index` on this rank's rows x and returns its metrics, equal on every rank.

        Raises NonFiniteError, with nothing changed, if an activation, a loss term or a gradient is not finite.
        """
        n_bad = (~torch.isfinite(x)).any(1).sum()
        n_tokens, n_bad = distributed.total(torch.stack([torch.full_like(n_bad, len(x)), n_bad])).tolist()
        if n_bad:  # on any rank, so that all of them leave the step
            raise NonFiniteError(f"activations hold NaN or Inf at {n_bad} of {n_tokens} tokens")
        spec, dead = self.coder.spec, self.dead
        self.optimizer.zero_grad(set_to_none=False)
        terms: dict[str, Tensor] = {name: torch.zeros((), device=x.device) for name in self.objectives}
        error_sum, error_square = torch.zeros(spec.d_out, device=x.device), torch.zeros((), device=x.device)
        fired = torch.zeros(spec.d_sae, dtype=torch.int64, device=x.device)
        for rows in x.split(self.schedule.micro_batch_tokens or len(x)) if len(x) else ():
            run = self.coder.run(rows, self.schedule.product_dtype)
            target = spec.normalization.apply(rows.to(run.prediction.dtype))[0]
            view = Step(self.coder, run, target, n_tokens, spec.variance or 1.0, self.residual_variance, dead)
            losses = {name: objective.loss(view) for name, objective in self.objectives.items()}
            loss = torch.stack([losses[name] * term.weight for name, term in self.objectives.items()]).sum()
            if loss.requires_grad:  # a term that does not apply at this step is a constant
                loss.backward()
            with torch.no_grad():
                error = target - run.prediction
                error_sum += error.sum(0)
                error_square += error.square().sum()
                fired += run.latents.fired()
                for name, loss in losses.items():
                    terms[name] += loss.detach()
        gradients = [p.grad for p in self.coder.parameters() if p.grad is not None]
        distributed.total_(*gradients, *terms.values(), error_sum, error_square, fired)
        grad_norm = self._checked_gradient_norm(terms)
        rate = self._update(grad_norm, index)

        self.tokens_since_fired = torch.where(fired > 0, 0, self.tokens_since_fired + n_tokens)
        variance, n = spec.variance or 1.0, max(1, n_tokens)  # the norm filter may leave nothing
        if n_tokens:
            spread = error_square.double() / n - (error_sum.double() / n).square().sum()
            self.residual_variance = max(float(spread), LEAST_RESIDUAL * variance)
        for name, loss in terms.items():
            self.active_steps[name] += int(loss != 0)
        return {
            "loss": sum(float(terms[name]) * objective.weight for name, objective in self.objectives.items()),
            **{f"loss.{name}": float(loss) for name, loss in terms.items()},
            "fvu": float(error_square) / (n * variance),
            "l0": float(fired.sum()) / n,
            "dead_share": float(self.dead.float().mean()),
            "lr": rate,
            "grad_norm": grad_norm,
            "tokens": n_tokens,
        }

    def _checked_gradient_norm(self, terms: dict[str, Tensor]) -> float:
        for name, loss in terms.items():
            if not torch.isfinite(loss):
                raise NonFiniteError(f"loss term {name} is {float(loss)}")
        squares = {name: p.grad.square().sum() for name, p in self.coder.named_parameters() if p.grad is not None}
        for name, square in squares.items():
            if not torch.isfinite(square):
                raise NonFiniteError(f"gradient of {name} is not finite")
        return float(torch.stack(list(squares.values())).sum().sqrt())

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
            normalize_decoder(self.coder.W_dec)
        if self.average:
            self.average.update(self.coder)
        return rate

    def trained(self) -> SparseCoder:
        """Returns the coder to evaluate and save: a copy with the averaged weights where there is an average."""
        copy = SparseCoder(self.coder.spec, self.coder.W_enc.device, self.coder.W_enc.dtype)
        copy.load_state_dict(self.coder.state_dict())
        if self.average and self.average.steps:
            copy.load_state_dict(self.average.weights())
            if copy.spec.decoder_norm == "unit":
                normalize_decoder(copy.W_dec)
        return copy.requires_grad_(False)

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Returns (tensors, plain values) from which `load_state` continues bit for bit."""
        tensors = {"tokens_since_fired": self.tokens_since_fired}
        for name, parameter in self.coder.named_parameters():
            tensors[f"weight.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adam.{key}.{name}"] = value
        if self.average:
            tensors |= {f"average.{name}": value for name, value in self.average.sums.items()}
        values = {
            "residual_variance": self.residual_variance,
            "active_steps": self.active_steps,
            "average_steps": self.average.steps if self.average else 0,
        }
        return tensors, values

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor], values: dict[str, object]) -> None:
        """Continues from what `state` returned."""
        self.tokens_since_fired = tensors["tokens_since_fired"].to(self.tokens_since_fired.device)
        for name, parameter in self.coder.named_parameters():
            parameter.copy_(tensors[f"weight.{name}"])
            for key, value in self.optimizer.state[parameter].items():
                value.copy_(tensors[f"adam.{key}.{name}"])
        if self.average:
            for name, value in self.average.sums.items():
                value.copy_(tensors[f"average.{name}"])
            self.average.steps = int(values["average_steps"])  # type: ignore[call-overload]
        self.residual_variance = float(values["residual_variance"])  # type: ignore[arg-type]
        self.active_steps = dict(values["active_steps"])  # type: ignore[call-overload]
