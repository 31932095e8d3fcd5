"""Strengths: the search for a target KL on curves and on the bundled model."""

import pytest

import sae
from sae.steering.edits import Edit
from sae.steering.strengths import Strength, is_monotone, searched

CURVES = {
    "square": lambda s: s * s,
    "from above": lambda s: 2.0 / (1 + s) + s * s * 1e-3,
    "a bump": lambda s: 3 * s / (1 + s * s) ** 2,
    "a valley": lambda s: 0.4 + (s - 5) ** 2 if s < 6 else 1.4 + (s - 6) ** 3,
    "jumps and comes back": lambda s: 5.0 if 2 < s < 50 else 0.6 * s / (1 + 0.1 * s),
}


def found_on(curve, target, start):
    seen: dict[float, float] = {}
    search = searched(target, start, seen)
    strength = next(search)
    while True:
        seen[strength] = curve(strength)
        try:
            strength = search.send(seen[strength])
        except StopIteration as ended:
            return ended.value, seen


@pytest.mark.parametrize("start", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("name", CURVES)
def test_a_strength_is_found_on_curves_that_turn_as_well(name, start):
    target = {"a valley": 0.5, "a bump": 0.5}.get(name, 1.0)
    found, seen = found_on(CURVES[name], target, start)
    assert found.reached, (name, start, found)
    assert abs(found.kl - target) <= 0.1 * target
    assert found.kl == CURVES[name](found.strength)
    assert len(seen) <= 120


def test_the_nearest_is_told_where_none_reaches_it():
    found, _ = found_on(lambda s: 0.3 * s / (1 + s), 1.0, 1.0)
    assert not found.reached
    assert found.kl == pytest.approx(0.3, rel=0.01)
    found, _ = found_on(lambda s: 2.0 + s, 1.0, 1.0)
    assert not found.reached
    assert found.kl == pytest.approx(2.0, rel=0.02)


def test_monotone_is_what_rises():
    assert is_monotone({1.0: 0.1, 2.0: 0.3, 4.0: 0.3, 8.0: 0.2999})
    assert not is_monotone({1.0: 0.1, 2.0: 0.3, 4.0: 0.2})


def test_a_factor_scales_what_an_edit_changes():
    assert Strength(Edit(3, "clamp", 2.0), 2.0).at(3.0) == Edit(3, "clamp", 6.0)
    assert Strength(Edit(3, "add"), None).at(3.0) == Edit(3, "add", 3.0)
    assert Strength(Edit(3, "scale", 0.5), 0.5).at(1.5) == Edit(3, "scale", 0.25)
    assert Strength(Edit(3, "scale"), None).at(0.5) == Edit(3, "scale", 1.5)
    assert Strength(Edit(3, "ablate"), None).at(9.0) == Edit(3, "ablate")
    assert Strength(Edit(3, "add", -2.0, "largest"), -8.0).at(0.5) == Edit(3, "add", -4.0)


TARGETS = (0.1, 0.5, 2.0)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The bundled model, with a coder of a short training."""
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAE_CACHE", str(folder / "cache"))
        run = sae.train({"tokens": 2**17, "eval": {"tokens": 2048}}, run_dir=str(folder / "run"))
    (coder,) = run.coders.values()
    return sae.load_language_model("quickstart"), coder


@pytest.mark.slow
def test_twenty_latents_meet_three_targets_on_the_bundled_model(quickstart):
    lm, coder = quickstart
    codes = sae.activations(lm, coder, "Return the number of elements of the list that are equal to x, as an int.")
    latents = [one.latent for one in codes.top(10)]
    latents += [latent for latent in range(0, coder.spec.d_sae, 97) if latent not in latents][: 20 - len(latents)]
    missed = []
    for latent in latents:
        for kl in TARGETS:
            found = sae.steer(lm, coder, "Return the number of", str(latent), new_tokens=20, kl=kl)
            if abs(found.mean_kl - kl) > 0.1 * kl:
                missed.append((latent, kl, found.mean_kl))
    assert len(latents) == 20
    assert not missed
