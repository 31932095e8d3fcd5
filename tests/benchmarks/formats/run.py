"""Do other libraries and ours compute the same from the same files? Both ways, with each library's own code.

    theirs -> ours: the library saves a random coder of each of its kinds, and `sae.load` reads it
    ours -> theirs: a coder of ours is exported, and the library loads it

    python run.py [--sae-lens PYTHON] [--sparsify PYTHON] [--dictionary-learning PYTHON] [--circuit-tracer PYTHON]

PYTHON is that of an environment with the library. Compared are latents and outputs of 512 activations, as
max |a - b| / max(1, |b|), and which latents fire. Tokens nearer than 1e-3 to where a latent would come or go are left
out and counted. Prints a table; exits with 1 if anything differs by more than 1e-5.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from common import D_IN, D_OUT, D_SAE, TOKENS, K, draw, randomize
from safetensors.torch import load_file, save_file

import sae
from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.lm.site import Site
from sae.selection import Budget, Selection
from sae.selection.feature_choice import FeatureChoice
from sae.selection.gated import Gated
from sae.selection.gradient_topk import GradientTopK
from sae.selection.groupmax import GroupMax
from sae.selection.jumprelu import JumpReLU
from sae.selection.matching_pursuit import MatchingPursuit
from sae.selection.mutual_choice import MutualChoice
from sae.selection.relu import ReLU
from sae.selection.signed_topk import SignedTopK
from sae.selection.topk import TopK
from sae.selection.unrectified_topk import UnrectifiedTopK

HERE = Path(__file__).parent
LIBRARIES = ("sae_lens", "sparsify", "dictionary_learning", "circuit_tracer")
MARGIN, LIMIT = 1e-3, 1e-5
HEADER = "| library | coder | direction | latents differ by | output differs by | supports equal | tokens left out |"


class Row(NamedTuple):
    """One comparison."""

    library: str
    coder: str
    direction: str
    latents: float
    output: float
    equal: bool
    left_out: int

    @property
    def good(self) -> bool:
        """Returns whether both compute the same."""
        return self.equal and max(self.latents, self.output) <= LIMIT and self.left_out < TOKENS / 2

    def __str__(self) -> str:
        what = f"{self.latents:.1e} | {self.output:.1e} | {'yes' if self.equal else 'NO'} | {self.left_out} of {TOKENS}"
        return f"| {self.library} | {self.coder} | {self.direction} | {what} |"


def coder_of(selection: Selection, d_in: int = D_IN, d_out: int | None = None, **more) -> SparseCoder:
    """Returns a random coder; a transcoder if it has a `d_out`."""
    site, other = Site("blocks.0.hook_resid_mid"), Site("blocks.0.hook_mlp_out")
    reads, writes = more.pop("sites", (site, site if d_out is None else other))
    spec = CoderSpec(
        d_in,
        d_out or d_in,
        D_SAE,
        selection,
        (reads,),
        (writes,),
        encoder=selection.encoder or "linear",
        calibration=(0.9,) if isinstance(selection, MutualChoice) else (),
        **{"pre_bias": "none" if d_out else "decoder", "decoder_norm": "free", **more},
    )
    coder = randomize(SparseCoder(spec).requires_grad_(False), seed=1)
    if selection.encoder:
        coder.W_enc.copy_(coder.W_dec)
        coder.b_enc.zero_()
    return coder


def unit(coder: SparseCoder) -> SparseCoder:
    """Returns the coder with decoder rows of norm 1, which makes it another."""
    coder.W_dec.div_(coder.W_dec.norm(dim=1, keepdim=True))
    return coder


def exports(library: str) -> dict[str, SparseCoder]:
    """Returns coders of ours of every kind that a library has."""
    trained = {"jumprelu": JumpReLU(), "calibrated mutual_choice": MutualChoice(K), "gated": Gated()}
    if library == "sae_lens":
        heads = Site("blocks.0.attn.hook_z")
        rules = {**trained, "relu": ReLU(), "topk": TopK(K), "gradient_topk": GradientTopK(K)}
        rules |= {
            "topk, most latents": TopK(D_SAE * 2 // 3),
            "signed_topk": SignedTopK(K),
            "feature_choice": FeatureChoice(K),
        }
        rules["matching_pursuit"] = MatchingPursuit(max_iterations=6)
        found = {name: coder_of(rule) for name, rule in rules.items()}
        found["relu, no pre-bias"] = coder_of(ReLU(), pre_bias="none")
        found["relu, scalar"] = coder_of(ReLU(), normalization=Normalization("scalar", 0.6))
        found["jumprelu, layer_norm"] = coder_of(JumpReLU(), normalization=Normalization("layer_norm", undo_eps=False))
        found["topk, l2"] = coder_of(TopK(K), normalization=Normalization("l2", eps=0.0))
        found["relu, heads"] = coder_of(ReLU(), sites=(heads, heads))
        found["relu, centered, folded"] = coder_of(ReLU(), normalization=Normalization("center")).fold_token_norm()
        for name in ("calibrated mutual_choice", "feature_choice"):
            found[f"{name} by decoder norm"] = coder_of(rules[name], select_by_decoder_norm=True)
        found["topk by decoder norm, folded"] = coder_of(TopK(K), select_by_decoder_norm=True).fold_decoder_norm()
        for name, rule in (("relu", ReLU()), ("jumprelu", JumpReLU())):
            for skip in (False, True):
                found[f"{name} transcoder{' with skip' if skip else ''}"] = coder_of(rule, d_out=D_OUT, skip=skip)
        return found
    if library == "sparsify":
        stream, mlp = Site("layers.0"), (Site("layers.0.mlp", "input"), Site("layers.0.mlp"))
        rules = {"topk": TopK(8), "groupmax": GroupMax(8)}
        found = {name: coder_of(rule, sites=(stream, stream)) for name, rule in rules.items()}
        for name, rule in rules.items():
            for skip in (False, True):
                coder = coder_of(rule, d_out=D_IN, skip=skip, sites=mlp)
                found[f"{name} transcoder{' with skip' if skip else ''}"] = coder
        return found
    if library == "dictionary_learning":
        site = Site("blocks.1.hook_resid_post")
        found = {name: coder_of(rule, sites=(site, site)) for name, rule in {**trained, "topk": TopK(K)}.items()}
        found["jumprelu"] = coder_of(JumpReLU(), pre_bias="none", sites=(site, site))
        found["relu, no pre-bias"] = coder_of(ReLU(), pre_bias="none", sites=(site, site))
        return {**found, "relu, unit decoder": unit(coder_of(ReLU(), sites=(site, site)))}
    rules = {"relu": ReLU(), "jumprelu": JumpReLU(), "unrectified_topk": UnrectifiedTopK(K)}
    rules["unrectified_topk, most latents"] = UnrectifiedTopK(D_SAE * 2 // 3)  # among which some are negative
    found = {name: coder_of(rule, d_out=D_IN) for name, rule in rules.items()}
    return found | {f"{name} with skip": coder_of(rule, d_out=D_IN, skip=True) for name, rule in rules.items()}


def margins(coder: SparseCoder, x: torch.Tensor) -> torch.Tensor:
    """Returns how far each token is from where a latent would come or go."""
    rule = coder.spec.selection
    if isinstance(rule, MatchingPursuit):
        return _pursuit_margins(rule, coder.centered(x)[0].double(), coder.W_dec.double())
    scores, tensors = coder.scores(x), coder.per_latent()
    compared, near = coder.compared(scores), scores.abs().min(1).values
    if isinstance(rule, Gated):
        magnitudes = tensors["r_mag"].exp() * (scores - tensors["b_enc"]) + tensors["b_mag"]
        return near.minimum(magnitudes.abs().min(1).values)
    if "threshold" in tensors or coder.spec.calibration:
        cut = tensors["threshold"] if "threshold" in tensors else torch.tensor(coder.spec.calibration[0])
        return near.minimum((compared - cut).abs().min(1).values)
    if isinstance(rule, GroupMax):
        best = compared.unflatten(1, (rule.k, -1)).topk(2).values
        return near.minimum((best[..., 0] - best[..., 1]).min(1).values)
    if isinstance(rule, Budget):
        best = (compared.abs() if isinstance(rule, SignedTopK) else compared).topk(rule.k + 1).values
        return near.minimum(best[:, -2] - best[:, -1])
    return near


def _pursuit_margins(rule: MatchingPursuit, rest: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    near, acts = torch.full((len(rest),), torch.inf), torch.zeros(len(rest), len(rows))
    live = torch.ones(len(rest), dtype=torch.bool)
    for _ in range(rule.max_iterations or rest.shape[1]):
        scores = rest @ rows.T
        (value, second), best = scores.topk(2).values.unbind(1), scores.argmax(1)
        known = (acts.gather(1, best[:, None])[:, 0] != 0) | (value <= 0)
        step = value.relu() * live
        acts.scatter_(1, best[:, None], 1.0)
        rest = rest - step[:, None] * rows[best]
        left = rest.norm(dim=1)
        closest = torch.stack([value - second, value.abs(), (left - rule.residual_threshold).abs()]).min(0).values
        near = torch.where(live, near.minimum(closest.float()), near)
        live &= ~((known & rule.stop_on_duplicate_support) | (left < rule.residual_threshold))
    return near


def compared(library: str, name: str, direction: str, coder: SparseCoder, folder: Path) -> Row:
    """Returns how what a coder of ours computes differs from what the library left in a folder."""
    x = load_file(folder / "x.safetensors")["x"]
    clear = margins(coder, x) > MARGIN
    out, latents = coder(x[clear])
    acts, theirs = latents.to_dense(), {name: t[clear] for name, t in load_file(folder / "theirs.safetensors").items()}
    equal = bool(((acts != 0) == (theirs["acts"] != 0)).all()) and bool((acts != 0).any())
    worst = (_difference(acts, theirs["acts"]), _difference(out, theirs["out"]))
    return Row(library, name, direction, *worst, equal, TOKENS - int(clear.sum()))


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(((ours - theirs).abs() / theirs.abs().clamp_min(1)).max())


def rows(library: str, python: str, folder: Path) -> Iterator[Row | str]:
    """Yields what was found of a library, and, as text, what we refuse of it."""

    def drive(what: str, where: Path) -> None:
        command = [python, HERE / f"drive_{library}.py", what, where]
        where.mkdir(parents=True, exist_ok=True)
        subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "OMP_NUM_THREADS": "1"})

    drive("make", folder / "theirs")
    for place in sorted((folder / "theirs").iterdir()):
        if not (place / "theirs.safetensors").exists():
            yield refused(library, place)
            continue
        about = json.loads((place / "about.json").read_text())
        coder = sae.load(place / "coder", **about["hints"])
        coder = coder.fold_decoder_norm() if about["folded"] else coder
        yield compared(library, place.name, "theirs -> ours", coder, place)
    export = import_module(f"sae.formats.{'saelens' if library == 'sae_lens' else library}").write
    coders = exports(library)
    for name, coder in coders.items():
        export(folder / "ours" / name / "coder", coder)
        save_file({"x": 1.5 * draw(TOKENS, coder.spec.d_in, seed=11)}, folder / "ours" / name / "x.safetensors")
    drive("load", folder / "ours")
    for name, coder in coders.items():
        yield compared(library, name, "ours -> theirs", coder, folder / "ours" / name)


def refused(library: str, place: Path) -> str:
    """Returns a line that says why a coder is not read; RuntimeError if it is."""
    try:
        sae.load(place / "coder")
    except ConfigError as error:
        why = str(error).replace(str(place / "coder"), place.name)
        return f"| {library} | {place.name} | theirs -> ours | refused: {why} | | | |"
    raise RuntimeError(f"{place} was read, though nothing here computes what it does")


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for library in LIBRARIES:
        parser.add_argument(f"--{library.replace('_', '-')}", metavar="PYTHON")
    pythons = {library: python for library, python in vars(parser.parse_args()).items() if python}
    if not pythons:
        parser.error("no library: give the PYTHON of at least one")
    torch.set_num_threads(1)
    print(HEADER, "|---" * 7 + "|", sep="\n", flush=True)
    found: list[Row | str] = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for library, python in pythons.items():
            for row in rows(library, python, Path(folder) / library):
                print(row, flush=True)
                found.append(row)
    compared_rows = [row for row in found if isinstance(row, Row)]
    bad = [row for row in compared_rows if not row.good]
    print(f"\n{len(compared_rows)} comparisons, {len(bad)} disagree")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
