"""What a run will take, before anything loads: parameters, memory, disk, FLOPs, bytes between ranks, and time.

The language model is built of fake tensors, which know every shape and hold no data, so widths and parameter counts are
exact; sites are resolved and a pass is traced on it, so a mistyped or unused hook is found here as well.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from sae.base.errors import ConfigError
from sae.base.room import Need, check_room, existing, taken
from sae.base.units import data_size, duration
from sae.lm.devices import MAPS, resolve_device
from sae.lm.models import DTYPES, LanguageModel, ModelConfig
from sae.lm.placement import bytes_by_device
from sae.parallel.ledger import Moved
from sae.parallel.mesh import Shape
from sae.parallel.ranks import world_size
from sae.training import flops as flops_of
from sae.training.config import TrainConfig
from sae.training.dealing import shape_for
from sae.training.footprint import FLOAT, Footprint, copies, footprint
from sae.training.planning import CoderPlan
from sae.training.shaping import deal, planned, process_bytes, room_of_rank, work
from sae.training.traffic import Traffic, traffic

LESS = {
    "model": "whole on every rank, unless model.kwargs.device_map spreads it over several devices",
    "coders": "fewer, or parts of them, with more parallel.sites or parallel.latents",
    "pool": "less with more ranks, or fewer activations.block_rows",
    "step": "less with more ranks along data, or fewer micro_batch_tokens",
    "snapshot": "less with more ranks",
    "statistics": "of rank 0; less with fewer activations.statistics_tokens",
    "evaluation": "less where coders are dealt or cut, by parallel.sites or parallel.latents",
}
"""By what holds memory: what makes it less."""


@dataclass(frozen=True)
class Estimate:
    """Sizes of a run. Bytes and FLOPs follow from shapes; seconds are those of the FLOPs alone.

    Measured on the quickstart, in CPU time with one thread: a run takes 2.3 times as long, of two ranks each 2.7 times.
    """

    shape: Shape
    """The mesh of the ranks."""
    widths: dict[str, int]
    """Activation width by site."""
    lm_parameters: int
    coder_parameters: int
    """Summed over all coders."""
    process: int
    """Bytes of one rank that do not depend on the config: the interpreter and its libraries."""
    footprint: Footprint
    """Of rank 0."""
    largest: Footprint
    """Of a rank of the group along sites that holds most."""
    room: int
    """Bytes of memory that a rank has where it trains, if each is like this process."""
    disk: int
    """Bytes in the run's folder, at the most at one time."""
    free: int
    """Bytes of disk that are free there."""
    cached: int
    """Bytes in the cache, if the text is as long as the run is and nothing of it is there yet."""
    groups: dict[str, int]
    """By coder, the place along sites of the ranks that train it."""
    flops: float
    """Of all ranks, but for what ranks along latents compute alike."""
    busiest: float
    """Of the rank that has the most to do."""
    flops_per_s: float
    """Of one rank, as measured here."""
    steps: int
    traffic: Traffic
    reason: str = ""
    """Why the mesh is what it is, where it was to be found."""
    placed: str = ""
    """Where the weights of models go that are spread or quantized, and what of it is not known before."""

    @property
    def ranks(self) -> int:
        """Returns how many there are."""
        return self.shape.size

    @property
    def memory(self) -> dict[str, int]:
        """Returns the bytes of one rank by what holds them, each part at its worst: not all of it at once."""
        return {"process": self.process, **self.footprint.parts()}

    @property
    def peak_memory(self) -> int:
        """Returns the estimated peak in bytes of rank 0, which also measures, before step 0."""
        return self.process + self.footprint.peak(measures=True)

    @property
    def peak_memory_others(self) -> int:
        """Returns the same of the other rank that needs the most."""
        return self.process + self.largest.peak(measures=False)

    @property
    def compute_s(self) -> float:
        """Returns the seconds of a step of the busiest rank, at the measured speed, the evaluation's shared out."""
        return self.busiest / self.flops_per_s / self.steps

    @property
    def seconds(self) -> float:
        """Returns the seconds of the run without what ranks wait for each other."""
        return self.compute_s * self.steps

    def to_json(self) -> dict[str, object]:
        """Returns all parts."""
        found = {
            name: value
            for name, value in vars(self).items()
            if name not in ("footprint", "largest", "traffic", "process", "shape")
        }
        moved = {name: getattr(self.traffic, name) for name in ("sent", "received", "collectives")}
        moved["by_axis"] = {axis: vars(one) for axis, one in self.traffic.by_axis.items()}
        return found | {
            "ranks": self.ranks,
            "shape": vars(self.shape),
            "memory": self.memory,
            "memory_largest": {"process": self.process, **self.largest.parts()},
            "peak_memory": self.peak_memory,
            "peak_memory_others": self.peak_memory_others,
            "traffic": moved,
            "compute_s": self.compute_s,
            "seconds": self.seconds,
        }

    def lines(self) -> list[str]:
        """Returns the estimate as lines for people."""
        parts = ", ".join(f"{name} {data_size(value)}" for name, value in self.memory.items())
        peak = f"{data_size(self.peak_memory)} at the peak"
        if self.ranks > 1:
            peak += f" of rank 0, at most {data_size(self.peak_memory_others)} of any other"
        return [
            f"sites        {', '.join(f'{name} (d {d})' for name, d in self.widths.items())}",
            f"parameters   {self.lm_parameters:,} in the model, {self.coder_parameters:,} in the coders",
            f"memory       {peak} ({parts})",
            *([f"placed       {self.placed}"] if self.placed else []),
            f"disk         {data_size(self.disk)} in the run's folder, up to {data_size(self.cached)} in the cache",
            f"compute      {self.flops:.3g} FLOPs, {duration(self.seconds)} at the speed of a matrix product in this "
            "process; a run of small models takes two to three times as long",
            *(self._exchange() if self.ranks > 1 else []),
            *([self._limits()] if self.ranks > 1 or self._most > self.room else []),
        ]

    @property
    def _most(self) -> int:
        return max(self.peak_memory, self.peak_memory_others)

    def _limits(self) -> str:
        """Returns what there is of memory and of disk, the scarcer one first, and what takes most of the memory."""
        rank = self.footprint if self.peak_memory >= self.peak_memory_others else self.largest
        name, size = max(rank.parts().items(), key=lambda part: part[1])
        memory = f"{data_size(self._most)} of {data_size(self.room)} of memory, {data_size(size)} of that the {name}"
        disk = f"{data_size(self.disk)} of {data_size(self.free)} of disk"
        told = [f"{memory} ({LESS[name]})", disk]
        if self.disk * self.room > self._most * self.free:
            told.reverse()
        return f"limits       {'; '.join(told)}"

    def _exchange(self) -> list[str]:
        moved = self.traffic
        along = [f"  {axis:11}{_told(one)}, over {one.ranks} ranks" for axis, one in moved.by_axis.items()]
        return [
            f"mesh         {self.shape}{f': {self.reason}' if self.reason else ''}",
            f"exchange     {_told(moved)}, by a rank in a step",
            *along,
            f"seconds      {self.steps:,} steps x ({self.compute_s:.3g} s + {moved.received[1]:.4g} B / bandwidth + "
            f"{moved.collectives[1]:.0f} x latency)",
        ]


def _told(moved: Traffic | Moved) -> str:
    sent, came, count = (_between(*ends) for ends in (moved.sent, moved.received, moved.collectives))
    return f"{sent} B sent, {came} B received, in {count} collective{'s' * (count != '1')}"


def _between(least: float, most: float) -> str:
    return f"{least:,.0f}" if least == most else f"{least:,.0f} to {most:,.0f}"


def estimate(config: TrainConfig, trust_remote_code: bool = False, ranks: int | None = None) -> Estimate:
    """Returns what a config will take, on so many ranks like this process; none: on those of its group.

    ConfigError for what the run itself would refuse.
    """
    config.validate()
    ranks = world_size() if ranks is None else ranks
    if ranks < 1:
        raise ConfigError(f"--ranks: {ranks} must be at least 1")
    if config.parallel.named:
        shape_for(config, ranks)  # what cannot be is told before models are made
    found = planned(config, trust_remote_code)
    passes, plans = found.passes, found.plans
    mesh = deal(config, found, ranks)
    said = (config.model, config.second_model)
    held = [footprint(config, passes, plans, mesh.shape, mesh.groups, group) for group in range(mesh.shape.sites)]
    stored = _stored_tokens(config)
    disk, cached = disk_needed(config, plans, found.widths)
    flops = flops_of.reading(config, passes.models) * (stored or config.tokens) if passes.models else 0.0
    flops += flops_of.SPARSELY * config.tokens * sum(map(flops_of.encoding, plans))
    flops += (
        flops_of.end_to_end(config, passes.models, plans, mesh.shape.data) * config.tokens if config.needs_rows else 0
    )
    times = 1 + ((config.steps - 1) // config.eval.every_steps if config.eval.every_steps else 0)
    evaluated = flops_of.evaluation(config, passes.models, plans) * config.eval.tokens * times
    busiest = work(config, found, mesh) * config.tokens + evaluated / ranks
    if stored and passes.models:  # that are read once, however often a token is trained on
        busiest += flops_of.reading(config, passes.models) * (stored - config.tokens) / ranks
    device = resolve_device(config.model.device)
    return Estimate(
        mesh.shape,
        found.widths,
        sum(p.numel() for model, _ in passes.models for p in model.model.parameters()),
        sum(plan.parameters for plan in plans),
        process_bytes(),
        held[0],
        max(held, key=lambda one: one.peak(measures=False)),
        room_of_rank(config),
        disk,
        shutil.disk_usage(existing(Path(config.run_dir or "."))).free,
        cached,
        {plan.name: group for plan, group in zip(plans, mesh.groups, strict=True)},
        flops + evaluated,
        busiest,
        measured_flops_per_s(device),
        config.steps,
        traffic(config, plans, mesh.shape, mesh.groups),
        mesh.reason,
        "; ".join(filter(None, (placed(said[i], lm) for i, (lm, _) in enumerate(passes.models)))),
    )


def placed(said: ModelConfig, lm: LanguageModel) -> str:
    """Returns where the weights of a model go, in words; "" where they all go to one device, as they are.

    The memory of an estimate counts all of them, in the precision that is not quantized.
    """
    places, parts = said.kwargs.get("device_map"), list[str]()
    if isinstance(places, dict):
        sizes = bytes_by_device(lm.model, places)
        parts.append(", ".join(f"{data_size(size)} of the model on {device}" for device, size in sizes.items()))
    elif places in MAPS:
        parts.append(f"by what is free when the model is loaded (device_map {places}), which is not known before")
    if said.kwargs.get("quantization_config"):
        parts.append("quantized when it is loaded, to a size that is not known before")
    return f"{'; '.join(parts)}; the memory above counts all of it as one" if parts else ""


def disk_needed(config: TrainConfig, plans: list[CoderPlan], widths: dict[str, int]) -> tuple[int, int]:
    """Returns the bytes that a run writes at most, to its folder and to a cache that holds nothing of it yet.

    The oldest checkpoint goes when a new one is whole, so that there is one more than are kept.
    """
    saved = sum(int((copies(plan) - 1) * plan.parameters * FLOAT) + 16 * plan.d_sae for plan in plans)  # but gradients
    trained = sum(plan.parameters for plan in plans) * FLOAT
    cached = 8 * config.max_text_tokens + _stored_tokens(config) * token_bytes(config, widths)
    cached = 0 if config.activations.source == "tensors" else cached
    return (config.checkpoints.keep + 1) * saved + trained, cached


def check_disk(in_run: int, folder: Path) -> None:
    """Raises ConfigError if what a run writes to its folder, beside what is there already, does not fit the disk."""
    check_room(Need("run_dir", folder, in_run - taken(folder)))


def token_bytes(config: TrainConfig, widths: dict[str, int]) -> int:
    """Returns the size of what is kept of a token."""
    return sum(widths.values()) * DTYPES[config.activations.dtype].itemsize * (2 if config.gradient_loss else 1)


def _stored_tokens(config: TrainConfig) -> int:
    """Returns of how many tokens the activations are stored."""
    visited = min(config.tokens, config.max_text_tokens)
    return {"disk": config.max_text_tokens, "write_through": visited}.get(config.activations.source, 0)


def measured_flops_per_s(device: torch.device) -> float:
    """Returns the speed of a float32 matrix product on a device, timed for a thirtieth of a second."""
    a = torch.randn(512, 512, device=device)
    float((a @ a)[0, 0])  # the first product also starts threads
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 1 / 30:
        float((a @ a)[0, 0])
        count += 1
    return count * 2 * 512**3 / (time.perf_counter() - began)
