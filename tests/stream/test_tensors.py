"""Stored activations as blocks: what a store holds, in which order, and what is wrong with it in one line."""

import re

import pytest
import torch
from safetensors.torch import save_file

from sae.base.errors import ConfigError, DataError
from sae.stream.tensors import cut, divided, stored_at, stored_in_memory

SITE = "layer.3"


def numbered(n, width=2, start=0):
    return (torch.arange(start, start + n)[:, None] + torch.zeros(width)).float()


def read(source, site=SITE):
    return [source.read(block).activations[site][:, 0].long().tolist() for block in range(len(source))]


def stored(tmp_path, *files):
    for number, tensors in enumerate(files):
        save_file(tensors, tmp_path / f"part-{number}.safetensors")
    return stored_at(str(tmp_path))


def test_files_are_cut_into_blocks_in_the_order_of_their_names(tmp_path):
    found = stored(tmp_path, {SITE: numbered(5)}, {SITE: numbered(2, start=5)}, {SITE: numbered(0)})
    assert read(cut(found.shards, [SITE], 3)) == [[0, 1, 2], [3, 4], [5, 6], []]
    assert read(cut(found.shards, [SITE], 100)) == [[0, 1, 2, 3, 4], [5, 6], []]
    for path in (tmp_path / "part-1.safetensors", tmp_path / "*-1*"):
        assert read(cut(stored_at(str(path)).shards, [SITE], 100)) == [[5, 6]]


def test_rows_are_flattened_without_what_is_masked(tmp_path):
    x = numbered(12).unflatten(0, (3, 4))
    mask = torch.ones(3, 4, dtype=torch.uint8)
    mask[1, 2] = 0
    found = stored(tmp_path, {SITE: x, "mask": mask, f"gradients/{SITE}": -x})
    assert read(cut(found.shards, [SITE], 8)) == [[0, 1, 2, 3, 4, 5, 7], [8, 9, 10, 11]], "whole rows, two of four"
    skipping = cut(found.shards, [SITE], 8, with_gradients=True, skip_positions=1)
    assert read(skipping) == [[1, 2, 3, 5, 7], [9, 10, 11]]
    block = skipping.read(0)
    assert torch.equal(block.gradients[SITE], -block.activations[SITE])
    flat = stored_in_memory({SITE: x.flatten(0, 1), "mask": mask.flatten().bool()}, "")
    assert read(cut(flat.shards, [SITE], 5, skip_positions=1)) == [[0, 1, 2, 3, 4], [5, 7, 8, 9], [10, 11]]


def test_large_files_are_read_by_slices(tmp_path, monkeypatch):
    save_file({SITE: numbered(100)}, tmp_path / "x.safetensors")
    source = cut(stored_at(str(tmp_path)).shards, [SITE], 10)
    asked = []
    opened = cut.__globals__["safe_open"]

    class Slice:
        def __init__(self, part):
            self.part = part

        def __getitem__(self, rows):
            asked.append((rows.start, rows.stop))
            return self.part[rows]

    class Open:
        def __init__(self, *arguments):
            self.file = opened(*arguments)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_slice(self, name):
            return Slice(self.file.get_slice(name))

    monkeypatch.setitem(cut.__globals__, "safe_open", Open)
    assert source.read(7).activations[SITE][:, 0].tolist() == list(range(70, 80))
    assert asked == [(70, 80)]


def test_precision_is_that_asked_for(tmp_path):
    found = stored(tmp_path, {SITE: numbered(4).bfloat16()})
    assert cut(found.shards, [SITE], 9).read(0).activations[SITE].dtype == torch.float32
    assert cut(found.shards, [SITE], 9, dtype=torch.float16).read(0).activations[SITE].dtype == torch.float16


def test_a_share_is_held_out_at_equal_distances():
    train, held_out = divided(stored_in_memory(numbered(1000), SITE), [SITE], 10, 0.03, 0)
    whole = [x for block in read(train) for x in block] + [x for block in read(held_out) for x in block]
    assert sorted(whole) == list(range(1000)), "none twice, none lost"
    assert [block[0] for block in read(held_out)] == [160, 500, 830]
    few = divided(stored_in_memory(numbered(40), SITE), [SITE], 2048, 0.05, 0)
    assert [part.vectors for part in few] == [38, 2], "blocks are no larger than the share"


def test_a_folder_of_held_out_ones_is_held_out(tmp_path):
    (tmp_path / "held_out").mkdir()
    save_file({SITE: numbered(3, start=50)}, tmp_path / "held_out" / "a.safetensors")
    train, held_out = divided(stored(tmp_path, {SITE: numbered(7)}), [SITE], 5, 0.5, 0)
    assert (read(train), read(held_out)) == ([[0, 1, 2, 3, 4], [5, 6]], [[50, 51, 52]])


def test_sites_are_found_by_name_end_and_glob(tmp_path):
    names = ["model.layers.1", "model.layers.1.mlp:input", "vit/block_3", "layers.2@second"]
    found = stored(tmp_path, {name: numbered(2) for name in names})
    assert [site.name for site in found.sites("layers.1")] == ["model.layers.1"]
    assert [site.name for site in found.sites("vit/*")] == ["vit/block_3"]
    site = found.sites("model.layers.1.mlp:input")[0]
    assert (site.hook, site.side, site.width, site.model) == ("model.layers.1.mlp", "input", 2, "")
    assert found.sites("layers.2@second")[0].tag == "second"
    with pytest.raises(ConfigError, match=r"'vit/block_4' is not in .* Did you mean 'vit/block_3'\?"):
        found.sites("vit/block_4")
    with pytest.raises(ConfigError, match=r"'\.\./x' cannot name a coder's folder"):
        stored_in_memory({"../x": numbered(2)}, "").sites("../x")


def test_other_activations_have_another_fingerprint(tmp_path):
    x = torch.randn(3000, 64)
    save_file({SITE: x}, tmp_path / "a.safetensors")
    before = stored_at(str(tmp_path)).fingerprint
    assert before == stored_at(str(tmp_path)).fingerprint
    save_file({SITE: x + 1e-3}, tmp_path / "a.safetensors")
    assert stored_at(str(tmp_path)).fingerprint != before
    assert stored_in_memory(x, SITE).fingerprint != stored_in_memory(x + 1e-3, SITE).fingerprint


X = numbered(4)
BAD = {  # files, each a mapping of tensors: what is said
    "other width": ([{SITE: X}, {SITE: numbered(4, 3)}], r"layer.3 has width 3 in .*part-1.*, but 2 in .*part-0"),
    "no such site": ([{SITE: X}, {"layer.4": X}], r"part-1.safetensors has no tensor 'layer.3'; it has layer.4"),
    "integers": ([{SITE: X.long()}], r"layer.3 in .*part-0.safetensors has the data type I64; .* floats"),
    "vector": ([{SITE: X[:, 0].contiguous()}], r"has the shape \[4\]; it must be \[n, width\]"),
    "mask": ([{SITE: X, "mask": torch.ones(3, dtype=torch.bool)}], r"mask in .* is BOOL \[3\]; it must be .* \[4\]"),
    "float mask": ([{SITE: X, "mask": torch.ones(4)}], r"mask in .* is F32 \[4\]; it must be bool or uint8 \[4\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_do_not_fit_are_named(case, tmp_path):
    files, said = BAD[case]
    with pytest.raises(ConfigError, match=rf"activations: .*{said}") as error:
        cut(stored(tmp_path, *files).shards, [SITE], 10)
    assert "\n" not in str(error.value)


def test_sites_of_different_lengths_do_not_go_together(tmp_path):
    found = stored(tmp_path, {SITE: X, "layer.4": numbered(5)})
    with pytest.raises(ConfigError, match=r"layer.3 is \[4\] vectors and layer.4 \[5\]; the rows of all sites belong"):
        cut(found.shards, [SITE, "layer.4"], 10)


def test_what_is_no_store_is_said(tmp_path):
    def error(name):
        with pytest.raises((ConfigError, DataError)) as found:
            stored_at(str(tmp_path / name) if name else "")
        assert "\n" not in str(found.value)
        return str(found.value)

    assert "activations.path: empty" in error("")
    (tmp_path / "acts").mkdir()
    assert re.search("no such file or folder: .*/act. Did you mean 'acts'?", error("act"))
    assert re.search("acts holds no .safetensors file$", error("acts"))
    torch.save(X, tmp_path / "acts" / "x.pt")
    assert re.search(r"convert x.pt: safetensors.torch.save_file\(\{'SITE': torch.load\('x.pt'\)\}", error("acts"))
    assert "no .safetensors file; convert x.pt" in error("acts/x.pt")
    save_file({SITE: X}, tmp_path / "acts/y.safetensors")
    assert re.search("holds no .safetensors file; .*/acts does", error("."))
    (tmp_path / "acts" / "y.safetensors").write_bytes(b"\x00" * 20)
    assert "y.safetensors is missing, damaged or no safetensors file" in error("acts")
    assert "no .safetensors file is matched by" in error("acts/z*")


def test_what_is_no_tensor_is_said():
    for given in ("text", [[1.0, 2.0]], {"a": 3}, object()):
        with pytest.raises(TypeError, match=r"activations: \w+ is no tensor; give a path, a tensor \[n, width\]"):
            stored_in_memory(given, SITE)
    with pytest.raises(ConfigError, match="activations: an empty list"):
        stored_in_memory([], SITE)
    assert read(cut(stored_in_memory(X.numpy(), SITE).shards, [SITE], 9)) == [[0, 1, 2, 3]]
    assert read(cut(stored_in_memory([X, X + 4], SITE).shards, [SITE], 9)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
