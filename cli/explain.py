"""sae-explain: say what the latents of a sparse coder mean, and score it."""

import sys
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.base.errors import ConfigError

from . import compare, exchange, show
from .common import read_config
from .parsing import Parser
from .recipes import config_path, fields_of, first_lines
from .running import DONE, log, run
from .telling import report, say_next

if TYPE_CHECKING:
    from interp.run.config import ExplainConfig

PARTIAL = 3
CONFIG = "interp.run.config:ExplainConfig"
EPILOG = """Every config field is an option: --examples.test 100 --models.judge.model NAME --latents 3,17,40-49
Examples:
  sae-explain runs/quickstart                        labels and scores with no key and no network
  sae-explain RUN --models.explainer.model gpt-4o-mini --budget-usd 5 --price-in 0.15 --price-out 0.6
  sae-explain RUN --models.explainer.model NAME --models.explainer.base_urls '[http://localhost:8000/v1]'
  sae-explain show RUN 508                           a latent: label, scores, and windows with marked tokens
  sae-explain RUN --shard 2/8 ...                    an eighth of the latents; then: sae-explain merge RUN_DIR
  sae-explain compare RUN_A RUN_B                    which latents of two coders mean the same
  sae-explain import DELPHI_RESULTS RUN_DIR          what delphi has explained and scored, as a run
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run(command, argv)


def command(argv: list[str]) -> int:
    """Parses and acts."""
    commands = {
        "show": show.parser(),
        "merge": _merge_parser(),
        "compare": compare.parser(),
        "import": exchange.import_parser(),
    }
    if argv[:1] and argv[0] in commands:
        asked = commands[argv[0]].parse_args(argv[1:])
        return asked.act(asked)
    if (
        argv
        and argv[0].isalpha()
        and not Path(argv[0]).exists()
        and (meant := get_close_matches(argv[0], commands, 1, 0.7))
    ):
        raise ConfigError(f"{argv[0]!r}: neither a folder nor a command. Did you mean {meant[0]!r}?")
    parser = Parser("sae-explain", config=CONFIG, commands=commands, description=__doc__, epilog=EPILOG)
    parser.add_argument("path", nargs="?", help="folder of a training run or of one coder")
    parser.add_argument("--config", metavar="NAME|FILE", help="a shipped config or a YAML file")
    parser.add_argument("--null", metavar="N|all", help="latents scored with another one's explanation too")
    parser.add_argument("--price-in", metavar="USD", help="for a million prompt tokens, of explainer and judge")
    parser.add_argument("--price-out", metavar="USD", help="for a million answer tokens, of explainer and judge")
    parser.add_argument("--evidence-only", action="store_true", help="look where latents fire, ask nothing")
    parser.add_argument("--explain-only", action="store_true", help="write explanations, score none")
    parser.add_argument("--score-only", action="store_true", help="score the explanations that are there")
    parser.add_argument("--retry-failed", action="store_true", help="do again what failed before")
    parser.add_argument("--shard", metavar="I/N", default="1/1", help="the I-th of N parts of the latents")
    parser.add_argument("--dry-run", action="store_true", help="print real prompts and what the run would take")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--list-configs", action="store_true", help="list the shipped configs and exit")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the model run code that it ships")
    parser.add_argument("--repair", action="store_true", help="verify what is stored and make again what is damaged")
    parser.add_json()
    options, overrides = parser.parse_fields(argv)
    if options.list_configs:
        told = first_lines("explain")
        report(options.json, told, (f"{name:20}{about}" for name, about in told.items()))
        return DONE

    path = config_path(options.config, "explain") if options.config else None  # a wrong name needs no import of torch

    from interp.run.config import ExplainConfig
    from interp.run.rundir import saved_config

    of_a_run = path is not None and (path.parent / "env.json").is_file()  # which an older version may have written
    began = saved_config(path.parent) if path and of_a_run else None
    said = fields_of(path, "explain") if path and not began else {}
    config = read_config(ExplainConfig, said, _words(options) + overrides, began)
    config.validate()
    if options.print_config:
        from sae.base.settings import encode, to_yaml

        report(options.json, encode(config.shown()), [to_yaml(config.shown()).rstrip()])
        return DONE
    return _explain(config, _shard(options.shard), options)


def _explain(config: "ExplainConfig", shard: tuple[int, int], options: Any) -> int:
    from interp.run.explaining import explain_run
    from interp.run.preparing import Given, resolve_config

    config, given = resolve_config(config), Given(trust_remote_code=options.trust_remote_code)
    if options.dry_run:
        from interp.run.estimate import dry_run

        lines = dry_run(config, given)
        report(options.json, {"lines": lines}, lines)
        return DONE
    found = explain_run(config, shard, given, retry_failed=options.retry_failed, repair=options.repair)
    if found is None:
        return DONE  # the ranks share the passes; what is left is to wait for answers
    if found.summary is not None:
        _tell(found.summary, found.run_dir, found.latents, options.json)
    if found.cut_off:
        hint = "" if "goes on" in found.cut_off else "; the same command goes on with what is missing"
        print(f"error: {found.cut_off}{hint}", file=sys.stderr)
    elif found.failed:
        print(f"error: {found.failed}; --retry-failed does them again", file=sys.stderr)
    return PARTIAL if found.cut_off or found.failed else DONE


def _tell(summary: dict[str, Any], run_dir: Path, latents: list[int] | None, as_json: Any) -> None:
    """Tells what the folder of a run amounts to, where that lies, and how to look at its best label."""
    from interp.run.telling import summary_lines
    from interp.view.reporting.report import keep_report

    report(as_json, {"run_dir": run_dir, **summary}, summary_lines(summary, run_dir, latents))
    log.info("results      %s", run_dir / "results.parquet")
    log.info("summary      %s", run_dir / "summary.json")
    if (page := keep_report(run_dir)) is not None:
        log.info("report       %s", page)
    best = [row["latent"] for rows in summary["best"].values() for row in rows] or latents or []
    say_next(["sae-explain", "show", run_dir, *map(str, best[:1])])


def _merge(options: Any) -> int:
    from interp.run.explaining import tell_run
    from interp.run.rundir import run_folder

    run_dir = run_folder(Path(options.run_dir))
    _tell(tell_run(run_dir), run_dir, None, options.json)
    return DONE


def _merge_parser() -> Parser:
    parser = Parser("sae-explain merge", description="put the shards of a run together")
    parser.add_argument("run_dir", help="folder of the run, which holds shards/")
    parser.add_json()
    parser.set_defaults(act=_merge)
    return parser


def _words(options: Any) -> list[str]:
    """Returns the fields that options of their own stand for, as they would be typed."""
    words: list[str] = []
    if options.path:
        words.append(f"--coder.path={options.path}")
    if options.null is not None:
        words.append(f"--null-latents={-1 if options.null == 'all' else options.null}")
    for name in ("price_in", "price_out"):
        value = getattr(options, name)
        if value is not None:
            words += [f"--models.{role}.{name}={value}" for role in ("explainer", "judge")]
    halves = [name for name in ("evidence", "explain", "score") if getattr(options, f"{name}_only")]
    if len(halves) > 1:
        raise ConfigError(f"--{halves[1]}-only: does not go with --{halves[0]}-only; leave out both to do all")
    words += [f"--only={name}" for name in halves]
    return words


def _shard(typed: str) -> tuple[int, int]:
    """Returns (i, n) of "i/n"; ConfigError unless 1 <= i <= n."""
    first, _, last = typed.partition("/")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise ConfigError(f"--shard: {typed!r} is not I/N with 1 <= I <= N, for example 2/8")
    return int(first), int(last)


if __name__ == "__main__":
    sys.exit(main())
