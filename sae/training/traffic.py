"""What the ranks of a run tell each other in a step: bytes and collectives, by the functions that move them.

    tokens:     how many each rank has                                        gathered, 8 bytes
    choice:     what the rule says, of each group of latents by itself        summed, or the smallest taken
    candidates: of Feature Choice, 12 bytes each                              gathered, padded to the rank with the most
    gradients:  every parameter, with the loss terms, errors and firings      summed, in buckets
    stop:       whether any rank was asked to end, once for all coders        summed

So nothing grows with the batch or the ranks but candidates, which grow with both.
"""

from dataclasses import dataclass

import torch

from sae.coder.coder import SparseCoder
from sae.kernels.codes import Entries
from sae.lm.models import DTYPES
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
    tied: int
    """Bytes that are summed beside, at the most, where a batch's cut falls among equal scores."""
    least: int
    most: int
    """Bytes that are gathered: candidates, of which data decides how many there are; the tokens of one rank."""
    collectives: int
    """Without those of ties."""

    @property
    def sent(self) -> tuple[int, int]:
        """Returns the least and the most bytes that a rank hands over."""
        return self.summed + self.least, self.summed + self.tied + self.most

    @property
    def received(self) -> tuple[float, float]:
        """Returns the same of what comes to it: of a sum over a ring 2 (N - 1) / N of it, else N - 1 times as much."""
        others = self.ranks - 1
        by_sums = 2 * others / self.ranks
        least, most = self.summed, self.summed + self.tied
        return by_sums * least + others * self.least, by_sums * most + others * self.most


def traffic(config: TrainConfig, plans: list[CoderPlan], ranks: int) -> Traffic:
    """Returns what a step moves in which no token is masked as an outlier; alone, nothing."""
    if ranks == 1:
        return Traffic(1, 0, 0, 0, 0, 0)
    share = Share(ranks - 1, ranks)
    of = config.text.context_length if config.needs_rows else config.batch_tokens // config.activations.lanes
    n = len(share.of(config.batch_tokens // of)) * of
    summed, tied = bytes_of_sums(torch.zeros(())), 0  # the stop flag
    gathered = []
    for plan in plans:
        sums, ties, rows = _of_coder(plan, config, n)
        summed, tied = summed + sums, tied + sum(ties)
        gathered += [(8, 8), *rows]
    least, most = (sum(size) for size in zip(*gathered, strict=True))
    return Traffic(ranks, sum(summed), tied, least, most, len(summed) + len(gathered))


def _of_coder(plan: CoderPlan, config: TrainConfig, n: int) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Returns the bytes of each sum of a coder and of those of ties, and the least and most that its rule gathers."""
    coder = SparseCoder(plan.spec, "meta")
    trainer = CoderTrainer(coder, plan.coder.objectives, plan.optim, Schedule(config.steps, config.dead_after))
    summed, ties, gathered = bytes_of_sums(*trainer.summed()), [], []
    compared = torch.float32 if plan.spec.select_by_decoder_norm else DTYPES[config.precision]
    for group in coder.rule_groups():
        m = group.stop - group.start
        always, perhaps = plan.spec.rule.exchanged(m, compared)
        summed += [tensor.nbytes for tensor in always]
        ties += [tensor.nbytes for tensor in perhaps]
        found = plan.spec.rule.gathered(n, config.batch_tokens, m)
        if found is not None:
            counts, (least, most) = bytes_of_rows(torch.zeros(0))[0], map(_rows, found)
            gathered += [(counts, counts), (least, most)]
    return summed, ties, gathered


def _rows(count: int) -> int:
    """Returns the bytes of so many candidates."""
    ids = torch.empty(count, dtype=torch.int64, device="meta")
    return bytes_of_rows(*Entries(ids, ids, torch.empty(count, device="meta")))[1]
