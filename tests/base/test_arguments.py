"""Arguments of another kind: told by what they are, in one line."""

import numpy as np
import pytest
import torch

from sae.base.arguments import described, number, whole, wrong
from sae.base.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "None"),
        (True, "True"),
        (1.5, "1.5"),
        ("a", "the text 'a'"),
        ("a" * 99, f"the text '{'a' * 57}...'"),
        ("https://key@host/x", "the text 'https://***host/x'"),
        ([1], "list"),
        ({}, "dict"),
        (dict, "the class dict, not an object of it,"),
        (np.zeros((2, 3)), "numpy.ndarray of shape [2, 3]"),
        (torch.zeros(2), "torch.Tensor of shape [2]"),
    ],
)
def test_a_value_is_told_by_what_it_is(value, told):
    assert described(value) == told
    assert str(wrong("x", value, "y")) == f"x: {told} was given; it takes y"


@pytest.mark.parametrize("value", [3, 3.0, np.int64(3), torch.tensor(3)])
def test_a_whole_number_is_one_in_whichever_form(value):
    assert whole("n", value) == 3
    assert type(whole("n", value)) is int


@pytest.mark.parametrize("value", [None, "3", 3.5, True, [3], float("nan"), torch.tensor(1.0), torch.zeros(2)])
def test_what_is_none_is_refused(value):
    with pytest.raises(TypeError, match=r"^n: .* was given; it takes a whole number$"):
        whole("n", value)


@pytest.mark.parametrize("value", [2.5, np.float32(2.5), torch.tensor(2.5), np.array(2.5)])
def test_a_number_is_one_of_numpy_and_torch_too(value):
    assert number("x", value) == 2.5
    assert type(number("x", value)) is float
    with pytest.raises(TypeError, match=r"^x: the text '2.5' was given; it takes a number$"):
        number("x", "2.5")
    with pytest.raises(ConfigError, match=r"^x: it is larger than a number may be$"):
        number("x", 10**400)


def test_one_that_is_too_small_says_the_least():
    with pytest.raises(ValueError, match=r"^n: 0 is too small; it must be at least 1$"):
        whole("n", 0)


def test_that_a_whole_number_is_too_small_ends_a_command_as_bad_usage():
    with pytest.raises(ConfigError, match=r"^n: -1 is too small"):
        whole("n", -1)
