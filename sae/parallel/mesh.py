"""Which rank does what: a mesh of three axes, in which every rank has its place.

    sites:   coders are dealt to so many groups of ranks, with the activations at the sites that they read and write
    data:    a group deals out the tokens of each batch
    latents: and cuts its coders, by rows, of which each rank holds a part

The ranks along one axis alone move tensors in a step (`collectives.py`); torch's DeviceMesh makes their groups and
nothing else. Rank numbers go through latents first, then data, then sites: what moves most moves between neighbors.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from sae.base.errors import ConfigError
from sae.parallel.ranks import ITSELF, Axis, Share, everyone


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks share the work; those that are left beside sites and latents share the tokens of a batch."""

    sites: int = 1
    """Groups of ranks among which the coders of a run are dealt, by cost; 0: as many as the estimate finds best."""
    latents: int = 1
    """Ranks over which each coder is cut, by its latents; 0: as many as the estimate finds best."""

    @property
    def named(self) -> bool:
        """Returns whether it leaves nothing to the estimate."""
        return bool(self.sites and self.latents)

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        for name in ("sites", "latents"):
            if getattr(self, name) < 0:
                raise ConfigError(f"parallel.{name}: {getattr(self, name)} must be at least 1, or 0 for the best")


@dataclass(frozen=True)
class Shape:
    """How many ranks there are along each axis."""

    sites: int = 1
    data: int = 1
    latents: int = 1

    def __str__(self) -> str:
        """Returns it for people."""
        return " x ".join(f"{name} {n}" for name, n in vars(self).items())

    @property
    def size(self) -> int:
        """Returns how many there are in all."""
        return self.sites * self.data * self.latents

    def place(self, rank: int) -> tuple[int, int, int]:
        """Returns where a rank stands on each axis."""
        return rank // (self.data * self.latents), rank // self.latents % self.data, rank % self.latents


@dataclass(frozen=True)
class Mesh:
    """The ranks along each axis through this one's place."""

    sites: Axis = ITSELF
    data: Axis = ITSELF
    latents: Axis = ITSELF
    team: Axis = ITSELF
    """Those that train the same coders: along data and latents."""

    @property
    def shape(self) -> Shape:
        """Returns how many there are along each axis."""
        return Shape(*(axis.world_size for axis in (self.sites, self.data, self.latents)))

    @property
    def cuts(self) -> bool:
        """Returns whether ranks hold different coders, or parts of them."""
        return self.sites.moves or self.latents.moves

    @property
    def lanes(self) -> Share:
        """Returns which of a batch's tokens this rank reads.

        So numbered, what comes together of the ranks along sites, and then along latents, is in the order of lanes.
        """
        shape = self.shape
        number = (self.data.rank * shape.latents + self.latents.rank) * shape.sites + self.sites.rank
        return Share(number, shape.sites * shape.data * shape.latents)


ALONE = Mesh()


def of_data() -> Mesh:
    """Returns the mesh of ranks that share the tokens of a batch, and nothing else."""
    return Mesh(data=everyone(), team=everyone())


def shape_of(parallel: ParallelConfig, n: int) -> Shape:
    """Returns the mesh of n ranks; ConfigError if sites and latents do not divide them."""
    both = parallel.sites * parallel.latents
    if n % both:
        raise ConfigError(
            f"parallel: sites {parallel.sites} x latents {parallel.latents} = {both} does not divide {n} "
            f"rank{'s' if n > 1 else ''}; start a multiple of {both}, or change them"
        )
    return Shape(parallel.sites, n // both, parallel.latents)


def made(shape: Shape) -> Mesh:
    """Returns the mesh of such a shape with a group of ranks for every axis; all ranks must call it.

    ConfigError if what moves tensors between them cannot do what an axis needs.
    """
    if shape.sites == shape.latents == 1:
        return of_data()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    axes = init_device_mesh(
        device, (shape.sites, shape.data, shape.latents), mesh_dim_names=("sites", "data", "latents")
    )
    teams = init_device_mesh(device, (shape.sites, shape.data * shape.latents), mesh_dim_names=("sites", "team"))
    wait = _timeout(dist.group.WORLD, device)  # DeviceMesh gives its groups torch's own, half an hour
    for mesh, name in ((axes, "sites"), (axes, "data"), (axes, "latents"), (teams, "team")):
        if wait:
            _set_pg_timeout(wait, mesh[name].get_group())
    sites, data, latents = (_axis(axes, name) for name in ("sites", "data", "latents"))
    if sites.moves:
        check_exchange(sites, device)
    return Mesh(sites, data, latents, team=_axis(teams, "team"))


def _timeout(group: ProcessGroup | None, device: str) -> timedelta | None:
    """Returns how long a collective of a group may take, if its backend tells."""
    options = getattr(group._get_backend(torch.device(device)), "options", None) if group else None
    return getattr(options, "_timeout", None)


def check_exchange(sites: Axis, device: str) -> None:
    """Raises ConfigError, on all ranks, if a backend has no all-to-all, which brings rows to groups along sites."""
    one_each = torch.zeros(sites.world_size, device=device)
    try:
        dist.all_to_all_single(torch.empty_like(one_each), one_each, group=sites.group)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"parallel.sites: {sites.world_size} groups exchange rows by all-to-all, which their backend cannot "
            f"({' '.join(str(error).split())[:120]}); join them by gloo or nccl, or set it to 1"
        ) from error


def last_of(shape: Shape) -> Mesh:
    """Returns the place of the last rank, which has as much as any, for what asks no other rank."""

    def last(n: int) -> Axis:
        return Axis(n - 1, n, ProcessGroup(n - 1, n)) if n > 1 else ITSELF  # type: ignore[call-arg]

    return Mesh(last(shape.sites), last(shape.data), last(shape.latents), last(shape.data * shape.latents))


def _axis(mesh: DeviceMesh, name: str) -> Axis:
    """Returns the ranks along one axis of torch's mesh; along one of a single rank nothing moves."""
    found = mesh[name]
    return Axis(found.get_local_rank(), found.size(), found.get_group()) if found.size() > 1 else ITSELF
