"""Edits as they are typed, as objects of JSON, and what is refused in one line."""

import json

import numpy as np
import pytest
import torch

from sae.base.errors import ConfigError
from sae.steering.edits import Condition, Edit, as_edits, check_latents, parse_edits

TYPED = {
    "508=4": Edit(508, strength=4.0),
    "508 = -4.5e-1": Edit(508, strength=-0.45),
    "508=2x": Edit(508, strength=2.0, unit="largest"),
    "17:add=1.5 in prompt": Edit(17, "add", 1.5, where="prompt"),
    "17:scale=0.5 if 12>1": Edit(17, "scale", 0.5, when=Condition(12, ">", 1.0)),
    "9:ablate": Edit(9, "ablate"),
    "9 : ablate in answer if 3 < -2": Edit(9, "ablate", where="answer", when=Condition(3, "<", -2.0)),
    "508": Edit(508),
    "508:clamp=0": Edit(508, strength=0.0),
}


@pytest.mark.parametrize("text", TYPED)
def test_what_is_typed_is_what_is_meant_and_is_written_back(text):
    (edit,) = parse_edits(text)
    assert edit == TYPED[text]
    assert parse_edits(str(edit)) == (edit,)
    assert as_edits(json.loads(json.dumps(edit.to_json()))) == (edit,)


def test_several_are_said_in_any_way():
    wanted = (Edit(508, strength=4.0), Edit(17, "add", 2.0, "largest"), Edit(9, "ablate"))
    objects = [{"latent": 508, "strength": 4}, {"latent": 17, "how": "add", "strength": "2x"}, "9:ablate"]
    ways = ["508=4, 17:add=2x, 9:ablate", "508=4;17:add=2x\n9:ablate,", objects, list(wanted), tuple(objects)]
    assert all(as_edits(way) == wanted for way in ways)
    assert as_edits("") == as_edits([]) == ()
    (one,) = as_edits({"latent": 3, "strength": 1, "if": "12>1"})
    assert one.when == Condition(12, ">", 1.0)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.array, torch.tensor])
def test_numbers_of_numpy_and_torch_are_numbers(kind):
    wanted = Edit(5, strength=2.0, when=Condition(12, "<", 1.0))
    made = Edit(kind(5), strength=kind(2), when=Condition(kind(12), "<", kind(1)))
    assert made == wanted == Edit(5, strength=2, when="12<1")
    assert as_edits({"latent": kind(5), "strength": kind(2), "if": "12<1"}) == (wanted,)
    assert type(made.latent) is type(made.when.latent) is int
    with pytest.raises(ConfigError, match=r"^edits.latent: .* is not the id of a latent"):
        Edit(kind([5, 6]) if kind in (np.array, torch.tensor) else np.bool_(True), strength=1)


def test_a_condition_is_refused_where_it_is_made():
    for wrong, line in (
        ((12, ">=", 1), "'>=' is not one of >, <"),
        ((True, ">", 1), "True is not the id"),
        ((1, ">", "x"), "'x' is not a number"),
    ):
        with pytest.raises(ConfigError, match=f"^edits.if: {line}"):
            Condition(*wrong)


def test_a_latent_is_edited_twice_only_where_the_two_cannot_meet():
    assert len(as_edits("5=1 if 3>1, 5=2 if 3<1, 5=3 in answer if 4>1")) == 3
    assert len(as_edits("5=1 in prompt, 5=2 in answer")) == 2
    for twice in ("5=1, 5=2", "5=1 in answer, 5:ablate", "5=1 if 3>1, 5=2 if 3>1"):
        with pytest.raises(ConfigError, match=r"^edits: latent 5 is edited twice at the same tokens: 5=1"):
            as_edits(twice)


WRONG = {
    "508:clam=4": r"^edits.how: 'clam' is not one of clamp, add, scale, ablate. Did you mean 'clamp'\?$",
    "508=4y": r"^edits.strength: '4y' is neither a number nor one of largest activations, as in 2x$",
    "508=nan": r"^edits.strength: 'nan' is neither",
    "508=4 in anser": r"^edits.where: 'anser' is not one of prompt, answer, both. Did you mean 'answer'\?$",
    "508=4 if 12=1": r"^edits.if: '12=1' is not LATENT>VALUE or LATENT<VALUE, as in 12>1$",
    "x=4": r"^edits: 'x=4' is not LATENT\[:HOW\]\[=STRENGTH\] \[in WHERE\] \[if LATENT>VALUE\]$",
    "-3=4": r"^edits: '-3=4' is not LATENT",
    "5:ablate=3": r"^edits.strength: 3, but ablate makes a latent 0; leave it out, or clamp$",
    "5:scale=2x": r"^edits.strength: '2x' is of clamp and add; scale takes no largest activation$",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_one_line(text):
    with pytest.raises(ConfigError, match=WRONG[text]):
        parse_edits(text)


def test_wrong_objects_are_one_line():
    wrong = {
        r"edits: 'latnt' is not one of latent, .* Did you mean 'latent'\?": {"latnt": 3},
        r"edits: \{'strength': 3\} has no latent": {"strength": 3},
        r"edits.latent: True is not the id of a latent, which is a whole number from 0": {"latent": True},
        r"edits.strength: inf is not a number": {"latent": 3, "strength": float("inf")},
        r"edits.unit: 'lagest' is not one of value, largest. Did you mean": {"latent": 3, "unit": "lagest"},
        r"edits.strength: 10{400} is not a number up to": {"latent": 3, "strength": 10**400},
        r"edits.if: inf is not a number up to": {"latent": 3, "if": "4>1e999"},
        r"edits.if: 7 is not LATENT>VALUE": {"latent": 3, "if": 7},
        r"edits: 7 is none; say them as in '508=4, ": 7,
    }
    for said, given in wrong.items():
        with pytest.raises(ConfigError, match=f"^{said}") as raised:
            as_edits(given)
        assert "\n" not in str(raised.value)
    check_latents(as_edits("31=1 if 30>1"), 32)
    for text in ("32=1", "3=1 if 32>1"):
        with pytest.raises(ConfigError, match=r"^latent: 32 is not one of this coder's; allowed are 0 to 31$"):
            check_latents(as_edits(text), 32)
