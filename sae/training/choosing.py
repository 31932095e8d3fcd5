"""How a coder's selection rule chooses in training: per token or over the whole batch, whatever its parts and ranks.

A batch-wide rule first sees every micro-batch without gradient and leaves its candidates; those of all ranks together
give one choice, which the second pass, with gradients, takes over. So micro-batches and ranks change nothing.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from sae.coder.coder import Look, SparseCoder
from sae.kernels.codes import Entries, Support
from sae.parallel import collectives, ranks
from sae.selection import Moment, Selection


class Chooser:
    """The rule at work: one state for each group of latents that it chooses among."""

    def __init__(self, coder: SparseCoder) -> None:
        self.coder, self.rule = coder, coder.spec.rule
        self.groups = coder.rule_groups()
        self.states = [self.rule.start(group.stop - group.start) for group in self.groups]
        self.moments: list[Moment] = []
        self.before = 0

    def begin(self, progress: float, n_tokens: int, before: int = 0) -> None:
        """Begins a step of `n_tokens` tokens over all ranks, of which nothing is kept before `finish`.

        `before` of them are those of the ranks before this one.
        """
        self.before = before
        self.moments = [Moment(progress, n_tokens, dict(state)) for state in self.states]
        for moment in self.moments:
            self.rule.begin(moment)

    def whole_batch(self, parts: list[Tensor], look: Callable[[Tensor], Look]) -> list[Support]:
        """Returns the support of every micro-batch of this rank, by a batch-wide rule."""
        starts = [0, *torch.tensor([len(part) for part in parts]).cumsum(0).tolist()]
        before, like = self.before, self.coder.W_enc
        none = Entries(*(torch.zeros(0, dtype=t, device=like.device) for t in (torch.long, torch.long, like.dtype)))
        held: list[list[Entries]] = [[none] for _ in self.groups]
        for part, start in zip(parts, starts, strict=False):
            scores = self.coder.compared(look(part))
            for entries, group, moment in zip(held, self.groups, self.moments, strict=True):
                entries.append(self.rule.candidates(scores[:, group], before + start, moment))
                entries[:] = [self.rule.reduce(Entries.cat(entries), moment)] if start else entries[1:]
        kept = []
        found = self._of_all_ranks([entries for (entries,) in held], starts[-1])
        for entries, group, moment in zip(found, self.groups, self.moments, strict=True):
            chosen = self.rule.keep(entries, moment)
            chosen = chosen.take((chosen.tokens >= before) & (chosen.tokens < before + starts[-1]))
            kept.append(Entries(chosen.tokens - before, chosen.ids + group.start, chosen.values))
        offsets, ids = Entries.cat(kept).to_support(starts[-1])
        return [(offsets[a : b + 1] - offsets[a], ids[offsets[a] : offsets[b]]) for a, b in pairwise(starts)]

    def _of_all_ranks(self, held: list[Entries], n_tokens: int) -> list[Entries]:
        """Returns the candidates of every group of latents of all ranks; this one has `n_tokens` tokens.

        Ranks first drop what none can keep: all candidates of each would be as many times what is kept as there are
        ranks, on every rank.
        """
        if not ranks.in_group():
            return held
        floors = [
            self.rule.floors(entries, n_tokens, group.stop - group.start, moment)
            for entries, group, moment in zip(held, self.groups, self.moments, strict=True)
        ]
        least = collectives.smallest(torch.cat(floors)).split([len(own) for own in floors])
        moved = []
        for (tokens, ids, values), group, floor in zip(held, self.groups, least, strict=True):
            moved.append(Entries(tokens, ids + group.start, values).take(~(values < floor[ids])))
        tokens, ids, values = collectives.gathered(*Entries.cat(moved))
        found = []
        for group in self.groups:
            mine = (ids >= group.start) & (ids < group.stop)
            found.append(Entries(tokens, ids - group.start, values).take(mine))
        return found

    def per_token(self, look: Look, gradients: Float[Tensor, "n d_out"] | None) -> Support:
        """Returns the support of one micro-batch, by a per-token rule."""
        scores = self.coder.compared(look, gradients, [moment.state for moment in self.moments])
        return self.coder.support(scores, self._ask)

    def _ask(self, rule: Selection, scores: Tensor, tensors: dict[str, Tensor], group: int) -> Support:
        return rule.choose(scores, tensors, self.moments[group])

    def finish(self) -> None:
        """Keeps what the step has taught the rule."""
        for moment in self.moments:
            self.rule.finish(moment)
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

    def report(self) -> dict[str, float]:
        """Returns what is worth logging, the mean over the groups that know it."""
        reports = [self.rule.report(state) for state in self.states]
        found = {name: [report[name] for report in reports if name in report] for report in reports for name in report}
        return {name: sum(values) / len(values) for name, values in found.items()}

    def state(self) -> dict[str, Tensor]:
        """Returns what the rule remembers, for the checkpoint."""
        return {f"{number}.{name}": value for number, state in enumerate(self.states) for name, value in state.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Takes in what `state` returned."""
        for number, state in enumerate(self.states):
            own = f"{number}."
            state.update({name.removeprefix(own): value for name, value in tensors.items() if name.startswith(own)})
