"""A weight file and what lies around it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sae.base.errors import ConfigError, DataError
from sae.untrusted.files import LocalFiles
from sae.untrusted.hints import Hints
from sae.untrusted.places import Place


def place(root, **hints):
    return Place(LocalFiles(root), "a/sae.safetensors", Hints(**hints))


def test_a_place_knows_what_lies_around_it(root):
    here = place(root)
    assert (here.name, here.folder, str(here)) == ("sae.safetensors", "a", f"{root}/a/sae.safetensors")
    assert here.has("../cfg.json")
    with pytest.raises(DataError, match="is refused: it points outside"):
        here.path("../../secret.json")
    assert here.path("../cfg.json") == root / "cfg.json"
    (root / "a" / "sae_1.safetensors").touch()
    assert here.beside(r"sae(_\d)?\.safetensors") == ["sae.safetensors", "sae_1.safetensors"]


@pytest.mark.parametrize("name", ["cfg.json", "cfg.yaml"])
def test_a_config_is_read_and_the_first_counts(root, name):
    text = '{"a": [1, {"b": 1e-4}], "c": null}'
    (root / "a" / name).write_text(text)
    assert place(root).config("none.json", name, "../cfg.json") == {"a": [1, {"b": 1e-4}], "c": None}
    assert place(root).config("none.json") == {}


def test_a_config_that_links_out_is_refused(root):
    (root / "a" / "cfg.json").symlink_to(root.parent / "secret.json")
    with pytest.raises(DataError, match=r"'a/cfg\.json' is refused: it points outside"):
        place(root).config("cfg.json")


def test_tensors_of_several_files_come_together_but_no_name_twice(root):
    save_file({"a": torch.ones(1)}, root / "a" / "1.safetensors")
    save_file({"b": torch.ones(2)}, root / "a" / "2.safetensors")
    here = place(root)
    assert sorted(here.tensors("1.safetensors", "2.safetensors")) == ["a", "b"]
    assert len(here.opened) == 1
    save_file({"b": torch.ones(2), "a": torch.ones(3)}, root / "a" / "2.safetensors")
    with pytest.raises(DataError, match=r"2\.safetensors: tensor a is in another file as well"):
        here.tensors("1.safetensors", "2.safetensors")


def test_what_files_are_silent_about_is_asked_for(root):
    with pytest.raises(ConfigError, match=r"^scale: .*does not say it \(why\); pass scale=a number"):
        place(root).required_hint("scale", "why", "a number")
    assert place(root, scale=2.0).required_hint("scale", "why", "a number") == 2.0


def test_a_json_config_may_hold_what_is_not_used(root):
    (root / "a" / "cfg.json").write_text(json.dumps({"loss": float("nan"), "notes": ["a"] * 1000}))
    assert len(place(root).config("cfg.json")["notes"]) == 1000
