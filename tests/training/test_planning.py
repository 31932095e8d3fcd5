"""What cannot be shared by ranks is refused in one line, with the number to set."""

import pytest
from rigs.fakes import tiny_config

from sae.base.errors import ConfigError
from sae.training.planning import check_ranks

ROWS = {"coder.objectives.kl": {"type": "kl"}}  # batches of whole rows, four of 32 tokens


@pytest.mark.parametrize(
    ("changes", "n", "told"),
    [
        ({}, 96, r"activations\.lanes: 64 for 96 ranks, of which each needs one; set it to 128, or take 64 ranks"),
        ({"activations.lanes": 8}, 9, r"activations\.lanes: 8 for 9 ranks.* set it to 16, or take 8 ranks"),
        ({}, 129, r"set it to 129, and batch_tokens to a multiple of that, or take 64 ranks"),
        (ROWS, 5, r"batch_tokens: 128 are 4 rows of 32 tokens for 5 ranks; set it to 160 or more, or take 4 ranks"),
    ],
)
def test_fewer_parts_of_a_batch_than_ranks_are_refused(tmp_path, changes, n, told):
    config = tiny_config(tmp_path, tmp_path, changes)
    config.validate()
    with pytest.raises(ConfigError, match=told):
        check_ranks(config, n)
    check_ranks(config, {96: 64, 9: 8, 129: 64, 5: 4}[n])


def test_a_batch_takes_equally_from_every_lane(tmp_path):
    for lanes in (0, 48):
        with pytest.raises(ConfigError, match=r"activations\.lanes: 0 is too small|128 is not a multiple of 48"):
            tiny_config(tmp_path, tmp_path, {"activations.lanes": lanes}).validate()
