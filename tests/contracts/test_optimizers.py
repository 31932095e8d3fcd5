"""What every optimizer promises, whichever it is; and of each, that it computes what it is named after."""

import copy

import pytest
import torch

from sae import kernels
from sae.base.errors import ConfigError
from sae.base.files import load_tensors, save_tensors
from sae.base.plugins import names
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.spec import CoderSpec
from sae.kernels import dispatch
from sae.kernels.update import Update
from sae.lm.site import Site
from sae.objectives.auxk import AuxK
from sae.objectives.reconstruction import Reconstruction
from sae.optimizers import Optimizer, adam8bit
from sae.selection.jumprelu import JumpReLU
from sae.selection.topk import TopK
from sae.training.config import CoderConfig
from sae.training.footprint import copies
from sae.training.optim import OptimConfig
from sae.training.planning import CoderPlan
from sae.training.step import Batch
from sae.training.trainer import CoderTrainer, Schedule

D, WIDTH, BATCH, STEPS = 64, 320, 24, 8
SITES = (Site("r.0", width=D),)


@pytest.fixture(params=["torch", "native", "reference"])
def path(request):
    if why := dispatch.missing(request.param):
        pytest.skip(why)
    before = kernels.path()
    kernels.use(request.param)
    yield request.param
    kernels.use(before)


SLOW = {"adam8bit": [pytest.mark.slow]}  # to import torchao


@pytest.fixture(params=[pytest.param(name, marks=SLOW.get(name, [])) for name in names(Optimizer)])
def kind(request):
    try:
        names(Optimizer)[request.param]().validate()
    except ConfigError as error:
        pytest.skip(str(error))
    return request.param


def trainer(kind, rule=None, layers=1, **terms):
    """One of an autoencoder, or of a cross-layer coder whose decoders have norm 1."""
    several = layers > 1
    reads, other = (tuple(Site(f"{side}.{i}", width=D) for i in range(layers)) for side in "rw")
    spec = CoderSpec(
        *(D * layers, D * layers, WIDTH, rule or TopK(4)),
        reads=reads,
        writes=other if several else reads,
        variance=float(D * layers),
        cross_layer=several,
        pre_bias="own" if several else "decoder",
        decoder_norm="unit",
    )
    coder, optim = SparseCoder(spec), OptimConfig(kind, lr=3e-3, ema=0.9)
    initialize(coder, torch.zeros(D * layers), 0, input_center=torch.zeros(D * layers) if several else None)
    optim.validate()
    schedule = Schedule(STEPS, 3 * BATCH, product_dtype=torch.bfloat16)
    return CoderTrainer(coder, {"reconstruction": Reconstruction(), **terms}, optim, schedule)


def batch(made, step):
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, made.coder.spec.d_in, generator=draw) + 0.3
    return Batch(x, x if made.coder.spec.is_autoencoder else 0.5 * x)


def run(made, steps):
    return [made.step(batch(made, step), step)["loss"] for step in steps]


def state_of(made):
    return {name: tensor.clone() for name, tensor in made.state()[0].items()}


def same(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def stepped(optimizer, weight, state, gradient, number, applies=True, **more):
    told = torch.tensor(float(number)), torch.tensor(0.7), torch.tensor(applies)
    optimizer.update(weight, gradient.clone(), state, Update(1e-2, 0.9, 0.999, 1e-8, *told), **more)


@pytest.mark.parametrize("shape", [(12, D), (12,)])
def test_an_update_that_does_not_apply_changes_nothing(path, kind, shape):
    optimizer, weight = names(Optimizer)[kind](), torch.randn(shape)
    state, half = optimizer.state(weight), torch.zeros(shape, dtype=torch.bfloat16)
    rows = {"touched": torch.arange(12) % 2 == 0} if optimizer.lazy else {}
    unit = {"along": torch.randn(12), "unit": True, "half": half} if len(shape) == 2 else {}
    stepped(optimizer, weight, state, torch.randn(shape), 1, **rows, **unit)
    before = copy.deepcopy([weight, state, half])
    stepped(optimizer, weight, state, torch.full(shape, torch.nan), 2, applies=False, **rows, **unit)
    assert torch.equal(weight, before[0])
    assert not same(state, before[1])
    assert torch.equal(half, before[2])


def test_a_run_goes_on_bit_for_bit_from_a_file(path, kind, tmp_path):
    whole, first, second = (trainer(kind) for _ in range(3))
    lines = run(whole, range(STEPS))
    run(first, range(5))
    tensors, values = first.state()
    save_tensors(tmp_path / "state.safetensors", tensors)
    second.load_state(load_tensors(tmp_path / "state.safetensors"), values)
    assert run(second, range(5, STEPS)) == lines[5:]
    assert not same(state_of(whole), state_of(second))


@pytest.mark.parametrize("layers", [1, 2])
def test_it_trains_and_decoders_keep_their_norm(kind, layers):
    made = trainer(kind, layers=layers)
    losses = run(made, [0] * STEPS)
    assert losses[-1] < 0.9 * losses[0]
    for decoder in made.coder.decoders():
        norms = decoder.norm(dim=1)
        moved = norms > 0  # of a cross-layer coder, rows begin at 0
        assert moved.any()
        torch.testing.assert_close(norms[moved], torch.ones(int(moved.sum())), atol=1e-5, rtol=0)
    assert torch.equal(made.chooser.rounded["W_enc"], made.coder.W_enc.bfloat16())


def test_memory_is_estimated_by_what_is_remembered(kind):
    made = trainer(kind)
    for name in ("W_enc", "W_dec"):
        held = sum(tensor.nbytes for key, tensor in made.updater.state[name].items() if key != "step")
        assert held == made.optim.optimizer.bytes_of_state(D) * WIDTH * D
    plan = CoderPlan("plan", SITES, SITES, CoderConfig(WIDTH), OptimConfig(kind, ema=0.9))
    assert copies(plan) == 3 + made.optim.optimizer.bytes_of_state(D) / 4


def test_a_step_that_is_not_finite_leaves_all_as_it_was(kind):
    made = trainer(kind)
    run(made, range(3))
    before = state_of(made)
    made.step(Batch(*[torch.full((BATCH, D), torch.nan)] * 2), 3)
    assert not same(state_of(made), before)


@pytest.mark.parametrize("kind", ["adam", "sparse_adam"])
def test_it_is_torchs_own_in_float64(path, kind):
    draw, rows = torch.Generator().manual_seed(0), 30
    weight = torch.randn(rows, D, generator=draw)
    theirs = torch.nn.Parameter(weight.double())
    options = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}
    exact = (
        torch.optim.SparseAdam([theirs], **options) if kind == "sparse_adam" else torch.optim.Adam([theirs], **options)
    )
    optimizer = names(Optimizer)[kind]()
    state = optimizer.state(weight)
    for number in range(1, 31):
        touched = torch.rand(rows, generator=draw) < 0.2
        gradient = torch.randn(rows, D, generator=draw) * touched[:, None]
        theirs.grad = 0.7 * gradient.double()
        if optimizer.lazy:
            theirs.grad = torch.sparse_coo_tensor(touched.nonzero().T, theirs.grad[touched], theirs.shape)
        exact.step()
        stepped(optimizer, weight, state, gradient, number, **({"touched": touched} if optimizer.lazy else {}))
    torch.testing.assert_close(weight.double(), theirs.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["exp_avg_sq"].double(), exact.state[theirs]["exp_avg_sq"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("rule", [TopK(4), JumpReLU(2.0)])
def test_latents_that_a_step_has_not_touched_rest(path, rule, layers):
    made = trainer("sparse_adam", rule, layers)
    run(made, range(2))
    before = state_of(made)
    run(made, [2])
    now, touched = state_of(made), made.updater.touched > 0
    assert 0 < touched.sum() < WIDTH
    fired = made.tokens_since_fired == 0
    pushed = [made.updater.gradients[name] != 0 for name in rule.parameters(0)]  # thresholds, of latents near them
    assert torch.equal(touched, torch.stack([fired, *pushed]).any(0))  # and of none that only fills a buffer up
    for name in ("W_enc", "b_enc", "W_dec", *rule.parameters(0)):
        for held in ("weight", "sparse_adam.exp_avg", "sparse_adam.exp_avg_sq"):
            changed = now[f"{held}.{name}"] != before[f"{held}.{name}"]
            parts = made.coder.decoders_of(changed) if name == "W_dec" else [changed]
            moved = torch.cat([part.reshape(len(part), -1).any(1) for part in parts])
            assert not moved[~touched].any(), (held, name)
            assert moved.any() or name == "threshold"
    assert not torch.equal(now["weight.b_dec"], before["weight.b_dec"])


def test_what_auxk_revives_is_touched():
    made = trainer("sparse_adam", auxk=AuxK(k=8))
    with torch.no_grad():
        made.coder.b_enc[:10] = -9.0
    run(made, range(4))
    before, dead = state_of(made), made.dead
    assert dead[:10].all()
    run(made, [4])
    moved = (state_of(made)["weight.W_enc"] != before["weight.W_enc"]).any(1)
    assert moved[dead].any()


@pytest.fixture
def eight():
    pytest.importorskip("torchao", reason="the extra adam8bit")
    return names(Optimizer)["adam8bit"]()


@pytest.mark.slow
def test_codes_are_those_of_the_library(eight):
    from torchao.optim.quant_utils import dequant_with_qmap, quantize_8bit_with_qmap

    state = eight.state(torch.zeros(40, 192))
    assert state["exp_avg.largest"].shape == (40, 3)
    for name, signed in adam8bit.SIGNED.items():
        moment = torch.randn(40, 192).pow(5 if signed else 6)
        moment[3], moment[4, 7] = 0, 1e-20
        adam8bit._put_back(state, name, moment, torch.tensor(True))
        blocks, largest = moment.view(-1, 64), state[f"{name}.largest"].view(-1)
        scaled = blocks / blocks.abs().amax(1, keepdim=True).clip(1e-12)
        table = adam8bit._table(signed, moment.device)
        right, codes = quantize_8bit_with_qmap(scaled, table).int(), state[f"{name}.codes"].view(-1, 64).int()
        middle = (table[torch.minimum(right, codes)] + table[torch.maximum(right, codes)]) / 2
        assert ((right - codes).abs() <= 1).all()
        near = (scaled - middle).abs() <= 2**-9 * scaled.abs()  # half way between two, but for its last bits
        assert near[right != codes].all()
        told = adam8bit._taken_out(state, name)
        assert torch.equal(told, dequant_with_qmap(state[f"{name}.codes"], table, largest))
        apart = (told.view(-1, 64) - blocks).abs().amax(1)
        assert (apart <= 0.008 * blocks.abs().amax(1)).all()


@pytest.mark.slow
def test_silent_latents_with_moments_of_8_bits_move_as_with_32(eight, path):
    """Of a row with columns of very different size, a small second moment must not come to be 0."""
    sizes = torch.logspace(-6, 0, 256)
    weights = [torch.zeros(8, 256) for _ in range(2)]
    adam = names(Optimizer)["adam"]()
    states = [optimizer.state(weights[0]) for optimizer in (eight, adam)]
    for number in range(1, 40):
        gradient = torch.randn(8, 256, generator=torch.Generator().manual_seed(number)) * sizes * (number % 10 == 1)
        for optimizer, weight, state in zip((eight, adam), weights, states, strict=True):
            stepped(optimizer, weight, state, gradient, number)
    apart, most = (weights[0] - weights[1]).abs(), float(weights[1].abs().max())
    assert float(apart[:, sizes > 0.3].max()) < 0.05 * most
    assert float(weights[0].abs().max()) < 2 * most  # of columns a millionth as large, codes tell the size alone


@pytest.mark.slow
def test_moments_of_8_bits_take_a_quarter(eight):
    for width, block in ((768, 256), (640, 128), (64, 64)):
        state = eight.state(torch.zeros(100, width))
        found = sum(tensor.nbytes for tensor in state.values()) / (100 * width)
        assert found == eight.bytes_of_state(width) == 2 + 8 / block
    assert eight.state(torch.zeros(100, 48)).keys() == eight.state(torch.zeros(100)).keys() == {"exp_avg", "exp_avg_sq"}
    assert eight.bytes_of_state(48) == 8


def test_without_its_library_one_line_names_the_extra(monkeypatch):
    monkeypatch.setattr(adam8bit, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"^optim.kind: adam8bit needs torchao; pip install 'sae-interp\[adam8bit\]'$"
    ):
        OptimConfig("adam8bit").validate()
