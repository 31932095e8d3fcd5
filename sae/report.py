"""report.html: one self-contained page per run, with the curves and tables people look at first."""

import io
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from sae.files import atomic_write
from sae.metrics import DENSITY_BINS


def write_report(run_dir: Path, results: dict[str, dict[str, Any]]) -> Path:
    """Writes run_dir/report.html from metrics.jsonl and the held-out results; returns its path."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    environment = Environment(loader=PackageLoader("sae"), autoescape=True)
    coders = [
        {
            "name": name,
            "rows": table(found),
            "curve": _curves([line for line in lines if line["coder"] == name and "fvu" in line]),
            "density": _density(found["density"]),
        }
        for name, found in results.items()
    ]
    config = (run_dir / "config.yaml").read_text(encoding="utf-8")
    page = environment.get_template("train.html").render(title=run_dir.name, coders=coders, config=config)
    path = run_dir / "report.html"
    atomic_write(path, page)
    return path


def table(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the figures of one evaluation as (name, text) rows: the same in the terminal and on the page."""
    r, raw, density = found["reconstruction"], found["reconstruction_unfiltered"], found["density"]
    rows = [
        ("held-out tokens", f"{r['tokens']:,}"),
        ("FVU", _number(r["fvu"])),
        ("FVU without the norm filter", f"{_number(raw['fvu'])} ({raw['tokens'] - r['tokens']} outliers)"),
        ("normalized MSE per token, mean / median", f"{_number(r['nmse_mean'])} / {_number(r['nmse_median'])}"),
        ("L0", f"{r['l0']:.1f}"),
        ("dead latents", f"{density['dead_share']:.1%} (silent on {density['counted_over_tokens']:,} tokens)"),
        ("cosine", _number(r["cosine"])),
        ("norm ratio", _number(r["norm_ratio"])),
        ("reconstruction bias", _number(r["reconstruction_bias"])),
    ]
    for key, of in (("loss", ""), ("loss_second", ", second model")):
        if key in found:
            loss = found[key]
            arms = " / ".join(_number(loss[f"ce_{arm}"], 3) for arm in ("clean", "spliced", "zero", "mean"))
            shares = f"{_share(loss['ce_recovered'])}, {_share(loss['ce_recovered_from_mean'])}"
            rows.append((f"CE clean / spliced / zero / mean (nats){of}", arms))
            rows.append((f"CE recovered (against zero, mean){of}", shares))
            rows.append((f"KL score{of}", _share(loss["kl_score"])))
    for site, value in found.get("fvu_by_site", {}).items():
        rows.append((f"FVU at {site}", _number(value)))
    if "skip" in found:
        rows.append(("explained by the skip path alone", _share(found["skip"]["ev"])))
    if "heads" in found:
        heads = found["heads"]
        rows.append(("latents mostly in one head", _share(heads["dominant"])))
        rows.append(("decoder share by head", " ".join(f"{share:.2f}" for share in heads["mean_share"])))
    for name, other in found.get("against", {}).items():
        text = f"CE {_number(other['ce_spliced'], 3)} at L0 {other['l0']:.1f}; ratio {_number(other['ce_ratio'])}"
        rows.append((f"against {name}", text))
    if "with_gradients" in found:
        other = found["with_gradients"]
        r, after = other["reconstruction"], other.get("loss", {}).get("ce_spliced")
        rows.append(
            (
                f"with gradients ({other['label'].partition(': ')[2]})",
                f"FVU {_number(r['fvu'])}, CE {_number(after, 3)}",
            )
        )
    for name, count in found.get("training", {}).get("active_steps", {}).items():
        if name != "reconstruction":
            rows.append((f"steps with {name} active", f"{count:,} of {found['training']['steps']:,}"))
    for name, null in found.get("nulls", {}).items():
        at = f" at L0 {null['l0']:.1f}" if "l0" in null else ""
        rows.append((f"null: {name.replace('_', ' ')}", f"FVU {_number(null['fvu'])}{at}"))
    return rows


def _number(value: float | None, digits: int = 4) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"


def _curves(lines: list[dict[str, Any]]) -> str:
    """Returns an SVG of FVU and dead share over steps."""
    steps = [line["step"] for line in lines]
    return _svg(
        lambda axes: (
            axes[0].plot(steps, [line["fvu"] for line in lines]),
            axes[0].set(xlabel="step", ylabel="FVU (training batches)", yscale="log"),
            axes[1].plot(steps, [line["dead_share"] for line in lines]),
            axes[1].set(xlabel="step", ylabel="dead share", ylim=(0, 1)),
        )
    )


def _density(density: dict[str, Any]) -> str:
    """Returns an SVG of the histogram of firing densities, dead latents as a bar of their own."""
    counts = density["log10_density_counts"]
    alive = sum(counts)
    dead = round(alive * density["dead_share"] / max(1e-9, 1 - density["dead_share"])) if alive else 0
    labels = ["dead", *(f"1e{edge}" for edge in DENSITY_BINS[:-1])]
    return _svg(
        lambda axes: (
            axes[0].bar(labels, [dead, *counts], color=["tab:red", *["tab:blue"] * len(counts)]),
            axes[0].set(xlabel="share of tokens a latent fires on, at least", ylabel="latents"),
        ),
        columns=1,
    )


def _svg(draw: Any, columns: int = 2) -> str:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(4.5 * columns, 3), squeeze=False, layout="constrained")
    draw(axes[0])
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
