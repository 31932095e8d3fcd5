"""Latents as Python has them: whatever stands for some does, and what does not is told in one line."""

import numpy as np
import pytest
import torch

from interp.run.latents import asked_latents, ids_among, is_one, named_latents
from sae.base.errors import ConfigError

D_SAE = 48
MASK = np.isin(np.arange(D_SAE), (3, 17))


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        (17, [17]),
        (np.int64(17), [17]),
        (torch.tensor(17), [17]),
        ("17", [17]),
        ("3,17", [3, 17]),
        ([3, 17], [3, 17]),
        ((17, 3), [3, 17]),
        ({17, 3}, [3, 17]),
        (["3", "10-12"], [3, 10, 11, 12]),
        (np.array([3, 17], dtype=np.uint16), [3, 17]),
        ([np.int32(3), torch.tensor(17)], [3, 17]),
        (torch.tensor([[3, 17]])[0], [3, 17]),
        (MASK, [3, 17]),
        (torch.from_numpy(MASK), [3, 17]),
        (MASK.tolist(), [3, 17]),
        (list(MASK), [3, 17]),  # numpy's True and False are no 1 and 0
        (range(3, 6), [3, 4, 5]),
        (range(5, 2, -1), [3, 4, 5]),
        (range(0, 9, 4), [0, 4, 8]),
        (slice(3), [0, 1, 2]),
        (slice(-2, None), [46, 47]),
        ((latent for latent in (3, 17)), [3, 17]),
        ("all", list(range(D_SAE))),
        ("random:5", 5),
        ("alive", "alive"),
    ],
)
def test_what_stands_for_latents_does(given, ids):
    assert asked_latents(named_latents(given, D_SAE), D_SAE) == ids


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (48, ConfigError, "48 is out of range; the coder has latents 0 to 47"),
        (range(10**12), ConfigError, "out of range"),
        (-1, ConfigError, "'-1' is no latent id"),
        ([3, 3], ConfigError, "3 is there twice"),
        ([], ConfigError, "none given; the coder has latents 0 to 47"),
        (MASK[:-1], ConfigError, "a mask of 47 latents; the coder has 48"),
        (3.5, TypeError, "3.5 is no latent id; allowed: an id, several"),
        ([3.0], TypeError, "3.0 is no latent id"),
        (np.array([0.5]), TypeError, "0.5 is no latent id"),
        (torch.tensor([[3, 17]]), TypeError, r"\[3, 17\] is no latent id"),
        (True, TypeError, "True is no latent id"),
        ([3, True], TypeError, "True is no latent id"),
        (None, TypeError, "None is no latent id"),
        (b"17", TypeError, "b'17' is no latent id"),
        ({3: "x"}, TypeError, "is no latent id"),
        ("tree", ConfigError, "'tree' is no latent id"),
    ],
)
def test_what_stands_for_none_is_told_in_one_line(given, error, said):
    with pytest.raises(error, match=said) as found:
        asked_latents(named_latents(given, D_SAE), D_SAE)
    assert str(found.value).startswith("latents: ")
    assert "\n" not in str(found.value)


def test_a_slice_of_what_is_there_is_as_long_as_what_is_there():
    assert ids_among([3, 17, 40], slice(None, 20), 2**31) == [3, 17]
    assert ids_among([3, 17, 40], slice(None), 2**31) == [3, 17, 40]
    with pytest.raises(ConfigError, match="'alive' names no latent"):
        ids_among([3], "alive", D_SAE)


def test_one_is_a_number_or_the_text_of_one():
    assert all(map(is_one, (3, "3", " 3 ", np.int8(3), torch.tensor(3))))
    assert not any(map(is_one, ([3], "3,4", {3}, range(1), np.array([3]), torch.tensor([3]), slice(1), 3.0, None)))
