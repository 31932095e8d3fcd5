"""Optimization of one coder: the update with its schedule, the decoder's norm constraint and the weight average."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae.base.errors import ConfigError
from sae.base.plugins import names
from sae.base.settings import choose
from sae.base.sums import in_float64
from sae.coder.coder import SparseCoder
from sae.kernels import Sink
from sae.kernels.update import Update
from sae.optimizers import Optimizer
from sae.parallel import collectives
from sae.parallel.ledger import Ledger
from sae.parallel.mesh import Mesh, of_data

LR_AT_WIDTH = (2e-4, 2**14)  # the law two libraries use for Adam: lr = 2e-4 / sqrt(d_sae / 2^14)
BLOCKS = 64  # of a sum over latents


@dataclass(frozen=True)
class OptimConfig:
    """How a coder is optimized."""

    kind: str = "adam"
    """What becomes of gradients (`sae/optimizers/`): adam; sparse_adam, which lets latents that a step has not touched
    rest; adam8bit, with moments of 8 bits (torchao)."""
    lr: float | None = None
    """Peak learning rate; none: 2e-4 / sqrt(d_sae / 2^14), Gao 2024's dependence on the width."""
    beta1: float = 0.9
    """Adam's decay of the mean gradient."""
    beta2: float = 0.999
    """Adam's decay of the mean squared gradient."""
    eps: float = 6.25e-10
    """Adam's epsilon."""
    warmup_share: float = 0.02
    """Share of the steps in which the rate rises linearly from 0; at most 0.05."""
    decay_share: float = 0.2
    """Share of the steps, at the end, in which the rate falls linearly to 0."""
    clip_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it; 0 never."""
    ema: float = 0.0
    """Decay of the bias-corrected weight average that is evaluated and saved; 0 saves the weights themselves."""

    @property
    def optimizer(self) -> Optimizer:
        """Returns the optimizer of that name."""
        return names(Optimizer)[self.kind]()

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is out of range, or what cannot be had here."""
        choose("optim.kind", self.kind, names(Optimizer))
        self.optimizer.validate()
        if self.lr is not None and not self.lr > 0:
            raise ConfigError(f"optim.lr: {self.lr} must be positive (or left out: it then follows from the width)")
        limits = {"beta1": 1.0, "beta2": 1.0, "warmup_share": 0.05, "decay_share": 1.0, "ema": 1.0}
        for name, limit in limits.items():
            value = getattr(self, name)
            if not 0 <= value <= limit or (limit == 1.0 and value == 1.0 and name != "decay_share"):
                raise ConfigError(f"optim.{name}: {value} is not between 0 and {limit}")
        if self.clip_norm < 0 or self.eps <= 0:
            name = "clip_norm" if self.clip_norm < 0 else "eps"
            raise ConfigError(f"optim.{name}: {getattr(self, name)} must be positive")

    def peak(self, d_sae: int) -> float:
        """Returns the peak learning rate of a coder with d_sae latents."""
        rate, width = LR_AT_WIDTH
        return self.lr if self.lr is not None else rate / (d_sae / width) ** 0.5

    def rate(self, d_sae: int, step: int, steps: int) -> float:
        """Returns the learning rate of step `step` (from 0) of `steps`."""
        warmup, decay = self.warmup_share * steps, self.decay_share * steps
        rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
        fall = min(1.0, (steps - step) / decay) if decay else 1.0
        return self.peak(d_sae) * rise * fall


class Updater:
    """The gradients of a coder, written once a step, and an optimizer with what goes with it: one pass over weights.

    Where the decoder has norm 1, its gradient loses the part along each row, which would only change the norm, before
    the step, and rows are scaled back behind it. Gradients are clipped to `clip_norm` all together.
    """

    def __init__(
        self, coder: SparseCoder, config: OptimConfig, rounded: dict[str, Tensor], mesh: Mesh | None = None
    ) -> None:
        """Takes the encoder's tensors in the precision of its product, if that is another, to keep them up to date.

        And the ranks that train the coder, all if there is no mesh.
        """
        self.coder, self.config, self.rounded, self.optimizer = coder, config, rounded, config.optimizer
        self.mesh = mesh or of_data()
        self.parameters = dict(coder.named_parameters())
        self.gradients = {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}
        self.state = {
            name: {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                **self.optimizer.state(parameter.detach()),
            }
            for name, parameter in self.parameters.items()
        }
        self.unit = coder.spec.decoder_norm == "unit"
        self.along = [torch.zeros(len(part), device=part.device) for part in coder.decoders(frozen=True)]
        self._squares: dict[str, Tensor] = {}
        self.of_latents = {*coder.encoder_tensors(), "W_dec", *coder.spec.selection.parameters(0)}
        self.touched = torch.zeros_like(coder.b_enc.detach()) if self.optimizer.lazy else None
        """Above 0 for latents that the step has touched."""

    @contextmanager
    def collecting(self) -> Iterator[Sink]:
        """While open, backward passes leave the gradients of the matrices with the sink, of all else in `.grad`."""
        weights = {name: (self.parameters[name], self.gradients[name]) for name in self.coder.spec.encoding.maps}
        decoders = zip(self.coder.decoders(frozen=True), self.coder.decoders_of(self.gradients["W_dec"]), strict=True)
        weights |= {f"W_dec.{number}": pair for number, pair in enumerate(decoders)}
        for parameter in self.parameters.values():
            parameter.grad = None
        self.coder.sink = Sink(weights, tells_rows=self.optimizer.lazy)
        try:
            yield self.coder.sink
        finally:
            self.coder.sink = None

    @torch.no_grad()
    def finish(self, sink: Sink) -> list[Tensor]:
        """Writes all gradients of a step; returns what is summed over ranks."""
        squares = sink.finish()
        coder, given = self.coder, {name: p.grad for name, p in self.parameters.items()}
        for weight, bias in coder.spec.encoding.maps.items():
            found = sink.of(weight)
            self._write(bias, found.bias, given[bias])
            if coder.spec.pre_bias != "none":  # y = N(x) - p: a bias before the encoder has minus the gradient of y
                blocks = [part.chunk(coder.spec.n_blocks) for part in (found.through, found.weight)]
                before = "b_dec" if coder.spec.pre_bias == "decoder" else "b_pre"
                moved = -torch.cat([_sum_of_rows(sums, rows) for sums, rows in zip(*blocks, strict=True)])
                others = given[before]
                given[before] = moved if others is None else others + moved
        if self.touched is not None:
            self.touched = self._touched(sink, given)
        matrices = {*coder.spec.encoding.maps, "W_dec"}
        for name in self.parameters.keys() - matrices - {*coder.spec.encoding.maps.values()}:
            self._write(name, None, given[name])
        blocks = [f"W_dec.{number}" for number in range(coder.spec.n_blocks)]
        self.along = [sink.of(block).along for block in blocks]
        self._squares = {name: squares[name] for name in coder.spec.encoding.maps}
        self._squares["W_dec"] = torch.stack([squares[block] for block in blocks]).sum()
        for name in matrices:
            of_itself = given[name]
            if of_itself is not None:  # a loss term has looked at the weights themselves
                self.gradients[name].add_(of_itself)
                del self._squares[name]
        of_itself = given["W_dec"]
        if of_itself is not None:
            found = zip(coder.decoders_of(of_itself), coder.decoders(frozen=True), self.along, strict=True)
            self.along = [along + (more * weight).sum(1) for more, weight, along in found]
        for name, parameter in self.parameters.items():
            parameter.grad = self.gradients[name]
        return self.exchanged()

    def _touched(self, sink: Sink, given: dict[str, Tensor | None]) -> Float[Tensor, "d_sae"]:
        """Returns how many entries of each latent are not 0, or have a gradient that came without entries."""
        found = torch.zeros_like(self.coder.b_enc.detach())
        for name in self.coder.spec.encoding.maps:
            found += sink.of(name).touched
        for number, block in enumerate(self.coder.blocks):
            found[block.latents] += sink.of(f"W_dec.{number}").touched
        for name in self.of_latents:
            gradient = given[name]
            if gradient is not None:
                parts = self.coder.decoders_of(gradient) if name == "W_dec" else [gradient]
                found += torch.cat([(part != 0).reshape(len(part), -1).any(1) for part in parts])
        return found

    def _write(self, name: str, found: Tensor | None, given: Tensor | None) -> None:
        parts = [part for part in (found, given) if part is not None]
        self.gradients[name].copy_(sum(parts[1:], parts[0])) if parts else self.gradients[name].zero_()

    def exchanged(self) -> list[Tensor]:
        """Returns what is summed, in place, over ranks with other tokens, between `finish` and `norms`."""
        rows = [] if self.touched is None else [self.touched]
        return [*self.gradients.values(), *(self.along if self.unit else []), *rows]

    def over_latents(self) -> list[Tensor]:
        """Returns what is then summed over ranks with other latents, too: gradients of what all of them have."""
        return [gradient for name, gradient in self.gradients.items() if name not in self.of_latents]

    def norms(self) -> dict[str, Tensor]:
        """Returns the norm of each gradient, summed over ranks, before anything is taken out."""
        own = {} if self.mesh.data.moves else self._squares
        found = {
            name: own[name].sqrt() if name in own else torch.linalg.vector_norm(gradient)
            for name, gradient in self.gradients.items()
        }
        if self.mesh.latents.moves:
            parts = [name for name in found if name in self.of_latents]
            squares = torch.stack([in_float64(found[name]).square() for name in parts])
            found |= zip(parts, collectives.total(squares, self.mesh.latents).sqrt().unbind(), strict=True)
        return found

    def moves(self, ledger: Ledger) -> None:
        """Writes down squares of norms, beside the gradients."""
        ledger.summed("latents", 8 * len(self.gradients.keys() & self.of_latents))

    @staticmethod
    def total(norms: dict[str, Tensor]) -> Tensor:
        """Returns the norm of all gradients together, in float64."""
        return torch.linalg.vector_norm(torch.stack([in_float64(norm) for norm in norms.values()]))

    @torch.no_grad()
    def update(self, norms: dict[str, Tensor], rate: float, applies: Bool[Tensor, ""]) -> None:
        """Takes the step, unless it does not apply: then nothing changes."""
        config, total = self.config, self.total(norms)
        clip = config.clip_norm
        scale = torch.where(total > clip, clip / total, 1.0) if clip else torch.ones_like(total)
        scale = scale.float().to(applies.device)
        touched = None if self.touched is None else self.touched > 0
        for name, parameter in self.parameters.items():
            state = self.state[name]
            state["step"] = state["step"] + applies
            taken = Update(rate, config.beta1, config.beta2, config.eps, state["step"], scale, applies)
            held = {key: value for key, value in state.items() if key != "step"}
            tensors = [parameter.detach(), self.gradients[name], *held.values()]
            latents, along, unit = [slice(None)], [None], self.unit and name == "W_dec"
            blocks = [tensors]
            if name == "W_dec":
                blocks = list(zip(*map(self.coder.decoders_of, tensors), strict=True))
                latents = [block.latents for block in self.coder.blocks]
                along = self.along if unit else [None] * len(blocks)
            for (weight, gradient, *own), some, part in zip(blocks, latents, along, strict=True):
                rows = touched[some] if touched is not None and name in self.of_latents else None
                of_rows = {"along": part, "unit": unit, "half": self.rounded.get(name), "touched": rows}
                self.optimizer.update(weight, gradient, dict(zip(held, own, strict=True)), taken, **of_rows)


def _sum_of_rows(coefficients: Float[Tensor, "m"], rows: Float[Tensor, "m d"]) -> Float[Tensor, "d"]:
    """Returns coefficients @ rows, block by block: a float32 sum of tens of thousands of rows at once loses a digit."""
    parts = zip(coefficients.chunk(BLOCKS), rows.chunk(BLOCKS), strict=True)
    return torch.stack([some @ of_rows for some, of_rows in parts]).sum(0)


@torch.no_grad()
def normalize_decoder(coder: SparseCoder) -> None:
    """Scales every latent's decoder to norm 1, in place; rows of zeros stay."""
    for weight in coder.decoders():
        weight.div_(torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp_min(1e-30))


class Average:
    """Exponential moving average of the weights, started at zero and divided by 1 - decay^t (Gao 2024, appendix A)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = torch.zeros((), dtype=torch.int64, device=next(module.parameters()).device)
        self.sums = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, applies: Bool[Tensor, ""]) -> None:
        """Takes in the weights after a step, if it was applied."""
        self.steps = self.steps + applies
        share = torch.where(applies, 1 - self.decay, 0.0)
        for name, parameter in module.named_parameters():
            self.sums[name].lerp_(parameter, share.to(parameter.dtype))

    def weights(self) -> dict[str, Tensor]:
        """Returns the bias-corrected average; valid after the first update."""
        return {name: value / (1 - self.decay ** int(self.steps)) for name, value in self.sums.items()}
