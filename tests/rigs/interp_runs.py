"""Runs of sae-explain on a coder of a tiny model, in a second or two."""

import json
import re
from pathlib import Path
from typing import Any

import draccus
import pytest
import torch
from rigs.fakes import tiny_model_folder, tiny_text_folder
from rigs.interp_examples import judge

from interp.client.requests import Chat
from interp.run.config import ExplainConfig
from interp.run.pipeline import Ended, Pipeline
from interp.run.preparing import Prepared, prepare, resolve_config
from interp.run.rundir import SCORE_KEY, begin_run, explained_in, scores_in
from sae.base.settings import decode, merge, set_dotted
from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.lm.masking import MaskSpec
from sae.lm.site import Site
from sae.loading import hub
from sae.selection.topk import TopK
from sae.text.documents import TextConfig

D_SAE = 48
SMALL = ["--evidence.tokens", "30000", "--examples.test", "12", "--examples.shown", "10"]


def coder_folder(folder: Path, model: Path, text: Path, width: int = 16, seed: int = 3) -> Path:
    """Saves an untrained coder of the tiny model's second layer, and returns its folder."""
    torch.manual_seed(seed)
    site = Site("model.layers.1", model=str(model))
    spec = CoderSpec(
        d_in=width,
        d_out=width,
        d_sae=D_SAE,
        selection=TopK(k=4),
        reads=(site,),
        writes=(site,),
        mask=MaskSpec(special_ids=(0, 1, 2)),
        context_length=64,
        training={"text": draccus.encode(TextConfig(source=str(text), context_length=64))},
    )
    coder = SparseCoder(spec)
    with torch.no_grad():
        coder.W_enc.normal_()
        coder.W_dec.copy_(coder.W_enc / coder.W_enc.norm(dim=1, keepdim=True))
    hub.save(coder, folder)
    return folder


def tiny_coder(folder: Path, documents: int = 40, **options: Any) -> Path:
    """Saves a tiny model, text of so many documents and a coder of theirs, and returns the coder's folder."""
    model = tiny_model_folder(folder / "model", initializer_range=0.5, **options)
    return coder_folder(folder / "coder", model, tiny_text_folder(folder / "text", documents=documents))


def explain_config(coder: Path, run_dir: Path, changes: dict[str, Any] | None = None) -> ExplainConfig:
    """Returns a run on all of the coder's alive latents; `changes` are fields by dotted name."""
    data: dict[str, Any] = {
        "run_dir": str(run_dir),
        "coder": {"path": str(coder)},
        "model": {"device": "cpu"},
        "evidence": {"tokens": 30_000},
        "latents": "random:24",
        "examples": {"shown": 10, "contrast": 6, "valid": 6, "test": 12},
    }
    data = merge(data, {})
    for key, value in (changes or {}).items():
        set_dotted(data, key, value)
    config = decode(ExplainConfig, merge(draccus.encode(ExplainConfig()), data))
    config.validate()
    return resolve_config(config)


def prepare_apart(coder: Path, folder: Path, changes: dict[str, Any] | None = None) -> Prepared:
    """Returns the evidence of a run, gathered with a cache of its own, for many runs of the same latents to share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAE_CACHE", str(folder / "cache"))
        return prepare(explain_config(coder, folder / "run", changes))


def run(config: ExplainConfig, prepared: Prepared | None = None, **options: Any) -> tuple[Pipeline, Ended]:
    """Runs a resolved config to its end."""
    begin_run(config)
    pipeline = Pipeline(config, prepared or prepare(config), options.pop("shard", (1, 1)))
    return pipeline, pipeline.run(**options)


def explained(run_dir: Path, shard: str = "1-of-1") -> dict[Any, dict[str, Any]]:
    """Returns the rows of journal-explain by (latent, explainer)."""
    journal = explained_in(run_dir / "shards" / shard)
    return {(row["latent"], row["explainer"]): row for row in journal.rows()}


def scores(run_dir: Path, shard: str = "1-of-1") -> dict[Any, dict[str, Any]]:
    """Returns the rows of journal-score by (latent, scorer, explainer, null)."""
    journal = scores_in(run_dir / "shards" / shard)
    return {tuple(row[name] for name in SCORE_KEY): row for row in journal.rows()}


def scripted(asked: Any) -> str:
    """An LLM that explains by the first word of what it reads, and judges by whether a text holds that word."""
    wanted = (asked.body.get("response_format") or {}).get("json_schema", {}).get("schema", {}).get("properties", {})
    if "explanation" in wanted:
        words = re.findall(r"[a-h]{2,}", asked.text)
        return json.dumps({"explanation": f"words: {words[0]}" if words else "words: none"})
    if "answers" in wanted:
        return json.dumps(judge(Chat("judge", tuple(asked.messages), 1, schema="{}")).data)
    return "hello"


def with_llm(url: str, **more: Any) -> dict[str, Any]:
    """Returns the changes of a config that let the model at an address explain, and judge several texts at once."""
    scorers = {n: {"type": n, "layout": "batch", "windows_per_request": 24} for n in ("detection", "fuzzing")}
    return {"models.explainer": {"model": "fake", "base_urls": [url]}, "scorers": scorers, **more}
