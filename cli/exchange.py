"""sae-view --export: a run for Neuronpedia, or a site; sae-explain import: delphi's explanations and scores."""

import argparse
import os
from pathlib import Path

from sae.base.errors import ConfigError, nearest
from sae.base.visible import visible

from .parsing import Parser
from .running import DONE
from .telling import report, say_next


def check_export(options: argparse.Namespace) -> None:
    """Raises ConfigError for what --export does not take."""
    kind, *folders = options.export or [""]
    kinds = {"neuronpedia": _neuronpedia, "static": _static}
    if options.export and kind not in kinds:
        raise ConfigError(f"--export: {kind!r} is not one of {', '.join(kinds)}.{nearest(kind, kinds)}")
    if len(folders) > 1:
        raise ConfigError(f"--export: {len(folders)} folders; it takes one: --export {kind} {folders[0]}")
    if kind == "static" and not folders:
        raise ConfigError("--export: static needs a folder to write the site to: --export static FOLDER")


def export(options: argparse.Namespace) -> int:
    """Writes what was asked for of a run."""
    kind, *folders = options.export
    return (_neuronpedia if kind == "neuronpedia" else _static)(options, *folders)


def _neuronpedia(options: argparse.Namespace, folder: str = "") -> int:
    """Writes what a local Neuronpedia instance imports."""
    from dataclasses import replace

    from interp.exchange.neuronpedia_names import check_ids
    from interp.run.rundir import latents_of, run_folder, saved_config
    from sae.base.paths import check_writable
    from sae.base.progress import Watch
    from sae.parallel.stopping import stop_flag

    check_ids(options.model_id, options.source_id)
    run_dir = run_folder(Path(options.runs[0]))
    target = Path(folder).expanduser() if folder else run_dir / "neuronpedia"
    check_writable(target, "--export")

    from interp.exchange.neuronpedia_run import export_explained
    from interp.run.latents import spelled_out
    from interp.run.preparing import Given, prepare, resolve_config
    from interp.view.notes import Notes

    config = replace(
        saved_config(run_dir), latents=spelled_out(latents_of(run_dir))
    )  # of all commands, not of the last
    asked = {"device": options.device} | ({"name": options.model} if options.model else {})
    config = resolve_config(replace(config, model=replace(config.model, **asked)))
    with stop_flag() as stop:
        watch = Watch(stop)
        prepared = prepare(config, Given(trust_remote_code=options.trust_remote_code), watch)
        ids = options.model_id, options.source_id
        names, made = export_explained(config, prepared, target, *ids, Notes(run_dir).labels(), watch)
    said = {"folder": target, "model_id": names.model_id, "source_id": names.source_id, **made._asdict()}
    counts = ", ".join(f"{count:,} {name}" for name, count in made._asdict().items())
    named = "" if all(ids) else "; --model-id and --source-id name it otherwise"
    told = [f"source       {names.model_id}/{names.source_id}{named}", f"exported     {counts} in {target}"]
    report(options.json, said, told)
    return DONE


def _static(options: argparse.Namespace, folder: str) -> int:
    """Writes a site of a run's reports."""
    from sae.base.paths import check_writable
    from sae.pages.site import check_site, write_site

    from .reports import written_of

    run, target = Path(options.runs[0]).expanduser(), Path(folder).expanduser()
    check_writable(target, "--export")
    check_site(target, "--export")
    pages = [page.absolute() for page in written_of([run])]
    root = Path(os.path.commonpath([page.parent for page in pages]))
    names = write_site(target, f"Reports of {visible(run.absolute().name)}", root, pages, "--export")
    told = f"site         {target / names[0]}: {len(pages)} pages; any static host takes the folder as it is"
    report(options.json, {"folder": target, "files": names}, [told])
    return DONE


def import_parser() -> Parser:
    """Returns what `sae-explain import` takes."""
    parser = Parser("sae-explain import", description="make a run of delphi's explanations and scores")
    parser.add_argument("results", help="folder of a delphi run, which holds explanations/ and scores/")
    parser.add_argument("run_dir", help="folder of the new run")
    parser.add_argument("--hookpoint", help="which of several")
    parser.add_json()
    parser.set_defaults(act=take_in)
    return parser


def take_in(options: argparse.Namespace) -> int:
    """Reads delphi's explanations and scores, and writes them as a run of ours, its figures computed anew."""
    from interp.exchange.delphi import EXPLAINER, SCORERS, read_explanations, read_scores
    from interp.records import Explanation
    from interp.run.reasons import OK
    from interp.run.results import write_results
    from interp.run.rundir import explained_in, scores_in, shard_folder
    from interp.run.telling import summary_lines
    from sae.base.paths import check_writable

    source, run_dir = Path(options.results).expanduser(), Path(options.run_dir).expanduser()
    explanations, rows = read_explanations(source), list(read_scores(source))
    hookpoints = sorted({*explanations, *(row["hookpoint"] for row in rows)})
    chosen = options.hookpoint or (hookpoints[0] if len(hookpoints) == 1 else "")
    if chosen not in hookpoints:
        what = f"{options.hookpoint!r} is not among them.{nearest(chosen, hookpoints)}" if chosen else "choose one."
        raise ConfigError(f"--hookpoint: {source} is of {', '.join(hookpoints) or 'none'}; {what}")
    check_writable(run_dir, "run_dir")
    if (run_dir / "shards").exists():
        raise ConfigError(f"run_dir: {run_dir} holds a run; choose another folder, or delete it")
    folder = shard_folder(run_dir, (1, 1))
    explained = explained_in(folder)
    scored = scores_in(folder)
    for latent, text in sorted(explanations.get(chosen, {}).items()):
        row = {"latent": latent, "explainer": EXPLAINER, "by": "", "status": OK, "reason": ""}
        explained.append(row | {"explanation": Explanation(latent, text, EXPLAINER).to_json()})
    for row in rows:
        if row["hookpoint"] == chosen:
            scored.append(row)
    names = {scorer.get_choice_name(type(scorer)): scorer for scorer in SCORERS.values()}
    summary = write_results(run_dir, names, {"imported": "delphi", "hookpoint": chosen})
    report(options.json, {"run_dir": run_dir, **summary}, summary_lines(summary, run_dir))
    say_next(["sae-explain", "show", run_dir, *map(str, sorted(explanations.get(chosen, {}))[:1])])
    return DONE
