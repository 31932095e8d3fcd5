"""sae-load: find released coders, look at them, fetch, convert, publish and check them."""

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.base.errors import ConfigError
from sae.base.units import data_size

from .parsing import Parser, add_hints, hints
from .running import DONE, ERROR, log, run
from .telling import report, say_next

if TYPE_CHECKING:
    from sae.coder.coder import SparseCoder
    from sae.loading.outline import Outline
    from sae.loading.releases import Release, ReleaseSummary
    from sae.loading.remote import HubFiles
    from sae.untrusted.files import Files
    from sae.untrusted.hints import Hints
    from sae.untrusted.places import Place

EPILOG = """ID is what sae.load takes: a folder or file, OWNER/REPO[/FOLDER] on the hub, SAELens' RELEASE/SAE_ID, or
Neuronpedia's MODEL/SOURCE.
Examples:
  sae-load list --model gemma-2-2b                                 what has been released
  sae-load show gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82    one coder, without its weights
  sae-load fetch gpt2-small-res-jb/blocks.8.hook_resid_pre --to models    for a machine without a network
  sae-load convert runs/quickstart/coders/model.layers.2 --to saelens exported
  sae-load push exported ME/MY-CODER --private
  sae-load doctor OWNER/REPO --model MODEL                         does it fit the model's activations?
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run(command, argv)


def command(argv: list[str]) -> int:
    """Parses and acts."""
    parser = Parser("sae-load", description=__doc__, epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def added(name: str, act: Any, path: str = "ID") -> Parser:
        found = commands.add_parser(name, help=act.__doc__, description=act.__doc__)
        found.set_defaults(act=act, parser=found)
        if path:
            found.add_argument("id", metavar=path, help="a folder, a hub address or a released name")
            add_hints(found)
            found.add_argument("--model-name", metavar="MODEL", help="the language model, if its files do not say")
            found.add_argument("--cache-dir", metavar="FOLDER", help="instead of huggingface_hub's cache")
        found.add_json()
        return found

    listing = added("list", _list, "")
    listing.add_argument("--model", help="only coders of this language model: a hub id, or a part of one")
    listing.add_argument("--release", metavar="NAME", help="only releases with this in their name")
    added("show", _show)
    fetch = added("fetch", _fetch)
    fetch.add_argument("--to", metavar="FOLDER", help="put the files below this folder instead of the cache")
    convert = added("convert", _convert, "A")
    convert.add_argument("--to", metavar="FORMAT", required=True, help="native, saelens, ...")
    convert.add_argument("folder", metavar="B", help="a folder that does not exist yet, or is empty")
    push = added("push", _push, "A")
    push.add_argument("repo", metavar="REPO", help="OWNER/NAME on the hub; it is made if need be")
    push.add_argument("--to", metavar="FORMAT", default="native", help="the format: native (the default), saelens, ...")
    push.add_argument("--private", action="store_true", help="if it is made, only for the owner")
    doctor = added("doctor", _doctor)
    doctor.add_argument("--model", help="hub id or folder of the language model (default: what the coder says)")
    doctor.add_argument("--tokens", type=int, default=2048, help="tokens to look at (default: %(default)s)")
    doctor.add_argument("--text", metavar="SOURCE", help="a file, folder or hub id (default: Python's documentation)")
    doctor.add_argument("--trust-remote-code", action="store_true", help="let the model run code that it ships")
    options = parser.parse_args(argv)
    return options.act(options)


def _list(options: argparse.Namespace) -> int:
    """List the releases that are known by name."""
    from sae.loading.releases import list_released

    rows = list_released(options.model, options.release)
    head = ("release", "model", "coders", "layers", "widths", "L0", "format", "verified")
    counts = f"{len(rows)} releases, {sum(row.coders or 0 for row in rows):,} coders"
    report(options.json, rows, [*_table([head, *map(_release_row, rows)]), "", counts])
    say_next(["sae-load", "show", rows[0].name if len(rows) == 1 else "RELEASE"])
    return DONE


def _show(options: argparse.Namespace) -> int:
    """Show what a coder is, without fetching its weights; list them where there are several."""
    members = _members(options.id)
    if members:
        head = ("coder", "in the repository", "L0", "Neuronpedia")
        rows = [(c.address, c.path, _figure(c.l0), c.neuronpedia or "") for c in members]
        counts = f"{len(members)} coders in hf://{members[0].repo}, expected in the format {members[0].format}"
        told = [{"address": coder.address, **vars(coder)} for coder in members]
        report(options.json, told, [*_table([head, *rows]), "", counts, *filter(None, [members[0].notes])])
        say_next(["sae-load", "show", members[0].address])
        return DONE
    from sae.loading.outline import coders_at, outline

    files, below, hints = _located(options)
    found = coders_at(files, below, hints)
    if len(found) == 1:
        known = outline(found[0])
        report(options.json, _told(options.id, known), _table(_facts(options.id, known)))
        say_next(["sae-load", "doctor", options.id])
        return DONE
    folders = [place.folder for place in found]
    alone = [bool(place.folder) and folders.count(place.folder) == 1 for place in found]
    parts = (place.folder if one else place.weights for place, one in zip(found, alone, strict=True))
    addresses = [f"{files.identity}/{part}" for part in parts]
    report(options.json, addresses, [*addresses, "", f"{len(found)} coders"])
    say_next(*([["sae-load", "show", addresses[0]]] if addresses else []))
    return DONE


def _fetch(options: argparse.Namespace) -> int:
    """Fetch the files of a coder, of all coders of a release, or of a whole repository."""
    from sae.loading.outline import coders_at, files_needed, outline, with_configs
    from sae.loading.remote import HubFiles

    members = _members(options.id)
    if members:
        files, below = HubFiles(members[0].repo, options.revision, options.cache_dir), ""
        parts = tuple(f"{member.path}/" for member in members)
        names = with_configs(files, [name for name in files.names() if f"{name}/".startswith(parts)])
    else:
        files, below, hints = _located(options)
        if not isinstance(files, HubFiles):
            here = Path(files.identity, below)
            report(options.json, {"folder": here, "files": []}, [f"on this disk {here}"])
            return DONE
        found = coders_at(files, below, hints)
        whole = [name for name in files.names() if not below or name.startswith(f"{below}/")]
        names = files_needed(outline(found[0])) if len(found) == 1 else with_configs(files, whole)
    target = Path(options.to).expanduser() / files.identity if options.to else None
    _download(files, names, target)
    folder = (target or files.snapshot) / below
    report(options.json, {"folder": folder, "revision": files.revision, "files": names}, [f"in           {folder}"])
    say_next(["sae-load", "doctor", folder if target else options.id])
    return DONE


def _download(files: "HubFiles", names: list[str], target: Path | None) -> None:
    """Fetches files into the cache or a folder, after saying how much that is, and compares them with their digests."""
    from sae.untrusted import digests

    left = [name for name in names if target or not files.is_cached(name)]
    sizes = files.sizes(left)
    total, root = sum(sizes.values()), target or files.folder
    of = f"{len(left)} of {len(names)} files, {data_size(total)}"
    log.info("to fetch     %s, of commit %s", of, files.revision)
    free = shutil.disk_usage(next(path for path in [root, *root.absolute().parents] if path.exists())).free
    if total > free:
        raise ConfigError(
            f"{'--to' if target else '--cache-dir'}: {data_size(total)} are needed, {data_size(free)} are free"
        )
    for number, name in enumerate(left, 1):
        log.info("%-12s %s  %s", f"{number}/{len(left)}", name, data_size(sizes.get(name, 0)))
        digests.verify(files.copy_into(name, target) if target else files.path(name))


def _convert(options: argparse.Namespace) -> int:
    """Write a coder in another format; what that format cannot say is named, and then nothing is written."""
    from sae.loading import hub
    from sae.loading.converting import convert

    coder = hub.load(options.id, **_load_arguments(options))
    changed = convert(coder, options.to, options.folder)
    folder = Path(options.folder).expanduser()
    lost = [f"not kept     {', '.join(changed)}: said otherwise or not at all; the map is the same"] if changed else []
    told = {"folder": folder, "format": options.to, "not_kept": list(changed)}
    report(options.json, told, [f"written      {folder}, in the format {options.to}", *lost])
    say_next(["sae-load", "show", folder])
    return DONE


def _push(options: argparse.Namespace) -> int:
    """Put a coder, or all coders of a folder, into a repository on the hub, with a model card and its reports."""
    from sae.loading import hub
    from sae.loading.card import push

    from .reports import reports_beside

    coders = hub.load_all(options.id, **_load_arguments(options))
    if len(coders) == 1:
        coders = {"": next(iter(coders.values()))}
    pages = reports_beside(options.id)
    url = push(coders, options.repo, options.private, format=options.to, reports=pages)
    told = [f"report       {name}, from {page}" for name, page in pages.items()]
    report(options.json, {"url": url, "coders": list(coders), "reports": list(pages)}, [f"pushed       {url}", *told])
    say_next(["sae-load", "show", options.repo])
    return DONE


def _doctor(options: argparse.Namespace) -> int:
    """Check a coder against a language model and name the usual mistake that explains a bad fit (exit code 1)."""
    if options.tokens < 1:
        raise ConfigError(f"--tokens: {options.tokens} must be at least 1")
    from sae.evaluation.doctor import diagnose
    from sae.lm.models import load_language_model

    coders = _open_questions(options)
    sites = [site for coder in coders.values() for site in coder.spec.reads]
    model = options.model or next((site.model for site in sites if site.model), "")
    if not model:
        raise ConfigError(f"--model: {options.id} does not say which language model it reads; pass it")
    lm = load_language_model(model, trust_remote_code=options.trust_remote_code)
    reports = {said: diagnose(coder, lm, options.tokens, options.text) for said, coder in coders.items()}
    ranked = sorted(reports.items(), key=lambda found: found[1].score)
    lines = [line for said, found in ranked for line in [*([f"with --{said}:"] if said else []), *found.lines()]]
    best, found = ranked[0]
    lines += [f"fits best    --{best}"] if len(ranked) > 1 else []
    told = [{"with": said, **vars(found)} for said, found in ranked]
    report(options.json, told if len(told) > 1 else told[0], lines)
    if found.healthy:
        said = [f"--{word}" if i == 0 else word for i, word in enumerate(best.split())]
        say_next(["sae-eval", options.id, *said])
    return DONE if found.healthy else ERROR


def _open_questions(options: argparse.Namespace) -> "dict[str, SparseCoder]":
    """Returns the coder under "" or, where its files leave a question open, one for each answer, by the option."""
    from sae.loading import hub
    from sae.untrusted.hints import Unsaid

    try:
        place = hub.find_place(options.id, **_load_arguments(options))
        coder = hub.read_coder(place)
        if place.unsaid:  # the map does not need it, but the doctor reads a model
            raise place.unsaid[0]
        return {"": coder}
    except Unsaid as unsaid:
        if not unsaid.choices:
            raise
        answers = {f"{unsaid.field.replace('_', '-')} {choice}": {unsaid.field: choice} for choice in unsaid.choices}
        return {said: hub.load(options.id, **(_load_arguments(options) | answer)) for said, answer in answers.items()}


def _load_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what was typed as `sae.load` takes it."""
    said = {**hints(options), "model": options.model_name}
    return {"revision": options.revision, "cache_dir": options.cache_dir, **said}


def _located(options: argparse.Namespace) -> "tuple[Files, str, Hints]":
    from sae.loading.hints import checked_hints
    from sae.loading.hub import locate

    files, below = locate(options.id, options.revision, options.cache_dir)
    return files, below, checked_hints({**hints(options), "model": options.model_name})


def _members(typed: str) -> "list[Release]":
    """Returns the coders of a release that has several; [] for any other address."""
    from sae.loading import releases

    found = releases.coders_of(typed) if typed in releases.names() and not Path(typed).exists() else []
    return found if len(found) > 1 else []


def _told(typed: str, known: "Outline") -> dict[str, Any]:
    """Returns what is known of a coder without its weights, as JSON has it."""
    from sae.loading.hints import known_release

    place, tensors = known.place, known.tensors.items()
    return {
        "address": typed,
        "files": place.files.label,
        "revision": place.files.revision,
        "weights": place.weights,
        "format": known.format,
        "tensors": {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in tensors},
        "spec": known.spec and known.spec.to_json(),
        "why": known.why,
        "published": known_release(place),
    }


def _facts(typed: str, known: "Outline") -> list[tuple[str, str]]:
    from sae.coder.wording import description

    place = known.place
    commit = f", commit {place.files.revision}" if place.files.revision else ""
    rows = [("address", typed), ("files", f"{place.files.label}{commit}"), ("weights", place.weights)]
    rows.append(("format", known.format or "not known"))
    rows += [("tensor", f"{name} {dtype} {list(shape)}") for name, (dtype, shape) in known.tensors.items()]
    rows += description(known.spec) if known.spec else [("spec", f"not known: {known.why}")]
    return rows + _published_facts(place)


def _published_facts(place: "Place") -> list[tuple[str, str]]:
    """Returns what the table of releases says of a coder."""
    from sae.loading.hints import known_release

    said = known_release(place)
    if said is None:
        return []
    rows = [
        ("released as", said.address),
        ("verified", "yes" if said.verified else "no, its files were never loaded here"),
    ]
    rows += [("stated L0", _figure(said.l0))] if said.l0 else []
    rows += [("stated scale", f"{said.scale:g}")] if said.scale else []
    rows += [("Neuronpedia", said.neuronpedia)] if said.neuronpedia else []
    return rows


def _release_row(row: "ReleaseSummary") -> tuple[str, ...]:
    l0 = f"{row.l0[0]:g}-{row.l0[1]:g}" if row.l0 and row.l0[0] != row.l0[1] else _figure(row.l0[0] if row.l0 else None)
    coders = "?" if row.coders is None else str(row.coders)
    verified = "yes" if row.verified else "no"
    return row.name, row.model, coders, _span(row.layers), ",".join(row.widths), l0, row.format, verified


def _span(layers: tuple[int, ...]) -> str:
    if len(layers) > 2 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ",".join(map(str, layers))


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _table(rows: list[Any]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


if __name__ == "__main__":
    sys.exit(main())
