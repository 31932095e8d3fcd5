"""Which latents of two explained runs belong together: of one coder those of one id, of two those that are matched."""

from pathlib import Path
from typing import Any

from interp.run.preparing import load_coder
from interp.run.rundir import ENVIRONMENT, saved_config
from interp.view.explained import ExplainedRun
from interp.view.reporting.blocks import rounded, shown_text
from sae.base.errors import ConfigError, DataError
from sae.base.files import read_json

MOST = 5_000  # latents of a run whose decoders are compared with all of the other's


def pairs_of(a: ExplainedRun, b: ExplainedRun) -> dict[str, Any]:
    """Returns `by` and, but for the latents of one coder, `pairs` [[latent of a, of b, how alike], ...].

    `by` is "id" for one coder, "decoder" or "co-activation" or "meaning" for what was compared by `sae-explain compare`
    or is compared now, and "" where nothing can be: `note` says why, and in the other cases what was done.
    """
    coders = [_digest(run.run_dir) for run in (a, b)]
    if coders[0] and coders[0] == coders[1]:
        return {"by": "id", "note": "Both runs are of one coder: latents are joined by their ids."}
    told = _compared(a, b)
    if told is not None:
        by, pairs, doubt = told
        note = (
            f"The runs are of different coders: latents are matched one to one by {by}, as sae-explain compare found."
        )
        return {"by": by, "note": f"{note} {shown_text(doubt)}".strip(), "pairs": pairs}
    try:
        pairs, doubt = _by_decoder(a, b)
    except (ConfigError, DataError, OSError) as error:
        note = f"The runs are of different coders, and latents are not matched: {shown_text(str(error))}"
        return {"by": "", "note": note}
    note = "The runs are of different coders: latents are matched one to one by the cosine of their decoders."
    return {"by": "decoder", "note": f"{note} {doubt}".strip(), "pairs": pairs}


def _compared(a: ExplainedRun, b: ExplainedRun) -> tuple[str, list[list[Any]], str] | None:
    """What sae-explain compare has written down: by what it matched, of two decoders if it could, the pairs, and what
    speaks against them.
    """
    for mine, other, turned in ((a, b, False), (b, a, True)):
        for path in sorted(mine.run_dir.glob("compare-*.json")):
            found = read_json(path)
            if Path(found.get("b", "")).resolve() != other.run_dir.resolve():
                continue
            for by in ("decoder", "co-activation", "meaning"):
                if by in found.get("matchings", {}):
                    pairs = [
                        [pair["a"], pair["b"], rounded(pair["strength"])] for pair in found["matchings"][by]["pairs"]
                    ]
                    doubt = found.get("doubt", "") if by == "decoder" else ""
                    return by, [[y, x, strength] for x, y, strength in pairs] if turned else pairs, doubt
    return None


def _by_decoder(a: ExplainedRun, b: ExplainedRun) -> tuple[list[list[Any]], str]:
    """The matching of explained latents by the cosines of their decoders, and what speaks against it; ConfigError if it
    cannot be had.
    """
    import numpy as np

    from interp.run.compare import apart, decoder_cosines, match

    for run in (a, b):
        if len(run) > MOST:
            raise ConfigError(
                f"{run.run_dir} has {len(run):,} latents, more than {MOST:,}; sae-explain compare does it"
            )
    coders = [load_coder(saved_config(run.run_dir)) for run in (a, b)]
    latents = [np.array(run.latents) for run in (a, b)]
    table = decoder_cosines(coders[0], coders[1], *latents)
    if table is None:
        raise ConfigError(f"their decoders write {coders[0].spec.d_out} and {coders[1].spec.d_out} dimensions")
    found = match(table)
    told = zip(found.pairs.tolist(), found.strength.tolist(), strict=True)
    pairs = [[int(latents[0][i]), int(latents[1][j]), rounded(strength)] for (i, j), strength in told]
    return sorted(pairs, key=lambda pair: -(pair[2] or 0.0)), apart(coders[0].spec, coders[1].spec)


def _digest(run_dir: Path) -> str:
    path = run_dir / ENVIRONMENT
    return read_json(path).get("coder", "") if path.is_file() else ""
