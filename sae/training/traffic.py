"""What the ranks of a run tell each other in a step: bytes and collectives, by the functions that move them.

    tokens:     how many each rank has                                        gathered, 16 bytes
    floors:     of a batch-wide rule, under which no rank has a candidate     smallest, one number a latent
    candidates: of a batch-wide rule, 12 bytes each                           gathered, padded to the rank with the most
    effects:    of a rule that looks at gradients, two numbers a group        summed
    gradients:  every parameter, with the loss terms, errors and firings      summed, in buckets
    stop:       whether any rank was asked to end, once for all coders        summed

So gradients do not grow with the batch or the ranks; candidates grow with both.
"""

from dataclasses import dataclass

import torch

from sae.coder.coder import SparseCoder
from sae.kernels.codes import Entries
from sae.parallel.collectives import bytes_of_rows, bytes_of_sums
from sae.parallel.ranks import Share
from sae.training.config import TrainConfig
from sae.training.planning import CoderPlan
from sae.training.trainer import CoderTrainer, Schedule


@dataclass(frozen=True)
class Traffic:
    """What one rank hands to collectives in a step, and what a ring of ranks then brings it."""

    ranks: int
    summed: int
    """Bytes that are summed, or of which the smallest is taken."""
    least: int
    most: int
    """Bytes that are gathered: candidates, of which data decides how many there are; the tokens of one rank."""
    collectives: int

    @property
    def sent(self) -> tuple[int, int]:
        """Returns the least and the most bytes that a rank hands over."""
        return self.summed + self.least, self.summed + self.most

    @property
    def received(self) -> tuple[float, float]:
        """Returns the same of what comes to it: of a sum over a ring 2 (N - 1) / N of it, else N - 1 times as much."""
        others = self.ranks - 1
        by_sums = 2 * others / self.ranks * self.summed
        return by_sums + others * self.least, by_sums + others * self.most


def traffic(config: TrainConfig, plans: list[CoderPlan], ranks: int) -> Traffic:
    """Returns what a step moves in which no token is masked as an outlier; alone, nothing."""
    if ranks == 1:
        return Traffic(1, 0, 0, 0, 0)
    share = Share(ranks - 1, ranks)
    of = config.text.context_length if config.needs_rows else config.batch_tokens // config.activations.lanes
    n = len(share.of(config.batch_tokens // of)) * of
    summed, gathered = [bytes_of_sums(torch.zeros(()))], [0, 0]  # the stop flag
    count = 1
    for plan in plans:
        found, rows = _of_coder(plan, config, n)
        summed.append(found)
        gathered = [gathered[0] + 8 + rows[0], gathered[1] + 8 + rows[1]]
        count += len(found) + 1 + (2 if plan.spec.rule.batch_wide else 0)
    return Traffic(ranks, sum(map(sum, summed)), gathered[0], gathered[1], count)


def _of_coder(plan: CoderPlan, config: TrainConfig, n: int) -> tuple[list[int], tuple[int, int]]:
    """Returns the bytes of each sum of a coder, and the least and most that its rule gathers."""
    coder = SparseCoder(plan.spec, "meta")
    trainer = CoderTrainer(coder, plan.coder.objectives, plan.optim, Schedule(config.steps, config.dead_after))
    summed, groups = bytes_of_sums(*trainer.summed()), coder.rule_groups()
    if plan.spec.rule.gradient_loss:
        summed += [bytes_of_sums(torch.zeros(2, dtype=torch.float64))[0]] * len(groups)
    if not plan.spec.rule.batch_wide:
        return summed, (0, 0)
    summed += bytes_of_sums(torch.empty(plan.d_sae, device="meta"))
    sizes = [plan.spec.rule.candidates_of(n, config.batch_tokens, group.stop - group.start) for group in groups]
    least, most = (sum(size[end] for size in sizes) for end in (0, 1))
    return summed, (_rows(least), _rows(most))


def _rows(count: int) -> int:
    """Returns the bytes of so many candidates."""
    ids = torch.empty(count, dtype=torch.int64, device="meta")
    return sum(bytes_of_rows(*Entries(ids, ids, torch.empty(count, device="meta"))))
