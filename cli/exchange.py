"""sae-explain export and import: Neuronpedia's JSON lines out, delphi's explanations and scores in."""

import argparse
from pathlib import Path

from sae.base.errors import ConfigError, nearest

from .parsing import Parser
from .running import DONE
from .telling import report, say_next


def export_parser() -> Parser:
    """Returns what `sae-explain export` takes."""
    parser = Parser("sae-explain export", description="write explanations, scores and windows for Neuronpedia")
    parser.add_argument("run_dir", help="folder of an explained run")
    parser.add_argument("folder", help="where explanations.jsonl and activations.jsonl are written")
    parser.add_argument("--model-id", required=True, help="Neuronpedia's name of the model, such as gpt2-small")
    parser.add_argument("--source-id", required=True, help="Neuronpedia's name of the coder, such as 6-res-jb")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the model run code that it ships")
    parser.add_json()
    parser.set_defaults(act=export)
    return parser


def export(options: argparse.Namespace) -> int:
    """Writes the explanations, scores and windows of a run for Neuronpedia."""
    from dataclasses import replace

    from interp.exchange.neuronpedia import export_run
    from interp.run.latents import spelled_out
    from interp.run.preparing import Given, prepare, resolve_config
    from interp.run.rundir import latents_of, run_folder, saved_config
    from sae.base.paths import check_writable
    from sae.base.progress import Watch
    from sae.parallel.stopping import stop_flag

    folder = run_folder(Path(options.run_dir))
    check_writable(Path(options.folder).expanduser(), "folder")
    config = replace(saved_config(folder), latents=spelled_out(latents_of(folder)))  # of all commands, not of the last
    config = resolve_config(config)
    with stop_flag() as stop:
        prepared = prepare(config, Given(trust_remote_code=options.trust_remote_code), Watch(stop))
        examples = (prepared.examples(latent) for latent in prepared.latents.tolist())
        names = options.model_id, options.source_id
        counts = export_run(folder, options.folder, config.all_scorers(), *names, examples, config.text.source)
    told = f"{counts.explanations} explanations and {counts.activations} windows in {options.folder}"
    report(options.json, {"folder": options.folder, **counts._asdict()}, [told])
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
