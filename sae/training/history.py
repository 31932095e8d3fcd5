"""What a run has measured, as rows for pandas and its like."""

import json
from pathlib import Path
from typing import Any

from sae.base.errors import ConfigError
from sae.base.files import read_json
from sae.base.paths import near
from sae.base.settings import flat


def history(run: Any) -> list[dict[str, Any]]:
    """Returns a flat row for each coder and step of a run that was logged: `pandas.DataFrame(sae.history(run))`.

    `run` is a run folder, finished or not, or what `sae.train` returned. A row has `step`, `coder`, and the names of
    metrics.jsonl; one of an evaluation has `held_out.reconstruction.fvu` and all that `sae.evaluate` returns under such
    names instead. The last evaluation comes last. ConfigError if the folder is not that of a run.
    """
    folder = Path(getattr(run, "run_dir", run)).expanduser()
    log = folder / "metrics.jsonl"
    if not log.is_file():
        raise ConfigError(f"run: {folder} holds no metrics.jsonl; it is not the folder of a run.{near(folder)}")
    whole = [line for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    rows = [json.loads(line) for line in whole]  # a run that goes on may be in the middle of one
    if (last := folder / "evaluation.json").is_file():
        found = read_json(last)
        rows += [{"step": found[name]["training"]["steps"], "coder": name, "held_out": found[name]} for name in found]
    return [flat(row) for row in rows]
