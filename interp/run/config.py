"""What a run of `sae-explain` is: frozen dataclasses, one docstring a field, checked before anything loads."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from interp.client.config import EndpointConfig
from interp.client.requests import ROLES
from interp.evidence.examples import ExampleConfig
from interp.evidence.tally import Sizes
from interp.explainers import Explainer
from interp.explainers.llm import LanguageModelExplainer
from interp.explainers.token_lookup import TokenLookup
from interp.scorers import Scorer
from interp.scorers.detection import Detection
from interp.scorers.embedding import Embedding
from interp.scorers.fuzzing import Fuzzing
from sae.base.errors import ConfigError
from sae.base.paths import near
from sae.base.settings import at_least, choose
from sae.lm.models import ModelConfig
from sae.loading.hints import Hints
from sae.text.documents import TextConfig

TOKENS, QUICKSTART_TOKENS = 10_000_000, 250_000
BASELINES = ("none", "neurons", "topk_neurons", "random_direction", "random_init")


def must_be_folder(name: str, path: str) -> None:
    """Raises ConfigError naming the field if there is no such folder."""
    if not Path(path).expanduser().is_dir():
        raise ConfigError(f"{name}: no such folder: {path}.{near(path)}")


@dataclass(frozen=True)
class CoderConfig:
    """The coder whose latents are explained."""

    path: str = ""
    """Folder of a training run or of a coder, hub id, or the name of a released one: whatever `sae.load` takes."""
    name: str = ""
    """Which coder, where there are several: its folder below coders/, or its name in the repository."""
    revision: str | None = None
    """Commit, branch or tag on the hub."""
    hints: Hints = field(default_factory=Hints)
    """What the files of a released coder do not say."""
    baseline: str = "none"
    """Explain a stand-in for it on the same text: neurons and topk_neurons (of the site it reads), random_direction,
    random_init."""

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        choose("coder.baseline", self.baseline, BASELINES)
        if not self.path:
            raise ConfigError("coder.path: empty; name the folder of a run or of a coder: sae-explain FOLDER")


@dataclass(frozen=True)
class EvidenceConfig:
    """What is gathered of every latent."""

    tokens: int | None = None
    """Tokens of text that are looked at; none: 10 million, or 250,000 of the quickstart text."""
    sizes: Sizes = field(default_factory=Sizes)
    store: bool = False
    """Whether every code is kept on disk too, 8 bytes times L0 for every token: other latents of the same coder are
    then explained without another run of the model."""
    cache: str = ""
    """Folder of a hookpoint in delphi's cache of this coder: its text and its codes are taken, the model reads none."""

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        if self.tokens is not None:
            at_least("evidence.tokens", self.tokens, 1)
        for name in ("explain", "valid", "test", "top"):
            at_least(f"evidence.sizes.{name}", getattr(self.sizes, name), 1)
        if self.cache:
            must_be_folder("evidence.cache", self.cache)


@dataclass(frozen=True)
class ModelsConfig:
    """The models that are asked."""

    explainer: EndpointConfig = field(default_factory=EndpointConfig)
    """Writes explanations."""
    judge: EndpointConfig = field(default_factory=EndpointConfig)
    """Judges them; without one, the explainer does."""
    reader: EndpointConfig = field(default_factory=EndpointConfig)
    """Tells the probability of texts, for surprisal, simulation and intervention; without one, the model that the coder
    reads does."""
    encoder: EndpointConfig = field(default_factory=lambda: EndpointConfig(model="tfidf", via="local"))
    """Embeds texts: "tfidf", which needs no model, a sentence encoder, or a server."""

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        for role in ROLES:
            getattr(self, role).validate(f"models.{role}")


@dataclass(frozen=True)
class ExplainConfig:
    """One run: evidence -> examples -> explanations -> scores."""

    run_dir: str = ""
    """Folder of the run; explain/ in the coder's folder by default."""
    seed: int = 0
    """Seed of all draws."""
    coder: CoderConfig = field(default_factory=CoderConfig)
    model: ModelConfig = field(default_factory=lambda: ModelConfig(name=""))
    """The language model that the coder reads; by default the one that it was trained on."""
    text: TextConfig = field(default_factory=lambda: TextConfig(source=""))
    """The text; by default the one that the coder was trained on. Documents of all its parts are used."""
    evidence: EvidenceConfig = field(default_factory=EvidenceConfig)
    latents: str | int = "random:100"
    """Which latents: an id or several ("508", "3,17,40-49"), a file of ids, "alive", "all", or so many alive ones at
    random ("random:100")."""
    examples: ExampleConfig = field(default_factory=ExampleConfig)
    explainers: dict[str, Explainer] = field(default_factory=dict)
    """Explainers by name; none named: token_lookup, and llm if there is an explainer model."""
    scorers: dict[str, Scorer] = field(default_factory=dict)
    """Scorers by name; none named: detection and embedding, and fuzzing if there is a judge."""
    explanations: str = ""
    """A file of explanations to score beside (or without) those of explainers: jsonl with latent and text. Several of
    one latent are scored each, as those of FILE, FILE#2, ..."""
    only: str = "both"
    """evidence (asks nothing), explain (no scores), score (the explanations that are there), or both."""
    models: ModelsConfig = field(default_factory=ModelsConfig)
    null_latents: int = 200
    """Latents scored with another latent's explanation too, at most; -1: all of them, 0: none."""
    budget_usd: float | None = None
    """Nothing more is asked once this much is spent."""
    in_flight: int = 256
    """Latents worked on at once, half a MiB each; fewer than the requests allowed at once would hold these back."""
    fail_share: float = 0.0
    """Share of latents that may fail before the command ends with exit code 3."""

    def validate(self) -> None:
        """Raises ConfigError naming the first field whose value is not allowed."""
        for part in (self.coder, self.evidence, self.examples, self.models):
            part.validate()
        if self.evidence.cache and self.coder.baseline != "none":
            raise ConfigError(f"coder.baseline: evidence.cache holds no codes of {self.coder.baseline}; leave one out")
        if self.model.name:
            self.model.validate()
        if self.text.source:
            self.text.validate()
        choose("only", self.only, ("evidence", "explain", "score", "both"))
        at_least("in_flight", self.in_flight, 1)
        at_least("null_latents", self.null_latents, -1)
        if not 0 <= self.fail_share <= 1:
            raise ConfigError(f"fail_share: {self.fail_share} is not between 0 and 1")
        if self.budget_usd is not None and not self.budget_usd > 0:
            raise ConfigError(f"budget_usd: {self.budget_usd} is not above 0")
        for plugin in (*self.explainers.values(), *self.scorers.values()):
            plugin.validate()
        for name, explainer in self.all_explainers().items():
            if explainer.needs_llm and not self.models.explainer.model:
                raise ConfigError(f"explainers.{name}: asks a language model; set models.explainer.model")
            if explainer.refines and "batch" in (self.models.explainer.via, self.endpoint("judge").via):
                raise ConfigError(f"explainers.{name}.refine: true takes a wave of batches too many; use via: http")
        for name, scorer in self.scorers.items():
            if scorer.role == "judge" and not scorer.takes_rules and not self.endpoint("judge").model:
                raise ConfigError(f"scorers.{name}: asks a judge; set models.judge.model or models.explainer.model")
        if self.explanations:
            path = Path(self.explanations).expanduser()
            if not path.is_file():
                raise ConfigError(f"explanations: no such file: {self.explanations}.{near(path)}")
            if path.stem in self.all_explainers():
                raise ConfigError(
                    f"explanations: {path.name} would be taken for what explainer {path.stem!r} says; rename the file"
                )

    def shown(self) -> "ExplainConfig":
        """Returns it as files and screens have it: addresses of models without queries, which may hold keys."""
        return replace(self, models=ModelsConfig(**{role: model.shown() for role, model in vars(self.models).items()}))

    def endpoint(self, role: str) -> EndpointConfig:
        """Returns the model behind a role: the judge is the explainer, and the reader the subject, if not set."""
        found: EndpointConfig = getattr(self.models, role)
        if role == "judge" and not found.model:
            return self.models.explainer
        if role == "reader" and not found.model:
            return replace(found, model=self.model.name, via="local")
        return found

    def all_explainers(self) -> dict[str, Explainer]:
        """Returns the explainers of the run."""
        if self.explainers or self.explanations:
            return self.explainers
        lookup: dict[str, Explainer] = {"token_lookup": TokenLookup()}
        return lookup | ({"llm": LanguageModelExplainer()} if self.models.explainer.model else {})

    def all_scorers(self) -> dict[str, Scorer]:
        """Returns the scorers of the run."""
        if self.scorers:
            return self.scorers
        found: dict[str, Scorer] = {"detection": Detection(), "embedding": Embedding()}
        return found | ({"fuzzing": Fuzzing()} if self.endpoint("judge").model else {})

    def chooser(self) -> Scorer:
        """Returns the scorer by which explainers choose between candidates: the run's first that may, or detection."""
        return next((scorer for scorer in self.all_scorers().values() if scorer.chooses), Detection())

    def roles_asked(self) -> list[str]:
        """Returns the roles that are asked, as far as they have a model."""
        roles = {scorer.role for scorer in self.all_scorers().values()} if self.only != "explain" else set()
        if any(explainer.needs_llm for explainer in self.all_explainers().values()) and self.only != "score":
            roles |= {"explainer", "judge"}
        return sorted(role for role in roles if self.endpoint(role).model)
