"""What a run says in the end, as people read it: what was asked for now, and what all of its folder amounts to."""

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.records import Measure
from interp.run.reasons import told, why
from interp.run.tables import best_of, read_rows
from sae.base.visible import visible

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN = 100  # characters of each label where more than ALL latents were asked for
ALL = 10  # of so many, each is told in full


def summary_lines(summary: dict[str, Any], run_dir: Path, asked: Collection[int] | None = None) -> list[str]:
    """Returns what to print of a run: by explainer what it amounts to, and latents with label and score.

    Latents are those of `asked` (None: all of the folder): up to ten each, with the reason where there is no label or
    score; of more the best by the explainer's first scorer.
    """
    return lines_of(summary, read_rows(run_dir, asked), asked)


def lines_of(summary: dict[str, Any], rows: "pa.Table", asked: Collection[int] | None = None) -> list[str]:
    """As `summary_lines`, given the rows of the latents that may be told."""
    latents, of = _told(rows, asked), ""
    if asked is not None and len(asked) < summary["latents"]:
        of = f" (of {summary['latents']:,} latents in this folder; {len(asked):,} asked for now)"
    found: list[str] = []
    for name in dict.fromkeys([*summary["explanations"], *latents, ""]):
        counts = ", ".join(f"{n} {status}" for status, n in sorted(summary["explanations"].get(name, {}).items()))
        found += ["", f"{name}: {counts}{of}"] if name else []
        failures = summary["failures"].get(name)
        found += [f"  no explanation: {_reasons(failures, 'latents')}"] if failures else []
        for one in summary["scores"]:
            if one["explainer"] == name:
                found.append(_line(one))
                found += [f"    no answer: {_reasons(one['invalid'], 'answers')}"] if one["invalid"] else []
        found += latents.get(name, [])
    return found


def _told(rows: "pa.Table", asked: Collection[int] | None) -> dict[str, list[str]]:
    """By explainer, a line for each latent that is told."""
    if asked is None or len(asked) > ALL:
        return {name: [_latent_line(row, SHOWN) for row in best] for name, best in best_of(rows).items()}
    found: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in rows.sort_by([("latent", "ascending"), ("scorer", "ascending")]).to_pylist():
        of_explainer = found[row["explainer"] or ""]
        if row["latent"] not in of_explainer or of_explainer[row["latent"]]["score"] is None:
            of_explainer[row["latent"]] = row
    return {name: [_latent_line(row) for row in of.values()] for name, of in found.items()}


def _latent_line(row: dict[str, Any], longest: int | None = None) -> str:
    text, score = row["explanation"] or "", row["score"]
    if (score is None and row["scorer"]) or not text:
        ended = why(row["status"], row["reason"])
        text = f"{text}  ({ended})" if text else ended
    text = visible(text)
    text = text if longest is None or len(text) <= longest else text[: longest - 3] + "..."
    return f"  latent {row['latent']:<8} {'   -' if score is None else f'{score:.2f}'}  {text}"


def _line(one: dict[str, Any]) -> str:
    average, null, lift = (str(Measure(**one[name])) for name in ("mean", "null", "lift"))
    of = sum(one["statuses"].values())
    return (
        f"  {one['scorer']}: {one['headline'].replace('_', ' ')} {average}, null {null}, lift {lift}; "
        f"{one['latents']} of {of} latents, coverage {_share(one['coverage'])}"
    )


def _reasons(found: dict[str, dict[str, Any]], unit: str) -> str:
    counts = {kind: one[unit] for kind, one in found.items()}
    return visible(told(counts, {kind: one["first"] for kind, one in found.items()}))


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"
