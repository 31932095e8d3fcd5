"""Errors name what was typed."""

from argparse import Namespace

import pytest

from cli.naming import as_typed
from sae.base.errors import ConfigError


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ("top_p: 2 is not above 0", "--top-p: 2 is not above 0"),
        ("text: it is empty: give some", "--prompt: it is empty: give some"),
        ("seed: it was not typed", "seed: it was not typed"),
        ("coder: no option of this command", "coder: no option of this command"),
        ("--top-p: named already", "--top-p: named already"),
        ("no field at all", "no field at all"),
    ],
)
def test_an_error_names_the_option_that_was_typed(told, wanted):
    with pytest.raises(ConfigError) as error, as_typed(Namespace(top_p=2, seed=None), text="--prompt"):
        raise ConfigError(told)
    assert str(error.value) == wanted
