"""Ranks that hold the same rows of a coder hold the same weights: the first one's at first, and compared from then on.

Each rank applies the same update to its own copy. Ranks that compute in different ways, such as two kinds of CPU, would
come to hold different weights without a word; so what they hold is compared, by a fingerprint, bit for bit.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from sae.base.errors import ConfigError
from sae.parallel import agreement, ranks
from sae.parallel.judging import Peer
from sae.parallel.ranks import Axis

CHUNK = 2**20  # elements hashed at once: their whole numbers are twice as large as the weights
ODD = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64)  # of splitmix64, as signed numbers


class ReplicaError(RuntimeError):
    """Two ranks hold different weights."""


def copy_of_first_(tensors: Iterable[Tensor], over: Axis) -> None:
    """Replaces the tensors by those of the first of some ranks, of the same shapes and types."""
    if over.moves:
        for tensor in tensors:
            with ranks.collective():
                dist.broadcast(tensor, group=over.group, group_src=0)


def check_alike(tensors: Mapping[str, Tensor], when: str) -> None:
    """Raises ReplicaError, on every rank, if two hold other tensors of one name: both and the tensors are named."""
    group = ranks.group()
    if group is None:
        return

    def differing(every: list[dict[str, int]]) -> list[str]:
        first: dict[str, tuple[Peer, int]] = {}
        for peer, found in zip(group.peers, every, strict=True):
            for name, value in found.items():
                first.setdefault(name, (peer, value))
            names = [name for name, value in found.items() if first[name][1] != value]
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                return [str(first[names[0]][0]), str(peer), ", ".join(names[:3]) + more]
        return []

    found = agreement.concluded({name: fingerprint(tensor) for name, tensor in tensors.items()}, differing)
    if found:
        raise ReplicaError(
            f"{found[0]} and {found[1]} hold different weights {when} ({found[2]}): they compute in different ways, or "
            "one has faulty memory; nothing of this step is saved"
        )


def check_machines(device: torch.device) -> None:
    """Raises ConfigError, on every rank, if they would not compute alike: another torch or, on CPUs, another kind.

    Kinds of GPU are left to `check_alike`: all of them round a single operation alike.
    """
    group = ranks.group()
    if group is None:
        return
    own = {"torch": torch.__version__, "kind of CPU": torch.backends.cpu.get_cpu_capability()}
    if device.type != "cpu":
        del own["kind of CPU"]

    def differing(every: list[dict[str, str]]) -> str:
        for peer, found in zip(group.peers, every, strict=True):
            for what, value in every[0].items():
                if found.get(what) != value:
                    remedy = "install one" if what == "torch" else "set ATEN_CPU_CAPABILITY=default for all ranks"
                    return f"{group.peers[0]} has {what} {value}, {peer} {found.get(what)}; {remedy}"
        return ""

    if found := agreement.concluded(own, differing):
        raise ConfigError(f"ranks: they would train different weights: {found}")


def fingerprint(tensor: Tensor) -> int:
    """Returns a number that differs, but for a chance of 2^-64, if any bit of the tensor does, or the order of them."""
    words = tensor.detach().contiguous().view(-1)
    words = words.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[words.element_size()])
    sums = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), CHUNK):
        part = words[start : start + CHUNK].long()
        mixed = (part ^ (torch.arange(start, start + len(part), device=words.device) * ODD[0])) * ODD[1]
        sums += (mixed ^ (mixed >> 31)).sum()
    return int(sums)
