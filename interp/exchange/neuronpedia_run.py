"""An explained run, with its coder and its model, as a source of Neuronpedia's."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from interp.exchange.neuronpedia import BATCH, About, Batch, Exported, export_run
from interp.exchange.neuronpedia_features import Featured
from interp.exchange.neuronpedia_names import Names, names_of
from interp.run.config import ExplainConfig
from interp.run.preparing import Prepared
from sae.base.progress import UNWATCHED, Watch
from sae.coder.spec import CoderSpec
from sae.coder.wording import kind, rule
from sae.lm.residual import ResidualStream, residual_of
from sae.loading import hub, releases


def export_explained(
    config: ExplainConfig,
    prepared: Prepared,
    folder: Path | str,
    model_id: str = "",
    source_id: str = "",
    labels: Mapping[int, str] | None = None,
    watch: Watch = UNWATCHED,
) -> tuple[Names, Exported]:
    """Writes what a local Neuronpedia instance imports of a run; returns the names and how many lines there are.

    `config` is the run's, resolved, and `prepared` its latents. Names that are not given are those by which Neuronpedia
    knows a released coder, else made of what it is. `labels` are of people, by latent. Raises as `export_run` does.
    """
    lm, coder = prepared.subject.lm, prepared.subject.coder
    stream, known = residual_of(lm.model), _released(config)
    there = known.neuronpedia if known is not None and config.coder.baseline == "none" else None
    names = names_of(coder.spec, config.model.name, stream, model_id, source_id, there or "")
    about = About(names, source=_source(config, prepared, known), model=_model(config, prepared, stream))
    about.sourceset["description"] = f"{kind(coder.spec)}, {coder.spec.d_sae:,} latents, {rule(coder.spec)}"
    about.release["description"] = f"{about.sourceset['description']}, at {_places(coder.spec)} of {names.model_id}"
    made = export_run(config.run_dir, folder, config.all_scorers(), about, _batches(prepared, stream, watch), labels)
    return names, made


def _batches(prepared: Prepared, stream: ResidualStream, watch: Watch) -> Iterator[Batch]:
    """Yields the latents of a run, batch by batch."""
    told, latents = Featured(prepared.subject.lm, prepared.subject.coder, stream), prepared.latents.tolist()
    with watch.stage("exporting", len(latents), "latents") as progress:
        for start in range(0, len(latents), BATCH):
            examples = []
            for latent in latents[start : start + BATCH]:
                watch.poll("while exporting; what was there before is as it was")
                examples.append(prepared.examples(latent))
                progress.update(progress.n + 1)
            yield Batch(told.rows([(one.latent, one.facts) for one in examples]), examples)


def _places(spec: CoderSpec) -> str:
    """Returns where a coder writes; the model it is of may be a folder of this machine."""
    return ", ".join(dict.fromkeys(site.name for site in spec.writes))


def _released(config: ExplainConfig) -> releases.Release | None:
    """Returns what the table of releases says of a run's coder, if it is one of the hub's."""
    if Path(config.coder.path).expanduser().exists():
        return None
    asked = config.coder
    place = hub.find_place(asked.path, asked.name, asked.revision, **vars(asked.hints))
    return releases.release_at(place.files.identity, place.weights)


def _source(config: ExplainConfig, prepared: Prepared, known: releases.Release | None) -> dict[str, Any]:
    corpus, text = prepared.corpus, config.text.source
    local = Path(text).expanduser().exists()
    found = {"dataset": Path(text).name if local else text, "num_prompts": corpus.n_rows}
    found["num_tokens_in_prompt"] = corpus.context_length
    if known is not None:
        found |= {"hfRepoId": known.repo, "hfFolderId": known.path or None}
        found |= {"saelensRelease": known.name or None, "saelensSaeId": known.id or None}
    return found


def _model(config: ExplainConfig, prepared: Prepared, stream: ResidualStream) -> dict[str, Any]:
    lm, name = prepared.subject.lm, config.model.name
    shape = lm.model.config.get_text_config()
    owner = name.partition("/")[0] if name.count("/") == 1 and not Path(name).expanduser().exists() else "unknown"
    chats = bool(getattr(lm.tokenizer, "chat_template", None))
    found: dict[str, Any] = {"owner": owner, "layers": len(stream.layers), "instruct": chats}
    found["neuronsPerLayer"] = int(getattr(shape, "intermediate_size", None) or getattr(shape, "n_inner", None) or 0)
    width = getattr(shape, "hidden_size", None)
    return found | ({"dimension": int(width)} if width else {})
