"""sae-eval: held-out metrics of a coder, or of every coder of a run or repository, as a table and one JSON.

Started by torchrun or srun, every rank measures its share, and the first one tells the figures of all.
"""

import sys
from functools import partial
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.base.errors import ConfigError
from sae.base.settings import read_yaml

from .common import read_config
from .parsing import JSON, Parser, add_hints, hints
from .running import DONE, log, run
from .telling import plain, report, say_next, tables

if TYPE_CHECKING:
    import argparse

    from sae.coder.coder import SparseCoder
    from sae.coder.spec import CoderSpec
    from sae.lm.models import LanguageModel
    from sae.parallel.stopping import StopFlag
    from sae.text.documents import TextConfig

    Read = tuple[LanguageModel, LanguageModel | None, TextConfig]

CONFIG, GROUPS = "sae.training.config:TrainConfig", ("model", "second_model", "text", "activations.path", "ranks")
READ = ("--model.", "--second_model.", "--text.")
STORED, RANKS = "--activations.path", "--ranks."


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run(command, argv)


def command(argv: list[str]) -> int:
    """Parses and acts."""
    parser = Parser("sae-eval", config=CONFIG, groups=GROUPS, description=__doc__)
    parser.add_argument("path", help="a run folder, a coder, or whatever else `sae.load` takes")
    parser.add_argument("--tokens", type=int, default=65_536, help="held-out tokens (default: %(default)s)")
    parser.add_argument("--nulls", action="store_true", help="also an untrained dictionary and PCA at the same L0")
    parser.add_json("with a file, write the metrics there (default: sae-eval.json in the run folder)")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the model run code that it ships")
    parser.add_argument("--repair", action="store_true", help="verify the cached text and make it again if damaged")
    add_hints(parser)
    options, overrides = parser.parse_fields(argv)
    if options.tokens < 1:
        raise ConfigError(f"--tokens: {options.tokens} must be at least 1")

    from sae.base.paths import check_file
    from sae.parallel import agreement, ranks
    from sae.parallel.stopping import stop_flag
    from sae.training.config import TrainConfig

    path = Path(options.path).expanduser()
    named = options.json not in (None, JSON)
    target = Path(options.json).expanduser() if named else (path if path.is_dir() else Path()) / "sae-eval.json"
    check_file(target, "--json")
    group = read_config(TrainConfig, {}, [word for word in overrides if word.startswith(RANKS)]).ranks
    group.validate()
    with ranks.process_group(group), stop_flag() as stop:
        found, model_known = _measured(options, [word for word in overrides if not word.startswith(RANKS)], stop)
        with agreement.together():
            if ranks.rank() == 0:
                _report(options, target, found, model_known)
    return DONE


def _measured(options: "argparse.Namespace", overrides: list[str], stop: "StopFlag") -> tuple[dict[str, Any], bool]:
    """Returns the figures by coder, and whether a language model is known that explains them."""
    from sae.base.progress import Watch
    from sae.evaluation.evaluation import evaluate_all
    from sae.parallel import agreement, ranks
    from sae.text.tokenizing import tokenize, what_was_met

    share, watch = ranks.own_share(), Watch(stop, repair=options.repair)
    with stop.lifted(), agreement.together():
        coders, on = _opened(options, overrides)
    if isinstance(on, str):
        found = evaluate_all(coders, watch, options.tokens, options.nulls, share, activations=on)
        return found, bool(next(iter(coders.values())).spec.reads[0].model)
    lm, second, config = on
    with agreement.rank_zero_first():
        text = tokenize(config, lm.tokenizer, lm.source(), watch)
    held_out = f"{text.held_out.n_rows * text.held_out.context_length:,}"
    log.info("text: %s held-out tokens, %s", held_out, what_was_met(text.meta))
    rows = text.held_out
    return evaluate_all(coders, watch, options.tokens, options.nulls, share, lm=lm, rows=rows, second=second), True


def _opened(options: "argparse.Namespace", overrides: list[str]) -> tuple[dict[str, "SparseCoder"], "str | Read"]:
    """Returns the coders, and what they are measured on: where stored activations lie, or models and text."""
    from sae.evaluation.evaluation import text_of
    from sae.lm.devices import resolve_device
    from sae.lm.models import ModelConfig, load_language_model
    from sae.loading import hub
    from sae.training.config import TrainConfig

    path = Path(options.path).expanduser()
    coders = hub.load_all(options.path, revision=options.revision, **hints(options))
    spec = next(iter(coders.values())).spec
    beside = [path.resolve() / next(iter(coders)), *(path.resolve() / next(iter(coders))).parents]
    runs = [p.parent / "config.yaml" for p in beside if p.name == "coders"]
    run_config = next((p for p in runs if p.is_file()), None)
    for name, coder in coders.items():
        if _subject(coder.spec) != _subject(spec):
            raise ConfigError(f"path: {name} reads another model or text than {next(iter(coders))}; evaluate one run")
    for name, coder in coders.items():
        if not coder.spec.is_placed:
            raise ConfigError(f"--site: {name} does not say where it reads; name the place, such as layers.12")
    stored = _stored(spec, run_config, overrides)
    if stored:
        return {name: coder.to(resolve_device("auto")) for name, coder in coders.items()}, stored
    if not (spec.reads and spec.reads[0].model) and not any(word.startswith("--model.name") for word in overrides):
        raise ConfigError("--model.name: the coder does not say which language model it reads; name it")
    trained = TrainConfig()
    if spec.reads and spec.reads[0].model:
        site = spec.reads[0]
        text = text_of(spec) if "text" in spec.training else trained.text
        trained = TrainConfig(model=ModelConfig(name=site.model, revision=site.revision), text=text)
    config = read_config(TrainConfig, read_yaml(run_config) if run_config else {}, overrides, trained)
    for part in (config.model, config.second_model, config.text):
        part.validate()
    load = partial(load_language_model, trust_remote_code=options.trust_remote_code)
    lm = load(**vars(config.model))
    second = load(**vars(config.second_model)) if config.second_model.name else None
    for model in (lm, second) if second else (lm,):
        model.check_context(config.text.context_length)
    return {name: coder.to(lm.device) for name, coder in coders.items()}, (lm, second, config.text)


def _report(options: "argparse.Namespace", target: Path, found: dict[str, Any], model_known: bool) -> None:
    """Writes and prints the metrics, and what can be done next."""
    from sae.base.files import write_json

    write_json(target, plain(found))
    report(options.json == JSON, found, tables(found))
    log.info("json         %s", target)
    if model_known:
        say_next(["sae-explain", options.path])


def _stored(spec: "CoderSpec", run_config: Path | None, overrides: list[str]) -> str:
    """Returns where the stored activations lie that are to be measured on, "" where a language model is to be read.

    Those are named, or are what the coder was trained on, unless a model or text is named.
    """
    named, other = ([word for word in overrides if word.startswith(start)] for start in ((STORED,), READ))
    if named:
        path = named[-1].partition("=")[2]
        if not path or len(named) < len(overrides):
            raise ConfigError(f"{STORED}: takes a folder, a file or a glob, and no other field beside it")
        return path
    if other or "tensors" not in spec.training:
        return ""
    kept = run_config.parent / "held_out.safetensors" if run_config else None
    path = str(kept) if kept and kept.is_file() else spec.training["tensors"]["source"]
    if not Path(path).exists() and not glob(path):
        raise ConfigError(
            f"{STORED}: the coder was trained on {path}, which is not here; name activations, or --model.name"
        )
    return path


def _subject(spec: "CoderSpec") -> tuple[Any, ...]:
    """What a coder is evaluated on: models and text."""
    return [(site.model, site.revision) for site in spec.reads[:1]], spec.training.get("text")


if __name__ == "__main__":
    sys.exit(main())
