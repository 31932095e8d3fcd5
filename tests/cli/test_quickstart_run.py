"""`sae-train` as typed on a fresh machine: it ends, its figures are good, and its latents mean something."""

from collections import Counter

import pytest
import torch
from rigs.pages import blocks

import sae
from cli import train
from sae.base.files import read_json
from sae.evaluation.evaluation import text_of
from sae.lm.hooks import capture
from sae.lm.masking import token_mask
from sae.text.tokenizing import tokenize

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SAE_CACHE", str(folder / "cache"))
        assert train.main([]) == 0
        yield folder / "runs" / "quickstart"


def test_the_figures_are_good(run):
    found = read_json(run / "evaluation.json")["model.layers.2"]
    assert found["reconstruction"]["fvu"] < 0.15
    assert found["reconstruction"]["l0"] == pytest.approx(16, abs=0.5)
    assert found["density"]["dead_share"] < 0.25
    assert found["loss"]["ce_recovered"] > 0.95
    assert found["training"]["active_steps"]["auxk"] > 0
    assert blocks(run / "report.html")["curves"][0]["training"]["fvu"]["y"]


def test_latents_mean_something(run):
    """The 20 strongest activations of a latent share a token far more often than 20 random tokens do."""
    coder, lm = sae.load(run), sae.load_language_model("quickstart")
    held_out = tokenize(text_of(coder.spec), lm.tokenizer, lm.source()).held_out
    codes, tokens = [], []
    for rows in torch.arange(240).split(40):
        batch = held_out.tokens(rows)
        keep = token_mask(batch, coder.spec.mask)
        codes.append(coder.encode(capture(lm, list(coder.spec.reads), batch)["model.layers.2"][keep]).to_dense())
        tokens.append(batch[keep])
    values, ids = torch.cat(codes), torch.cat(tokens)
    busy = ((values > 0).sum(0) >= 20).nonzero()[:, 0].tolist()
    draw = torch.Generator().manual_seed(0)

    def purity(places):
        return Counter(ids[places].tolist()).most_common(1)[0][1] / 20

    top = sum(purity(values[:, latent].topk(20).indices) for latent in busy) / len(busy)
    null = sum(purity(torch.randint(len(ids), (20,), generator=draw)) for _ in busy) / len(busy)
    print(f"{len(busy)} latents: the commonest token among the top 20 has share {top:.3f}, among random 20 {null:.3f}")
    assert top > 4 * null
