"""report.html: one self-contained page per run, with the curves and tables people look at first."""

import io
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from sae.base.files import atomic_write
from sae.base.lines import lines_of
from sae.evaluation.metrics import DENSITY_BINS
from sae.evaluation.tables import table


def write_report(run_dir: Path, results: dict[str, dict[str, Any]]) -> Path:
    """Writes run_dir/report.html from metrics.jsonl and the held-out results; returns its path."""
    lines = [json.loads(line) for line in lines_of((run_dir / "metrics.jsonl").read_bytes()) if line]
    environment = Environment(loader=PackageLoader("sae.training"), autoescape=True)
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
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # not pyplot, whose backend is the user's to choose
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * columns, 3), layout="constrained")
    FigureCanvasSVG(figure)
    draw(figure.subplots(1, columns, squeeze=False)[0])
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
