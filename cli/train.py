"""sae-train: train, evaluate and save sparse coders on a language model's activations."""

import gc
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from sae.base.errors import ConfigError

from .common import read_config
from .parsing import Parser
from .recipes import FAMILY, MODEL, first_lines, recipe
from .running import DONE, log, run
from .telling import report, say_next, tables

AUTO, DRY_RUN = "auto", "--dry-run"
CONFIG = "sae.training.config:TrainConfig"
EPILOG = """Every config field is an option: --coder.selection.k 64 --activations.sites '[layers.3]'.
Examples:
  sae-train                                          the embedded quickstart: under two minutes, nothing downloaded
  sae-train --config jumprelu --on smollm2           a family of coders on a model: --list-configs names both
  sae-train --on smollm2 --model.name FOLDER --text.source FOLDER
  sae-train --resume runs/quickstart                 continue bit for bit
  torchrun --no-python --nproc-per-node 2 sae-train --on smollm2
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    code = run(command, argv)
    if argv is None and DRY_RUN in sys.argv:
        os._exit(code)  # all is said and nothing under way: taking torch's modules apart would cost a second
    return code


def command(argv: list[str]) -> int:
    """Parses and acts."""
    parser = Parser("sae-train", config=CONFIG, description=__doc__, epilog=EPILOG)
    parser.add_argument("--config", metavar="NAME|FILE", help=f"a family of coders or a YAML file (default: {FAMILY})")
    parser.add_argument("--on", metavar="MODEL|FILE", help=f"the model it is trained on (default: {MODEL})")
    parser.add_argument("--resume", metavar="RUN|auto", help="continue the run in this folder; auto: that of this job")
    parser.add_argument(DRY_RUN, action="store_true", help="print what the run would take, touch nothing")
    parser.add_argument("--ranks", metavar="N", type=int, help="of a --dry-run: processes that would train together")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--list-configs", action="store_true", help="list families and models and exit")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the model run code that it ships")
    parser.add_argument("--repair", action="store_true", help="verify the caches and make again what is damaged")
    parser.add_argument("--store-only", action="store_true", help="store what activations.source disk reads, and end")
    parser.add_argument("--shard", metavar="I/N", help="with --store-only: the I-th of N parts, 1/N to N/N")
    parser.add_json()
    options, overrides = parser.parse_fields(argv)
    if options.ranks is not None and not options.dry_run:
        raise ConfigError("--ranks: is for --dry-run; torchrun, srun or accelerate start the ranks of a run")
    if options.list_configs:
        return _list_configs(options.json)

    if options.shard and not options.store_only:
        raise ConfigError("--shard: goes with --store-only")
    if options.resume and options.store_only:
        raise ConfigError("--resume: goes without --store-only")
    folder = Path(options.resume) if options.resume not in (None, AUTO) else None
    if folder and (options.config or options.on):
        option = "--config" if options.config else "--on"
        raise ConfigError(
            f"{option}: a resumed run has its own; change fields one by one, for example --log.every_steps 50"
        )
    said = {} if folder else recipe(options.config, options.on)  # a wrong name is told before torch is imported
    with _rarely_collected() if options.dry_run else nullcontext():
        return _act(said, folder, options, overrides)


@contextmanager
def _rarely_collected() -> Iterator[None]:
    """While open, cycles are seldom looked for: modules and shapes are made that last, and it is a quarter of the time.

    Seldom rather than never, so that the process holds what any other would.
    """
    usual = gc.get_threshold()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def _act(said: dict[str, Any], folder: Path | None, options: Namespace, overrides: list[str]) -> int:
    """Does what was asked for, with torch."""
    from sae.training.checkpoint import resumed_config, saved_config
    from sae.training.config import TrainConfig

    def config() -> TrainConfig:
        if folder:
            return resumed_config(read_config(TrainConfig, {}, overrides, saved_config(folder)), folder)
        return read_config(TrainConfig, said, overrides)

    if options.print_config:
        from sae.base.settings import encode, to_yaml

        report(options.json, encode(_valid(config())), [to_yaml(config()).rstrip()])
        return DONE
    if options.store_only:
        return _store(_valid(config()), options)
    if options.dry_run:
        return _estimate(_valid(config()), options)
    return _train(config, folder, options)


def _estimate(config, options, more=lambda widths: []) -> int:
    from sae.training.estimate import estimate

    found = estimate(config, options.trust_remote_code, options.ranks)
    report(options.json, found.to_json(), [*found.lines(), *more(found.widths)])
    return DONE


def _valid(config):
    config.validate()
    return config


def _train(config, folder: Path | None, options) -> int:
    from sae.base.memory import keep_freed_memory
    from sae.parallel.agreement import together
    from sae.parallel.ranks import process_group, rank
    from sae.training.run import train
    from sae.training.start import begin

    keep_freed_memory()
    with process_group(_ranks(config)):
        going_on = True if folder else options.resume or False
        found, folder, resume = begin(config, folder, going_on, _new_folder)
        with together():
            if rank() == 0:
                _announce(found, folder, options.trust_remote_code)
        result = train(found, resume, options.trust_remote_code, folder, options.repair)
        first = rank() == 0
    if first:
        report(options.json, {"run_dir": folder, "metrics": result.metrics}, tables(result.metrics))
        log.info("run folder   %s", folder)
        if (folder / "report.html").is_file():
            log.info("report       %s", folder / "report.html")
        read = all(site.model for coder in result.coders.values() for site in coder.spec.reads)
        say_next(["sae-eval", folder], *([["sae-explain", folder]] if read else []))  # of vectors there is no text
    return DONE


def _ranks(config):
    """Returns how the ranks are to meet; where one cannot read the config, rank 0 tells it why not, or what it says."""
    from sae.parallel.launch import launch
    from sae.parallel.ranks import RanksConfig

    if launch().world_size > 1:
        with suppress(ConfigError):
            return config().ranks
    return RanksConfig()


def _store(config, options) -> int:
    from sae.base.parts import Part
    from sae.training.storing import check_storing, size_told, store_activations

    part = Part.parse(options.shard or "1/1")
    check_storing(config)
    if options.dry_run:
        return _estimate(config, options, lambda widths: [size_told(config, widths, part)])
    folder = store_activations(config, (part.number, part.of), options.trust_remote_code, options.repair)
    report(options.json, {"folder": folder, "shard": str(part)}, [f"store        {folder}"])
    return DONE


def _announce(config, folder: Path, trust_remote_code: bool) -> None:
    """Says what the run will take, before anything is loaded."""
    from sae.base.files import cache_dir
    from sae.base.room import Need, shortage
    from sae.training.estimate import check_disk, estimate

    log.info("run folder   %s", folder)
    try:
        found = estimate(config, trust_remote_code)
    except ConfigError:
        raise
    except Exception as error:  # a model that cannot be traced without its weights may still run
        log.warning("warning      no estimate: %s", " ".join(str(error).split())[:200])
        return
    for line in found.lines():
        log.info(line)
    if found.disk:
        check_disk(found.disk, folder)
        missing = shortage(Need("run_dir", folder, found.disk), Need("SAE_CACHE", cache_dir(), found.cached))
        if missing:  # no error: the text may be short, or be there already
            log.warning("warning      %s", missing)


def _new_folder(base: Path) -> Path:
    """Returns the folder of a run that is named by its config alone: with a number if it is taken."""
    from sae.training.checkpoint import has_begun

    folder, number = base, 2
    while has_begun(folder):
        folder = base.with_name(f"{base.name}-{number}")
        number += 1
    if folder != base:
        log.info(
            "%s holds a run, so this one goes to %s; to continue that one: sae-train --resume %s; to begin it anew: "
            "rm -r %s",
            *(base, folder, base, base),
        )
    return folder


def _list_configs(as_json: str | None) -> int:
    told = {kind: first_lines(kind) for kind in ("families", "models")}
    lines: list[str] = []
    for kind, option, default in (("families", "--config", FAMILY), ("models", "--on", MODEL)):
        listed = [f"  {name:20}{about}" for name, about in told[kind].items()]
        lines += [f"{kind}, for {option} (default: {default})", *listed, ""]
    lines.append("Any family goes on any model: sae-train --config jumprelu --on smollm2")
    lines.append("A file of your own begins with: extends: jumprelu on smollm2")
    report(as_json, told, lines)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
