"""The figures of an evaluation as rows: of text, the same in the terminal and on the page, and for pandas."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.base.arguments import wrong
from sae.base.errors import ConfigError
from sae.base.settings import flat
from sae.pages import notebook

if TYPE_CHECKING:
    import pandas as pd

SAVED = "evaluation.json"  # in a run's folder


class Evaluation(dict[str, Any]):
    """The figures of a coder, or of several by name: a dict, which a notebook shows as a table."""

    def _repr_html_(self) -> str:
        several = {"": self} if "density" in self else self
        columns = [dict(table(found)) for found in several.values()]
        names = dict.fromkeys(name for column in columns for name in column)
        rows = [(name, *(column.get(name, "") for column in columns)) for name in names]
        return notebook.table(("", *several) if len(several) > 1 or "" not in several else (), rows)


def to_pandas(found: Any) -> "pd.DataFrame":
    """Returns figures as a table: a row for each coder, by name, and a column for each figure ("reconstruction.fvu").

    Of what `evaluate` or `train` returned, or of a run's folder or evaluation.json. ConfigError if pandas is not
    installed, or there is no such file. What was measured on the way is in `sae.history`.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ConfigError("to_pandas: pandas is not installed; pip install pandas") from error
    if isinstance(found, str | os.PathLike):
        path = Path(found).expanduser()
        path = path / SAVED if path.is_dir() else path
        if not path.is_file():
            raise ConfigError(f"found: no such file: {path}")
        found = json.loads(path.read_text(encoding="utf-8"))
    found = getattr(found, "metrics", found)
    if not isinstance(found, dict) or not all(isinstance(part, dict) for part in found.values()):
        raise wrong("found", found, "what evaluate or train returned, or the path of a run's folder or figures")
    rows = {"": found} if "density" in found else found
    return pd.DataFrame([flat(row) for row in rows.values()], index=list(rows))


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
    if "not_available" in found.get("heads", {}):
        rows.append(("decoder share by head", f"not available: {found['heads']['not_available']}"))
    elif "heads" in found:
        heads = found["heads"]
        rows.append(("latents mostly in one head", _share(heads["dominant"])))
        rows.append(("decoder share by head", " ".join(f"{share:.2f}" for share in heads["mean_share"])))
    for name, other in found.get("against", {}).items():
        text = f"CE {_number(other['ce_spliced'], 3)} at L0 {other['l0']:.1f}; ratio {_number(other['ce_ratio'])}"
        rows.append((f"against {name}", text))
    if "with_gradients" in found:
        other = found["with_gradients"]
        r, after = other["reconstruction"], other.get("loss", {}).get("ce_spliced")
        label = f"with gradients ({other['label'].partition(': ')[2]})"
        rows.append((label, f"FVU {_number(r['fvu'])}, CE {_number(after, 3)}"))
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
