"""Does the doctor find what is wrong? Every usual mistake planted on coders of a real model, and each coder as it is.

    python tests/benchmarks/doctor.py train FOLDER --model MODEL --text FOLDER
    python tests/benchmarks/doctor.py FOLDER

`train` makes the coders (4,096 latents, k 32, layer 15 of SmolLM2-135M, 393,216 and 262,144 tokens; about half an hour
on two idle cores); the second command prints a Markdown table and exits with 1 unless each of the six planted mistakes
is ranked first, all coders are healthy as they are, and no diagnosis took a minute.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import sae
from sae.base.settings import decode
from sae.coder.coder import SparseCoder
from sae.coder.normalization import Normalization
from sae.evaluation.alternatives import rebuilt
from sae.evaluation.doctor import Report, diagnose
from sae.selection.relu import ReLU
from sae.training.config import TrainConfig
from sae.training.run import train

LAYER, MOST_SECONDS = 15, 60
TOPK = {"d_sae": 4096, "selection": {"type": "topk", "k": 32}}
RESIDUAL = {
    "topk": {},
    "bare": {"pre_bias": "none"},
    "scaled": {"normalization": {"kind": "scalar"}},
    "centered": {"normalization": {"kind": "center"}},
    "relu": {
        "selection": {"type": "relu"},
        "decoder_norm": "free",
        "objectives": {"l1": {"type": "l1", "target_l0": 32}},
    },
    "jumprelu": {
        "selection": {"type": "jumprelu"},
        "normalization": {"kind": "scalar"},
        "objectives": {"l0": {"type": "l0", "target_l0": 32}},
    },
}
BLOCK, MLP = f"model.layers.{LAYER}", f"model.layers.{LAYER}.mlp"
NORM = f"model.layers.{LAYER}.post_attention_layernorm"
CODERS = {
    **{name: f"residual/coders/{BLOCK}/{name}" for name in RESIDUAL},
    "mlp": f"mlp/coders/{MLP}",
    "transcoder": f"mlp/coders/{MLP}-input-to-{MLP}",
    "transcoder before the gain": f"mlp/coders/{NORM}-normalized-to-{MLP}",
}


def at(hook: str, side: str = "output", names: tuple[str, ...] = ("reads", "writes")):
    """Returns the change of a spec's sites to one side of a module."""
    return lambda spec: {
        name: tuple(replace(site, hook=hook, side=side) for site in getattr(spec, name)) for name in names
    }


def to(**changes: object):
    """Returns the change of some fields of a spec."""
    return lambda _: changes


# what is planted | on which coder | how | the mistake that must be ranked first | what must be said
SIX = [
    ("layer off by one", "topk", at(f"model.layers.{LAYER - 1}"), "layer off by one", f'site="{BLOCK}"'),
    ("input instead of output", "mlp", at(MLP, "input"), "input and output swapped", f'site="{MLP}"'),
    ("missing scale", "scaled", to(normalization=Normalization()), "input scale", "scale="),
    ("missing pre-bias", "topk", to(pre_bias="none"), "pre-bias", 'pre_bias="decoder"'),
    ("ReLU instead of TopK", "topk", to(selection=ReLU()), "selection", "topk (k=32)"),
    (
        "raw weights, trained on processed ones",
        "transcoder before the gain",
        at(MLP, "input", ("reads",)),
        "norm's gain (processed weights)",
        f'site="{NORM}:normalized->',
    ),
]
MORE = [
    ("layer off by one, later", "topk", at(f"model.layers.{LAYER + 1}"), "layer off by one", f'site="{BLOCK}"'),
    ("input instead of output", "topk", at(BLOCK, "input"), "input and output swapped", f'site="{BLOCK}"'),
    (
        "autoencoder instead of transcoder",
        "transcoder",
        at(MLP),
        "input and output swapped",
        f'site="{MLP}:input->{MLP}"',
    ),
    ("superfluous scale", "topk", to(normalization=Normalization("scalar", 0.1)), "input scale", "normalization none"),
    ("missing scale", "jumprelu", to(normalization=Normalization()), "input scale", "scale="),
    ("superfluous pre-bias", "bare", to(pre_bias="decoder"), "pre-bias", 'pre_bias="none"'),
    ("superfluous pre-bias", "transcoder", to(pre_bias="decoder"), "pre-bias", 'pre_bias="none"'),
    ("ReLU, no L0 known", "topk", to(selection=ReLU(), metrics={}), "selection", "topk (k=32)"),
    ("threshold dropped", "jumprelu", to(selection=ReLU()), "selection", "jumprelu (threshold="),
    ("threshold dropped, no L0 known", "jumprelu", to(selection=ReLU(), metrics={}), "selection", "jumprelu ("),
    (
        "processed weights, trained on raw ones",
        "transcoder",
        at(NORM, "normalized", ("reads",)),
        "norm's gain (processed weights)",
        f'site="{NORM}->',
    ),
    (
        "layer off by one and missing pre-bias",
        "topk",
        lambda spec: at(f"model.layers.{LAYER - 1}")(spec) | {"pre_bias": "none"},
        "pre-bias + layer off by one",
        f'site="{BLOCK}", pre_bias="decoder"',
    ),
    (
        "missing scale and ReLU",
        "scaled",
        to(normalization=Normalization(), selection=ReLU()),
        "input scale + selection",
        "topk (k=32)",
    ),
    # on this model the mean over components is one direction like any other: nothing is wrong that could be found
    ("not centered", "centered", to(normalization=Normalization()), "", ""),
]


def trained(folder: Path, model: str, text: str) -> None:
    """Makes the coders; a run that is there goes on."""
    mlp = {"sites": [MLP, f"{NORM}:normalized", f"{MLP}:input"], "targets": [MLP] * 3}
    runs = {
        "residual": {"activations": {"sites": [BLOCK]}, "grid": {"coder": RESIDUAL}, "coder": TOPK, "tokens": 393_216},
        "mlp": {"activations": mlp, "coder": TOPK | {"pre_bias": "none"}, "tokens": 262_144},
    }
    for name, run in runs.items():
        shared = {
            "name": f"doctor-{name}",
            "model": {"name": model},
            "text": {"source": text, "context_length": 256, "max_tokens": 262_144},
            "optim": {"lr": 2e-3},
            "batch_tokens": 1024,
            "eval": {"tokens": 8192},
        }
        run["activations"]["source"] = "write_through"
        config = decode(TrainConfig, shared | run)
        train(config, resume=(folder / name / "config.yaml").exists(), run_dir=folder / name)


def row(planted: str, name: str, report: Report, right: bool, seconds: float) -> str:
    """Returns a line of the table."""
    best, ev = report.candidates[0], "{:.3f}".format
    first = "healthy" if report.healthy else f"{best.mistake}: `{best.change}`"
    own, new = f"{ev(report.ev)}, {report.l0:.4g}", f"{ev(best.ev)}, {best.l0:.4g}"
    return f"| {planted} | {name} | {first} | {own} | {new} | {'yes' if right else 'NO'} | {seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", metavar="[train] FOLDER")
    parser.add_argument("--model", help="of `train`")
    parser.add_argument("--text", help="of `train`")
    options = parser.parse_args()
    folder = Path(options.what[-1])
    if options.what[0] == "train":
        trained(folder, options.model, options.text)
        return
    coders: dict[str, SparseCoder] = {name: sae.load(folder / path) for name, path in CODERS.items()}
    lm = sae.load_language_model(coders["topk"].spec.reads[0].model, device="cpu")
    print(
        "| planted | on | ranked first | EV, L0 as it is | EV, L0 of the first | right | s |",
        "|---" * 7 + "|",
        sep="\n",
    )
    failed = []
    for name, coder in coders.items():
        start = time.monotonic()
        report = diagnose(coder, lm)
        seconds = time.monotonic() - start
        print(row("nothing", name, report, report.healthy, seconds), flush=True)
        failed += [f"{name} as it is"] * (not report.healthy or seconds > MOST_SECONDS)
    for number, (planted, name, change, mistake, said) in enumerate([*SIX, *MORE]):
        coder = coders[name]
        start = time.monotonic()
        report = diagnose(rebuilt(coder, coder.spec.with_(**change(coder.spec))), lm)
        seconds, best = time.monotonic() - start, report.candidates[0]
        right = report.healthy != bool(mistake) and mistake in best.mistake and said in best.change
        print(row(f"**{planted}**" if number < len(SIX) else planted, name, report, right, seconds), flush=True)
        failed += [planted] * ((number < len(SIX) and not right) or seconds > MOST_SECONDS)
    print("\n" + (f"failed: {', '.join(failed)}" if failed else "6 of 6 ranked first, all healthy as they are"))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
