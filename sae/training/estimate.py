"""What a run will take, before anything loads: parameters, memory, disk, FLOPs and time.

The language model is built of fake tensors, which know every shape and hold no data, so widths and parameter counts are
exact; sites are resolved and a pass is traced on it, so a mistyped or unused hook is found here as well.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch._subclasses import FakeTensorMode

from sae.base.room import Need, check_room, taken
from sae.base.units import data_size, duration
from sae.evaluation.evaluation import rows_per_pass
from sae.lm.hooks import sites_of_model
from sae.lm.models import DTYPES, LanguageModel, resolve_device, untrained
from sae.lm.site import SECOND, Site
from sae.stream.tensors import stored_at
from sae.training.config import TrainConfig
from sae.training.planning import CoderPlan, plan_run, plan_tensors, with_model_named
from sae.training.subject import of_tensors

FLOAT = 4
LATER = 250_000_000  # measured: model code, plotting and the allocator's slack come after the estimate
MEASURED_BYTES = 24  # of one number while statistics are taken: three times in float64
GRAPH_LOGITS = 5  # of one token: clean, spliced, their softmaxes and a gradient
EVALUATION_COPIES = 7  # logits of one pass: clean, patched, and the float32 intermediates of CE and KL


@dataclass(frozen=True)
class Estimate:
    """Sizes of a run. Bytes, FLOPs and seconds; time is rough, the rest follows from shapes."""

    widths: dict[str, int]
    """Activation width by site."""
    lm_parameters: int
    coder_parameters: int
    """Summed over all coders."""
    memory: dict[str, int]
    """Peak bytes by what holds them, not all of it at once."""
    evaluated_midway: bool
    """Whether there is an evaluation while the pool of activations is still held."""
    disk: int
    """Bytes in the run's folder, at the most at one time."""
    cached: int
    """Bytes in the cache, if the text is as long as the run is and nothing of it is there yet."""
    flops: float
    seconds: float

    @property
    def peak_memory(self) -> int:
        """Returns the estimated peak of the process in bytes."""
        m = self.memory
        training = m["pool"] + max(m["step"], m["evaluation"] if self.evaluated_midway else 0)
        return m["process"] + m["model"] + m["coders"] + max(m["statistics"], training, m["evaluation"])

    def lines(self) -> list[str]:
        """Returns the estimate as lines for people."""
        parts = ", ".join(f"{name} {data_size(value)}" for name, value in self.memory.items())
        return [
            f"sites        {', '.join(f'{name} (d {d})' for name, d in self.widths.items())}",
            f"parameters   {self.lm_parameters:,} in the model, {self.coder_parameters:,} in the coders",
            f"memory       {data_size(self.peak_memory)} at the peak ({parts})",
            f"disk         {data_size(self.disk)} in the run's folder, up to {data_size(self.cached)} in the cache",
            f"compute      {self.flops:.3g} FLOPs, about {duration(self.seconds)} at this machine's measured speed",
        ]


def estimate(config: TrainConfig, trust_remote_code: bool = False) -> Estimate:
    """Returns what a config will take on this machine; ConfigError for what the run itself would refuse."""
    config.validate()
    models, width, plans = _planned(config, trust_remote_code)
    context, settings = config.text.context_length, config.activations
    row = token_bytes(config, width)
    block = settings.block_rows * context * row
    weights = sum(p.numel() for model, _ in models for p in model.model.parameters())
    device = resolve_device(config.model.device)
    dtype = DTYPES.get(config.model.dtype)
    itemsize = dtype.itemsize if dtype else FLOAT if device.type == "cpu" else 2
    micro = config.micro_batch_tokens or config.batch_tokens
    described = models[0][0].model.config.get_text_config() if models else None
    sizes = ("vocab_size", "num_hidden_layers", "hidden_size")
    vocabulary, layers, hidden = (getattr(described, name, 0) for name in sizes)
    parameters = sum(plan.parameters for plan in plans)
    ahead = settings.blocks_ahead(on_cpu=device.type == "cpu")
    tokens = settings.block_rows * context
    backward = tokens if config.gradient_loss else micro if config.needs_rows else 0
    graph = backward * (GRAPH_LOGITS * vocabulary + 20 * layers * hidden) * FLOAT
    memory = {
        "process": psutil.Process().memory_info().rss + LATER,
        "model": weights * itemsize,
        "coders": sum(_copies(plan) * plan.parameters for plan in plans) * FLOAT,
        "pool": config.batch_tokens * row if config.needs_rows else block * (settings.lanes + ahead),
        "step": max((3 * p.d_sae + 4 * (p.d_in + p.d_out)) * micro + p.parameters for p in plans) * FLOAT
        + 4 * tokens * hidden * FLOAT
        + graph,
        "statistics": (FLOAT * sum(width.values()) + MEASURED_BYTES * max(map(_measured, plans)))
        * min(settings.statistics_tokens, config.max_text_tokens),
        "evaluation": EVALUATION_COPIES * rows_per_pass(context, vocabulary) * context * vocabulary * FLOAT,
    }
    stored = _stored_tokens(config)
    disk, cached = disk_needed(config, plans, width)
    below = 3 * weights if config.gradient_loss else sum(_parameters_below(*model) for model in models)
    flops = 2.0 * below * (stored or config.tokens)
    encoders = sum(p.d_in // p.spec.n_blocks * p.d_sae * len(p.spec.encoding.maps) for p in plans)
    flops += 3.2 * config.tokens * encoders  # the dense encoder and, sparse, the rest
    flops += 8.0 * weights * config.tokens * len(plans) if config.needs_rows else 0  # clean, spliced and back
    flops += 8.0 * weights * config.eval.tokens * len(plans) if models and models[0][0].is_causal else 0
    seconds = flops / measured_flops_per_s(device)
    return Estimate(width, weights, parameters, memory, bool(config.eval.every_steps), disk, cached, flops, seconds)


def _planned(
    config: TrainConfig, trust_remote_code: bool
) -> tuple[list[tuple[LanguageModel, list[Site]]], dict[str, int], list[CoderPlan]]:
    """Returns the models with the sites that are read of each, the widths by site, and the coders."""
    if config.activations.source == "tensors":
        stored = with_model_named(config, stored_at(config.activations.path))
        sites, width, plans = plan_tensors(config, stored)
        of_tensors(config, stored, [site.name for site in sites], resolve_device(config.model.device))
        return [], width, plans
    with FakeTensorMode():
        lm = untrained(config.model, trust_remote_code)
        second = untrained(config.second_model, trust_remote_code) if config.second_model.name else None
        sites, width, plans = plan_run(config, lm, second)
    models = [(model, sites_of_model(sites, tag)) for model, tag in ((lm, ""), (second, SECOND)) if model]
    return models, width, plans


def disk_needed(config: TrainConfig, plans: list[CoderPlan], widths: dict[str, int]) -> tuple[int, int]:
    """Returns the bytes that a run writes at most, to its folder and to a cache that holds nothing of it yet.

    The oldest checkpoint goes when a new one is whole, so that there is one more than are kept.
    """
    saved = sum((_copies(plan) - 1) * plan.parameters * FLOAT + 16 * plan.d_sae for plan in plans)  # but the gradients
    trained = sum(plan.parameters for plan in plans) * FLOAT
    cached = 8 * config.max_text_tokens + _stored_tokens(config) * token_bytes(config, widths)
    cached = 0 if config.activations.source == "tensors" else cached
    return (config.checkpoints.keep + 1) * saved + trained, cached


def check_disk(in_run: int, folder: Path) -> None:
    """Raises ConfigError if what a run writes to its folder, beside what is there already, does not fit the disk."""
    check_room(Need("run_dir", folder, in_run - taken(folder)))


def _copies(plan: CoderPlan) -> int:
    """Returns how often a coder's parameters are there: weights, gradients, two moments, an average."""
    return 5 if plan.optim.ema else 4


def token_bytes(config: TrainConfig, widths: dict[str, int]) -> int:
    """Returns the size of what is kept of a token."""
    return sum(widths.values()) * DTYPES[config.activations.dtype].itemsize * (2 if config.gradient_loss else 1)


def _stored_tokens(config: TrainConfig) -> int:
    """Returns of how many tokens the activations are stored."""
    visited = min(config.tokens, config.max_text_tokens)
    return {"disk": config.max_text_tokens, "write_through": visited}.get(config.activations.source, 0)


def measured_flops_per_s(device: torch.device) -> float:
    """Returns the speed of a float32 matrix product on a device, timed for a tenth of a second."""
    a = torch.randn(512, 512, device=device)
    float((a @ a)[0, 0])  # the first product also starts threads
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 0.1:
        float((a @ a)[0, 0])
        count += 1
    return count * 2 * 512**3 / (time.perf_counter() - began)


def _measured(plan: CoderPlan) -> int:
    """Returns how many numbers of a token are measured at once."""
    return plan.d_in + (plan.d_out if plan.reads != plan.writes else 0)


def _parameters_below(lm: LanguageModel, sites: list[Site]) -> int:
    """Returns the parameters that run before the last site is seen: the early stop saves the rest."""
    order = [name for name, _ in lm.model.named_modules()]
    last = max(order.index(site.hook) for site in sites)
    inside = {id(p) for site in sites for p in lm.model.get_submodule(site.hook).parameters()}
    before = {id(p) for name in order[: last + 1] for p in lm.model.get_submodule(name).parameters(recurse=False)}
    embedding = lm.model.get_input_embeddings()
    skipped = {id(p) for p in embedding.parameters()} if embedding is not None else set()
    return sum(p.numel() for p in lm.model.parameters() if id(p) in (before | inside) - skipped)
