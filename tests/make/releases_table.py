"""Derives `assets/releases.json` from what the sae-lens package states of released coders, and what it lacks.

    python tests/make/releases_table.py PATH/TO/sae_lens/pretrained_saes.yaml --out sae/assets/releases.json

Only facts are taken: names, repositories, paths and numbers. Coders of a release whose names differ in numbers alone
are one pattern: texts with {0}, {1}, ... and, for each of these, a column of numbers, one a coder. The table is read
back and every coder of the package looked for, by repository, path and numbers; `--check` does that alone.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from sae.assets import RELEASES
from sae.base.errors import ConfigError, DataError
from sae.base.files import atomic_write
from sae.lm.sites import model_id
from sae.loading.releases import Release, Table, expand

LICENSE = "MIT"
FORMATS = {
    None: "saelens",
    "connor_rob_hook_z": "kissane",
    "deepseek_r1": "linear_pair",
    "dictionary_learning_1": "dictionary_learning",
    "gemma_2": "gemma_scope",
    "gemma_2_transcoder": "gemma_scope",
    "gemma_3": "gemma_scope_2",
    "goodfire": "linear_pair",
    "llama_scope": "llama_scope",
    "llama_scope_r1_distill": "openmoss",
    "mntss_clt_layer_transcoder": "cross_layer_transcoder",
    "mwhanna_transcoder": "circuit_tracer",
    "qwen_scope": "qwen_scope",
    "temporal": "temporal",
}
"""Our format of each of the package's loaders."""

MODELS = {f"qwen3-{size}": f"Qwen/Qwen3-{size.upper()}" for size in ("0.6b", "1.7b", "4b", "8b", "14b")}
"""Hub ids of models that the package calls by a short name which `sae.lm.sites` does not know."""

CORRECTED = {"gemma-scope-9b-it-res": {"model": "google/gemma-2-9b-it"}}
"""What the package states otherwise for the same repository in another release, and the paper (2408.05147) too."""

REFUSED = {
    "temporal": "its codes depend on the whole context by attention; a coder here maps each activation by itself",
    "cross_layer_transcoder": "one layer of a cross-layer transcoder is no coder of its own; load all of them together:"
    " {repo}",
}
"""Formats that the package makes coders of, and we do not."""

ADDED: list[dict[str, Any]] = [
    *(
        {"name": repo, "repo": f"EleutherAI/{repo}", "model": model, "format": "sparsify"}
        for repo, model in {
            "sae-pythia-70m-32k": "EleutherAI/pythia-70m",
            "sae-pythia-70m-deduped-32k": "EleutherAI/pythia-70m-deduped",
            "sae-pythia-160m-32k": "EleutherAI/pythia-160m",
            "sae-pythia-160m-32x": "EleutherAI/pythia-160m",
            "sae-pythia-410m-65k": "EleutherAI/pythia-410m",
            "sae-llama-3-8b-32x": "meta-llama/Meta-Llama-3-8B",
            "sae-llama-3-8b-32x-v2": "meta-llama/Meta-Llama-3-8B",
            "sae-llama-3.1-8b-32x": "meta-llama/Llama-3.1-8B",
            "sae-Llama-3.2-1B-131k": "meta-llama/Llama-3.2-1B",
            "skip-transcoder-Llama-3.2-1B-131k": "meta-llama/Llama-3.2-1B",
            "skip-transcoder-SmolLM2-135M-128x": "HuggingFaceTB/SmolLM2-135M",
        }.items()
    ),
    *(
        {
            "name": f"llama_scope_lxtc_{width}x",
            "repo": f"fnlp/Llama3_1-8B-Base-LXTC-{width}x",
            "model": "meta-llama/Llama-3.1-8B",
            "format": "llama_scope",
            "coders": [
                {
                    "id": f"l{{0}}tc_{width}x",
                    "path": f"Llama3_1-8B-Base-L{{0}}TC-{width}x",
                    "columns": ["0-31"],
                }
            ],
        }
        for width in (8, 32)
    ),
    {
        "name": "gpt2-transcoders",
        "repo": "pchlenski/gpt2-transcoders",
        "model": "openai-community/gpt2",
        "format": "dunefsky",
        "coders": [
            {
                "id": "blocks.{0}.ln2.hook_normalized",
                "path": "final_sparse_autoencoder_gpt2-small_blocks.{0}.ln2.hook_normalized_24576.pt",
                "columns": ["0-11"],
            }
        ],
    },
    *(
        {"name": repo.split("/")[1], "repo": repo, "model": model, "format": name}
        for repo, model, name in (
            ("facebook/crv-8b-instruct-transcoders", "meta-llama/Llama-3.1-8B-Instruct", "circuit_tracer"),
            ("mntss/gemma-scope-transcoders", "google/gemma-2-2b", "circuit_tracer"),
            ("mntss/transcoder-Llama-3.2-1B", "meta-llama/Llama-3.2-1B", "circuit_tracer"),
            ("mntss/clt-gemma-2-2b-426k", "google/gemma-2-2b", "cross_layer_transcoder"),
            ("mntss/clt-gemma-2-2b-2.5M", "google/gemma-2-2b", "cross_layer_transcoder"),
            ("mntss/clt-llama-3.2-1b-524k", "meta-llama/Llama-3.2-1B", "cross_layer_transcoder"),
            ("mntss/clt-131k", "openai/gpt-oss-20b", "cross_layer_transcoder"),
        )
    ),
]
"""Releases that the package lacks. Without "coders", ids are paths in the repository, which nobody has listed."""

ORIGIN = "not in sae-lens; as its publisher or public code that loads it names repository and paths"


def main(argv: list[str] | None = None) -> int:
    """Writes the table, or checks the one that is there; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python tests/make/releases_table.py", description=__doc__)
    parser.add_argument("yaml", type=Path, help="pretrained_saes.yaml of an installed sae-lens")
    parser.add_argument("--out", type=Path, default=RELEASES)
    parser.add_argument("--check", action="store_true", help="compare the table that is there, and write nothing")
    options = parser.parse_args(argv)
    try:
        stated = read_stated(options.yaml)
        if not options.check:
            atomic_write(options.out, to_json(table(stated, version_of(options.yaml))))
        count = check(stated, Table(json.loads(options.out.read_text(encoding="utf-8"))))
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    size = options.out.stat().st_size
    print(f"{options.out}: {len(stated)} releases, {count:,} coders of the package, {size:,} bytes")
    return 0


def read_stated(path: Path) -> dict[str, Any]:
    """Returns {release: what the package states of it}."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # 44,000 lines
    found = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    if not isinstance(found, dict) or not all("saes" in release for release in found.values()):
        raise DataError(f"{path} is no table of releases of sae-lens")
    return found


def version_of(path: Path) -> str:
    """Returns the version of the package that a file lies in."""
    for folder in path.resolve().parents:
        for about in folder.glob("sae_lens-*.dist-info"):
            return about.name.removeprefix("sae_lens-").removesuffix(".dist-info")
    raise ConfigError(f"yaml: {path} lies in no installed sae-lens: no sae_lens-*.dist-info beside its package")


def table(stated: dict[str, Any], version: str) -> dict[str, Any]:
    """Returns the table as plain JSON values."""
    source = {"package": "sae-lens", "version": version, "license": LICENSE, "file": "sae_lens/pretrained_saes.yaml"}
    package = [release_row(name, release) for name, release in stated.items()]
    added = [{**row, "verified": False, "notes": ORIGIN} for row in ADDED]
    return {"source": source, "releases": sorted(package + added, key=lambda row: row["name"])}


def release_row(name: str, release: dict[str, Any]) -> dict[str, Any]:
    """Returns one release of the package as a row of the table."""
    how = FORMATS.get(release["conversion_func"])
    if how is None:
        raise ConfigError(f"conversion_func: {release['conversion_func']!r} of {name} is not known; add it to FORMATS")
    model = MODELS.get(release["model"]) or model_id(release["model"])
    row = {"name": name, "repo": release["repo_id"], "model": model, "format": how, "verified": False}
    row |= CORRECTED.get(name, {})
    if how in REFUSED:
        row["refused"] = REFUSED[how].format(repo=release["repo_id"])
    if release.get("config_overrides"):
        row["overrides"] = release["config_overrides"]
    return {**row, "coders": folded(coder_row(coder) for coder in release["saes"])}


def coder_row(coder: dict[str, Any]) -> dict[str, Any]:
    """Returns what is kept of one coder; None for what is not stated."""
    path, l0 = str(coder["path"]), coder.get("l0")
    said = re.search(r"average_l0_(\d+)$", path)
    if l0 is None and said:
        l0 = int(said[1])
    row = {"id": coder["id"], "path": path, "neuronpedia": coder.get("neuronpedia")}
    return {**row, "l0": _plain(l0), "scale": _plain(coder.get("norm_scaling_factor"))}


def folded(coders: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns patterns that stand for these coders; `sae.loading.releases.expand` is the inverse."""
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for coder in coders:
        texts = tuple(tuple(_texts(coder[name])) for name in TEXTS)
        groups[texts, coder["l0"] is None, coder["scale"] is None].append(coder)
    return [_pattern(members) for members in groups.values()]


TEXTS = ("id", "path", "neuronpedia")


def _pattern(members: list[dict[str, Any]]) -> dict[str, Any]:
    members = sorted(members, key=lambda coder: [int(n) for n in _numbers(coder["id"])])
    columns: list[list[Any]] = []
    found: dict[str, Any] = {}
    for name in TEXTS:
        if members[0][name] is None:
            continue
        texts = _texts(members[0][name])
        slots = [_slot(list(column), columns) for column in zip(*(_numbers(m[name]) for m in members), strict=True)]
        found[name] = "".join(text + slot for text, slot in zip(texts, [*slots, ""], strict=True))
    if found["path"] == found["id"]:
        del found["path"]
    for name in ("l0", "scale"):
        values = [member[name] for member in members]
        if values[0] is not None:
            text = [str(value) for value in values]
            same = f"{{{columns.index(text)}}}" if text in columns else values
            found[name] = values[0] if len(set(values)) == 1 else same
    if columns:
        found["columns"] = [_compact(column) for column in columns]
    return found


def _slot(column: list[str], columns: list[list[Any]]) -> str:
    """Returns what stands for a column of digits in a text: the digits if they are always the same, or its number."""
    if len(set(column)) == 1:
        return column[0]
    if column not in columns:
        columns.append(column)
    return f"{{{columns.index(column)}}}"


def _compact(column: list[str]) -> Any:
    """Returns "0-25" for consecutive numbers, or the list; digits with leading zeros stay text."""
    numbers = [int(text) for text in column]
    if [str(number) for number in numbers] != column:
        return column
    run = list(range(numbers[0], numbers[0] + len(numbers)))
    return f"{run[0]}-{run[-1]}" if numbers == run else numbers


def _texts(text: str | None) -> list[str]:
    if text is not None and ("{" in text or "}" in text):
        raise DataError(f"{text!r} holds braces, which stand for columns here")
    return [] if text is None else re.split(r"\d+", text)


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)


def _plain(value: float | None) -> float | int | None:
    return int(value) if value is not None and value == int(value) else value


def to_json(found: dict[str, Any]) -> str:
    """Returns the table as text, one release a line."""
    rows = ",\n".join(json.dumps(row, separators=(",", ":"), ensure_ascii=False) for row in found["releases"])
    return f'{{"source":{json.dumps(found["source"])},\n"releases":[\n{rows}\n]}}\n'


def check(stated: dict[str, Any], written: Table) -> int:
    """Returns the number of coders of the package; DataError names the first that the table has otherwise."""
    count = 0
    for name, release in stated.items():
        row = written.rows.get(name)
        if row is None:
            raise DataError(f"{name} is not in the table")
        mine = {coder.id: coder for coder in expand(row)}
        if len(mine) != len(release["saes"]):
            raise DataError(f"{name}: {len(release['saes'])} coders are stated, {len(mine)} in the table")
        for coder in release["saes"]:
            wanted = coder_row(coder)
            if wanted["id"] not in mine or _facts(mine[wanted["id"]]) != (release["repo_id"], *wanted.values()):
                raise DataError(f"{name}/{wanted['id']}: stated as {wanted}, in the table as {mine.get(wanted['id'])}")
            count += 1
    return count


def _facts(coder: Release) -> tuple[Any, ...]:
    return coder.repo, coder.id, coder.path, coder.neuronpedia, coder.l0, coder.scale


if __name__ == "__main__":
    sys.exit(main())
