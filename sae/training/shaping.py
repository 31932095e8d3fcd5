"""The mesh of a run, found before anything loads: the one that its config names, or the best of so many ranks.

What a mesh is worth depends on how fast its ranks reach each other, which nobody knows beforehand. So of the meshes
that fit a rank's memory, those are looked at whose busiest rank computes hardly more than that of any other; of these,
those that move hardly more bytes in a step than any other; and of these the one of fewest collectives is the best.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache

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
from sae.parallel.ranks import Share
from sae.stream.tensors import stored_at
from sae.training import flops
from sae.training.config import TrainConfig
from sae.training.dealing import dealt, shape_for, units
from sae.training.footprint import Part, Passes, footprint, weights_dtype
from sae.training.planning import CoderPlan, plan_run, plan_tensors, with_model_named
from sae.training.subject import of_tensors
from sae.training.traffic import traffic

LATER = 80_000_000  # measured: model code, the tokenizer and pictures, which come after the estimate
NEAR = 1.1
"""Times the least, up to which the work of the busiest rank, or what it moves, is as good."""


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


@cache
def process_bytes() -> int:
    """Returns the bytes of a rank that do not depend on the config: the interpreter and its libraries.

    Those of the first time that it is asked, so that all estimates of a process choose alike.
    """
    return psutil.Process().memory_info().rss + LATER


def room_of_rank(config: TrainConfig) -> int:
    """Returns the bytes of memory that a rank has where it trains, if each is like this process."""
    return memory_of_rank(resolve_device(config.model.device), "device_map" in config.model.kwargs)


def mesh_of_run(
    config: TrainConfig, n: int, trust_remote_code: bool = False, passed: bool = False
) -> tuple[Shape, str]:
    """Returns the mesh of the n ranks of a run, and why it is that one; all must ask. ConfigError as `deal` raises it.

    `passed` says that a model or activations were passed beside the config, of which no estimate knows.
    """
    said = config.parallel
    if said.named or n == 1:
        return shape_for(replace(config, parallel=ParallelConfig(said.sites or 1, said.latents or 1)), n), ""
    left = f"parallel.{'latents' if said.sites else 'sites'}: 0 leaves the choice to an estimate"
    if passed:
        raise ConfigError(
            f"{left}, which knows models and activations by their names alone; name a number, or pass neither"
        )

    def decide() -> tuple[dict[str, int], str]:
        try:
            found = deal(config, planned(config, trust_remote_code), n)
        except ConfigError:
            raise
        except Exception as error:  # of a model that cannot be traced without its weights
            told = " ".join(str(error).split())[:200]
            raise ConfigError(f"{left}, and there is none ({told}); name a number") from error
        return vars(found.shape), found.reason

    shape, reason = agreement.agreed(decide)
    return Shape(**shape), reason


def deal(config: TrainConfig, found: Planned, n: int) -> Deal:
    """Returns the mesh of n ranks that a config names, or the best of what it leaves open.

    ConfigError if there is none.
    """
    possible = _possible(config, found, n)
    if len(possible) == 1:
        return possible[0]
    room = room_of_rank(config)
    held = [_held(config, found, one) for one in possible]
    fitting = [one for one, size in zip(possible, held, strict=True) if size <= room]
    if not fitting:
        why = f"none of {len(possible)} meshes fits the {data_size(room)} of a rank; this one takes least"
        return replace(possible[held.index(min(held))], reason=why)
    works = [work(config, found, one) for one in fitting]
    even = [one for one, size in zip(fitting, works, strict=True) if size <= NEAR * min(works)]
    moved = {one.shape: traffic(config, found.plans, one.shape, one.groups) for one in even}
    most = {shape: told.received[1] for shape, told in moved.items()}
    frugal = [one for one in even if most[one.shape] <= NEAR * min(most.values())]
    best = min(frugal, key=lambda one: (moved[one.shape].collectives[1], most[one.shape]))
    along_data = most.get(Shape(data=n), 0)
    beside = f" (data alone {data_size(along_data)})" if along_data > most[best.shape] else ""
    why = f"of {len(possible)} meshes {len(fitting)} fit the {data_size(room)} of a rank, {len(even)} share work evenly"
    why += f"; of these it moves least, at the most {data_size(most[best.shape])} to a rank in a step{beside}"
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


def work(config: TrainConfig, found: Planned, one: Deal) -> float:
    """Returns the FLOPs of a step of the busiest rank, by the token of a batch: its part of it, and of its coders.

    Every rank along latents runs the model, where a loss does, on all tokens of its group.
    """
    shape, models, (count, _) = one.shape, found.passes.models, units(config)
    reads, trains = (len(Share(n - 1, n).of(count)) / count for n in (shape.size, shape.data))
    loads = []
    for group in range(shape.sites):
        own = [plan for plan, place in zip(found.plans, one.groups, strict=True) if place == group]
        load = sum(flops.SPARSELY * flops.encoding(plan) * Part.of(plan, shape).latents / plan.d_sae for plan in own)
        loads.append(load + (flops.end_to_end(config, models, own, shape.data) if config.needs_rows else 0.0))
    return (flops.reading(config, models) * reads if models else 0.0) + max(loads) * trains
