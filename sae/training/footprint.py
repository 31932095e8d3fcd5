"""What one rank holds in memory, and when: what lasts, and what each phase of a run needs beside it.

    loaded:    model weights
    measured:  a sample of activations, its copies in float64                 rank 0 alone
    trained:   coders with gradients and moments, the lanes' blocks, one step, a checkpoint that is being written
    evaluated: the coders once more, the logits of one pass

Along sites and latents of a mesh a rank has some coders, or parts of them, and the rows of others. Only what grows with
the config is counted, by the sizes of the blocks it is in (`sae/base/held.py`); a pass of the language model is traced
on shapes. The rest, an interpreter with its libraries, is what this process takes now. Not counted are pages of files
that the system may have back: where no rank has coders whole, they are evaluated from disk.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from sae.base.held import Held, Live, blocks, peak
from sae.coder.coder import CHUNK_ENTRIES
from sae.coder.cutting import empty_part
from sae.coder.tiles import HELD
from sae.evaluation.evaluation import PASS_LOGITS, rows_per_pass
from sae.lm.devices import resolve_device
from sae.lm.hooks import LOGITS_AT_ONCE, capture, hooked, model_inputs
from sae.lm.models import DTYPES, LanguageModel
from sae.lm.site import Site
from sae.parallel.collectives import BUCKET_BYTES
from sae.parallel.mesh import Shape, last_of
from sae.parallel.ranks import Share
from sae.training.choosing import tile_tokens
from sae.training.config import TrainConfig
from sae.training.dealing import row_bytes, units
from sae.training.flops import SEEN, Read
from sae.training.planning import CoderPlan

FLOAT, DOUBLE = 4, 8
ENTRY = 57  # measured: bytes of a code in a step: its id, place and value, and what is kept of them for the gradient
ROWS = 4  # of a step, as wide as what is read and written: raw, normalized, predicted, the error
CANDIDATE = 64  # bytes of a candidate where a rule chooses in the whole batch: as sent, and as chosen among
END_TO_END = 4  # logits of one token beside those of the graph: clean, and the softmaxes of both


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank by what holds them, each at its own worst."""

    model: Held
    coders: Held
    pool: Held
    """Blocks of the rank's lanes, and those read ahead."""
    reading: Held
    """A pass of the language model."""
    step: Held
    snapshot: Held
    """What a checkpoint on the way still holds while it is written, in the memory of the host."""
    sampling: Held
    measuring: Held
    """Of rank 0."""
    sample: Held
    """What is held of the sample while coders are made."""
    evaluation: Held
    midway: bool
    """Whether there is an evaluation while the pool is held."""
    on_host: bool
    """Whether coders are trained in the memory of the host."""

    def parts(self) -> dict[str, int]:
        """Returns the bytes by name, for people."""
        found = {
            "model": self.model,
            "coders": self.coders,
            "pool": self.pool,
            "step": _larger(self.reading, self.step),
            "snapshot": self.snapshot,
            "statistics": max(self.sampling, self.measuring, key=lambda held: held.total),
            "evaluation": self.evaluation,
        }
        return {name: int(held.total) for name, held in found.items()}

    def peak(self, measures: bool) -> int:
        """Returns the most bytes that are held at once beside the process, of the rank that measures or of another."""
        training = self.coders + self.pool + (self.snapshot if self.on_host else Held())
        phases = [self.sampling, self.measuring, self.coders + self.sample] if measures else []
        phases += [
            training + self.reading,
            training + self.step,
            *([training + self.evaluation] if self.midway else []),
        ]
        phases.append(self.coders + self.evaluation)
        return int(peak(self.model + phase for phase in phases))


class Part(NamedTuple):
    """A coder as a rank has it that holds as many of its latents as any."""

    plan: CoderPlan
    parameters: int
    latents: int

    @classmethod
    def of(cls, plan: CoderPlan, shape: Shape) -> "Part":
        """Returns the part of a rank of such a mesh: all, unless latents are cut."""
        if shape.latents == 1:
            return cls(plan, plan.parameters, plan.d_sae)
        coder = empty_part(plan.spec, last_of(shape).latents, "meta")
        return cls(plan, sum(p.numel() for p in coder.parameters()), coder.spec.d_sae)


class Passes:
    """What passes of models of fake tensors hold, or of none; each kind of pass is traced once."""

    def __init__(self, models: Read) -> None:
        self.models = models
        self._known: dict[tuple[int, int, bool, bool], Held] = {}

    def __call__(self, rows: int, context: int, backward: bool, to_sites: bool = True) -> Held:
        """Returns what one of so many texts holds, over all models: up to their last sites, or through all of each."""
        key = (rows, context, backward, to_sites)
        if key not in self._known:
            each = (passed(lm, at if to_sites else [], rows, context, backward) for lm, at in self.models)
            self._known[key] = sum(each, Held())
        return self._known[key]

    @property
    def weights(self) -> Held:
        """Returns the weights."""
        return sum((blocks(p.nbytes) for lm, _ in self.models for p in lm.model.parameters()), Held())

    @property
    def vocabulary(self) -> int:
        """Returns how many logits a token has."""
        if not self.models:
            return 0
        return getattr(self.models[0][0].model.config.get_text_config(), "vocab_size", 0)

    @property
    def is_causal(self) -> bool:
        """Returns whether there are losses to measure."""
        return bool(self.models) and self.models[0][0].is_causal


def footprint(
    config: TrainConfig, passes: Passes, plans: list[CoderPlan], shape: Shape, groups: list[int], group: int = 0
) -> Footprint:
    """Returns what a rank of a group along sites holds, which has as many lanes and latents as any there.

    `groups` says to which each of the plans was dealt.
    """
    settings, context, share = config.activations, config.text.context_length, Share(shape.size - 1, shape.size)
    rows, of_lanes = settings.block_rows, len(share.of(settings.lanes))
    count, of = units(config)
    read, n = (len(part.of(count)) * of for part in (share, Share(shape.data - 1, shape.data)))
    together = shape.sites * shape.latents
    micro = min(n, -(-config.micro_batch_tokens // shape.data) or n)
    parts = [Part.of(plan, shape) for plan, place in zip(plans, groups, strict=True) if place == group]
    sites = {name: site.width for plan in plans for name, site in plan.sites.items()}
    widths, kinds = list(sites.values()), 2 if config.gradient_loss else 1
    stored = DTYPES[settings.dtype].itemsize
    block = [blocks(rows * context * width * stored, kinds) for width in widths]
    reading = passes(rows, context, bool(config.gradient_loss))
    on_cpu = resolve_device(config.model.device).type == "cpu"
    ahead = settings.blocks_ahead(on_cpu, share)
    pool = blocks(sum(read * width * stored for width in widths)) if config.needs_rows else Held()
    for one in [] if config.needs_rows else block:
        pool += blocks(one.total / kinds, kinds * (of_lanes + ahead)) if one.total else Held()
    graph = Held()
    if config.needs_rows:
        at_once = max(1, micro // context)
        graph = passes(at_once, context, True) + blocks(at_once * context * passes.vocabulary * FLOAT, END_TO_END)
    tokens = min(settings.statistics_tokens, config.max_text_tokens)
    sample = sum((blocks(tokens * width * FLOAT) for width in widths), Held())
    taken = sum((blocks(rows * context * w * FLOAT, kinds * tokens / (rows * context)) for w in widths), Held())
    coders = sum((_matrices(part.parameters, copies(part.plan)) for part in parts), Held())
    on_the_way = config.checkpoints.every_steps < config.steps
    saved = sum((_matrices(part.parameters, copies(part.plan) - 1) for part in parts), Held()) if on_the_way else Held()
    bucket = min(BUCKET_BYTES, max(part.parameters for part in parts) * FLOAT)
    moving = came = Held()
    if together > 1:
        row = row_bytes(config, plans, groups, shape.sites)
        came = blocks(n * row[group])
        of_sites = blocks(read * shape.sites * row[group])
        moving = blocks(read * sum(row)) + of_sites + came + (of_sites + came if shape.latents > 1 else Held())
    step = _larger(*(_step(part, n, micro, config) for part in parts)) + (blocks(bucket) if shape.data > 1 else Held())
    return Footprint(
        passes.weights,
        coders,
        pool,
        reading,
        _larger(moving, came + step, came + graph),
        Held(saved.kept / shape.data, saved.returned / shape.data),
        sample + taken + reading,
        sample + _larger(*(_measured(plan, tokens) for plan in plans)),
        sample,
        _evaluated(config, passes, plans, rows * context, parts, from_disk=together > 1),
        bool(config.eval.every_steps),
        on_cpu,
    )


def copies(plan: CoderPlan) -> float:
    """Returns how often a coder's parameters are there: weights, gradients, an average, an optimizer's state."""
    widths = {side // plan.spec.n_blocks for side in (plan.d_in, plan.d_out)}
    return (3 if plan.optim.ema else 2) + max(map(plan.optim.optimizer.bytes_of_state, widths)) / FLOAT


def weights_dtype(config: TrainConfig) -> torch.dtype:
    """Returns the precision in which the language model is loaded; auto is the checkpoint's on a GPU, of 16 bits."""
    on_cpu = resolve_device(config.model.device).type == "cpu"
    return DTYPES.get(config.model.dtype, torch.float32 if on_cpu else torch.bfloat16)


def _larger(*held: Held) -> Held:
    return max(held, key=lambda one: one.total)


def _matrices(parameters: int, times: float = 1) -> Held:
    """Returns a coder's parameters so many times: an encoder and a decoder each, and what is small beside them."""
    whole, rest = divmod(times, 1)
    return blocks(parameters * FLOAT / 2, 2 * whole) + blocks(parameters * FLOAT / 2 * rest, 2)


def passed(lm: LanguageModel, sites: list[Site], rows: int, context: int, backward: bool) -> Held:
    """Returns what a pass of a fake model holds: up to the last site, or of all of it, `backward` with a gradient."""
    with next(lm.model.parameters()).fake_mode, Live() as live:  # type: ignore[attr-defined]
        tokens = torch.zeros(rows, context, dtype=torch.int32)
        if not backward:
            with torch.no_grad():
                capture(lm, sites, tokens) if sites else lm.model(**model_inputs(lm, tokens))
            return live.worst
        begin = lambda site, x: x.detach().requires_grad_()  # noqa: E731
        with torch.enable_grad(), hooked(lm.model, sites, begin):
            logits = lm.model(**model_inputs(lm, tokens)).logits.float()
            logits.logsumexp(-1).sum().backward()
    return live.worst


def _step(part: Part, n: int, micro: int, config: TrainConfig) -> Held:
    """Returns what one coder's step holds beside the coder: a tile of scores and what stands beside it, codes, rows."""
    plan, d_sae = part.plan, part.latents
    rule = plan.spec.rule
    tile = min(micro, tile_tokens(plan.d_sae, resolve_device(config.model.device)))
    scores, k = tile * d_sae * FLOAT, max(getattr(rule, "k", 0), getattr(rule, "k_start", 0))
    codes = micro * k if k else tile * d_sae  # of a rule without a k, all entries of a tile, until few are kept
    rows = blocks(n * (plan.d_in + plan.d_out) * FLOAT, 2) + blocks(micro * (plan.d_in + plan.d_out) * FLOAT, ROWS / 2)
    chosen = blocks(scores) + blocks(scores * (rule.beside_scores % 1)) + blocks(scores, int(rule.beside_scores))
    chosen += blocks(codes * FLOAT, ENTRY / FLOAT)
    if rule.batch_wide:
        own = min(k * config.batch_tokens, n * d_sae)
        gathers = rule.gathered(n, config.batch_tokens, d_sae)[1] > 0
        everywhere = own * (min(2, config.batch_tokens // n) if gathers else 1)  # hardly more than the budget
        chosen += blocks(everywhere * CANDIDATE / 8, 8)
    beside = [term.entries(plan.spec) for term in plan.coder.objectives.values() if term.weight]
    if any(beside):
        chosen += blocks(scores) + blocks(micro * sum(beside) * FLOAT, ENTRY / FLOAT)
    return rows + chosen


def _measured(plan: CoderPlan, tokens: int) -> Held:
    """Returns what measuring holds beside the sample: what is left of it, and float64 of both sides and of a square."""
    kept = sum((blocks(tokens * site.width * FLOAT) for site in plan.sites.values()), Held())
    return kept + blocks(tokens * plan.d_in * DOUBLE) + blocks(tokens * plan.d_out * DOUBLE, 3)


def _evaluated(
    config: TrainConfig, passes: Passes, plans: list[CoderPlan], block: int, parts: list[Part], from_disk: bool
) -> Held:
    """Returns what the evaluation holds beside coders in training: finished ones, logits, one coder's codes.

    Where no rank has coders whole, its finished parts, and rows of latents that were read.
    """
    finished = sum((_matrices(part.parameters) for part in parts), Held())
    if from_disk:
        finished += blocks(HELD * FLOAT)
    vocabulary, context = passes.vocabulary, config.text.context_length
    n = rows_per_pass(context, vocabulary) * context if passes.models else block
    graded = bool(config.gradient_loss)
    seen = passes(n // context, context, graded, to_sites=graded) if passes.models else Held()
    found = []
    for plan in plans:
        m, rule = plan.d_sae, plan.spec.rule
        chunk = min(n, max(1, CHUNK_ENTRIES // m)) * m * FLOAT
        asked = blocks(chunk) + blocks(chunk * (rule.beside_scores % 1)) + blocks(chunk, int(rule.beside_scores))
        found.append(asked + blocks(n * plan.d_out * DOUBLE, 5))
    if passes.is_causal:
        logits = blocks(n * vocabulary * weights_dtype(config).itemsize)
        found = [logits + _larger(each, seen, logits + blocks(LOGITS_AT_ONCE * FLOAT, 5)) for each in found]
        wide = sum({name: site.width for plan in plans for name, site in plan.sites.items()}.values())
        finished += blocks(min(PASS_LOGITS, config.eval.tokens * SEEN * wide) * FLOAT)
    return finished + _larger(seen, *found)
