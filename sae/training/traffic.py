"""What the ranks of a run tell each other in a step: bytes and collectives, by the axes of the mesh.

    sites:   rows of activations, to the ranks whose coders want them
    latents: those rows, once more; lists of the best of a token, what parts of a coder make of outputs, what all share
    data:    gradients, with the loss terms, errors and firings; of Feature Choice, candidates
    team:    what batch-wide rules agree on, of data and latents together
    all:     whether any rank was asked to end

What moves says so where it does (`sae/parallel/ledger.py`): here it is asked, of coders that are shapes alone.
"""

from dataclasses import dataclass

from sae.coder.cutting import empty_part
from sae.lm.devices import resolve_device
from sae.lm.models import DTYPES
from sae.parallel.ledger import Ends, Ledger, Moved
from sae.parallel.mesh import Shape, last_of
from sae.parallel.ranks import Share
from sae.stream import exchange
from sae.training.choosing import tile_tokens
from sae.training.config import TrainConfig
from sae.training.dealing import row_bytes, units
from sae.training.planning import CoderPlan
from sae.training.trainer import CoderTrainer, Schedule

AXES = ("sites", "latents", "data", "team", "all")
TEXT = 2 * 4  # bytes of a position of text: a token, and whether it counts


@dataclass(frozen=True)
class Traffic:
    """What one rank moves in a step: of all, one of the group that moves most, with the most tokens and latents."""

    by_axis: dict[str, Moved]
    """Of those axes along which something moves."""

    @property
    def sent(self) -> Ends:
        """Returns the least and the most bytes that a rank hands over."""
        return self._total("sent")

    @property
    def received(self) -> Ends:
        """Returns the same of what comes to it."""
        return self._total("received")

    @property
    def collectives(self) -> Ends:
        """Returns by how many collectives."""
        return self._total("collectives")

    def _total(self, what: str) -> Ends:
        ends = [getattr(moved, what) for moved in self.by_axis.values()]
        return sum(least for least, _ in ends), sum(most for _, most in ends)


def traffic(config: TrainConfig, plans: list[CoderPlan], shape: Shape, groups: list[int] | None = None) -> Traffic:
    """Returns what a step moves, of coders so dealt to groups (none: all to the first).

    That is of one in which no token is left out, but for those of `skip_positions`.

    A step that has to be repeated, since it had no room for all entries, moves all but rows once more.
    """
    found = [_of_group(config, plans, shape, groups or [0] * len(plans), group) for group in range(shape.sites)]
    return max(found, key=lambda moved: moved.received[1])


def _of_group(config: TrainConfig, plans: list[CoderPlan], shape: Shape, groups: list[int], group: int) -> Traffic:
    count, of = units(config)
    kept = of - config.activations.skip_positions if config.needs_rows else of
    tokens = len(Share(shape.data - 1, shape.data).of(count)) * kept
    ledger = Ledger(shape, tokens, count * kept, DTYPES[config.precision])
    if config.needs_rows:
        exchange.moves(ledger, [TEXT * of] * shape.sites, group, count)
    exchange.moves(ledger, row_bytes(config, plans, groups, shape.sites), group, count, kept)
    for plan, place in zip(plans, groups, strict=True):
        if place == group:
            _of_coder(ledger, plan, config)
    ledger.summed("all", (4 if shape.sites == 1 else 8))  # flags: to end; that a coder of another group went wrong
    return Traffic({axis: ledger.moved[axis] for axis in AXES if axis in ledger.moved})


def _of_coder(ledger: Ledger, plan: CoderPlan, config: TrainConfig) -> None:
    """Writes down what the step of a coder moves."""
    mesh = last_of(ledger.shape)
    coder = empty_part(plan.spec, mesh.latents, "meta")
    schedule = Schedule(config.steps, config.dead_after, product_dtype=DTYPES[config.precision])
    trainer = CoderTrainer(coder, plan.coder.objectives, plan.optim, schedule, mesh)
    n, tile = ledger.tokens, tile_tokens(plan.d_sae, resolve_device(config.model.device))
    micro = -(-config.micro_batch_tokens // ledger.shape.data) or config.batch_tokens
    if config.needs_rows:
        context = config.text.context_length
        micro = max(1, micro // context) * (context - config.activations.skip_positions)
    ways = [(-(-n // micro), n // micro * -(-micro // tile) + -(-(n % micro) // tile))]
    if trainer.chooser.cuts() is not None and not config.needs_rows:  # where most entries are kept, a tile at a time
        fine = -(-n // min(micro, tile))
        ways.append((fine, fine))
    ledger.passes, ledger.tiles = ((min(ends), max(ends)) for ends in zip(*ways, strict=True))
    trainer.moves(ledger)
