"""The model card of coders on the hub, and putting them there: what they are, how well they do, how to load them."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sae.base.errors import ConfigError, nearest
from sae.base.files import atomic_write, safe_join
from sae.base.paths import model_elsewhere, without_places
from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.coder.wording import Description, description, kind
from sae.evaluation.tables import table
from sae.formats import NATIVE, formats
from sae.loading.converting import convert, writers

LIBRARY = "sae-interp"


def model_card(coders: Mapping[str, SparseCoder], repo: str, format: str = NATIVE, reports: Iterable[str] = ()) -> str:
    """Returns the README.md of a repository that holds these coders, by the names of their folders ("" at the root),
    and `reports`, pages to look at, by their names.

    Its library is the one whose format it is where the hub knows that, for the code that the hub offers to use it.
    """
    specs = {name: coder.spec for name, coder in coders.items()}
    models = sorted({site.model for spec in specs.values() for site in (*spec.reads, *spec.writes) if site.model})
    its = formats()[format]
    about: dict[str, Any] = {"library_name": getattr(its, "LIBRARY", LIBRARY)}
    on_hub = [model for model in models if model.count("/") == 1 and not Path(model).is_absolute()]
    if on_hub:
        about["base_model"] = on_hub
    about["tags"] = sorted({"mechanistic-interpretability", *(kind(spec).replace(" ", "-") for spec in specs.values())})
    front = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in about.items()]  # which YAML is, too
    one = len(specs) == 1
    what = f"A {kind(next(iter(specs.values())))}" if one else f"{len(specs)} sparse coders"
    lines = ["---", *front, "---", "", f"# {repo.partition('/')[2]}", ""]
    lines += [f"{what} of activations of {_cell(' and '.join(models) or 'a language model')}.", ""]
    for name, spec in specs.items():
        if name:
            lines += [f"## {name}", ""]
        lines += _table(("what", "it is"), description(spec))
        if {"reconstruction", "density"} <= spec.metrics.keys():
            lines += ["Held-out metrics:", "", *_table(("metric", "value"), table(spec.metrics))]
    links = [f"- [{_cell(name)}]({quote(name)})" for name in reports]
    lines += ["## Reports", "", "Pages to download and open in a browser:", "", *links, ""] if links else []
    first = next(iter(specs))
    address = f"{repo}/{first}" if first else repo
    lines += ["## Loading", "", "```python", "import sae", "", f'coder = sae.load("{address}")']
    lines += ["latents = coder.encode(x)  # x: [..., d_in], at the site above", "```", ""]
    if hasattr(its, "SNIPPET"):
        lines += ["```python", its.SNIPPET.format(repo=repo, folder=first), "```", ""]
    return "\n".join(lines)


def push(
    coders: Mapping[str, SparseCoder],
    repo: str,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    format: str = NATIVE,
    reports: Mapping[str, Path] | None = None,
) -> str:
    """Puts coders with a card into a repository on the hub, made if need be; returns the address of the commit.

    `reports` are pages that go along, by their names there. No file says where something lies on this machine: a model
    of a folder is named as that folder, of other paths the last two parts are told.

    The token is that of the environment (HF_TOKEN) or of `hf auth login` by default; `revision` is a branch, made if
    need be. ConfigError without a token, if the hub refuses, or if the format cannot say what a coder is.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if repo.count("/") != 1:
        raise ConfigError(f"repo: {repo!r} is not OWNER/NAME")
    if not (token if isinstance(token, str) else token is not False and get_token()):
        raise ConfigError("repo: pushing needs a token; run `hf auth login`, or set the variable HF_TOKEN")
    if format not in writers():
        raise ConfigError(f"format: {format!r} is not one of {', '.join(writers())}.{nearest(format, writers())}")
    if hasattr(formats()[format], "SNIPPET"):  # whose library looks below the root alone
        coders = {name or "sae": coder for name, coder in coders.items()}
    coders = {name: coder.with_spec(_elsewhere(coder.spec)) for name, coder in coders.items()}
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temp:
        for name, coder in coders.items():
            convert(coder, format, safe_join(temp, name) if name else Path(temp))
        for name, page in (reports or {}).items():
            atomic_write(safe_join(temp, name), page.read_bytes())
        atomic_write(Path(temp, "README.md"), model_card(coders, repo, format, reports or ()))
        said = {"commit_message": commit_message or f"Upload with {LIBRARY}", "create_pr": create_pr or None}
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            if revision is not None and not create_pr:
                api.create_branch(repo, branch=revision, exist_ok=True)
            done = api.upload_folder(repo_id=repo, folder_path=temp, revision=revision, **said)
        except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled) as error:
            raise ConfigError(f"repo: {repo} cannot be written to: {' '.join(str(error).split())[:300]}") from error
    return done.pr_url or done.commit_url


def _elsewhere(spec: CoderSpec) -> CoderSpec:
    """Returns a spec as others may see it."""
    reads, writes = (
        tuple(replace(site, model=model_elsewhere(site.model)) for site in sites) for sites in (spec.reads, spec.writes)
    )
    return spec.with_(reads=reads, writes=writes, training=without_places(spec.training))


def _table(head: tuple[str, str], rows: Description) -> list[str]:
    cells = [f"| {_cell(name)} | {_cell(text)} |" for name, text in rows]
    return [f"| {head[0]} | {head[1]} |", "| --- | --- |", *cells, ""]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
