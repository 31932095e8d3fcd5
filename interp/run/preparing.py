"""From a config to examples: coder, model and text, both passes, and which latents it is about."""

import copy
import logging
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray

from interp.evidence.baselines import activation_sample, baseline_coder
from interp.evidence.codes import KeyedCodes, LiveCodes, StoredCodes
from interp.evidence.corpus import Corpus, corpus_of_text
from interp.evidence.delphi_cache import CachedCodes, DelphiCache, corpus_of_cache
from interp.evidence.examples import ExampleMaker
from interp.evidence.first_pass import CODES, Keep, gather_evidence
from interp.evidence.kept_codes import KeptCodes
from interp.evidence.places import plan_places
from interp.evidence.promotes import Tokens, decoder_neighbors, promoted_tokens
from interp.evidence.second_pass import visit_places
from interp.evidence.subject import Subject
from interp.evidence.tally import Evidence
from interp.records import SPLITS, Examples, Excerpt
from interp.run import explanations_file
from interp.run.config import QUICKSTART_TOKENS, TOKENS, ExplainConfig
from interp.run.latents import asked_latents, spelled_out
from interp.scoring.together import together
from sae.base.errors import ConfigError
from sae.base.files import write_json
from sae.base.paths import same_place
from sae.base.progress import UNWATCHED, Watch
from sae.base.seeding import generator
from sae.coder.coder import SparseCoder
from sae.coder.parts import CoderInParts
from sae.coder.spec import RELEASED
from sae.evaluation.doctor import check_widths
from sae.evaluation.evaluation import text_of, with_special_tokens_masked
from sae.lm.devices import resolve_device
from sae.lm.files import load_tokenizer
from sae.lm.hooks import site_widths
from sae.lm.models import LanguageModel, ModelConfig, load_language_model
from sae.loading import hub
from sae.parallel import ranks
from sae.text.decode import Decoder
from sae.text.documents import TextConfig
from sae.text.tokenizing import what_was_met

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
NEIGHBORS = 8
SHOWN = 8  # of the strongest windows, people look at so many
OF_A_DECILE = 2  # and of each decile of the uniform sample at so many
TEXT = "text.json"  # what the evidence is of


@dataclass
class Prepared:
    """What explaining and scoring need of the latents in question."""

    subject: Subject
    corpus: Corpus
    evidence: Evidence
    latents: Int[ndarray, "n"]
    maker: ExampleMaker
    tokens: dict[int, Tokens]
    """By latent, what its direction promotes and suppresses."""
    near: dict[int, tuple[tuple[int, float], ...]]
    """By latent, its nearest neighbors."""

    def examples(self, latent: int) -> Examples:
        """Returns all that is shown of a latent."""
        up, down = self.tokens[latent]
        facts, beside = self.maker.facts(latent), self.maker.visits.beside(latent)
        facts = replace(facts, promoted=up, suppressed=down, neighbors=self.near[latent])
        if beside is not None:
            facts = replace(facts, together=together(latent, *beside, self.evidence))
        return self.maker.make(latent, facts)

    def shown(self, examples: Examples) -> dict[str, list[Excerpt]]:
        """Returns what people look at of a latent: its `strongest` windows, and of others some of each decile of the
        uniform sample (`sampled`), the strongest first.
        """
        strongest = self.maker.strongest(examples.latent, SHOWN)
        places = {one.window.start for one in strongest}
        sampled: dict[int, list[Excerpt]] = {}
        for split in reversed(SPLITS):  # of the test, the windows of a decile are in random order
            for item in examples.of(split):
                if item.active and item.window.start not in places:
                    sampled.setdefault(item.decile, []).append(Excerpt(item.window, item.decile, split))
        few = [one for decile in sorted(sampled) for one in sampled[decile][:OF_A_DECILE]]
        return {"strongest": strongest, "sampled": sorted(few, key=lambda one: -one.window.strength)}


@dataclass(frozen=True)
class Given:
    """What a run gets beside its config."""

    coder: SparseCoder | None = None
    """A loaded coder, in place of the one that the config names; the run saves it there."""
    lm: LanguageModel | None = None
    """A loaded language model, in place of the one that the config names."""
    trust_remote_code: bool = False
    """Whether a model that the config names may run code that it ships."""

    def load_lm(self, model: ModelConfig) -> LanguageModel:
        """Returns the language model, under the name that it has in the config."""
        if self.lm is not None:
            return replace(self.lm, name=model.name, revision=model.revision)
        return load_language_model(**vars(model), trust_remote_code=self.trust_remote_code)

    def tokenizer(self, model: ModelConfig) -> "PreTrainedTokenizerBase":
        """Returns the tokenizer of the language model, which need not be loaded for it."""
        if self.lm is not None:
            return self.lm.tokenizer
        return load_tokenizer(model.name, model.revision, self.trust_remote_code)


NOTHING = Given()


def resolve_config(config: ExplainConfig, given: Given = NOTHING) -> ExplainConfig:
    """Returns the config with the coder's own model and text, explainers and scorers where none are named, the run's
    folder, and the ids that a file of latents holds.

    Raises ConfigError if the coder cannot be loaded or does not say what it reads, or it has no such latents.
    """
    spec = load_coder(config, lazy=True, given=given).spec
    if not spec.is_placed and given.coder is not None:
        raise ConfigError("coder: the one that was given names no site to read; load it with sae.load(..., site=...)")
    if not spec.is_placed:
        raise ConfigError(f"coder.path: the coder in {config.coder.path} names no site to read; say coder.hints.site")
    model, text, run_dir, site = config.model, config.text, config.run_dir, spec.reads[0]
    if not model.name:
        if not site.model:
            raise ConfigError("model.name: the coder does not say which language model it reads; name it")
        model = replace(model, name=site.model, revision=model.revision or site.revision)
    elif given.lm is not None and site.model and same_place(site.model, model.name):
        model = replace(model, name=site.model, revision=site.revision)
    found = text_of(spec) if "text" in spec.training else None
    if found is None and not text.source:
        raise ConfigError("text.source: the coder does not say what text it was trained on; name one")
    if found is not None and (not text.source or same_place(text.source, found.source)):
        changed = {k: v for k, v in vars(text).items() if v != vars(TextConfig(source=""))[k]}
        text = replace(found, max_tokens=None, **changed)
    if not run_dir:
        label = "" if config.coder.baseline == "none" else f"-{config.coder.baseline}"
        path = Path(config.coder.path).expanduser()
        beside = path if path.is_dir() else Path("runs", re.sub(r"[^\w.-]+", "-", config.coder.path))
        run_dir = str(beside / f"explain{label}")
        if config.coder.name:
            run_dir = str(Path(run_dir) / config.coder.name)
    run_dir = str(Path(run_dir).expanduser())
    evidence = config.evidence
    if evidence.tokens is None:
        evidence = replace(
            evidence, tokens=QUICKSTART_TOKENS if text.source == "quickstart" and not evidence.cache else TOKENS
        )
    latents = spelled_out(asked_latents(config.latents, spec.d_sae)) if config.latents != "all" else "all"
    if config.explanations:
        explanations_file.read_explanations(Path(config.explanations).expanduser(), spec.d_sae)
    plugins = {"explainers": config.all_explainers(), "scorers": config.all_scorers()}
    found = {"model": model, "text": text, "run_dir": run_dir, "evidence": evidence, "latents": latents}
    return replace(config, **found, **plugins)


def load_coder(
    config: ExplainConfig, device: str | torch.device = "cpu", lazy: bool = False, given: Given = NOTHING
) -> SparseCoder:
    """Returns the one coder that is meant; to work with, unless it is to be looked at only (`lazy`)."""
    asked = config.coder
    if given.coder is not None:
        if lazy:
            return given.coder
        if isinstance(given.coder, CoderInParts):
            return given.coder  # it stays where it lies, and nothing changes it
        own = copy.deepcopy(given.coder).requires_grad_(False).eval()  # the caller's stays where and as it is
        return own.to(device).to_dtype(torch.float32)
    try:
        place = hub.find_place(asked.path, asked.name, asked.revision, **vars(asked.hints))
    except ConfigError as error:
        raise ConfigError(f"coder.{error}") from None
    return hub.read_coder(replace(place, lazy=lazy), device)


def prepare(config: ExplainConfig, given: Given = NOTHING, watch: Watch = UNWATCHED) -> Prepared:
    """Returns everything about the latents of a resolved config, computed as far as it is not in its folder."""
    return looked_at(config, read_from(config, given, watch), watch)


def evidence_of(config: ExplainConfig) -> tuple[Path, Keep]:
    """Returns the folder of a run's evidence, and what is kept there."""
    return Path(config.run_dir) / "evidence", Keep(config.evidence.sizes, config.seed, config.evidence.store)


def looked_at(config: ExplainConfig, reading: "Reading", watch: Watch = UNWATCHED) -> Prepared:
    """As `prepare`, of what is read already. ConfigError if no latent fires: then no evidence is kept."""
    subject, rows, codes = reading
    folder, keep = evidence_of(config)
    n_sections, by = rows.meta["sections"], rows.meta["split_by"]
    log.info(
        "text: %s tokens in %s sections %s, split by %s",
        f"{rows.n_tokens:,}",
        f"{n_sections:,}",
        what_was_met(rows.meta),
        by,
    )
    seen = KeptCodes(codes)
    evidence = gather_evidence(codes if keep.store else seen, rows, folder, keep, watch)
    known = StoredCodes(folder / CODES, rows, codes.d_sae) if keep.store else seen.again()
    if ranks.rank() == 0:
        found = {"latents": evidence.d_sae, "alive": len(evidence.alive()), "tokens_counted": evidence.tokens}
        write_json(folder / TEXT, {"tokens": rows.n_tokens, **rows.meta, **found})
    if not len(evidence.alive()) and ranks.rank() == 0:  # it would stand in the way of what fires
        shutil.rmtree(folder)
    latents = chosen_latents(config.latents, evidence, config.seed)
    near = decoder_neighbors(subject.coder, latents.tolist(), NEIGHBORS)
    places = plan_places(evidence, rows, latents, [[other for other, _ in pairs] for pairs in near], config.seed)
    visits = visit_places(known, rows, places, folder, watch)
    maker = ExampleMaker(evidence, visits, rows, Decoder(subject.lm.tokenizer), config.examples, config.seed)
    tokens = dict(zip(latents.tolist(), promoted_tokens(subject.lm, subject.coder, latents.tolist()), strict=True))
    neighborhood = {latent: tuple(pairs) for latent, pairs in zip(latents.tolist(), near, strict=True)}
    return Prepared(subject, rows, evidence, latents, maker, tokens, neighborhood)


Reading = tuple[Subject, Corpus, KeyedCodes]


def read_from(config: ExplainConfig, given: Given = NOTHING, watch: Watch = UNWATCHED) -> Reading:
    """Returns the coder (or its baseline) with its language model, the text of a resolved config, and its codes."""
    coder = load_coder(config, given.lm.device if given.lm else resolve_device(config.model.device), given=given)
    if RELEASED in coder.spec.training:
        coder = with_special_tokens_masked(coder, given.tokenizer(config.model))
    subject, tokens = Subject(coder, lambda: given.load_lm(config.model)), config.evidence.tokens or TOKENS
    if config.evidence.cache:
        cache = DelphiCache(Path(config.evidence.cache).expanduser(), coder.spec.mask)
        if cache.d_sae != coder.spec.d_sae:
            raise ConfigError(
                f"evidence.cache: {cache.folder} is of {cache.d_sae} latents; the coder has {coder.spec.d_sae}"
            )
        if cache.model != config.model.name:
            log.warning("evidence.cache: %s is of %s; the coder reads %s", cache.folder, cache.model, config.model.name)
        return subject, corpus_of_cache(cache, tokens, watch), CachedCodes(cache)
    reads = coder.spec.reads
    if not any(site.tag for site in reads):
        check_widths(subject.lm, site_widths(subject.lm, list(reads)), reads, coder.spec.d_in)
    subject.lm.check_context(config.text.context_length)
    rows = corpus_of_text(config.text, subject.lm.tokenizer, subject.lm.source(), tokens, watch)
    if config.coder.baseline != "none":
        stand_in = baseline_coder(config.coder.baseline, coder, config.seed, activation_sample(subject, rows))
        lm = subject.lm
        subject = Subject(stand_in, lambda: lm)
    return subject, rows, LiveCodes(subject, rows)


def chosen_latents(typed: str | int, evidence: Evidence, seed: int) -> Int[ndarray, "n"]:
    """Returns the latents meant by what was typed, ascending (`asked_latents`)."""
    alive, d_sae = evidence.alive(), evidence.d_sae
    if not len(alive):
        raise ConfigError(f"latents: none of {d_sae} fires on the text; is the coder of this model and site?")
    asked = asked_latents(typed, d_sae)
    if asked == "alive":
        return alive
    if isinstance(asked, int):
        order = torch.randperm(len(alive), generator=generator(seed, "latents")).numpy()
        return np.sort(alive[order[:asked]])
    return np.array(asked)
