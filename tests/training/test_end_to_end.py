"""End-to-end terms: gradients through the language model, whole rows of text, fine-tuning, resume."""

import json
import math

import pytest
import torch
from rigs.fakes import sampled_rows, tiny_lm, tiny_tokenizer
from rigs.runs import assert_equal, error_of, lines
from transformers import GPT2Config, GPT2LMHeadModel

import sae
from sae.coder.coder import Choice, SparseCoder
from sae.coder.initialization import initialize
from sae.coder.normalization import undo
from sae.coder.spec import CoderSpec
from sae.evaluation.evaluation import evaluate
from sae.lm.hooks import capture
from sae.lm.masking import MaskSpec, norm_mask
from sae.lm.models import LanguageModel
from sae.lm.site import Site
from sae.objectives import Step
from sae.objectives.ce import CE
from sae.objectives.kl import KL
from sae.parallel.ranks import Share
from sae.selection.topk import TopK
from sae.stream.batch import TextBatch
from sae.stream.rows import RowStream
from sae.stream.sources import Reading
from sae.training.end_to_end import CleanPasses, splicer

SITE = Site("model.layers.1", model="tiny", width=16)
MASK = MaskSpec((0, 1, 2), 1)
TERMS = {"kl": {"type": "kl", "weight": 1.0}}


@pytest.fixture
def lm():
    return tiny_lm()


def text_of(lm, count=6, site=SITE):
    tokens = sampled_rows(lm, count=count).data
    keep = (tokens > 2) & (torch.arange(tokens.shape[1]) > 0)
    x = capture(lm, [site], tokens)[site.name][keep]
    return TextBatch(tokens, keep), x


def passes_of(lm, text, rows=99, site=SITE, coders=1):
    return CleanPasses(lm, text, rows, [(site,)] * coders)


def made(dtype=torch.float32):
    coder = SparseCoder(CoderSpec(16, 16, 40, TopK(4), (SITE,), (SITE,), mask=MASK, variance=1.0), dtype=dtype)
    initialize(coder, torch.zeros(16), 0)
    return coder


def view(coder, x, spliced):
    run = coder.run(coder.look(x), Choice(*coder.support(coder.scores(x))), x)
    return Step(coder, run, x, len(x), 1.0, torch.ones(()), spliced=lambda y: spliced(0, undo(y, run.how)))


@pytest.mark.parametrize("term", [KL(), CE()], ids=["kl", "ce"])
def test_gradients_through_the_model_equal_finite_differences(term):
    """On a GPT-2: Llama's norms compute in float32, whatever the model."""
    tokenizer = tiny_tokenizer()
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=len(tokenizer), n_positions=32, initializer_range=0.3
    )
    model = GPT2LMHeadModel(config).double().eval().requires_grad_(False)
    lm = LanguageModel(model, tokenizer, "tiny", None, True)
    site = Site("transformer.h.0", model="tiny", width=16)
    text, x = text_of(lm, site=site)
    coder = made(torch.float64)
    _, spliced = splicer(passes_of(lm, text, site=site), torch.ones(len(x), dtype=torch.bool), (site,))
    step = view(coder, x, spliced)
    term.loss(step).backward()
    support = step.run.latents
    for name, parameter in coder.named_parameters():
        flat, grad = parameter.data.view(-1), parameter.grad.view(-1)
        for i in grad.abs().topk(3).indices.tolist():
            old, values = float(flat[i]), []
            for shift in (1e-6, -1e-6):
                flat[i] = old + shift
                run = coder.run(coder.look(x), Choice(support.offsets, support.ids), x)
                found = spliced(0, undo(run.prediction, run.how))
                moved = Step(coder, run, x, len(x), 1.0, torch.ones(()), spliced=lambda y, f=found: f)
                values.append(term.loss(moved).item())
            flat[i] = old
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(grad[i]), rel=1e-4, abs=1e-7), (name, i)
    assert all(p.grad is None for p in lm.model.parameters()), "the language model is frozen"


def test_the_terms_are_what_evaluation_measures(lm):
    text, x = text_of(lm)
    coder = made()
    _, spliced = splicer(passes_of(lm, text), torch.ones(len(x), dtype=torch.bool), (SITE,))
    step = view(coder, x, spliced)
    counted = len(step.through_model().next_tokens)
    from rigs.fakes import Rows

    found = evaluate(coder, lm, Rows(text.tokens), 10**6)["loss"]
    assert found["tokens"] == counted
    assert KL().loss(step).item() * len(x) / counted == pytest.approx(found["kl_spliced"], rel=1e-4)
    assert CE().loss(step).item() * len(x) / counted == pytest.approx(found["ce_spliced"], rel=1e-4)


def test_micro_batches_of_rows_add_up_and_outliers_are_left_alone(lm):
    text, x = text_of(lm)
    coder = made()
    usual = x.norm(dim=1) < x.norm(dim=1).quantile(0.8)
    whole_sizes, whole = splicer(passes_of(lm, text), usual, (SITE,))
    sizes, parts = splicer(passes_of(lm, text, 2), usual, (SITE,))
    assert sum(sizes) == sum(whole_sizes) == int(usual.sum())
    assert len(sizes) == 3
    out = coder(x[usual]).out
    patched = torch.cat([parts(i, rows).patched for i, rows in enumerate(out.split(list(sizes)))])
    torch.testing.assert_close(patched, whole(0, out).patched, atol=1e-4, rtol=1e-4)
    keep = text.keep.clone()
    keep[text.keep] = usual
    limit = float(x.norm(dim=1).quantile(0.8))
    assert torch.equal(norm_mask({"a": x}, MaskSpec(norm_limits={"a": limit})), x.norm(dim=1) <= limit)


def test_coders_of_a_batch_share_the_clean_pass_and_begin_where_they_write(lm):
    text, x = text_of(lm)
    everything = torch.ones(len(x), dtype=torch.bool)
    usual = x.norm(dim=1) < x.norm(dim=1).quantile(0.8)
    ran = []
    for path in ("0", "1", "2"):
        layer = lm.model.get_submodule(f"model.layers.{path}.mlp")
        layer.register_forward_hook(lambda *_, path=path: ran.append(path))
    cases = [(rows, made()(x[rows]).out) for rows in (everything, usual)]
    alone = [splicer(passes_of(lm, text), rows, (SITE,))[1](0, out) for rows, out in cases]
    passes = passes_of(lm, text, coders=2)
    ran.clear()
    for (rows, out), expected in zip(cases, alone, strict=True):
        found = splicer(passes, rows, (SITE,))[1](0, out)
        assert torch.equal(found.clean, expected.clean)
        assert torch.equal(found.patched, expected.patched)
        assert torch.equal(found.next_tokens, expected.next_tokens)
        assert len(found.clean) == len(found.next_tokens)
    assert "".join(ran) == "01222"  # one pass as it is, and two of what lies above


def test_the_clean_pass_goes_on_from_where_activations_were_read(lm):
    text = next(RowStream(Reading(lm, [SITE], MASK), sampled_rows(lm, count=20), 4 * 12, 0)).text
    expected = passes_of(lm, TextBatch(text.tokens, text.keep)).at(0).logits
    ran = []
    for path in ("0", "1", "2"):
        layer = lm.model.get_submodule(f"model.layers.{path}.mlp")
        layer.register_forward_hook(lambda *_, path=path: ran.append(path))
    assert torch.equal(passes_of(lm, text).at(0).logits, expected)
    assert ran == ["2"]
    passes_of(lm, text, 2).at(0)
    assert ran == ["2", "0", "1", "2"], "those of all rows are of no use to a part of them"


def test_of_several_micro_batches_so_many_clean_passes_are_kept_as_there_is_room_for(lm, monkeypatch):
    text, _ = text_of(lm)
    passes = passes_of(lm, text, 2, coders=2)
    passes.room = passes.at(0).logits.numel() + 1
    first = [passes.at(number) for number in range(3)]
    assert [passes.at(number) is clean for number, clean in enumerate(first)] == [True, True, False]
    assert passes_of(lm, text, 2).room == 0, "nobody else asks"


def test_batches_are_whole_rows_in_an_order_of_their_own(lm):
    rows, reading = sampled_rows(lm, count=20), Reading(lm, [SITE], MASK)
    streams = [RowStream(reading, rows, 4 * 12, 0, Share(rank, 2)) for rank in (0, 1)]
    alone = RowStream(reading, rows, 4 * 12, 0)
    for _ in range(12):  # more than two epochs
        both = torch.cat([next(stream).text.tokens for stream in streams])
        batch = next(alone)
        assert torch.equal(both, batch.text.tokens)
        assert len(batch.activations[SITE.name]) == int(batch.text.keep.sum()) == len(batch.blocks)
    again = RowStream(reading, rows, 4 * 12, 0)
    again.load_state(alone.state())
    assert torch.equal(next(again).text.tokens, next(alone).text.tokens)
    first = torch.cat([alone.order(0), alone.order(1)])
    assert sorted(first[:20].tolist()) == list(range(20))
    assert first[:20].tolist() != first[20:].tolist()


@pytest.mark.slow
def test_fine_tuning_lowers_the_divergence_and_starts_where_the_coder_was(tiny_train, tmp_path):
    assert tiny_train({"optim.lr": 1e-3}, folder=tmp_path / "first")[0] == 0
    start = {"coder.start_from": str(tmp_path / "first" / "coders" / "model.layers.1")}
    fine = start | {"coder.objectives": TERMS | {"reconstruction": {"type": "reconstruction", "weight": 0.01}}}
    fine |= {"coder.objectives.auxk": {"type": "auxk", "weight": 0}, "tokens": 60 * 128, "optim.warmup_share": 0.0}
    assert tiny_train(fine, folder=tmp_path / "fine")[0] == 0
    found = [
        json.loads((tmp_path / run / "evaluation.json").read_text())["model.layers.1"] for run in ("first", "fine")
    ]
    kl = [result["loss"]["kl_spliced"] for result in found]
    assert kl[1] < kl[0]
    log = [line["loss.kl"] for line in lines(tmp_path / "fine")]
    assert sum(log[-10:]) < sum(log[:10])
    first = lines(tmp_path / "fine")[0]
    assert first["fvu"] == pytest.approx(lines(tmp_path / "first")[-1]["fvu"], rel=0.2), "not from a random start"
    assert math.isfinite(first["loss.kl"])


def test_a_run_of_rows_resumes_bit_for_bit(tiny_train, tmp_path):
    changes = {"coder.objectives": TERMS, "micro_batch_tokens": 64}
    assert tiny_train(changes, folder=tmp_path / "whole")[0] == 0
    import shutil

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for path in (tmp_path / "cut" / "checkpoints").glob("step-*20"):
        shutil.rmtree(path)
    shutil.rmtree(tmp_path / "cut" / "coders")
    code, printed = tiny_train(options=("--resume", tmp_path / "cut"))
    assert code == 0, printed
    assert_equal(tmp_path / "cut", tmp_path / "whole")


BAD = [
    ({"activations.source": "disk"}, "end-to-end terms (kl, ce) run the model live; drop stored activations"),
    ({"batch_tokens": 192, "text.context_length": 28}, "batch_tokens: 192 is not whole rows of text.context_length 28"),
    ({"coder.selection": {"type": "gradient_topk", "k": 2}}, "drop a selection that looks at gradients"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=str)
def test_what_does_not_go_with_whole_rows_is_refused(changes, message, tiny_train, no_model):
    code, printed = tiny_train({"coder.objectives": TERMS} | changes)
    assert code == 2
    assert message in error_of(printed)


OTHER = [
    ({"coder.d_sae": 32}, "has d_sae 64, but this run 32"),
    ({"coder.normalization.kind": "l2"}, "has normalization.kind none, but this run l2"),
    ({"coder.selection": {"type": "groupmax", "k": 4}}, "has selection.type topk, but this run groupmax"),
    ({"activations.sites": ["layers.0"]}, "has sites ['model.layers.1'], but this run ['model.layers.0']"),
]


@pytest.mark.parametrize(("changes", "message"), OTHER, ids=str)
def test_starting_from_another_coder_names_the_difference(changes, message, tiny_train, tmp_path):
    assert tiny_train({"tokens": 128}, folder=tmp_path / "first")[0] == 0
    code, printed = tiny_train({"coder.start_from": str(tmp_path / "first")} | changes, folder=tmp_path / "second")
    assert code == 2
    assert message in error_of(printed)
    assert sae.load(tmp_path / "first").spec.d_sae == 64
