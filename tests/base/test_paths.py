"""Paths as typed: one place by any name, what is near, and what moved along."""

import pytest

from sae.base.paths import can_only_be_local, model_elsewhere, moved_along, near, same_place, told_elsewhere


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "runs" / "quickstart" / "coders").mkdir(parents=True)
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_one_place_has_many_names(here):
    names = ("runs/quickstart/", "./runs/quickstart", "runs//quickstart", "runs/other/../quickstart", "link", "~/link")
    for name in (*names, str(here / "runs" / "quickstart")):
        assert same_place("runs/quickstart", name)
    assert not same_place("runs/quickstart", "runs/other")
    assert same_place("owner/model", "owner/model")
    assert not same_place("owner/model", "owner/model2")
    assert not same_place("\0", "runs")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("runs/quickstrat", "quickstart"),
        ("run/quickstart", "runs/quickstart"),
        ("./runs/quickstrat/coders", "runs/quickstart/coders"),
        ("~/runs/quickstat", "quickstart"),
        ("runs/zzz", ""),
        ("gpt2", ""),
        ("runs/quickstart", ""),
    ],
)
def test_what_is_near_is_named_as_it_would_be_typed(here, typed, meant):
    assert near(typed) == (f" Did you mean {meant!r}?" if meant else "")


def test_what_can_only_be_a_path(here):
    assert all(map(can_only_be_local, ("runs/x", "./x", "~/x", "/x", "link/x", "../x/y")))
    assert not any(map(can_only_be_local, ("owner/model", "gpt2", "release/blocks.8/x")))


def test_what_moved_along_is_found_again(here):
    (here / "new").mkdir()
    moved = (here / "runs" / "quickstart").rename(here / "new" / "q")
    for then, path in (("runs/quickstart/explain", "runs/quickstart"), ("/old/q/explain", "/old/q")):
        assert moved_along(path, then, moved / "explain") == str(moved)
    assert moved_along("runs/other", "runs/quickstart/explain", moved / "explain") == "runs/other"
    assert moved_along("owner/model", "/old/q/explain", moved / "explain") == "owner/model"
    assert moved_along("", "/old/q/explain", moved / "explain") == ""


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/home/me/work/runs/topk", "runs/topk"),
        ("~/topk", "topk"),
        ("/topk", "topk"),
        ("/", ""),
        ("runs/quickstart", "runs/quickstart"),
        ("owner/model", "owner/model"),
    ],
)
def test_what_others_may_see_of_a_path(path, told):
    assert told_elsewhere(path) == told


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("owner/model", "owner/model"),
        ("quickstart", "quickstart"),
        ("/home/me/models/mine", "mine"),
        ("~/models/mine/", "mine"),
        ("./here/mine", "mine"),
        ("here/mine", "mine"),
        ("/home/me/.cache/hub/models--owner--its-name/snapshots/0123abc", "owner/its-name"),
    ],
)
def test_a_model_is_called_as_others_know_it(model, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "mine").mkdir(parents=True)
    assert model_elsewhere(model) == told
