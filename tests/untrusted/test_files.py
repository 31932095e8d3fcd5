"""Folders as names: what stays below them, and links that lead out."""

import os

import pytest

from sae.base.errors import DataError
from sae.untrusted.files import LocalFiles


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
