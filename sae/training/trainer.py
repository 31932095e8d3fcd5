"""One coder in training: losses, guards, the update, and the counters that a resume needs."""

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.base.sums import in_float64, summed_on
from sae.coder.coder import Look, SparseCoder
from sae.coder.cutting import empty_part
from sae.coder.normalization import undo
from sae.coder.shard import HeldRows, moves_output
from sae.kernels import Sink
from sae.objectives import Objective, Start, Step, check_cut
from sae.parallel import collectives
from sae.parallel.cut import NO_LATENTS
from sae.parallel.ledger import Ledger
from sae.parallel.mesh import Mesh, of_data
from sae.training.choosing import Chooser, Chosen
from sae.training.optim import Average, OptimConfig, Updater, normalize_decoder
from sae.training.step import Batch, Figures, Heard, Planned, Sums, at_first

LEAST_RESIDUAL = 1e-6  # of the variance: a batch of one token has none, and AuxK divides by it


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


class CoderTrainer:
    """Trains one coder. `step` consumes the (masked, raw) activations of one batch and returns its figures.

    The host never waits for the step that it has just given: whether one was applied it hears when the next is on its
    way. One with a NaN changes nothing; one that had no room for all entries of its codes changes nothing either, nor
    do those behind it, until they are repeated with room for all.
    """

    def __init__(
        self,
        coder: SparseCoder,
        objectives: dict[str, Objective],
        optim: OptimConfig,
        schedule: Schedule,
        mesh: Mesh | None = None,
    ) -> None:
        """Takes a coder, or this rank's shard of it, and the ranks that train it; none: all, each the whole of it."""
        self.coder, self.optim, self.schedule, self.mesh = coder, optim, schedule, mesh or of_data()
        self.objectives = {name: term for name, term in objectives.items() if term.weight}
        if coder.shard:
            check_cut(self.objectives)
        self.cut = coder.shard.cut if coder.shard else NO_LATENTS
        self.chooser = Chooser(coder, self.objectives, schedule.product_dtype, self.mesh)
        self.updater = Updater(coder, optim, self.chooser.rounded, self.mesh)
        self.average = Average(coder, optim.ema) if optim.ema else None
        device, float64 = coder.W_enc.device, {"dtype": torch.float64, "device": summed_on(coder.W_enc.device)}
        self.tokens_since_fired = torch.zeros(coder.spec.d_sae, dtype=torch.int64, device=device)
        self.density = torch.zeros(coder.spec.d_sae, **float64)
        self.tokens_seen = torch.zeros((), **float64)
        self.residual_variance = torch.full((), coder.spec.variance or 1.0, **float64)
        self._active = torch.zeros(len(self.objectives), dtype=torch.int64, device=device)
        self.multipliers = {name: torch.ones((), **float64) for name in self.objectives}
        self._stuck = torch.zeros((), dtype=torch.bool, device=device)
        self._on_its_way: list[tuple[Planned, Figures]] = []
        self.count, self.tokens_before = 0, 0  # of the steps given so far, and of the last of them
        self.heard: dict[int, Heard] = {}
        self.heard[-2] = self.heard[-1] = Heard(at_first(coder.spec), at_first(coder.whole))

    @property
    def dead(self) -> Bool[Tensor, "d_sae"]:
        """Returns which latents have not fired for `dead_after_tokens` tokens."""
        return self.tokens_since_fired >= self.schedule.dead_after_tokens

    @property
    def active_steps(self) -> dict[str, int]:
        """Returns at how many steps each loss term was not 0; it waits for the device."""
        return dict(zip(self.objectives, self._active.tolist(), strict=True))

    def step(self, batch: Batch | Tensor, index: int) -> Figures:
        """Begins step `index` on this rank's tokens and returns its figures, equal on every rank; to read them waits.

        Of an autoencoder the activations [n, d] alone will do. If an activation, a loss term or a gradient is not
        finite, nothing changes, and NonFiniteError says so when the figures are read or checked.
        """
        batch = batch if isinstance(batch, Batch) else Batch(batch, batch)
        before, n_tokens = self._counted(batch)
        then = self.heard[max(number for number in self.heard if number <= self.count - 2)]
        may_be_dead = then.may_be_dead(self.schedule.dead_after_tokens, self.tokens_before, self.coder.whole.d_sae)
        planned = Planned(batch, index, before, n_tokens, then, may_be_dead)
        figures = self._given(planned)
        self._on_its_way.append((planned, figures))
        self.count, self.tokens_before = self.count + 1, n_tokens
        if len(self._on_its_way) > 1:
            self._listen()
        return figures

    def settle(self) -> None:
        """Waits for the last step, so that what is saved or measured now is known to be whole."""
        while self._on_its_way:
            self._listen()

    def _listen(self) -> None:
        """Hears of the oldest step on its way; if it had no room, repeats it with room for all, and those behind it."""
        planned, figures = self._on_its_way[0]
        if figures.had_no_room():
            self._stuck = torch.zeros_like(self._stuck)
            figures.become(self._given(planned, careful=True))
            for behind, theirs in self._on_its_way[1:]:
                theirs.become(self._given(behind))
        del self._on_its_way[0]
        number = self.count - len(self._on_its_way) - 1
        older, last = self.heard.values()
        heard = figures.heard()
        self.heard = {number - 1: last, number: heard} if heard else {number - 1: older, number: last}

    def _given(self, planned: Planned, careful: bool = False) -> Figures:
        """Gives a step to the device and returns its figures to come; where `careful`, there is room for all."""
        n_tokens, progress = planned.n_tokens, planned.index / self.schedule.steps
        start = Start(self.dead, self.density, planned.may_be_dead, self.cut)
        begun = {name: term.begin(start) for name, term in self.objectives.items()}
        factors = {name: term.factor(progress, self.multipliers[name]) for name, term in self.objectives.items()}
        self.chooser.begin(progress, n_tokens, planned.before, begun, None if careful else planned.heard.per_token)
        dense = self.chooser.dense(self.coder.whole.d_sae if careful else planned.heard.everywhere)
        sums, sink = self._backward(planned.batch, n_tokens, factors, begun, dense)
        collectives.total_(*self.updater.finish(sink), *sums.tensors(), over=self.mesh.data)
        collectives.total_(*self.updater.over_latents(), *sums.over_latents(), over=self.mesh.latents)
        norms = self.updater.norms()
        watched = (*norms.values(), *sums.terms.values(), sums.square)
        finite = torch.stack([in_float64(x) for x in watched]).isfinite().all().to(self._stuck.device)
        applies = finite & (sums.failed == 0) & ~self._stuck
        self._stuck = self._stuck | (sums.failed > 0)
        rate = self.optim.rate(self.coder.whole.d_sae, planned.index, self.schedule.steps)
        self.updater.update(norms, rate, applies)
        if self.average:
            self.average.update(self.coder, applies)
        fired = collectives.total(sums.fired.sum(), self.mesh.latents)
        self._learn(sums, fired, n_tokens, applies)
        return self._figures(planned, sums, fired, norms, factors, rate, applies)

    def moves(self, ledger: Ledger) -> None:
        """Writes down what a step moves in which no token is left out; one that is repeated moves it once more."""
        sums, updater = Sums.zero(self.objectives, self.coder), self.updater
        moves_output(ledger, self.coder.d_out, self.coder.dtype)
        self.chooser.moves(ledger)
        updater.moves(ledger)
        for term in self.objectives.values():
            term.moves(ledger, self.coder)
        ledger.summed("data", *collectives.bytes_of_sums(*updater.exchanged(), *sums.tensors()))
        ledger.summed("latents", 8, *collectives.bytes_of_sums(*updater.over_latents(), *sums.over_latents()))
        ledger.gathered("data", 8)  # how many tokens each has
        ledger.gathered("latents", 32)  # counts, behind a sum of the entries that fire

    def _backward(
        self, batch: Batch, n_tokens: int, factors: dict[str, Tensor | float], begun: dict[str, Any], dense: bool
    ) -> tuple["Sums", Sink]:
        """Leaves the gradients of every micro-batch with a sink, and adds up what is reported of it."""
        coder, variance = self.coder, self.coder.spec.variance or 1.0
        sums = Sums.zero(self.objectives, coder)
        with self.updater.collecting() as sink:
            for number, (look, target, chosen) in enumerate(self._passes(batch, dense)):
                run = coder.run(look, chosen.by_rule, target)
                spliced = None
                if batch.spliced is not None:
                    spliced = lambda made, i=number, how=run.how: batch.spliced(i, undo(made, how))  # type: ignore[misc]  # noqa: E731
                view = Step(coder, run, target, n_tokens, variance, self.residual_variance, spliced=spliced)
                losses = {
                    name: term.loss(replace(view, begun=begun[name], beside=chosen.beside.get(name)))
                    for name, term in self.objectives.items()
                }
                loss = torch.stack([losses[name] * _beside(factors[name], losses[name]) for name in losses]).sum()
                if loss.requires_grad:  # a term that does not apply at this step is a constant
                    loss.backward()
                with torch.no_grad():
                    sums.error += coder.weighted(run.error).sum(0)
                    sums.square += run.square.detach()
                    sums.fired += run.latents.fired()
                    for name, loss in losses.items():
                        sums.terms[name] += loss.detach()
        entries, failed = self.chooser.entries(), self.chooser.failed()
        sums.entries += sums.fired.sum() if entries is None else entries
        if failed is not None:
            sums.failed += failed
        if batch.gradients is not None:  # they choose, and leave no trace in a loss
            sums.failed += 0 * batch.gradients.abs().amax() if len(batch.gradients) else 0
        return sums, sink

    def _learn(self, sums: Sums, fired: Int[Tensor, ""], n_tokens: int, applies: Bool[Tensor, ""]) -> None:
        """Takes what a step has shown into the state that later steps, and a resume, start from, if it was applied.

        `fired` counts the entries of all latents.
        """
        shown = torch.stack([loss != 0 for loss in sums.terms.values()])
        self._active = self._active + (shown & applies)
        if not n_tokens:
            return
        self.chooser.finish(applies)
        there = applies.to(self.density.device)
        since = torch.where(sums.fired > 0, 0, self.tokens_since_fired + n_tokens)
        self.tokens_since_fired = torch.where(applies, since, self.tokens_since_fired)
        decay = self.tokens_seen / (self.tokens_seen + n_tokens)  # at first, all tokens alike
        decay = decay.clamp_max(math.exp(-n_tokens / self.schedule.dead_after_tokens))
        density = torch.lerp(in_float64(sums.fired) / n_tokens, self.density, decay)
        self.density = torch.where(there, density, self.density)
        self.tokens_seen = self.tokens_seen + n_tokens * there
        least = LEAST_RESIDUAL * (self.coder.spec.variance or 1.0)
        self.residual_variance = torch.where(there, sums.spread(n_tokens).clamp_min(least), self.residual_variance)
        l0 = in_float64(fired) / n_tokens
        for name, term in self.objectives.items():
            now = self.multipliers[name]
            self.multipliers[name] = torch.where(there, term.adapted(now, l0), now)

    def _counted(self, batch: Batch) -> tuple[int, int]:
        """Returns the numbers of tokens of the ranks before this one, and of all."""
        data = self.mesh.data
        if not data.moves:
            return 0, len(batch.x)
        found = collectives.of_every_rank(torch.tensor([len(batch.x)], device=batch.x.device), data)
        counts = [own for (own,) in found]
        return sum(counts[: data.rank]), sum(counts)

    def _passes(self, batch: Batch, dense: bool) -> Iterator[tuple[Look, Float[Tensor, "m d_out"], Chosen]]:
        """Yields what is seen, aimed at and chosen, of every micro-batch."""
        coder = self.coder
        size = self.schedule.micro_batch_tokens or max(1, len(batch.x))
        if dense:  # what is held of a token is as much as its pre-activations
            size = min(size, self.chooser.tile)
        sizes = list(batch.sizes or [len(part) for part in batch.x.split(size)] if len(batch.x) else [])
        beside = [None] * len(sizes) if batch.gradients is None else batch.gradients.split(sizes)
        if self.chooser.rule.batch_wide:
            looks = [coder.look(part) for part in batch.x.split(sizes)] if sizes else []
            found = zip(looks, self.chooser.whole_batch(looks), strict=True)
        else:
            looked = map(coder.look, batch.x.split(sizes) if sizes else [])
            found = ((look, self.chooser.choose(look, g)) for look, g in zip(looked, beside, strict=True))
        targets = batch.target.split(sizes) if sizes else []
        for (look, chosen), target in zip(found, targets, strict=True):
            yield look, coder.spec.normalize_target(target.to(look.x)), chosen

    def _figures(
        self,
        planned: Planned,
        sums: Sums,
        fired: Int[Tensor, ""],
        norms: dict[str, Tensor],
        factors: dict[str, Tensor | float],
        rate: float,
        applies: Bool[Tensor, ""],
    ) -> Figures:
        """Returns the figures of a step that the device has been given."""
        weights = {name: term.weight for name, term in self.objectives.items()}
        states, dead, n_tokens = self.chooser.states, self.dead, planned.n_tokens
        nearly = self.tokens_since_fired + 2 * n_tokens >= self.schedule.dead_after_tokens
        idle = self.tokens_since_fired.max() if len(dead) else self.tokens_since_fired.new_zeros(())
        counts = torch.stack([dead.sum(), nearly.sum(), sums.entries.to(idle), idle])
        every = collectives.stacked(counts, self.mesh.latents)
        n_dead, may_be_dead, entries, _ = every.sum(0)
        reporting = [term for term in self.objectives.values() if type(term).report is not Objective.report]
        about = (self.cut.whole(self.density), self.cut.whole(dead)) if reporting else ()
        variance, tokens = self.coder.spec.variance or 1.0, max(1, n_tokens)  # the norm filter may leave nothing

        def read(found: dict[str, float]) -> dict[str, float]:
            reports = [term.report(*about) for term in reporting]
            factor = {name: found[f"weight.{name}"] for name in weights}
            return {
                "loss": sum(found[f"loss.{name}"] * factor[name] for name in weights),
                **{f"loss.{name}": found[f"loss.{name}"] for name in weights},
                **{f"weight.{name}": w for name, w in factor.items() if w != weights[name]},
                "fvu": found["square"] / (tokens * variance),
                "l0": found["fired"] / tokens,
                "dead_share": found["dead_share"],
                **{name: value for report in reports for name, value in report.items()},
                **self.chooser.report(states),
                "lr": rate,
                "grad_norm": found["grad_norm"],
                "tokens": n_tokens,
            }

        values = {
            **{f"loss.{name}": loss for name, loss in sums.terms.items()},
            **{f"weight.{name}": factor for name, factor in factors.items()},
            **{f"gradient.{name}": norm for name, norm in norms.items()},
            "square": sums.square,
            "fired": fired,
            "failed": sums.failed,
            "applies": applies,
            "entries": sums.entries,
            "everywhere": entries,
            "dead_share": n_dead / self.coder.whole.d_sae,
            "grad_norm": self.updater.total(norms),
            "idle": every[:, 3].max(),
            "nearly": may_be_dead,
        }
        return Figures(values, read, planned.batch, n_tokens, self.settle, self.mesh.data)

    def trained(self) -> SparseCoder:
        """Returns the coder to evaluate and save: a calibrated copy, with averaged weights if there is an average.

        Of a shard, the same part. It shares nothing with the coder in training.
        """
        self.settle()
        numbers, thresholds = self.chooser.calibrated()
        spec = deepcopy(self.coder.whole).with_(calibration=numbers)
        copy = empty_part(spec, self.mesh.latents, self.coder.W_enc.device, self.coder.W_enc.dtype)
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
        self.settle()
        named = {name: parameter.detach() for name, parameter in self.coder.named_parameters()}
        return named | {"tokens_since_fired": self.tokens_since_fired, "density": self.density}

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Returns (tensors, plain values) from which `load_state` continues bit for bit; waits for the last step."""
        self.settle()
        tensors = {"tokens_since_fired": self.tokens_since_fired, "density": self.density}
        tensors |= {f"selection.{name}": value for name, value in self.chooser.state().items()}
        for name, parameter in self.coder.named_parameters():
            tensors[f"weight.{name}"] = parameter.detach()
            for key, value in self.updater.state[name].items():
                tensors[f"{self.optim.kind}.{key}.{name}"] = value
        if self.average:
            tensors |= {f"average.{name}": value for name, value in self.average.sums.items()}
        values = {
            "residual_variance": float(self.residual_variance),
            "active_steps": self.active_steps,
            "multipliers": {name: float(value) for name, value in self.multipliers.items()},
            "tokens_seen": int(self.tokens_seen),
            "average_steps": int(self.average.steps) if self.average else 0,
            "tokens_before": self.tokens_before,
            "heard": [heard.to_json() for heard in self.heard.values()],
        }
        return tensors, values

    def rows(self, name: str, tensor: Tensor) -> HeldRows | None:
        """Returns which rows this rank has of a tensor of `state`; None: all."""
        shard, (kind, _, of) = self.coder.shard, name.partition(".")
        if shard is None or not tensor.dim():
            return None
        if kind == "selection":
            group = shard.groups[int(of.partition(".")[0])]
            return HeldRows(group.pieces(), group.latents)
        return shard.rows(name.rpartition(".")[2])

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> None:
        """Continues from what `state` returned."""
        self.tokens_since_fired = tensors["tokens_since_fired"].to(self.tokens_since_fired.device)
        self.density = tensors["density"].to(self.density.device)
        own = "selection."
        self.chooser.load_state({n.removeprefix(own): tensors[n] for n in tensors if n.startswith(own)})
        for name, parameter in self.coder.named_parameters():
            parameter.copy_(tensors[f"weight.{name}"])
            for key, value in self.updater.state[name].items():
                value.copy_(tensors[f"{self.optim.kind}.{key}.{name}"])
        for name, rounded in self.chooser.rounded.items():
            rounded.copy_(self.coder.get_parameter(name))
        if self.average:
            for name, value in self.average.sums.items():
                value.copy_(tensors[f"average.{name}"])
            self.average.steps.fill_(values["average_steps"])
        self.residual_variance = torch.full_like(self.residual_variance, values["residual_variance"])
        self._active = torch.tensor([values["active_steps"][n] for n in self.objectives], device=self._active.device)
        for name, found in values["multipliers"].items():
            self.multipliers[name] = torch.full_like(self.multipliers[name], found)
        self.tokens_seen = torch.full_like(self.tokens_seen, values["tokens_seen"])
        if "heard" in values:
            self.tokens_before = values["tokens_before"]
            heard = [Heard(**{"everywhere": found["per_token"], **found}) for found in values["heard"]]
        else:  # written by a version that waited for every step
            idle = torch.cat([self.tokens_since_fired.new_zeros(1), self.tokens_since_fired]).amax()
            heard = [replace(self.heard[-1], idle=int(collectives.largest(idle, self.mesh.latents)))] * 2
        self.heard.clear()
        self.count, (self.heard[-2], self.heard[-1]) = 0, heard


def _beside(factor: Tensor | float, loss: Tensor) -> Tensor | float:
    return factor.to(loss) if isinstance(factor, Tensor) else factor
