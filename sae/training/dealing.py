"""Which ranks train what: the mesh of a run, and its coders dealt over groups of ranks by what a step of each takes."""

from sae.base.errors import ConfigError
from sae.base.plugins import names
from sae.coder.shard import check_choice
from sae.encoders import Encoder
from sae.lm.models import DTYPES
from sae.objectives import check_cut
from sae.parallel.mesh import Shape, shape_of
from sae.stream.exchange import Wanted
from sae.training.config import TrainConfig
from sae.training.flops import Read, of_coder
from sae.training.planning import CoderPlan, check_ranks


def shape_for(config: TrainConfig, n: int) -> Shape:
    """Returns the mesh of n ranks that a config names.

    ConfigError if they do not make one, if one of them has no part of a batch, and for coders that cannot be cut.
    """
    shape = shape_of(config.parallel, n)
    check_ranks(config, n)
    for _, coder, _ in config.points() if shape.latents > 1 else ():
        check_choice(coder.selection, names(Encoder)[coder.encoder](), coder.width(1))
        check_cut({name: term for name, term in coder.objectives.items() if term.weight})
    return shape


def dealt(config: TrainConfig, models: Read, plans: list[CoderPlan], shape: Shape) -> list[int]:
    """Returns for every coder the place, along sites, of the ranks that train it: on every rank the same.

    The one that takes most comes first, and each goes to those that have least to do; of several such, to those that
    train coders of the same sites already, so that fewer rows move. ConfigError if some would have
    nothing. `models` are read where a coder runs them.
    """
    if shape.sites > len(plans):
        coders = f"{len(plans)} coder{'s' if len(plans) > 1 else ''}"
        raise ConfigError(
            f"parallel.sites: {shape.sites} groups of ranks for {coders}, of which each needs one; set it to "
            f"{len(plans)}{' or less' if len(plans) > 1 else ''}"
        )
    costs = [of_coder(config, models, plan) for plan in plans]
    sites = [frozenset(plan.sites) for plan in plans]
    loads, read, groups = [0.0] * shape.sites, [set[frozenset[str]]() for _ in range(shape.sites)], [0] * len(plans)
    for number in sorted(range(len(plans)), key=lambda i: (-costs[i], sites[:i].count(sites[i]), i)):
        group = min(range(shape.sites), key=lambda g: (loads[g], sites[number] not in read[g], g))
        loads[group] += costs[number]
        read[group].add(sites[number])
        groups[number] = group
    return groups


def wanted(plans: list[CoderPlan], groups: list[int], n: int) -> list[Wanted]:
    """Returns what each of n groups of ranks needs of a batch, to whose coders plans were dealt."""
    found = []
    for group in range(n):
        own = [plan for plan, of in zip(plans, groups, strict=True) if of == group]
        sites = {name: None for plan in own for name in plan.sites}
        graded = {site.name: None for plan in own if plan.coder.selection.gradient_loss for site in plan.writes}
        found.append(Wanted(tuple(sites), tuple(graded)))
    return found


def row_bytes(config: TrainConfig, plans: list[CoderPlan], groups: list[int], n: int) -> list[int]:
    """Returns, for each of n groups, the bytes that its ranks are sent of a token."""
    widths = {name: site.width for plan in plans for name, site in plan.sites.items()}
    size = DTYPES[config.activations.dtype].itemsize
    return [sum(widths[name] for name in (*w.activations, *w.gradients)) * size for w in wanted(plans, groups, n)]


def units(config: TrainConfig) -> tuple[int, int]:
    """Returns how many units of a batch ranks share, and of how many tokens each is: rows of text, or lanes."""
    if config.needs_rows:
        return config.batch_tokens // config.text.context_length, config.text.context_length
    return config.activations.lanes, config.batch_tokens // config.activations.lanes
