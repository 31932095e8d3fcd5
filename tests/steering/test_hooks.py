"""Edits in a model: bitwise nothing where nothing changes, else what full codes give by hand, in one pass or many."""

import pytest
import torch
from rigs.fakes import tiny_lm
from rigs.interp_lms import subject_lm
from rigs.steering import D_SAE, KINDS, RESIDUAL, SEVERAL, D, by_hand, coder_of
from rigs.tiny_lms import tiny_lm as tiny_model

from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.lm.hooks import capture
from sae.lm.masking import MaskSpec
from sae.lm.models import LanguageModel
from sae.lm.reading import Row
from sae.lm.site import Site
from sae.selection.gradient_topk import GradientTopK
from sae.selection.topk import TopK
from sae.steering.edits import as_edits
from sae.steering.hooks import Steering

PROMPT = [0, 40, 41, 42, 50, 61, 62]
MORE = [70, 71, 45, 80]
ROW = [*PROMPT, *MORE]
NEAR = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


def logits(lm, tokens, during=None):
    return Row(lm, during, keeps=False).read(tokens, len(tokens))


def in_steps(lm, during):
    row = Row(lm, during)
    assert row.cache
    return torch.cat([row.read(PROMPT, len(PROMPT)), *(row.read([token]) for token in MORE)])


def firing(coder, lm, tokens=ROW):
    """The latent that fires at most of the tokens that count, and its values."""
    seen = capture(lm, list(coder.spec.reads), torch.tensor([tokens]))
    codes = coder.encode_dense(torch.cat([seen[s.name][0].float() for s in coder.spec.reads], -1))
    latent = int((codes[1:] != 0).sum(0).argmax())
    return latent, codes[:, latent]


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_change_the_model_is_bitwise_itself(lm, kind):
    coder = coder_of(kind)
    steering, plain = Steering(lm, coder), logits(lm, ROW)
    latent, values = firing(coder, lm)
    assert (values[1:] != 0).any(), "or nothing is shown"
    for text in ("", f"{latent}:scale=1, {(latent + 1) % D_SAE}:add=0", f"{latent}=9 if {latent}>1e9"):
        during = steering.during(as_edits(text), len(PROMPT))
        assert torch.equal(logits(lm, ROW, during), plain)
        assert torch.equal(in_steps(lm, during), in_steps(lm, None))
        assert during.changed == 0


@pytest.mark.parametrize("kind", KINDS)
def test_pass_by_pass_is_what_one_pass_gives(lm, kind):
    coder = coder_of(kind)
    steering, (latent, _) = Steering(lm, coder), firing(coder, lm)
    edits = as_edits(f"{latent}=3, {(latent + 7) % D_SAE}:add=1.5 in answer")
    whole, parts = (steering.during(edits, len(PROMPT)) for _ in range(2))
    once, steps = logits(lm, ROW, whole), in_steps(lm, parts)
    assert torch.allclose(once, steps, **NEAR)
    assert (once - logits(lm, ROW)).abs().max() > 0.1
    assert (whole.tokens, whole.masked, whole.changed) == (parts.tokens, parts.masked, parts.changed)
    assert (whole.tokens, whole.masked, whole.changed) == (len(ROW), 1, len(ROW) - 1)


HOWS = {"=3": lambda a: torch.full_like(a, 3.0), ":add=1.5": lambda a: a + 1.5, ":scale=-2": lambda a: -2 * a,
        ":ablate": torch.zeros_like}  # fmt: skip


OFTEN = ("relu", "l2", "skip", "crosscoder", "cross-layer")


@pytest.mark.parametrize(("kind", "how"), [(k, h) for k in KINDS for h in HOWS if h == "=3" or k in OFTEN])
def test_what_is_added_is_what_full_codes_give(lm, kind, how):
    coder = coder_of(kind)
    spec, (latent, _) = coder.spec, firing(coder, lm)
    tokens = torch.tensor([ROW])
    clean = capture(lm, list(dict.fromkeys((*spec.reads, *spec.writes))), tokens)
    wanted = by_hand(coder, clean, latent, HOWS[how])
    wanted[0] = 0  # masked
    first = min(spec.writes, key=lambda site: (wanted[:, column(spec, site)].norm() == 0, spec.writes.index(site)))
    seen: dict[str, torch.Tensor] = {}
    during = Steering(lm, coder).during(as_edits(f"{latent}{how}"), len(PROMPT))
    with during(tokens, 0):
        seen = capture(lm, [first], tokens)
    found = seen[first.name][0] - clean[first.name][0]
    assert torch.allclose(found, wanted[:, column(spec, first)], atol=1e-4, rtol=1e-3)
    assert wanted.norm() > 0.1


def column(spec, site):
    at = spec.writes.index(site)
    return slice(at * D, (at + 1) * D)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["topk", "l2", "skip", "crosscoder", "cross-layer"])
def test_coders_in_other_precisions_steer_as_well(lm, kind, dtype):
    coder = coder_of(kind).to(dtype)
    steering, plain = Steering(lm, coder), logits(lm, ROW)
    latent, _ = firing(coder, lm)
    assert torch.equal(logits(lm, ROW, steering.during(as_edits(f"{latent}:scale=1"), len(PROMPT))), plain)
    edited = logits(lm, ROW, steering.during(as_edits(f"{latent}=3"), len(PROMPT)))
    same = coder_of(kind)
    same.load_state_dict(coder.state_dict())  # the same numbers, in float32
    wanted = logits(lm, ROW, Steering(lm, same).during(as_edits(f"{latent}=3"), len(PROMPT)))
    assert torch.allclose(edited, wanted, **NEAR)
    assert (wanted - plain).abs().max() > 0.1


def test_what_is_not_reconstructed_stays(lm):
    coder = coder_of("topk")
    assert Steering(lm, coder).spec.is_autoencoder
    latent, values = firing(coder, lm)
    during = Steering(lm, coder).during(as_edits(f"{latent}:ablate"), len(PROMPT))
    tokens = torch.tensor([ROW])
    clean = capture(lm, list(RESIDUAL), tokens)[RESIDUAL[0].name][0]
    with during(tokens, 0):
        edited = capture(lm, list(RESIDUAL), tokens)[RESIDUAL[0].name][0]
    fires = values != 0
    fires[0] = False
    assert 0 < fires.sum() < len(ROW)
    assert torch.equal(edited[~fires], clean[~fires]), "tokens at which it does not fire are not touched"
    wanted = clean - values[:, None] * coder.W_dec[latent]
    assert torch.allclose(edited[fires], wanted[fires], atol=1e-5)


def test_edits_act_where_they_are_said_to(lm):
    coder = coder_of("relu")
    tokens, site = torch.tensor([ROW]), RESIDUAL[0]
    clean = capture(lm, [site], tokens)[site.name][0]
    codes = coder.encode_dense(clean)
    place = torch.arange(len(ROW))
    counted = place > 0
    answer = place >= len(PROMPT) - 1
    other = int(((codes > 0.5) & counted[:, None]).sum(0).sub(len(ROW) // 2).abs().argmin())
    over = codes[:, other] > 0.5
    assert 0 < (over & counted).sum() < counted.sum()
    cases = {
        "5:add=2": counted,
        "5:add=2 in answer": counted & answer,
        "5:add=2 in prompt": counted & ~answer,
        f"5:add=2 if {other}>0.5": counted & over,
        f"5:add=2 in answer if {other}<0.5": counted & answer & ~over,
        "5:add=2 in prompt, 5:add=2 in answer": counted,
        f"5:add=2 if {other}>0.5, 5:add=2 if {other}>0.4": counted & (codes[:, other] > 0.4),
    }
    for text, where in cases.items():
        during = Steering(lm, coder).during(as_edits(text), len(PROMPT))
        with during(tokens, 0):
            found = capture(lm, [site], tokens)[site.name][0] - clean
        assert torch.allclose(found, where[:, None] * (2 * coder.W_dec[5]), atol=1e-5), text
        assert during.changed == where.sum()


def test_masked_tokens_are_left_alone_also_outliers_and_behind_a_cache(lm):
    tokens = [0, 40, 1, 42, 50, 2, 62]
    site = RESIDUAL[0]
    clean = capture(lm, [site], torch.tensor([tokens]))[site.name][0]
    limit = float(clean[[1, 3, 4, 6]].norm(dim=1).sort().values[-2:].mean())
    mask = MaskSpec((0, 1, 2), 2, {site.name: limit})
    masked = (clean.norm(dim=1) > limit) | torch.isin(torch.tensor(tokens), torch.tensor([0, 1, 2]))
    masked[:2] = True
    for kind in ("relu", "crosscoder"):
        limits = {SEVERAL[0].name: 1e-9} if kind == "crosscoder" else mask.norm_limits
        coder = coder_of(kind, MaskSpec((0, 1, 2), 2, limits))
        during = Steering(lm, coder).during(as_edits("5:add=2"), 3)
        row = Row(lm, during)
        row.read(tokens[:3])
        for token in tokens[3:]:
            row.read([token])
        expected = int(masked.sum()) if kind == "relu" else len(tokens)
        assert (during.tokens, during.changed) == (len(tokens), len(tokens) - expected)


WINDOWED = ("gemma2", "gemma3_text", "mistral")
FAMILIES = ("gpt2", "llama", *WINDOWED, "gpt_neox", "opt", "bloom", "qwen3", "gptj", "phi", "mamba")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_families_of_models_give_the_same_in_steps(kind, attention):
    model = tiny_model(kind, **({"sliding_window": 4} if kind in WINDOWED else {}))
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"{kind} has none")
    if kind != "mamba":
        model.set_attn_implementation(attention)
    lm = LanguageModel(model.double(), tiny_lm().tokenizer, kind, None, True)
    path = next(n for n, module in model.named_modules() if n.endswith(".0") and len(list(module.children())) > 1)
    site = (Site(path.removesuffix("0") + "1", width=32),)
    coder = SparseCoder(CoderSpec(32, 32, 64, TopK(8), site, site, mask=MaskSpec((0,), 1))).requires_grad_(False)
    for parameter in coder.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(1))
    steering = Steering(lm, coder)
    plain, row = logits(lm, ROW), Row(lm, steering.during(as_edits("3:scale=1"), len(PROMPT)))
    assert torch.equal(logits(lm, ROW, steering.during(as_edits("3:scale=1"), len(PROMPT))), plain)
    assert row.cache, f"{kind} goes on from what it has read"
    during = steering.during(as_edits("3=9, 4:add=2 in answer"), len(PROMPT))
    steps, once = in_steps(lm, during), logits(lm, ROW, during)
    assert torch.allclose(steps, once, atol=1e-5, rtol=1e-4)
    assert (once - plain).abs().max() > 0.01


def test_a_condition_on_a_layer_above_is_read_before(lm):
    coder = coder_of("cross-layer, thresholds")
    tokens = torch.tensor([ROW])
    seen = capture(lm, list(coder.spec.reads), tokens)
    codes = coder.encode_dense(torch.cat([seen[s.name][0] for s in coder.spec.reads], -1))
    later = 32 + int(((codes[1:, 32:] > 0.1).sum(0) - 5).abs().argmin())
    over = codes[:, later] > 0.1
    over[0] = False
    assert 0 < over.sum() < len(ROW) - 1
    during = Steering(lm, coder).during(as_edits(f"3:add=2 if {later}>0.1"), len(PROMPT))
    assert during.ahead
    with during(tokens, 0):
        found = capture(lm, [coder.spec.writes[0]], tokens)[coder.spec.writes[0].name]
    clean = capture(lm, [coder.spec.writes[0]], tokens)[coder.spec.writes[0].name]
    assert torch.equal((found != clean).any(-1)[0], over)
    assert torch.allclose(in_steps(lm, during), logits(lm, ROW, during), **NEAR)


def test_a_small_addition_is_linear_with_the_slope_of_the_gradient():
    """What an added latent changes the loss by is its direction times the gradient there."""
    lm64 = subject_lm("gpt2")  # all of it in float64
    site = Site("transformer.h.1", width=D)
    coder = coder_of("topk")
    coder = coder.with_spec(coder.spec.with_(reads=(site,), writes=(site,)))
    kept: list[torch.Tensor] = []

    def leaf(module, args, out):
        first = (out[0] if isinstance(out, tuple) else out).detach().requires_grad_()
        kept.append(first)
        return (first, *out[1:]) if isinstance(out, tuple) else first

    handle = lm64.model.get_submodule(site.hook).register_forward_hook(leaf)
    with torch.enable_grad():
        lm64.model(torch.tensor([ROW])).logits[0, -1].log_softmax(0)[7].backward()
    handle.remove()
    slope = float((kept[0].grad[0, 1:] @ coder.W_dec[5].double()).sum())
    values = []
    for strength in (1e-4, -1e-4):
        during = Steering(lm64, coder).during(as_edits(f"5:add={strength}"), len(PROMPT))
        with torch.no_grad(), during(torch.tensor([ROW]), 0):
            values.append(float(lm64.model(torch.tensor([ROW])).logits[0, -1].log_softmax(0)[7]))
    assert (values[0] - values[1]) / 2e-4 == pytest.approx(slope, rel=1e-4)


def test_coders_that_cannot_steer_say_why(lm):
    site = RESIDUAL
    second = (Site("model.layers.1", width=D), Site("model.layers.1", width=D, tag="second"))
    normalized = (Site("model.layers.1.input_layernorm", "normalized", width=D),)
    gradient = GradientTopK(4, inference="gradient")
    wrong = {
        r"coder: it writes nothing, so that there is nothing to steer with": CoderSpec(D, D, 8, TopK(2), site, ()),
        r"coder: it does not say where it reads and writes": CoderSpec(D, D, 8, TopK(2), (Site(""),), (Site(""),)),
        r"coder: its selection looks at gradients": CoderSpec(D, D, 8, gradient, site, site, calibration=(0.5,)),
        r"coder: it is of two models": CoderSpec(2 * D, 2 * D, 8, TopK(2), second, second),
        r"coder: it writes model.layers.1.input_layernorm:normalized, which can be read, not replaced": CoderSpec(
            D, D, 8, TopK(2), normalized, normalized
        ),
    }
    for told, spec in wrong.items():
        with pytest.raises(ConfigError, match=f"^{told}"):
            Steering(lm, SparseCoder(spec))
    with pytest.raises(ConfigError, match=r"^lm: the coder does not say which model it is of; pass it$"):
        Steering(None, coder_of("topk"))
    encoder = LanguageModel(lm.model, lm.tokenizer, "tiny", None, False)
    with pytest.raises(ConfigError, match=r"^lm: tiny does not predict the next token"):
        Steering(encoder, coder_of("topk"))
    for text in ("3=2x", "3"):
        with pytest.raises(ConfigError, match=r"^edits: 3.*: its strength is to be a value here$"):
            Steering(lm, coder_of("topk")).during(as_edits(text), 3)
