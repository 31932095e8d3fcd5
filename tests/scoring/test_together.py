"""Which latents fire together: what really does is told first, and neither what is dense nor what is rare."""

import numpy as np
import pytest
from rigs.interp_evidence import (
    CONTEXT_LENGTH,
    D_SAE,
    DEAD,
    DENSE,
    ORDINARY,
    Found,
    dense,
    read_corpus,
    write_documents,
)

from interp.evidence.tally import CELL, Evidence, Sizes, Tally
from interp.scoring.metrics import wilson
from interp.scoring.together import LEAST, TOLD, together

TOKENS, PEAKS = 100_000, 160
ME, PARTNER, SUBSET, DENSE_ONE, RARE, CHANCE, WIDE = range(7)


def evidence(fired):
    """What a pass would say of latents that fire on so many tokens."""
    tally = Tally(len(fired), 64, Sizes(1, 1, 1, 1), 0)
    tally.fired[:] = fired
    tally.tokens[:] = TOKENS
    return Evidence(tally.state())


def ids_of(hits):
    """Ids of what fires at the peaks of the first latent, given at how many each does."""
    return np.repeat(np.arange(len(hits)), hits).astype(np.int32)


def test_neither_dense_nor_rare_latents_win():
    fired = [1000, 1200, 300, 60_000, 3, 5000, 9000]
    hits = [160, 80, 40, 150, 3, 8, 120]
    found = together(ME, ids_of(hits), PEAKS, evidence(fired))
    assert [one.latent for one in found] == [PARTNER, SUBSET, WIDE, DENSE_ONE, RARE]  # and none that is there by chance
    by_latent = {one.latent: one for one in found}
    assert max(found, key=lambda one: one.share).latent == DENSE_ONE
    assert max(found, key=lambda one: one.lift).latent == RARE
    assert by_latent[PARTNER].share == 0.5
    assert by_latent[PARTNER].lift == pytest.approx(0.5 * TOKENS / 1200)
    assert by_latent[PARTNER].places == PEAKS


def test_one_coincidence_is_none_and_eight_are_enough():
    assert together(ME, ids_of([160, 1]), PEAKS, evidence([1000, 2])) == ()
    assert len(together(ME, ids_of([160, LEAST]), PEAKS, evidence([1000, 2]))) == 1
    assert len(together(ME, ids_of([160] * 20), PEAKS, evidence([1000] * 20))) == TOLD
    assert together(ME, np.zeros(0, np.int32), 0, evidence([0, 5])) == ()


def test_few_peaks_are_held_for_less():
    """Of two latents that fire equally often where it does, the one seen at more peaks is the surer one."""
    few = together(ME, ids_of([4, 2, 0]), 4, evidence([1000, 1000, 1]))
    many = together(ME, ids_of([160, 80, 0]), 160, evidence([1000, 1000, 1]))
    assert few[0].share == many[0].share == 0.5
    assert wilson(0.5, 4).low < wilson(0.5, 160).low


def test_planted_latents_fire_together_as_all_of_the_text_says(tmp_path):
    """Shares of a sample of peaks are near those of all peaks, and who is first is who shares most tokens in all."""
    found = Found(tmp_path, read_corpus(write_documents(tmp_path / "text.jsonl", [40, 150, 700] * 30)))
    rows = found.rows
    fires = dense(rows.tokens(rows.kept).numpy())
    cells = fires.reshape(-1, CELL, D_SAE) if not CONTEXT_LENGTH % CELL else pytest.fail("cells cross rows")
    on = (fires != 0).reshape(-1, D_SAE).astype(float)
    both, alone = on.T @ on, on.sum(0)
    jaccard = both / (alone[:, None] + alone - both + 1e-9)
    np.fill_diagonal(jaccard, 0)
    firsts = 0
    for latent in ORDINARY:
        told = together(latent, *found.visits.beside(latent), found.evidence)
        peaks = np.abs(cells[..., latent])
        which = peaks.max(1) > 0
        at_peaks = cells[which, peaks[which].argmax(1)] != 0
        for one in told:
            share = at_peaks[:, one.latent].mean()
            assert abs(one.share - share) < 4.5 * np.sqrt(max(share * (1 - share), 0.01) / one.places), (latent, one)
            assert one.lift == pytest.approx(one.share * found.evidence.tokens / alone[one.latent])
        assert DEAD not in [one.latent for one in told]
        assert not told or told[0].latent != DENSE
        best = int(jaccard[latent].argmax())
        if jaccard[latent, best] > 0.2:  # it has a partner
            firsts += 1
            assert told[0].latent == best, (latent, told[:2], jaccard[latent, best])
    assert firsts > 20
