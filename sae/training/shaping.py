"""The mesh of a run, found before anything loads: the one that its config names, or the best of so many ranks.

What a mesh is worth depends on how fast its ranks reach each other, which nobody knows beforehand. So of the meshes
that fit a rank's memory, those are looked at whose busiest rank computes hardly more than that of any other; of these,
the one that moves the fewest bytes in a step is the best.
"""

from contextlib import suppress
from dataclasses import dataclass, replace

import psutil
from torch._subclasses import FakeTensorMode

from sae.base.errors import ConfigError
from sae.base.units import data_size
from sae.lm.devices import memory_of_rank, resolve_device
from sae.lm.hooks import sites_of_model
from sae.lm.models import untrained
from sae.lm.site import SECOND
from sae.parallel import agreement
from sae.parallel.mesh import ParallelConfig, Shape
from sae.stream.tensors import stored_at
from sae.training import flops
from sae.training.config import TrainConfig
from sae.training.dealing import dealt, shape_for
from sae.training.footprint import Passes, footprint, weights_dtype
from sae.training.planning import CoderPlan, plan_run, plan_tensors, with_model_named
from sae.training.subject import of_tensors
from sae.training.traffic import traffic

LATER = 80_000_000  # measured: model code, the tokenizer and pictures, which come after the estimate
NEAR = 1.1
"""Times the least work of the busiest rank, up to which that of another mesh is as good."""


@dataclass(frozen=True)
class Planned:
    """What a run reads and trains, of tensors that hold no data."""

    passes: Passes
    widths: dict[str, int]
    """By site."""
    plans: list[CoderPlan]


@dataclass(frozen=True)
class Deal:
    """A mesh, which of its groups along sites trains which coder, and why it is that one."""

    shape: Shape
    groups: list[int]
    reason: str = ""


def planned(config: TrainConfig, trust_remote_code: bool = False) -> Planned:
    """Returns what a run reads and trains; ConfigError for what the run itself would refuse."""
    if config.activations.source == "tensors":
        stored = with_model_named(config, stored_at(config.activations.path))
        sites, widths, plans = plan_tensors(config, stored)
        of_tensors(config, stored, [site.name for site in sites], resolve_device(config.model.device))
        return Planned(Passes([]), widths, plans)
    with FakeTensorMode():
        lm = untrained(config.model, trust_remote_code)
        second = untrained(config.second_model, trust_remote_code) if config.second_model.name else None
        sites, widths, plans = plan_run(config, lm, second)
        for model in (lm, second) if second else (lm,):
            for weight in model.model.parameters():
                weight.data = weight.data.to(weights_dtype(config))  # as it will be loaded
    models = [(model, sites_of_model(sites, tag)) for model, tag in ((lm, ""), (second, SECOND)) if model]
    return Planned(Passes(models), widths, plans)


def process_bytes() -> int:
    """Returns the bytes of a rank that do not depend on the config: the interpreter and its libraries."""
    return psutil.Process().memory_info().rss + LATER


def room_of_rank(config: TrainConfig) -> int:
    """Returns the bytes of memory that a rank has where it trains, if each is like this process."""
    return memory_of_rank(resolve_device(config.model.device), "device_map" in config.model.kwargs)


def shape_of_run(config: TrainConfig, n: int, trust_remote_code: bool = False, passed: bool = False) -> Shape:
    """Returns the mesh of the n ranks of a run, which all must ask for; ConfigError as `deal` raises it.

    `passed` says that a model or activations were passed beside the config, of which no estimate knows.
    """
    if config.parallel.named:
        return shape_for(config, n)
    open_ = f"parallel.{'latents' if config.parallel.sites else 'sites'}: 0 leaves the choice to an estimate"
    if passed:
        raise ConfigError(
            f"{open_}, which knows models and activations by their names alone; name a number, or pass neither"
        )

    def decide() -> dict[str, int]:
        try:
            return vars(deal(config, planned(config, trust_remote_code), n).shape)
        except ConfigError:
            raise
        except Exception as error:  # of a model that cannot be traced without its weights
            raise ConfigError(f"{open_}, and there is none ({_line(error)}); name a number") from error

    return Shape(**agreement.agreed(decide))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def deal(config: TrainConfig, found: Planned, n: int) -> Deal:
    """Returns the mesh of n ranks that a config names, or the best of what it leaves open.

    ConfigError if there is none.
    """
    possible = _possible(config, found, n)
    if config.parallel.named:
        return possible[0]
    room = room_of_rank(config)
    held = [_held(config, found, one) for one in possible]
    fitting = [one for one, size in zip(possible, held, strict=True) if size <= room]
    if not fitting:
        why = f"none of {len(possible)} meshes fits the {data_size(room)} of a rank; this one takes least"
        return replace(possible[held.index(min(held))], reason=why)
    work = [_work(config, found, one) for one in fitting]
    even = [one for one, size in zip(fitting, work, strict=True) if size <= NEAR * min(work)]
    moved = {one.shape: traffic(config, found.plans, one.shape, one.groups).received[1] for one in even}
    best = min(even, key=lambda one: (moved[one.shape], one.shape.latents, one.shape.sites))
    along_data = moved.get(Shape(data=n), 0)
    beside = f" (data alone {data_size(along_data)})" if along_data > moved[best.shape] else ""
    why = f"of {len(possible)} meshes {len(fitting)} fit the {data_size(room)} of a rank, {len(even)} share work evenly"
    why += f"; of these it moves least, {data_size(moved[best.shape])} to a rank in a step{beside}"
    return replace(best, reason=why)


def _possible(config: TrainConfig, found: Planned, n: int) -> list[Deal]:
    """Returns the meshes of n ranks that agree with what a config names; ConfigError if there is none."""
    said, possible = config.parallel, []
    least = replace(config, parallel=ParallelConfig(said.sites or 1, said.latents or 1))
    shape_for(least, n)  # raises what is wrong with all of them
    for sites in [said.sites] if said.sites else range(1, len(found.plans) + 1):
        for latents in [said.latents] if said.latents else range(1, n // sites + 1):
            if n % (sites * latents) == 0:
                named = replace(config, parallel=ParallelConfig(sites, latents))
                with suppress(ConfigError):  # of coders that cannot be cut
                    shape = shape_for(named, n)
                    possible.append(Deal(shape, dealt(named, found.passes.models, found.plans, shape)))
    if not possible:
        dealt(least, found.passes.models, found.plans, shape_for(least, n))  # raises why
    return possible


def _held(config: TrainConfig, found: Planned, one: Deal) -> int:
    """Returns the most bytes that any rank of a mesh holds."""
    parts = [footprint(config, found.passes, found.plans, one.shape, one.groups, g) for g in range(one.shape.sites)]
    return process_bytes() + max(part.peak(measures=not group) for group, part in enumerate(parts))


def _work(config: TrainConfig, found: Planned, one: Deal) -> float:
    """Returns the FLOPs of a step of the busiest rank, of every token of a batch."""
    loads = [0.0] * one.shape.sites
    for plan, group in zip(found.plans, one.groups, strict=True):
        loads[group] += flops.of_coder(config, found.passes.models, plan)
    reading = flops.reading(config, found.passes.models) / one.shape.size if found.passes.models else 0.0
    return reading + max(loads) / (one.shape.data * one.shape.latents)
