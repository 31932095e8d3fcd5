"""The folder of a run: what it holds fixed, what may change, and what older versions wrote."""

import pytest

from interp.run.rundir import saved_config


@pytest.mark.parametrize(
    ("stood", "means"),
    [("'100'", "random:100"), ("100", "random:100"), ("23,55", "23,55"), ("508,", "508,"), ("all", "all")],
)
def test_a_bare_number_in_the_config_of_an_older_run_is_so_many_at_random(tmp_path, stood, means):
    (tmp_path / "config.yaml").write_text(f"latents: {stood}\n")
    assert saved_config(tmp_path).latents == means
