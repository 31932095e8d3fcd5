"""How a coder's selection rule chooses in training: per token or over the whole batch, whatever its parts and ranks.

Pre-activations are computed for a tile of tokens at a time, into one buffer: of each tile the chosen entries are kept,
with those that loss terms look at beside them, and nothing else. A batch-wide rule takes candidates of every tile;
those of all ranks together give one choice. So micro-batches and ranks change nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.base.sums import summed_on
from sae.coder.coder import Choice, Look, SparseCoder
from sae.coder.normalization import Undo
from sae.coder.shard import best, moves_lists
from sae.kernels import kernel
from sae.kernels.codes import PAD, Entries, by_rows, offsets_of
from sae.kernels.dispatch import DENSE_SHARE
from sae.objectives import Objective
from sae.parallel.ledger import Ledger
from sae.parallel.mesh import Mesh, of_data
from sae.selection import Budget, Moment, Selection

TILE_ENTRIES = {"cpu": (2**22, 2**25), "cuda": (2**27, 2**30)}  # what a tile has at least, and at the most
TILE_TOKENS = 256  # fewer make a product slower: on a CPU, and on a card, which then waits for the weights
SPARE = 1.5  # room for entries beyond those that were kept before


def tile_tokens(d_sae: int, device: torch.device) -> int:
    """Returns how many tokens' pre-activations are held at once."""
    least, most = TILE_ENTRIES.get(device.type, TILE_ENTRIES["cpu"])
    return max(1, least // d_sae, min(TILE_TOKENS, most // d_sae))


class Chosen(NamedTuple):
    """What was chosen of a micro-batch."""

    by_rule: Choice
    beside: dict[str, Choice]
    """What each loss term looks at beside it."""


class Chooser:
    """The rule at work: one state for each group of latents that it chooses among."""

    def __init__(
        self,
        coder: SparseCoder,
        objectives: Mapping[str, Objective] | None = None,
        dtype: torch.dtype | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """Takes the precision of the dense product (None: that of the weights) and the ranks that choose together.

        Along latents these hold other parts of the coder, which is then a shard. None: all share the tokens.
        """
        self.coder, self.rule, self.objectives = coder, coder.spec.rule, objectives or {}
        self.exact = dtype in (None, coder.W_enc.dtype)
        self.rounded = {} if self.exact else {n: p.detach().to(dtype) for n, p in coder.encoder_tensors().items()}
        """The encoder's tensors in the precision of the product, where it is another; updates keep them."""
        self.groups = coder.rule_groups()
        self.mesh = mesh or of_data()
        self.tile = tile_tokens(coder.whole.d_sae, coder.W_enc.device)
        device = coder.W_enc.device
        self.states = [
            {name: _held(value, device) for name, value in self.rule.start(group.stop - group.start).items()}
            for group in self.groups
        ]
        self.moments: list[Moment] = []
        self.before, self.per_token = 0, 0.0
        self.begun: dict[str, Any] = {}
        self.short: list[Bool[Tensor, ""]] = []
        self._counts: list[Int[Tensor, ""]] = []
        self._buffer: Tensor | None = None

    def begin(
        self,
        progress: float,
        n_tokens: int,
        before: int = 0,
        begun: dict[str, Any] | None = None,
        per_token: float | None = None,
    ) -> None:
        """Begins a step of `n_tokens` tokens over all ranks, of which nothing is kept before `finish`.

        `before` of them are those of the ranks before this one; `begun` is what the loss terms know of the step;
        `per_token` how many entries a token is expected to keep. Without, there is room for all.
        """
        self.before, self.begun, self.short, self._counts = before, begun or {}, [], []
        self.per_token = self.coder.spec.d_sae if per_token is None else per_token
        known = {"careful": per_token is None, "mesh": self.mesh}
        self.moments = [
            Moment(progress, n_tokens, dict(state), cut=cut, **known)
            for state, cut in zip(self.states, self.coder.cuts, strict=True)
        ]
        for moment in self.moments:
            self.rule.begin(moment)

    def dense(self, per_token: float) -> bool:
        """Returns whether, of a rule with cuts, so many entries of a token are kept, of all ranks, that all are held.

        Those that are not kept are held as 0.
        """
        m = self.coder.whole.d_sae
        return self.cuts() is not None and _room(per_token, m, self.tile) > DENSE_SHARE * self.tile * m

    def failed(self) -> Bool[Tensor, ""] | None:
        """Returns whether something was left out for want of room, on the coder's device; None: nothing can be."""
        found = [*self.short, *(moment.failed for moment in self.moments if moment.failed is not None)]
        return torch.stack(found).any() if found else None

    def entries(self) -> Int[Tensor, ""] | None:
        """Returns how many entries of this rank's tokens lie above their cuts, of a rule that has such cuts."""
        return torch.stack(self._counts).sum() if self._counts else None

    def choose(self, look: Look, gradients: Float[Tensor, "n d_out"] | None) -> Chosen:
        """Returns what is chosen of a micro-batch, by a per-token rule."""
        cuts = self.cuts()
        chosen, beside = [], _Beside()
        for rows, scores in self._tiles(look):
            g = None if gradients is None else gradients[rows]
            compared = self.coder.compared(scores, _of_rows(look.how, rows), g, self.moments)
            if self.mesh.latents.moves and self.rule.over == "token":
                chosen.append(self._best(scores, compared))
            elif not scores.shape[1]:  # of so few latents this rank holds none
                chosen.append(Choice(*by_rows(scores.long()), scores.flatten(), self.exact))
            elif cuts is None:
                chosen.append(self.coder.chosen(scores, *self.coder.support(compared, self._ask), self.exact))
            else:
                chosen.append(self._above(scores, compared, cuts))
            beside.look(self, scores)
        return Chosen(joined(chosen, look.y), beside.joined(look.y))

    def whole_batch(self, looks: list[Look]) -> list[Chosen]:
        """Returns what is chosen of every micro-batch of this rank, by a batch-wide rule."""
        starts = [*accumulate((len(look.x) for look in looks), initial=0)]
        before, besides = self.before, []
        held: list[list[Entries]] = [[] for _ in self.groups]
        for look, start in zip(looks, starts, strict=False):
            besides.append(_Beside())
            for rows, scores in self._tiles(look):
                compared, first = self.coder.compared(scores), start + rows.start
                for entries, group, moment in zip(held, self.groups, self.moments, strict=True):
                    entries.append(self.rule.candidates(compared[:, group], before + first, moment))
                    entries[:] = [self.rule.reduce(Entries.cat(entries), moment)] if first else entries
                besides[-1].look(self, scores)
        kept = []
        for entries, group, moment in zip(held, self.groups, self.moments, strict=True):
            moment.n_own = starts[-1]
            chosen = self.rule.keep(entries[0] if entries else self._no_entries(), moment)
            kept.append(Entries(chosen.tokens - before, chosen.ids + group.start, chosen.values))
        choice = self._by_rows(Entries.cat(kept), starts[-1])
        return [
            Chosen(_part(choice, a, b), beside.joined(look.y))
            for (a, b), beside, look in zip(pairwise(starts), besides, looks, strict=True)
        ]

    def moves(self, ledger: Ledger) -> None:
        """Writes down what choosing moves in a step: what the rule does, of every group, or the k best of a token."""
        graded = self.rule.gradient_loss is not None
        compared = torch.float32 if self.coder.spec.select_by_decoder_norm or graded else ledger.dtype
        for cut in self.coder.cuts:
            self.rule.moves(replace(ledger, dtype=compared), cut)
            if self.rule.over == "token" and not self.rule.batch_wide and self.mesh.latents.moves:
                budget: Budget = self.rule  # type: ignore[assignment]
                moves_lists(ledger, cut, budget.ks[1], compared, least=budget.ks[0])

    def cuts(self) -> Float[Tensor, "d_sae"] | None:
        """Returns what a score must exceed to be kept, of every latent, if the rule has such cuts."""
        found = [self.rule.cuts(self.coder.given(i, group)) for i, group in enumerate(self.groups)]
        if any(cut is None for cut in found):
            return None
        device = self.coder.W_enc.device
        sizes = [group.stop - group.start for group in self.groups]
        return torch.cat([cut.detach().to(device).expand(m) for cut, m in zip(found, sizes, strict=True)])  # type: ignore[union-attr]

    def _tiles(self, look: Look) -> Iterator[tuple[slice, Float[Tensor, "_n d_sae"]]]:
        """Yields some tokens' rows with their pre-activations, which the next ones overwrite."""
        size, m = self.tile, self.coder.spec.d_sae
        y = look.y.detach()
        with torch.no_grad():
            for start in range(0, len(y), size):
                rows = slice(start, min(start + size, len(y)))
                n = rows.stop - rows.start
                if self._buffer is None or len(self._buffer) < n:
                    dtype = y.dtype if self.exact else self.rounded["W_enc"].dtype
                    self._buffer = torch.empty(n, m, dtype=dtype, device=y.device)
                yield rows, self.coder.preactivations(y[rows], self.rounded or None, self._buffer[:n])

    def _above(self, scores: Tensor, compared: Tensor, cuts: Tensor) -> Choice:
        """Returns the entries above their cuts, in a buffer of fixed size, so that the host need not know how many."""
        n, m = scores.shape
        capacity = self._room(n)
        if capacity > DENSE_SHARE * n * m:
            below = compared <= cuts
            self._counts.append(n * m - torch.count_nonzero(below))
            known = torch.where(below, PAD, scores).flatten()
            offsets = torch.arange(0, n * m + 1, m, device=scores.device)
            return Choice(offsets, torch.arange(m, device=scores.device).repeat(n), known, self.exact)
        counts, places, count = kernel("above", compared)(compared, cuts, capacity)
        self.short.append(count > capacity)
        self._counts.append(count)
        return self._filled_up(counts, places, places % m, scores.reshape(-1).index_select(0, places.clamp_min(0)))

    def _best(self, scores: Tensor, compared: Tensor) -> Choice:
        """Returns what this rank holds of the k best of every token, in a buffer of fixed size.

        Codes that may be negative leave nothing to fill one up with: then the host waits for their number.
        """
        rule: Budget = self.rule  # type: ignore[assignment]
        k = rule.k_at(self.moments[0].progress)
        found = best(scores, rule.rank(compared), k, self.groups, self.coder.cuts)
        count, room = found.kept.sum(), self._room(len(scores))
        self._counts.append(count)
        if not rule.signed and room > min(found.ids.numel(), DENSE_SHARE * scores.numel()):
            offsets, ids = by_rows(found.ids)
            return Choice(offsets, ids, torch.where(found.kept, found.known, PAD).flatten(), self.exact)
        capacity = int(count) if rule.signed else room
        self.short.append(count > capacity)
        places = torch.nonzero_static(found.kept.flatten(), size=capacity, fill_value=-1)[:, 0]
        ids, known = (x.flatten().index_select(0, places.clamp_min(0)) for x in (found.ids, found.known))
        return self._filled_up(found.kept.sum(1), places, ids, known)

    def _filled_up(self, counts: Tensor, places: Tensor, ids: Tensor, known: Tensor) -> Choice:
        """Returns the entries of a buffer; those at a place below 0 fill it up, and belong to the last row."""
        pads = places < 0
        offsets = offsets_of(counts).clamp_max(len(places))  # without room for all, the step is repeated
        offsets[-1:] = len(places)
        last = self.coder.spec.d_sae - 1
        return Choice(offsets, torch.where(pads, last, ids), torch.where(pads, PAD, known), self.exact)

    def _room(self, n: int) -> int:
        """Returns the size of a buffer for the entries of n tokens."""
        return _room(self.per_token, self.coder.spec.d_sae, n)

    def _by_rows(self, entries: Entries, n: int) -> Choice:
        """Returns entries as compressed rows, with their pre-activations where these are what was compared."""
        offsets, ids, values = entries.to_rows(n)
        compared_as_they_are = not self.coder.spec.select_by_decoder_norm
        return Choice(offsets, ids, values if compared_as_they_are else None, self.exact)

    def _no_entries(self) -> Entries:
        """Returns none, as precise as those of tokens are."""
        device, none = self.coder.W_enc.device, torch.zeros(0, dtype=torch.long, device=self.coder.W_enc.device)
        made = self.coder.W_enc.dtype if self.exact else self.rounded["W_enc"].dtype
        compared = self.coder.compared(torch.empty(0, self.coder.spec.d_sae, dtype=made, device=device))
        return Entries(none, none, compared.flatten())

    def _ask(self, rule: Selection, scores: Tensor, tensors: dict[str, Tensor], group: int) -> tuple[Tensor, Tensor]:
        return rule.choose(scores, tensors, self.moments[group])

    def finish(self, applies: Bool[Tensor, ""] | None = None) -> None:
        """Keeps what the step has taught the rule, if it was applied, as it was where nothing is said."""
        for moment in self.moments:
            self.rule.finish(moment)
        applies = torch.ones((), dtype=torch.bool, device=self.coder.W_enc.device) if applies is None else applies
        for moment, old in zip(self.moments, self.states, strict=True):
            state = moment.state
            kept = {n: torch.where(applies.to(new.device), new, old[n]) for n, new in state.items() if n in old}
            moment.state = {**state, **kept}
        self.states = [moment.state for moment in self.moments]

    def calibrated(self) -> tuple[tuple[float, ...], Float[Tensor, "d_sae"] | None]:
        """Returns what the per-token rule needs: numbers for the spec, and thresholds of latents for the buffer."""
        found = [self.rule.calibration(state) for state in self.states]
        known = [value for value in found if value is not None]
        if len(known) < len(found):
            return (), None
        if known[0].dim():
            return (), torch.cat(known)
        return tuple(float(value) for value in known), None

    def report(self, states: list[dict[str, Tensor]] | None = None) -> dict[str, float]:
        """Returns what is worth logging of what is remembered, or was; the mean over the groups that know it.

        Where ranks hold other latents, of the numbers alone that all of them have.
        """
        known = states or self.states
        if self.coder.shard:
            known = [{name: value for name, value in state.items() if not value.dim()} for state in known]
        reports = [self.rule.report(state) for state in known]
        found = {name: [report[name] for report in reports if name in report] for report in reports for name in report}
        return {name: sum(values) / len(values) for name, values in found.items()}

    def state(self) -> dict[str, Tensor]:
        """Returns what the rule remembers, for the checkpoint."""
        return {f"{number}.{name}": value for number, state in enumerate(self.states) for name, value in state.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Takes in what `state` returned."""
        device = self.coder.W_enc.device
        for number, state in enumerate(self.states):
            own = f"{number}."
            found = {name.removeprefix(own): value for name, value in tensors.items() if name.startswith(own)}
            state.update({name: _held(value, device) for name, value in found.items()})


def _room(per_token: float, m: int, n: int) -> int:
    return int(SPARE * per_token * n) + m // 16 + 64


class _Beside(dict[str, list[Choice]]):
    """What loss terms have chosen of the tiles so far."""

    def look(self, chooser: Chooser, scores: Tensor) -> None:
        for name, begun in chooser.begun.items():
            choice = chooser.objectives[name].choose(chooser.coder, scores, begun)
            if choice is not None:
                self.setdefault(name, []).append(choice._replace(exact=chooser.exact))

    def joined(self, like: Tensor) -> dict[str, Choice]:
        return {name: joined(choices, like) for name, choices in self.items()}


def joined(choices: list[Choice], like: Tensor) -> Choice:
    """Returns what was chosen of tokens one after the other as one; known numbers as precise as `like`."""
    if not choices:
        none = torch.zeros(0, dtype=torch.long, device=like.device)
        return Choice(none.new_zeros(1), none, like.new_zeros(0))
    first = choices[0]
    if len(choices) == 1:
        return first._replace(known=None if first.known is None else first.known.to(like.dtype))
    starts = [*accumulate((len(choice.ids) for choice in choices), initial=0)]
    offsets = [first.offsets[:1], *(c.offsets[1:] + start for c, start in zip(choices, starts, strict=False))]
    known = [choice.known for choice in choices if choice.known is not None]
    return Choice(
        torch.cat(offsets),
        torch.cat([choice.ids for choice in choices]),
        torch.cat(known).to(like.dtype) if known else None,
        first.exact,
    )


def _part(choice: Choice, a: int, b: int) -> Choice:
    """Returns what was chosen of the tokens from a to b; all of them without looking where they begin."""
    if (a, b) == (0, choice.offsets.numel() - 1):
        return choice
    start, stop = choice.offsets[a], choice.offsets[b]
    known = None if choice.known is None else choice.known[start:stop]
    return Choice(choice.offsets[a : b + 1] - start, choice.ids[start:stop], known, choice.exact)


def _held(value: Tensor, device: torch.device) -> Tensor:
    """Returns what a rule remembers where the coder is, or where its numbers can be."""
    return value.to(summed_on(device) if value.dtype == torch.float64 else device)


def _of_rows(how: Undo, rows: slice) -> Undo:
    return tuple(part[rows] if isinstance(part, Tensor) and part.dim() else part for part in how)  # type: ignore[return-value]
