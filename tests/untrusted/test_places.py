"""Where coders lie: names that stay below their folder, configs of strangers, tensors that are used or refused."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from sae.base.errors import ConfigError, DataError
from sae.untrusted.configs import as_int, one_of
from sae.untrusted.files import LocalFiles
from sae.untrusted.hints import Hints
from sae.untrusted.places import Place
from sae.untrusted.tensors import Tensors, check_finite


@pytest.fixture
def root(tmp_path):
    for name in ("cfg.json", "a/sae.safetensors", "a/b/config.json", ".git/config.json", "a/.hidden.json"):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (tmp_path / "secret.json").write_text('{"secret": 1}')
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "sae.safetensors").write_text("{}")
    return tmp_path / "root"


# LocalFiles


def test_names_are_those_of_files_that_are_neither_hidden_nor_unprintable(root):
    for name in ("new\nline.json", "esc\x1b[31m.json", "a/\udc80.json", "tab\t.json"):
        (root / name).write_text("{}")
    os.mkfifo(root / "sae.safetensors")
    assert LocalFiles(root).names() == ["a/b/config.json", "a/sae.safetensors", "cfg.json"]


def test_a_folder_called_by_a_detour_is_the_folder(root):
    files = LocalFiles(root / "a" / ".." / "a")
    assert files.label == files.identity == (root / "a").as_posix()
    assert files.names() == ["b/config.json", "sae.safetensors"]
    assert files.revision is None


@pytest.mark.parametrize(
    "name",
    [
        "../secret.txt",
        "../outside/sae.safetensors",
        "../../root/cfg.json",
        "a/../cfg.json",
        "a/../../secret.json",
        "a\\..\\..\\secret.json",
        "/etc/passwd",
        "cfg.json\0",
    ],
)
def test_names_that_lead_out_are_refused(root, name):
    with pytest.raises(DataError, match=r"is refused: it points outside of"):
        LocalFiles(root).path(name)


@pytest.mark.parametrize("name", ["nothing.json", "a", "x/y", "n" * 5000, "loop", "loop/x.json", "new\nline", "fifo"])
def test_what_is_no_file_is_missing(root, name):
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "fifo")
    assert not LocalFiles(root).has(name)
    with pytest.raises(DataError, match=r"is missing, or no file$"):
        LocalFiles(root).path(name)


def test_only_a_config_may_lie_one_folder_above(root):
    files = LocalFiles(root)
    assert files.path("../secret.json") == root.parent / "secret.json"
    (root.parent / "link.json").symlink_to("/etc/passwd")
    with pytest.raises(DataError, match=r"'link\.json' is refused: it points outside"):
        files.path("../link.json")
    (root.parent / "up.json").symlink_to("secret.json")
    assert files.path("../up.json").read_text() == '{"secret": 1}'


def linked(root, kind):
    """Puts a link out of the folder into it, and returns the name by which a file is reached."""
    target = root.parent / "outside" / "sae.safetensors"
    if kind == "file":
        (root / "l.safetensors").symlink_to(target)
    elif kind == "relative":
        (root / "l.safetensors").symlink_to("../outside/sae.safetensors")
    elif kind == "folder":
        (root / "l").symlink_to(target.parent)
        return "l/sae.safetensors"
    elif kind == "chain":
        (root / "l.safetensors").symlink_to("hop")
        (root / "hop").symlink_to("a/hop")
        (root / "a" / "hop").symlink_to(target)
    return "l.safetensors"


@pytest.mark.parametrize("kind", ["file", "relative", "folder", "chain"])
def test_links_out_are_refused(root, kind):
    name = linked(root, kind)
    for ask in (LocalFiles(root).path, LocalFiles(root).shapes):
        with pytest.raises(DataError, match=rf"^'{name}' is refused: it points outside of {root}$"):
            ask(name)


def test_links_within_are_followed(root):
    (root / "l.json").symlink_to("a/b/config.json")
    (root / "into").symlink_to("a")
    assert "l.json" in LocalFiles(root).names()
    assert LocalFiles(root).path("l.json").read_text() == "{}"
    assert LocalFiles(root).path("into/b/config.json").read_text() == "{}"


def test_loops_of_folders_come_to_an_end(root):
    (root / "a" / "again").symlink_to("..")
    (root / "here").symlink_to(".")
    assert LocalFiles(root).names() == ["a/b/config.json", "a/sae.safetensors", "cfg.json"]


def cache(tmp_path, folder="models--google--gemma"):
    """Makes what the hub's client makes: blobs, and a snapshot of links to them."""
    blob = tmp_path / "hub" / folder / "blobs" / "0f3a"
    blob.parent.mkdir(parents=True)
    blob.write_text('{"from": "blob"}')
    snapshot = tmp_path / "hub" / folder / "snapshots" / "c0ffee"
    (snapshot / "layer_1").mkdir(parents=True)
    (snapshot / "layer_1" / "cfg.json").symlink_to("../../../blobs/0f3a")
    (snapshot / "config.json").symlink_to("../../blobs/0f3a")
    (snapshot / "out.json").symlink_to("../../../../secret.json")
    (tmp_path / "secret.json").write_text("{}")
    return snapshot


def test_links_of_the_hubs_cache_are_followed_to_its_blobs_and_no_further(tmp_path):
    snapshot = cache(tmp_path)
    files = LocalFiles(snapshot)
    assert (files.identity, files.revision) == ("google/gemma", "c0ffee")
    assert files.path("layer_1/cfg.json").read_text() == '{"from": "blob"}'
    below = LocalFiles(snapshot / "layer_1")
    assert below.identity == "google/gemma/layer_1"
    assert below.names() == ["cfg.json"]
    assert below.path("cfg.json").read_text() == below.path("../config.json").read_text() == '{"from": "blob"}'
    for name in ("out.json", "../../secret.json", "/etc/passwd"):
        with pytest.raises(DataError, match="is refused: it points outside of"):
            files.path(name)
    with pytest.raises(DataError, match="is refused: it points outside of"):
        below.path("../out.json")


def test_a_folder_that_only_looks_like_the_cache_may_not_link_out(tmp_path):
    snapshot = cache(tmp_path, "mine")
    assert LocalFiles(snapshot).revision is None
    for name in ("layer_1/cfg.json", "config.json"):
        with pytest.raises(DataError, match="is refused: it points outside of"):
            LocalFiles(snapshot).path(name)


# Place


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


LAUGHS = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))])
MERGES = "\n".join(
    ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 10))]
)
BAD_CONFIGS = {
    "text": ("json", "hello", "is not valid JSON"),
    "list": ("json", "[1]", "holds a list, expected an object"),
    "bytes": ("json", b"\xff\xfe{", "is not valid JSON"),
    "empty": ("json", "", "is not valid JSON"),
    "deep": ("json", '{"a":' * 200 + "1" + "}" * 200, "lie too deep in each other"),
    "deeper": ("json", '{"a":' * 100_000, "is not valid JSON"),
    "long number": ("json", '{"d_sae": ' + "9" * 5000 + "}", "is not valid JSON"),
    "huge": ("json", '{"a": "' + "x" * 2**24 + '"}', "and a config at most 16,777,216"),
    "yaml": ("yaml", "a: [1, 2", "is damaged or no config: .* is not valid YAML"),
    "yaml list": ("yaml", "[1]", "holds a list"),
    "yaml bytes": ("yaml", b"\xff\xfe{", "is damaged or no config"),
    "yaml deep": ("yaml", "[" * 100_000, "lie too deep in each other"),
    "yaml indented": ("yaml", "\n".join(" " * i + "a:" for i in range(300)), "lie too deep in each other"),
    "yaml huge": ("yaml", "a: " + "x" * 2**20, "and a config at most 131,072"),
    "yaml long number": ("yaml", "d_sae: " + "9" * 5000, "is damaged or no config"),
    "laughs": ("yaml", LAUGHS, "are there too often"),
    "merges": ("yaml", MERGES, "are there too often"),
    "itself": ("yaml", "a: &a [*a]", "lie too deep in each other"),
    "object": ("yaml", "!!python/object/apply:os.system ['true']", "is not valid YAML"),
    "tabs": ("yaml", "a:\n\t- b", "is damaged or no config: while scanning"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configs_that_are_damaged_or_would_never_end_are_named(root, case):
    kind, text, message = BAD_CONFIGS[case]
    path = root / "a" / f"cfg.{kind}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as error:
        place(root).config(path.name)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_few_aliases_are_read(root):
    (root / "a" / "cfg.yaml").write_text("a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}}\n")
    assert place(root).config("cfg.yaml") == {"a": [1, 2], "b": [1, 2], "c": {"d": 1}}


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


# Tensors


def tensors(**found):
    return Tensors("file", found)


def test_tensors_are_taken_with_their_shape_or_named():
    found = tensors(W_enc=torch.ones(3, 2), k=torch.tensor(4))
    assert found.take("W_enc").shape == found.take("W_enc", 3, 2).shape == (3, 2)
    with pytest.raises(DataError, match=r"^file: tensor W_enc has shape \(3, 2\), expected \(2, 3\)$"):
        found.take("W_enc", 2, 3)
    with pytest.raises(DataError, match=r"^file: tensor W_ec is missing\. Did you mean 'W_enc'\?$"):
        found.take("W_ec")
    assert found.number("k") == 4
    assert len(found) == 2


def test_a_matrix_is_turned_as_it_must_be():
    w = torch.randn(3, 2)
    assert torch.equal(tensors(w=w).matrix("w", 3, 2), w)
    assert torch.equal(tensors(w=w).matrix("w", 2, 3), w.T)
    square = torch.randn(3, 3)
    assert torch.equal(tensors(w=square).matrix("w", 3, 3), square)
    assert torch.equal(tensors(w=square).matrix("w", 3, 3, transposed=True), square.T)
    with pytest.raises(DataError, match=r"tensor w has shape \(3, 2\), expected \(3, 4\) or its transpose"):
        tensors(w=w).matrix("w", 3, 4)


@pytest.mark.parametrize("value", [torch.ones(2), torch.ones(0), torch.tensor(float("nan")), torch.tensor([torch.inf])])
def test_a_number_is_one_and_finite(value):
    with pytest.raises(DataError, match=r"^file: tensor k (has shape|holds NaN or Inf)"):
        tensors(k=value).number("k")


def test_what_is_left_over_is_refused():
    found = tensors(a=torch.ones(1), b=torch.ones(1), c=torch.ones(1))
    found.take("a")
    found.ignore("b", "not there")
    with pytest.raises(DataError, match=r"^file: tensor c is not part of this format"):
        found.refuse_unused()
    assert list(dict(found)) == ["a", "b", "c"]
    found.refuse_unused()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_nan_and_infinity_are_found_in_every_precision(dtype):
    for shape, bad in (((), torch.nan), ((5,), torch.inf), ((3, 4), -torch.inf)):
        tensor = torch.ones(shape)
        check_finite({"w": tensor.to(dtype), "i": torch.ones(2, dtype=torch.int64), "e": torch.ones(0, 3)}, "file")
        tensor.view(-1)[-1] = bad
        with pytest.raises(DataError, match=rf"^file: tensor w holds NaN or Inf, read as {dtype}$"):
            check_finite({"w": tensor.to(dtype)}, "file")


def test_nan_is_found_wherever_it_is_in_a_large_tensor():
    tensor = torch.ones(300, 70_000, dtype=torch.float16)  # which is looked at in parts
    check_finite({"w": tensor, "t": tensor.T}, "file")
    for place in (0, 16_777_216, -1):
        tensor.view(-1)[place] = torch.nan
        for w in (tensor, tensor.T):
            with pytest.raises(DataError, match="tensor w holds NaN or Inf"):
                check_finite({"w": w}, "file")
        tensor.view(-1)[place] = 1


# values of configs


def test_whole_numbers_are_numbers():
    for value in (0, 1, 32.0, 2**40):
        assert as_int(value, "k", "cfg.json") == int(value)


BAD = [None, True, "32", "abc", 1.5, -1, 10**15, 1e400, float("nan"), [3], {"a": 1}, "x" * 10**6, 10**3000]


def test_what_is_no_whole_number_is_named_in_one_short_line():
    for value in BAD:
        with pytest.raises(DataError, match=r"^cfg\.json: d_sae is .*, expected a whole number") as error:
            as_int(value, "d_sae", "cfg.json")
        assert len(str(error.value)) < 300
        with pytest.raises(DataError, match=r"^cfg\.json: activation is .*; known are relu, topk") as error:
            one_of(value, ("relu", "topk"), "activation", "cfg.json")
        assert len(str(error.value)) < 300


def test_words_are_known_or_the_nearest_is_named():
    assert one_of("topk", ("relu", "topk"), "activation", "cfg.json") == "topk"
    with pytest.raises(DataError, match=r"activation is 'topkk'; known are relu, topk\. Did you mean 'topk'\?$"):
        one_of("topkk", ("relu", "topk"), "activation", "cfg.json")
    with pytest.raises(DataError, match=r"activation is 'a\\nb'"):
        one_of("a\nb", ("relu",), "activation", "cfg.json")


def test_a_json_config_may_hold_what_is_not_used(root):
    (root / "a" / "cfg.json").write_text(json.dumps({"loss": float("nan"), "notes": ["a"] * 1000}))
    assert len(place(root).config("cfg.json")["notes"]) == 1000
