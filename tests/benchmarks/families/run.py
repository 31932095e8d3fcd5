"""The families side by side on one layer of a real model: equal L0, equal tokens, three seeds, one pass of the model.

    python tests/benchmarks/families/run.py smollm2 --model FOLDER --text FOLDER --out FOLDER
    python tests/benchmarks/families/run.py table FOLDER [FOLDER ...]

Activations and gradients are stored once; every coder then trains on the same batches. Writes a run folder like any
other and prints the mean and standard deviation over seeds of FVU, added CE, CE recovered and dead share.
"""

import argparse
import json
import logging
import statistics
from pathlib import Path

from sae.base.settings import decode
from sae.training.config import TrainConfig
from sae.training.run import train

K, SEEDS = 32, (0, 1, 2)
LN = {"normalization": {"kind": "layer_norm"}}
NO_RECONSTRUCTION = {"reconstruction": {"type": "reconstruction", "weight": 0}}
MATRYOSHKA = {"objectives": NO_RECONSTRUCTION | {"matryoshka": {"type": "matryoshka"}}}


def rule(kind, **fields):
    return {"selection": {"type": kind, "k": K, **fields}}


FAMILIES = {
    "topk": rule("topk"),
    "topk-ln": rule("topk") | LN,
    "mutual": rule("mutual_choice"),
    "mutual-ln": rule("mutual_choice") | LN,
    "feature": rule("feature_choice"),
    "feature-ln": rule("feature_choice") | LN,
    "phased": rule("feature_choice", mutual_share=0.5),
    "phased-ln": rule("feature_choice", mutual_share=0.5) | LN,
    **{f"gradient-{beta}": rule("gradient_topk", beta=beta) for beta in (0.5, 1.0, 2.0)},
    "jumprelu": {
        "selection": {"type": "jumprelu"},
        "normalization": {"kind": "scalar"},
        "objectives": {"l0": {"type": "l0", "target_l0": K}},
    },
    "gated": {
        "selection": {"type": "gated"},
        "normalization": {"kind": "scalar"},
        "objectives": {"l1": {"type": "l1", "target_l0": K}, "gate": {"type": "gate"}},
    },
    "matryoshka": rule("topk") | MATRYOSHKA,
    "matryoshka-batch": rule("batch_topk") | MATRYOSHKA,
}
TRANSCODERS = {"plain": rule("topk"), "skip": rule("topk") | {"skip": True}}
SETTINGS = {
    "smollm2": {"layer": 15, "tokens": 524_288, "text": 524_288, "block_rows": 8, "lr": 2e-3},
    "gemma3": {"layer": 9, "tokens": 524_288, "text": 262_144, "block_rows": 4, "lr": 2e-3},
}


def config(name: str, model: str, text: str, families: dict, sites: dict, eval_tokens: int) -> TrainConfig:
    setting = SETTINGS[name]
    return decode(
        TrainConfig,
        {
            "name": name,
            "model": {"name": model},
            "text": {"source": text, "context_length": 256, "max_tokens": setting["text"]},
            "activations": {"source": "disk", "block_rows": setting["block_rows"], **sites},
            "coder": {"d_sae": 4096},
            "optim": {"lr": setting["lr"]},
            "grid": {"coder": families, "coder.seed": list(SEEDS)},
            "tokens": setting["tokens"],
            "batch_tokens": 1024,
            "eval": {"tokens": eval_tokens},
            "checkpoints": {"every_steps": 200, "keep": 1},
            "log": {"every_steps": 20},
        },
    )


def figures(found: dict) -> dict[str, float]:
    loss, density = found["loss"], found["density"]
    return {
        "FVU": found["reconstruction"]["fvu"],
        "L0": found["reconstruction"]["l0"],
        "dead %": 100 * density["dead_share"],
        "CE added": loss["ce_added"],
        "CE": loss["ce_spliced"],
        "recovered %": 100 * (loss["ce_recovered"] or 0.0),
    }


def table(*folders: Path) -> str:
    """Returns mean ± standard deviation over seeds, as Markdown; a family of a later folder replaces an earlier one."""
    results: dict = {}
    for folder in folders:
        results |= json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    by_family: dict[str, list[dict[str, float]]] = {}
    for name, found in results.items():
        family = name.rpartition(",seed=")[0]
        by_family.setdefault(family, []).append(figures(found))
        if "with_gradients" in found:
            by_family.setdefault(f"{family} (gradients at inference)", []).append(figures(found["with_gradients"]))
    columns = list(next(iter(by_family.values()))[0])
    lines = ["| coder | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for family, runs in by_family.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.4g} ± {spread:.2g}")
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*SETTINGS, "table"])
    parser.add_argument("folders", nargs="*", type=Path, help="of `table`: run folders")
    parser.add_argument("--model")
    parser.add_argument("--text")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--transcoders", action="store_true", help="transcoders and the SAE on the MLP's output instead"
    )
    parser.add_argument("--families", nargs="*", help="only these")
    parser.add_argument("--eval-tokens", type=int, default=8192)
    options = parser.parse_args()
    if options.what == "table":
        print(table(*options.folders))
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("model", "text", "out"):
        if getattr(options, name) is None:
            parser.error(f"--{name} is needed")
    layer = SETTINGS[options.what]["layer"]
    if options.transcoders:
        mlp = f"layers.{layer}.mlp"
        sites = {"sites": [f"{mlp}:input", mlp], "targets": [mlp, mlp]}
        families = TRANSCODERS
    else:
        sites, families = {"sites": [f"layers.{layer}"]}, FAMILIES
    families = {name: families[name] for name in options.families or families}
    made = config(options.what, options.model, options.text, families, sites, options.eval_tokens)
    train(made, resume=(options.out / "config.yaml").exists(), run_dir=options.out)
    print(table(options.out))


if __name__ == "__main__":
    main()
