"""Every selection rule keeps the contract; a new rule is tested by being there."""

import copy
from itertools import pairwise

import pytest
import torch
from rigs.teams import together

from sae.base import plugins
from sae.base.errors import ConfigError
from sae.coder.coder import Choice, SparseCoder
from sae.coder.cutting import part_of
from sae.coder.initialization import initialize
from sae.coder.spec import CoderSpec
from sae.kernels.codes import PAD
from sae.objectives import Objective as OBJECTIVES
from sae.parallel.mesh import ALONE, Shape
from sae.selection import trainable
from sae.training.choosing import Chooser
from sae.training.optim import OptimConfig
from sae.training.step import Batch
from sae.training.trainer import CoderTrainer, Schedule

RULES = {name: kind for name, kind in trainable().items() if name == kind.get_choice_name(kind)}  # no second names
D, M, N, K = 16, 64, 24, 4


@pytest.fixture(params=RULES)
def rule(request):
    return small(request.param)


def small(name):
    kind = RULES[name]
    return kind(k=K) if "k" in kind.__dataclass_fields__ else kind()


def made(rule, seed=0):
    coder = SparseCoder(CoderSpec(D, D, M, rule, variance=float(D)))
    initialize(coder, torch.zeros(D), seed)
    return coder


def batch(n=N, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=draw)
    return Batch(x, x, torch.randn(n, D, generator=draw))


def support(coder, batch, sizes=None, steps=2, mesh=ALONE):
    """The supports that training chooses in step `steps`, as one dense mask over the batch, and the chooser."""
    chooser = Chooser(coder, mesh=mesh)
    for step in range(steps):
        chooser.begin(step / 10, len(batch.x))
        parts = list(batch.x.split(sizes or len(batch.x)))
        if chooser.rule.batch_wide:
            found = chooser.whole_batch(list(map(coder.look, parts)))
        else:
            gradients = batch.gradients.split(sizes or len(batch.x))
            found = [chooser.choose(coder.look(x), g) for x, g in zip(parts, gradients, strict=True)]
        chooser.finish()
    found, masks = [fired(chosen.by_rule) for chosen in found], []
    for offsets, ids in found:
        mask = torch.zeros(len(offsets) - 1, coder.spec.d_sae, dtype=torch.bool)
        mask[torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff()), ids] = True
        masks.append(mask)
    return found, torch.cat(masks), chooser


def fired(choice):
    """The support of what was chosen, without entries that only fill a buffer."""
    there = choice.known != PAD
    rows = torch.repeat_interleave(torch.arange(len(choice.offsets) - 1), choice.offsets.diff())
    counts = torch.bincount(rows[there], minlength=len(choice.offsets) - 1)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), choice.ids[there]


def trained(rule, steps=5):
    """A coder whose inference has been calibrated by a few steps."""
    needed = (group[0] for group in rule.needs)
    terms = {name: plugins.names(OBJECTIVES)[name]() for name in ("reconstruction", *needed)}
    trainer = CoderTrainer(made(rule), terms, OptimConfig(lr=1e-3), Schedule(steps, 1000))
    for step in range(steps):
        trainer.step(batch(seed=step), step)
    return trainer.trained()


def test_support_is_well_formed_in_training_and_at_inference(rule):
    coder = trained(rule)
    chosen, _, _ = support(coder, batch())
    for offsets, ids in [*chosen, coder.support(coder.compared(coder.scores(batch().x)))]:
        assert offsets[0] == 0
        assert offsets[-1] == len(ids)
        assert len(offsets) == N + 1
        assert (offsets.diff() >= 0).all()
        for start, stop in pairwise(offsets):
            assert (ids[start:stop].diff() > 0).all(), "ids ascend within a row, none twice"


def test_support_contains_the_nonzeros_and_sparse_equals_dense_decode(rule):
    coder, x = trained(rule), batch().x
    z = coder.encode(x)
    torch.testing.assert_close(coder.decode(z), z.to_dense() @ coder.W_dec + coder.b_dec)
    assert 0 < float(z.l0().mean()) < M / 2 + 4, "a few steps leave no rule without latents"


def test_choice_depends_on_the_token_alone_at_inference(rule):
    coder, x = trained(rule), batch().x
    together = coder.encode(x).to_dense()
    alone = torch.stack([coder.encode(row).to_dense() for row in x])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("size", [1, 7, 23])
def test_micro_batches_choose_as_one(rule, size):
    coder = made(rule)
    _, whole, one = support(coder, batch(), steps=1)
    _, parts, other = support(coder, batch(), sizes=size, steps=1)
    assert torch.equal(whole, parts)
    assert one.state().keys() == other.state().keys()
    for name, value in one.state().items():
        torch.testing.assert_close(value, other.state()[name])


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_that_hold_parts_of_the_latents_choose_as_one(rule, ties):
    """Those of a rule that says how it is cut: a unit of neighbors stays together. Parts are ragged."""
    unit = rule.unit(M)
    if unit is None:
        pytest.skip("it cannot be cut")
    coder, seen = made(rule), batch()
    if ties:
        coder.W_enc.data = torch.randint(-1, 2, coder.W_enc.shape).float()
        seen = Batch(seen.x.round(), seen.target, seen.gradients)
    _, whole, one = support(coder, seen)

    def work(mesh):
        _, mask, chooser = support(part_of(coder, mesh.latents), seen, mesh=mesh)
        return mask, chooser.calibrated(), chooser.report()

    found = together(Shape(latents=3), work)
    assert {own.shape[1] % unit for own, _, _ in found} == {0}
    assert torch.equal(torch.cat([own for own, _, _ in found], dim=1), whole)
    numbers, thresholds = one.calibrated()
    for _, (own, _), report in found:
        assert own == pytest.approx(numbers, rel=1e-6)
        assert report == pytest.approx(one.report(), rel=1e-6)
    if thresholds is not None:
        torch.testing.assert_close(torch.cat([own for _, (_, own), _ in found]), thresholds)


def test_what_is_remembered_survives_a_checkpoint_and_a_failed_step(rule):
    coder = made(rule)
    _, _, chooser = support(coder, batch())
    before = copy.deepcopy(chooser.state())
    chooser.begin(0.5, N)
    if rule.batch_wide:
        chooser.whole_batch([coder.look(batch(seed=9).x)])
    else:
        chooser.choose(coder.look(batch(seed=9).x), batch(seed=9).gradients)
    for name, value in chooser.state().items():
        assert torch.equal(value, before[name]), f"{name}: a step counts when it is finished"
    again = Chooser(coder)
    again.load_state(before)
    assert {k: v.tolist() for k, v in again.state().items()} == {k: v.tolist() for k, v in before.items()}
    assert again.calibrated()[0] == chooser.calibrated()[0]


def test_config_survives_the_spec(rule):
    spec = CoderSpec(4, 4, M, rule)
    assert CoderSpec.from_json(spec.to_json()).selection == rule


def test_equal_scores_give_the_same_choice_every_time(rule):
    coder = made(rule)
    flat = Batch(*[torch.zeros(N, D)] * 3)
    assert torch.equal(support(coder, flat)[1], support(coder, flat)[1])


def test_gradients_of_all_parameters_are_finite_and_reach_what_is_trained(rule):
    coder = made(rule)
    chosen, _, _ = support(coder, batch(), steps=1)
    run = coder.run(coder.look(batch().x), Choice(*chosen[0]), batch().x)
    (run.prediction.square().sum() + run.kept.square().sum()).backward()
    for name, parameter in coder.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0 or name in ("r_mag",), name


def test_shared_budget_is_that_of_all_blocks(rule):
    shared = rule.shared_by(3)
    assert getattr(shared, "k", 0) == 3 * getattr(rule, "k", 0)


BAD = {
    "topk": [{"k": 0}, {"k": M + 1}, {"k_start": M + 1}, {"anneal_share": 0.0}],
    "mutual_choice": [{"k": 0}, {"threshold_decay": 1.0}],
    "feature_choice": [{"mutual_share": 1.5}, {"exponent": -1.0}, {"density_decay": 1.0}, {"density": "none"}],
    "gradient_topk": [{"beta": -1.0}, {"loss": "kl"}, {"gradient_norm": "layer"}, {"inference": "both"}],
    "jumprelu": [{"bandwidth": 0.0}, {"threshold_start": -1.0}],
    "groupmax": [{"k": 7}, {"k": 0}],
}


@pytest.mark.parametrize(("name", "changes"), [(n, c) for n, many in BAD.items() for c in many], ids=str)
def test_constants_out_of_range_are_named(name, changes):
    (field,) = changes
    with pytest.raises(ConfigError, match=rf"selection\.{field}: "):
        RULES[name](**changes).validate(M)


def test_groupmax_keeps_the_largest_of_every_group():
    x = batch().x
    scores = made(small("groupmax")).scores(x)
    expected = torch.nn.functional.one_hot(scores.view(N, K, M // K).argmax(2), M // K).view(N, M).bool()
    codes = made(small("groupmax")).encode(x).to_dense()
    torch.testing.assert_close(codes, scores.relu() * expected)


def test_signed_topk_keeps_the_largest_magnitudes_with_their_sign():
    x = batch().x
    scores = made(small("signed_topk")).scores(x)
    expected = torch.zeros(N, M).scatter_(1, scores.abs().topk(K, dim=1).indices, 1.0)
    codes = made(small("signed_topk")).encode(x).to_dense()
    torch.testing.assert_close(codes, scores * expected)
    assert (codes < 0).any()
