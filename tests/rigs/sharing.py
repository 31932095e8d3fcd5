"""Coders of every kind on made-up activations, trained by one process or by several that share each batch unevenly."""

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rigs.fakes import tiny_tokenizer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from sae.base.files import save_tensors
from sae.base.plugins import names
from sae.coder.normalization import Normalization
from sae.encoders import Encoder
from sae.lm.hooks import capture
from sae.lm.masking import MaskSpec
from sae.lm.models import LanguageModel
from sae.lm.site import Site
from sae.objectives import Objective
from sae.objectives.auxk import AuxK
from sae.objectives.reconstruction import Reconstruction
from sae.parallel import collectives
from sae.parallel.mesh import Mesh, Shape, made, of_data
from sae.parallel.ranks import process_group, rank
from sae.selection import trainable
from sae.stream.batch import TextBatch
from sae.training.beginning import Begun, new_part
from sae.training.config import CoderConfig
from sae.training.end_to_end import CleanPasses, splicer
from sae.training.measuring import Recipe, measure
from sae.training.optim import OptimConfig
from sae.training.step import Batch
from sae.training.trainer import CoderTrainer, Schedule

D, WIDTH, K, TOKENS, ROWS, CONTEXT = 24, 190, 5, 96, 12, 8  # no number of ranks divides the latents equally
WIDTHS = {"a": D, "b": D} | {f"{side}{i}": D // 3 for side in "rw" for i in range(3)}
A, B = Site("a", width=D), Site("b", width=D)
READS, WRITES = (tuple(Site(f"{side}{i}", width=D // 3) for i in range(3)) for side in "rw")
DRAWING = threading.Lock()  # of a generator that ranks share where they are threads
OF_MODEL = Site("transformer.h.0", model="tiny", width=D)


@dataclass(frozen=True)
class Case:
    """A coder, and how it is trained."""

    reads: tuple[Site, ...] = (A,)
    writes: tuple[Site, ...] = (A,)
    rule: str = "topk"
    options: dict[str, Any] = field(default_factory=dict)
    terms: tuple[str, ...] = ()
    coder: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    micro: int = 0
    width: int = WIDTH

    def config(self) -> CoderConfig:
        """Returns the coder's config, with the terms that its rule needs, and AuxK."""
        kind = trainable()[self.rule]
        k = {"k": K} if "k" in kind.__dataclass_fields__ else {}
        terms = {name: names(Objective)[name]() for name in (*self.terms, *(group[0] for group in kind.needs))}
        objectives = {"reconstruction": Reconstruction(), "auxk": AuxK(k=8), **terms}
        selection = kind(**k | self.options)
        return CoderConfig(self.width, selection=selection, objectives=objectives, **self.coder)


def cases() -> dict[str, Case]:
    """Returns all by name: every rule, encoder and loss term there is, and every shape of a coder."""
    found = {f"rule {name}": Case(rule=name, micro=40 * (i % 2)) for i, name in enumerate(trainable())}
    found |= {f"encoder {n}": Case(coder={"encoder": n}) for n, kind in names(Encoder).items() if kind.trainable}
    for name, kind in names(Objective).items():
        sites = ((OF_MODEL,), (OF_MODEL,)) if kind.needs_rows else ((A,), (A,))
        found[f"term {name}"] = Case(*sites, {"l0": "jumprelu", "gate": "gated"}.get(name, "topk"), terms=(name,))
    rules = ("topk", "mutual_choice", "feature_choice", "gradient_topk", "jumprelu")
    shapes: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "transcoder": ((A,), (B,), {}),
        "skip transcoder": ((A,), (B,), {"skip": True}),
        "crosscoder": (READS, READS, {"layout": "crosscoder"}),
        "cross-layer": (READS, WRITES, {"layout": "cross_layer"}),
        "cross-layer, shared": (READS, WRITES, {"layout": "cross_layer", "budget": "shared"}),
    }
    for shape, (reads, writes, coder) in shapes.items():
        width = 3 * 61 if shape.startswith("cross-layer") else WIDTH
        found |= {f"{shape} {rule}": Case(reads, writes, rule, coder=coder, micro=25, width=width) for rule in rules}
    few = {
        "topk": {"k": 2},
        "mutual_choice": {"k": 2},
        "feature_choice": {"k": 2},
        "groupmax": {"k": 3},
        "jumprelu": {},
    }
    return found | {
        **{
            f"fewer latents than ranks {rule}": Case(rule=rule, options=k, width=3, micro=40) for rule, k in few.items()
        },
        "mutual first": Case(rule="feature_choice", options={"mutual_share": 0.5, "density": "own"}, micro=30),
        # with the usual eps, what rounding leaves of gradients near zero moves weights, so that others are chosen
        "fewer entries than latents": Case(rule="feature_choice", options={"k": 1}, optim={"eps": 1e-4}, micro=30),
        "gradient of the token": Case(rule="gradient_topk", options={"gradient_norm": "token"}),
        "k annealed": Case(rule="mutual_choice", options={"k_start": 16, "anneal_share": 0.5}, micro=17),
        "rows, mutual": Case((OF_MODEL,), (OF_MODEL,), "mutual_choice", terms=("kl", "ce"), micro=1),
        "layer norm, by norm": Case(
            rule="mutual_choice",
            coder={
                "normalization": Normalization("layer_norm"),
                "decoder_norm": "free",
                "select_by_decoder_norm": True,
            },
        ),
        "untouched latents rest": Case(optim={"kind": "sparse_adam"}, micro=25),
        "scaled, glu, averaged": Case(
            coder={"normalization": Normalization("scalar"), "encoder": "glu"}, optim={"ema": 0.9, "clip_norm": 0.0}
        ),
    }


def bounds(step: int, n: int, total: int) -> list[int]:
    """Returns where n ranks' shares of a batch begin and end: uneven, others at each step, and at some of none."""
    draw = torch.Generator().manual_seed(step)
    cuts = [0, *sorted(torch.randint(0, total + 1, (n - 1,), generator=draw).tolist()), total]
    if step % 3 == 0 and n > 1:
        empty = step // 3 % n
        if empty + 1 < n:
            cuts[empty + 1] = cuts[empty]
        else:
            cuts[empty] = cuts[n]
    return cuts


def trained(
    case: Case, steps: int, dtype: torch.dtype, mesh: Mesh | None = None, products: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Returns what this rank has of a training: losses, weights, counters, and the gradients of the first step.

    Of a coder that is cut over ranks, what all have together. Alone, every batch is taken whole. Without a mesh all
    ranks share the tokens.
    """
    mesh = mesh or of_data()
    several = mesh.team.world_size > 1
    lm = _language_model(dtype) if case.reads == (OF_MODEL,) else None
    trainer = new_trainer(case, steps, dtype, mesh, lm, products)
    lines, gradients = [], {}
    for step in range(steps):
        lines.append(trainer.step(share(case, trainer, lm, step, several), step))
        if not step:
            gradients = {f"gradient.{name}": p.grad.clone() for name, p in trainer.coder.named_parameters()}
    figures = ("loss", "fvu", "l0", "dead_share", "grad_norm", "tokens")
    told = {name: torch.tensor([line[name] for line in lines], dtype=torch.float64) for name in figures}
    state, values = trainer.state()
    auxk = torch.tensor(values["active_steps"]["auxk"])
    held = gradients | {name: value.clone() for name, value in state.items()}
    return told | {"auxk": auxk} | {name: _whole(trainer, name, value) for name, value in held.items()}


def new_trainer(
    case: Case,
    steps: int,
    dtype: torch.dtype,
    mesh: Mesh,
    lm: LanguageModel | None = None,
    products: torch.dtype | None = None,
) -> CoderTrainer:
    """Returns a trainer of what this rank holds of an untrained coder; `products` are computed in that type."""
    seen = _activations(lm, 1000, dtype)[0]
    coder_config = case.config()
    recipe = Recipe(coder_config.normalization, 10.0, coder_config.center, coder_config.balance_sites)
    sample = {name: x.float() for name, x in seen.items()}
    found = measure(sample, case.reads, case.writes, MaskSpec(), recipe)
    coder = new_part(coder_config, Begun.of(coder_config, found), mesh.latents, "cpu").to(dtype)
    micro = case.micro * (mesh.team.world_size > 1) * (lm is None)
    schedule = Schedule(steps, dead_after_tokens=3 * TOKENS, micro_batch_tokens=micro, product_dtype=products)
    optim = OptimConfig(lr=3e-3, **case.optim)
    return CoderTrainer(coder, coder_config.objectives, optim, schedule, mesh)


def _whole(trainer: CoderTrainer, name: str, own: Tensor) -> Tensor:
    """Returns a tensor of the state, or a gradient, with the rows of all ranks that hold parts of the coder."""
    rows = trainer.rows(name, own)
    if rows is None:
        return own
    whole, start = own.new_zeros(rows.total, *own.shape[1:]), 0
    for piece in rows.pieces:
        whole[piece.start : piece.stop] = own[start : start + len(piece)]
        start += len(piece)
    assert start == len(own)
    return collectives.total(whole, trainer.mesh.latents)


def train_all(chosen: list[str], steps: int, dtype: torch.dtype, folder: Path, shape: Shape | None = None) -> int:
    """The work of a rank: trains the cases of some names, one after the other, and leaves what it has."""
    torch.set_num_threads(1)
    with process_group():
        mesh = made(shape) if shape else None
        found = {name: trained(cases()[name], steps, dtype, mesh) for name in chosen}
        named = {f"{name}: {key}": x for name, tensors in found.items() for key, x in tensors.items()}
        save_tensors(folder / f"{rank()}.safetensors", named)
    return 0


def share(case: Case, trainer: CoderTrainer, lm: LanguageModel | None, step: int, several: bool) -> Batch:
    """Returns this rank's share of the batch of a step."""
    dtype = trainer.coder.W_enc.dtype
    seen, text = _activations(lm, step, dtype)
    data = trainer.mesh.data
    cuts = bounds(step, data.world_size, ROWS if lm else TOKENS)
    mine = slice(cuts[data.rank], cuts[data.rank + 1])
    if text is not None:
        own = TextBatch(text.tokens[mine], text.keep[mine])
        before = int(text.keep[: mine.start].sum())
        x = seen[OF_MODEL.name][before : before + int(own.keep.sum())]
        usual = torch.ones(len(x), dtype=torch.bool)
        passes = CleanPasses(lm, own, 1 if several and case.micro else ROWS, [(OF_MODEL,)])
        return Batch(x, x, None, *splicer(passes, usual, (OF_MODEL,)))
    x, y = (torch.cat([seen[site.name] for site in sites], 1)[mine] for sites in (case.reads, case.writes))
    draw = torch.Generator().manual_seed(10_000 + step)
    gradients = torch.randn(TOKENS, y.shape[1], generator=draw).to(dtype)[mine] / 10
    return Batch(x, y, gradients if trainer.coder.spec.selection.gradient_loss else None)


def _activations(lm: LanguageModel | None, seed: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], TextBatch | None]:
    """Returns those of a whole batch by site: sums of a few directions, or those of a model at rows of text."""
    draw = torch.Generator().manual_seed(seed)
    if lm is not None:
        tokens = torch.randint(3, 250, (ROWS, CONTEXT), generator=draw).int()
        keep = torch.rand(ROWS, CONTEXT, generator=draw) < 0.8
        keep[seed % ROWS] = False  # a row of which nothing counts
        with torch.no_grad():
            return {OF_MODEL.name: capture(lm, [OF_MODEL], tokens)[OF_MODEL.name][keep]}, TextBatch(tokens, keep)
    fixed = torch.Generator().manual_seed(0)
    n = 4096 if seed == 1000 else TOKENS
    codes = torch.rand(n, 40, generator=draw) * (torch.rand(n, 40, generator=draw) < 0.1)
    found = {}
    for name, width in WIDTHS.items():
        directions, offset = torch.randn(40, width, generator=fixed), torch.randn(width, generator=fixed)
        found[name] = (codes.double() @ directions.double() + offset.double() / 3).to(dtype)
    return found, None


def _language_model(dtype: torch.dtype) -> LanguageModel:
    tokenizer = tiny_tokenizer()
    config = GPT2Config(
        n_embd=D,
        n_layer=2,
        n_head=2,
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    with DRAWING, torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).to(dtype).eval().requires_grad_(False)
    return LanguageModel(model, tokenizer, "tiny", None, True)
