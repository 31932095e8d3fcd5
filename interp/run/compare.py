"""Two coders side by side: which latents are the same, and whether their explanations say so.

Latents are matched one to one, so that the sum over pairs is largest (Hungarian algorithm), by
- the cosine of their decoders, where both write a space of the same width,
- co-activation: the Jaccard index of the tokens on which they fire, |A and B| / |A or B|,
- meaning: the cosine of their explanations' embeddings.
For every matching it is told how alike the explanations of a pair are, beside the same of two latents that are no pair
(the null), as the paper does for coders of neighboring layers (arXiv 2410.13928). MMCS is the mean over latents of the
largest cosine to any latent of the other coder (Sharkey 2022), beside the same for random directions.

Everything is compared with everything, in tables of explained latents by explained latents: for thousands of them, not
for all of a wide coder. 20,000 by 20,000, the most that is taken, are 3 GB a table, and half a dozen are held at once.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.optimize import linear_sum_assignment

from interp.client.client import Client
from interp.client.config import EndpointConfig
from interp.client.requests import Embed
from interp.client.running import finished
from interp.evidence.codes import Codes, LiveCodes, row_blocks
from interp.evidence.corpus import Corpus
from interp.evidence.first_pass import check_evidence, stored_evidence
from interp.evidence.subject import Subject
from interp.run.config import ExplainConfig
from interp.run.pipeline import check_models
from interp.run.preparing import Given, evidence_of, read_from, resolve_config
from interp.run.results import explanations_of_run
from interp.run.rundir import saved_config
from interp.scorers.embedding import BATCH
from interp.scoring.metrics import mean_measure
from sae.base.errors import ConfigError, nearest
from sae.base.files import atomic_write
from sae.base.seeding import generator
from sae.base.visible import visible
from sae.coder.coder import CHUNK_ENTRIES, SparseCoder
from sae.coder.spec import CoderSpec

MOST = 20_000  # explained latents of a coder


@dataclass(frozen=True)
class Side:
    """An explained coder."""

    folder: Path
    config: ExplainConfig
    subject: Subject
    rows: Corpus
    texts: dict[int, str]
    """Explanations by latent."""

    @property
    def latents(self) -> Int[ndarray, "n"]:
        """Returns the explained latents, ascending."""
        return np.array(sorted(self.texts))

    @property
    def alive(self) -> Int[ndarray, "m"]:
        """Returns the latents that fired in the evidence pass."""
        evidence = stored_evidence(self.folder / "evidence")
        assert evidence is not None  # it is explained
        return evidence.alive()

    def told(self) -> tuple[str, ...]:
        """Returns the explanations in the order of the latents."""
        return tuple(self.texts[latent] for latent in self.latents.tolist())


def compare(
    a: Path,
    b: Path,
    encoder: EndpointConfig,
    explainer: str | None = None,
    tokens: int = 100_000,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Returns how alike two explained runs are: `mmcs` both ways and, by what they are matched by, `matchings`.

    `doubt` says, if so, why cosines of decoders may mean nothing.

    Latents without an explanation take part in the MMCS alone. Co-activation is counted on `tokens` tokens of the text
    of `a`, and left out where the runs read different language models. Raises ConfigError if a run has no explanation
    by `explainer` (default: llm, or the first one there) or more than 20,000, its coder is another by now, or the
    encoder fails.
    """
    cache = a / "compare.sqlite"
    answers = finished(check_models({"encoder": encoder}, ["encoder"], cache))
    left, right = (_side(folder, explainer, trust_remote_code) for folder in (a, b))
    coders = left.subject.coder, right.subject.coder
    if answers:
        atomic_write(cache, answers)
    vectors = finished(_embedded(encoder, left.told() + right.told(), cache))
    similarity = cosines(vectors[: len(left.texts)], vectors[len(left.texts) :])
    alike = {"meaning": similarity, "decoder": decoder_cosines(*coders, left.latents, right.latents)}
    if left.config.model.name == right.config.model.name:
        subjects = left.subject, Subject(coders[1], lambda: left.subject.lm)
        codes = LiveCodes(subjects[0], left.rows), LiveCodes(subjects[1], left.rows)
        found = coactivation(codes, left.rows, left.latents, right.latents, tokens)
        alike["co-activation"] = found
    matchings = {name: match(table) for name, table in alike.items() if table is not None}
    return {
        "a": str(a),
        "b": str(b),
        "encoder": encoder.model,
        "latents": [len(left.texts), len(right.texts)],
        "doubt": apart(coders[0].spec, coders[1].spec),
        "mmcs": {
            "a_to_b": mmcs(*coders, left.alive, right.alive),
            "b_to_a": mmcs(coders[1], coders[0], right.alive, left.alive),
        },
        "matchings": {
            name: {
                "mean_strength": float(found.strength.mean()),
                "similarity": semantic(found, similarity),
                "pairs": _pairs(found, similarity, left, right),
            }
            for name, found in matchings.items()
        },
    }


def _side(folder: Path, explainer: str | None, trust_remote_code: bool) -> Side:
    config = resolve_config(saved_config(folder))
    found = explanations_of_run(folder)
    name = explainer or ("llm" if "llm" in found else next(iter(found), ""))
    if not found.get(name):
        known = ", ".join(found) or "none"
        raise ConfigError(
            f"--explainer: {folder} has no explanations by {name!r}.{nearest(name, found)} It has: {known}"
        )
    if len(found[name]) > MOST:
        raise ConfigError(
            f"path: {folder} has {len(found[name]):,} explained latents; at most {MOST:,} can be compared"
        )
    subject, rows, codes = read_from(config, Given(trust_remote_code=trust_remote_code))
    check_evidence(codes, rows, *evidence_of(config))  # the texts are of this coder, not of what took its place
    return Side(folder, config, subject, rows, found[name])


async def _embedded(encoder: EndpointConfig, texts: tuple[str, ...], cache: Path) -> Float[ndarray, "n d"]:
    async with Client({"encoder": encoder}, cache) as client:
        together = (await client.abilities("encoder")).fits_texts  # else a server may take so many at once only
        size = len(texts) if together else BATCH
        batches = [Embed("encoder", texts[start : start + size]) for start in range(0, len(texts), size)]
        replies = await client.ask_all(batches)
    for reply in replies:
        if not reply.ok:
            raise ConfigError(f"--encoder: {encoder.model}: {reply.failure} {reply.detail}".rstrip())
    return np.array([vector for reply in replies for vector in reply.vectors])


def _pairs(found: "Matching", similarity: Float[ndarray, "a b"], left: Side, right: Side) -> list[dict[str, Any]]:
    """Returns the matched latents with both explanations, the surest pair first."""
    pairs = [
        {"a": int(left.latents[i]), "b": int(right.latents[j]), "strength": strength, "similarity": similarity[i, j]}
        for (i, j), strength in zip(found.pairs.tolist(), found.strength.tolist(), strict=True)
    ]
    told = [{**pair, "explanations": [left.texts[pair["a"]], right.texts[pair["b"]]]} for pair in pairs]
    return sorted(told, key=lambda pair: -pair["strength"])


@dataclass(frozen=True)
class Matching:
    """Pairs of latents, one to one."""

    pairs: Int[ndarray, "n 2"]
    """Places in the two lists of latents."""
    strength: Float[ndarray, "n"]
    """What the matching maximizes the sum of, by pair."""


def match(alike: Float[ndarray, "a b"]) -> Matching:
    """Returns the one-to-one matching whose sum is largest; min(a, b) pairs."""
    rows, columns = linear_sum_assignment(alike, maximize=True)
    return Matching(np.stack([rows, columns], 1), alike[rows, columns])


def decoder_cosines(
    a: SparseCoder, b: SparseCoder, of_a: Int[ndarray, "a"], of_b: Int[ndarray, "b"]
) -> Float[ndarray, "a b"] | None:
    """Returns the cosines of decoders [a, b], or None where the coders write spaces of different width."""
    if a.spec.d_out != b.spec.d_out:
        return None
    left, right = (_directions(coder, latents) for coder, latents in ((a, of_a), (b, of_b)))
    return (left @ right.T).numpy()


def apart(a: CoderSpec, b: CoderSpec) -> str:
    """Returns in a sentence why cosines of two coders' decoders may mean nothing: they write different places."""
    written = [[(site.name, site.model) for site in spec.writes] for spec in (a, b)]
    if written[0] == written[1]:
        return ""
    models = len({model for places in written for _, model in places}) > 1
    named = [
        visible(", ".join(f"{name} of {model}" if models else name for name, model in places) or "a place not told")
        for places in written
    ]
    return (
        f"One coder writes {named[0]}, the other {named[1]}: the cosine of their decoders tells something only where "
        "these have one basis, as places of one residual stream have."
    )


def mmcs(a: SparseCoder, b: SparseCoder, of_a: Int[ndarray, "a"], of_b: Int[ndarray, "b"]) -> dict[str, Any] | None:
    """Returns `value`, the mean over latents of `a` of the largest cosine to one of `b`, and `null`, that of `a` to as
    many random directions; None where the coders write spaces of different width.
    """
    if a.spec.d_out != b.spec.d_out:
        return None
    left, right = (_directions(coder, latents) for coder, latents in ((a, of_a), (b, of_b)))
    random = torch.randn(right.shape, generator=generator(0, "random directions"))
    found = {}
    for name, others in (("value", right), ("null", random / random.norm(dim=1, keepdim=True))):
        size = max(1, CHUNK_ENTRIES // len(others))
        found[name] = float(torch.cat([(some @ others.T).max(1).values for some in left.split(size)]).mean())
    return found


def coactivation(
    codes: tuple[Codes, Codes], corpus: Corpus, of_a: Int[ndarray, "a"], of_b: Int[ndarray, "b"], tokens: int
) -> Float[ndarray, "a b"]:
    """Returns the Jaccard index [a, b] of the tokens on which latents fire, on the first `tokens` tokens of rows drawn
    from all. Tokens that either coder masks count for neither.
    """
    both = np.zeros((len(of_a), len(of_b)))
    alone = [np.zeros(len(of_a)), np.zeros(len(of_b))]
    order = torch.randperm(len(corpus.kept), generator=generator(0, "coactivation")).numpy()
    rows = corpus.kept[order]
    rows = rows[: int(np.searchsorted(np.cumsum(corpus.length[rows]), tokens)) + 1]
    rows = rows[np.argsort(-corpus.length[rows], kind="stable")]
    for group in row_blocks(corpus, rows):
        coded = [side.read(group) for side in codes]
        spots = [c.rows.astype(np.int64) * corpus.context_length + c.places for c in coded]
        common = np.intersect1d(*spots, assume_unique=True)
        fires = []
        for latents, code, spot in zip((of_a, of_b), coded, spots, strict=True):
            table = np.zeros((len(common), len(latents)), np.float32)
            place = np.full(code.latents.d_sae, -1)
            place[latents] = np.arange(len(latents))
            counts = np.diff(code.latents.offsets.cpu().numpy())
            token = np.repeat(np.searchsorted(common, spot), counts)
            here = np.repeat(np.isin(spot, common), counts) & (code.latents.values.cpu().numpy() != 0)
            column = place[code.latents.ids.cpu().numpy()]
            chosen = here & (column >= 0)
            table[token[chosen], column[chosen]] = 1
            fires.append(table)
        both += fires[0].T @ fires[1]
        for total, table in zip(alone, fires, strict=True):
            total += table.sum(0)
    either = alone[0][:, None] + alone[1][None] - both
    return np.divide(both, either, out=np.zeros_like(both), where=either > 0)


def semantic(matching: Matching, similarity: Float[ndarray, "a b"]) -> dict[str, Any]:
    """Returns how alike the explanations of matched latents are: `value`, `null` (the mean over all ways to put a
    latent of one pair beside that of another) and their difference, `lift`, each with its interval over pairs.

    The n (n - 1) terms of the null are of 2 n latents. So its interval is that of the mean over pairs of what the two
    latents of a pair contribute to it (the projection of a two-sample U statistic, Hoeffding 1948).
    """
    table = similarity[np.ix_(*matching.pairs.T)]
    own, n = np.diag(table), len(table)
    others, lift = np.zeros(0), np.zeros(0)
    if n > 1:
        sums = (table.sum(0) + table.sum(1) - 2 * own) / (n - 1)  # of both latents' means over the other pairs
        others = sums - sums.mean() / 2
        lift = own - others
    return {
        name: asdict(mean_measure(values.tolist()))
        for name, values in (("value", own), ("null", others), ("lift", lift))
    }


def cosines(vectors_a: Float[ndarray, "a d"], vectors_b: Float[ndarray, "b d"]) -> Float[ndarray, "a b"]:
    """Returns the cosines of two lists of vectors; 0 where one is zero."""
    left, right = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in (vectors_a, vectors_b))
    return left @ right.T


def _directions(coder: SparseCoder, latents: Int[ndarray, "n"]) -> Float[torch.Tensor, "n d_out"]:
    rows = coder.decoder_rows(torch.from_numpy(latents).to(coder.device)).cpu()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
