"""Folders of training runs, written without training: logs, figures and config as `sae-train` leaves them."""

import json
from pathlib import Path
from typing import Any

import yaml

LATENTS, BATCH = 64, 1024


def figures(fvu: float, l0: float, steps: int, **changed: Any) -> dict[str, Any]:
    """Returns what an evaluation gives."""
    counts = [0, 0, 2, 5, 30, 10, 1]
    return {
        "reconstruction": {
            "tokens": 4000,
            "fvu": fvu,
            "ev": 1 - fvu,
            "mse": 2.0,
            "nmse_mean": 0.2,
            "nmse_median": 0.1,
            "l0": l0,
            "cosine": 0.9,
            "norm_ratio": 0.95,
            "reconstruction_bias": 1.0,
        },
        "reconstruction_unfiltered": {"tokens": 4002, "fvu": fvu, "ev": 1 - fvu},
        "density": {
            "dead_share": 1 - sum(counts) / LATENTS,
            "counted_over_tokens": 4000,
            "log10_density_edges": list(range(-7, 1)),
            "log10_density_counts": counts,
            "dense_share_1_percent": 0.2,
            "dense_share_10_percent": 1 / LATENTS,
        },
        "loss": {
            **{f"ce_{arm}": 3.0 + i for i, arm in enumerate(("clean", "spliced", "zero", "mean"))},
            **{"ce_added": fvu, "ce_recovered": 1 - fvu / 2, "ce_recovered_from_mean": 0.9, "kl_score": 0.93},
        },
        "training": {"steps": steps, "active_steps": {"reconstruction": steps}},
        **changed,
    }


def recorded(
    folder: Path,
    coders: dict[str, tuple[float, float]],
    steps: int = 40,
    finished: bool = True,
    midway: int = 0,
    **config: Any,
) -> Path:
    """Writes the folder of a run of coders, {name: (FVU, L0) at the end}, with a line at every step.

    Args:
        folder: where.
        coders: what it trained.
        steps: how many.
        finished: whether it has come to its end; else it has neither held-out figures nor coders.
        midway: a held-out evaluation every so many steps; 0: none.
        config: fields that differ, "group__field".
    """
    folder.mkdir(parents=True)
    lines, timings = [], []
    for step in range(1, steps + 1):
        for name, (fvu, l0) in coders.items():
            value = fvu * (1 + 1 / step)
            line = {"step": step, "coder": name, "loss": value + 0.01, "loss.auxk": 0.0, "fvu": value, "l0": l0}
            lines.append(line | {"dead_share": step / 1000, "lr": 0.001, "grad_norm": 0.1, "tokens": BATCH})
            if midway and step % midway == 0 and step < steps:
                lines.append({"step": step, "coder": name, "held_out": figures(2 * fvu, l0, step)})
        timings.append({"step": step, "seconds": step / 10, "tokens_per_s": 10240.0})
    for name, some in (("metrics.jsonl", lines), ("timings.jsonl", timings)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in some), encoding="utf-8")
    plain: dict[str, Any] = {
        "name": folder.name,
        "batch_tokens": BATCH,
        "tokens": steps * BATCH,
        "optim": {"lr": 0.001},
    }
    for key, value in config.items():
        group, _, field = key.rpartition("__")
        (plain.setdefault(group, {}) if group else plain)[field] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    environment = {"python": "3.12.1", "packages": {"torch": "2.13.0"}, "device": "cpu", "platform": "Linux-host-7"}
    (folder / "env.json").write_text(json.dumps(environment | {"command": ["sae-train", "/home/me"]}), encoding="utf-8")
    if finished:
        found = {name: figures(fvu, l0, steps) for name, (fvu, l0) in coders.items()}
        (folder / "evaluation.json").write_text(json.dumps(found), encoding="utf-8")
        for name in coders:
            (folder / "coders" / name).mkdir(parents=True)
            (folder / "coders" / name / "cfg.json").write_text(json.dumps({"d_sae": LATENTS}), encoding="utf-8")
    return folder
