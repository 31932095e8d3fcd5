"""The hub: offline, unknown, gated, moved, cut off, altered. A cached copy serves; or one line says what to fetch, how.

Never is half a coder loaded, or one put together from two commits.
"""

import logging
import os
import shutil

import pytest
import torch
from rigs.fake_hub import COMMIT, Faults, fake_hub, reached_from_here
from rigs.hub_coders import GEMMA, gemma, native, saelens

import sae
from sae.base.errors import ConfigError, DataError
from sae.loading.remote import HubFiles

REPO = "own/coder"
WEIGHTS = "sub/sae_weights.safetensors"
OTHER = "f" * 40


@pytest.fixture
def faults():
    return Faults()


@pytest.fixture
def hub(tmp_path, monkeypatch, faults):
    root = tmp_path / "hub"
    saelens(root, f"{REPO}/sub")
    with fake_hub(root, tmp_path / "home", faults) as (environment, asked):
        reached_from_here(monkeypatch, environment)
        yield root, asked


@pytest.fixture
def cached(tmp_path):
    return tmp_path / "home" / "hub" / "models--own--coder"


@pytest.fixture
def offline(monkeypatch):
    from huggingface_hub import constants

    return lambda value=True: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", value)


def unplugged(offline, faults, how):
    if how == "offline":
        offline()
    else:
        faults.down = True


@pytest.mark.parametrize("how", ["offline", "down"])
def test_without_a_network_the_cached_copy_is_used(hub, offline, faults, how, caplog):
    wanted = sae.load(f"{REPO}/sub")
    unplugged(offline, faults, how)
    with caplog.at_level(logging.WARNING):
        found = sae.load(f"{REPO}/sub")
    assert found.spec == wanted.spec
    assert torch.equal(found.W_dec, wanted.W_dec)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (how == "down")
    assert all(f"hf://{REPO} cannot be asked" in line and f"from the cache, commit {COMMIT}" in line for line in told)


@pytest.mark.parametrize("how", ["offline", "down"])
def test_without_a_network_what_is_not_cached_is_named_with_the_way_to_get_it(hub, offline, faults, how, tmp_path):
    unplugged(offline, faults, how)
    with pytest.raises(ConfigError) as told:
        sae.load(f"{REPO}/sub")
    assert str(told.value).startswith(f"path: the hub cannot be asked for {REPO} (")
    assert f"`sae-load fetch {REPO}/sub`" in str(told.value)
    assert str(tmp_path / "home" / "hub") in str(told.value)


def test_half_a_coder_in_the_cache_is_not_taken_for_one(hub, offline, faults):
    HubFiles(REPO).path("sub/cfg.json")
    offline()
    with pytest.raises(DataError) as told:
        sae.load(f"{REPO}/sub")
    assert f"hf://{REPO}/{WEIGHTS} is not cached and cannot be fetched" in str(told.value)
    assert f"`hf download {REPO} {WEIGHTS} --revision {COMMIT}`" in str(told.value)


def test_a_missing_config_is_named_too(hub, offline, cached):
    sae.load(f"{REPO}/sub")
    (cached / "snapshots" / COMMIT / "sub" / "cfg.json").unlink()
    offline()
    with pytest.raises(
        DataError, match=r"hf://own/coder/sub/cfg\.json is not cached .* `hf download own/coder sub/cfg"
    ):
        sae.load(f"{REPO}/sub")


def test_one_cached_coder_of_several_is_not_taken_for_the_only_one(hub, offline):
    root, _ = hub
    saelens(root, f"{REPO}/other")
    sae.load(f"{REPO}/sub")
    offline()
    with pytest.raises(ConfigError, match=r"is not one coder; it holds 2: other/sae_weights\.safetensors, sub/"):
        sae.load(REPO)


def test_a_cache_that_others_filled_serves_and_says_that_it_may_not_be_all(hub, offline, cached):
    sae.load(f"{REPO}/sub")
    shutil.rmtree(cached / "sae-interp")
    offline()
    assert sae.load(REPO).spec.training["released"]["revision"] == COMMIT
    with pytest.raises(ConfigError, match=r"hf://own/coder \(cached files only\) has no 'other'"):
        sae.load(f"{REPO}/other")


def test_a_cache_with_several_commits_and_no_main_asks_which(hub, offline, cached):
    sae.load(f"{REPO}/sub")
    shutil.copytree(cached / "snapshots" / COMMIT, cached / "snapshots" / OTHER, symlinks=True)
    (cached / "refs" / "main").unlink()
    offline()
    with pytest.raises(ConfigError, match=r"revision: hf://own/coder is cached at .*; say which"):
        sae.load(f"{REPO}/sub")
    assert sae.load(f"{REPO}/sub", revision=COMMIT[:7]).spec.training["released"]["revision"] == COMMIT


def test_unknown_repositories_and_revisions(hub):
    with pytest.raises(ConfigError, match="no folder and no hub repository 'own/codre'"):
        sae.load("own/codre")
    with pytest.raises(ConfigError, match="revision: 'v2' is no branch, tag or commit of own/coder"):
        sae.load(REPO, revision="v2")
    with pytest.raises(ConfigError, match="no folder and no hub repository 'own/not a name'"):
        sae.load("own/not a name")


def test_a_repository_that_has_gone_is_served_from_the_cache(hub, caplog):
    root, _ = hub
    sae.load(f"{REPO}/sub")
    shutil.rmtree(root / "models" / "own")
    sae.load(f"{REPO}/sub")
    assert "cannot be asked (404" in caplog.text


def test_gated_files_say_what_to_accept_and_cached_ones_serve(hub, faults):
    faults.gated.add(REPO)
    with pytest.raises(ConfigError, match=r"own/coder is gated: accept its terms at https://huggingface\.co/own/coder"):
        sae.load(f"{REPO}/sub")
    faults.gated.clear()
    sae.load(f"{REPO}/sub")
    faults.gated.add(REPO)
    sae.load(f"{REPO}/sub")


def test_a_branch_that_moved_gives_the_new_coder_and_the_old_one_by_its_commit(hub, faults):
    root, _ = hub
    old = sae.load(f"{REPO}/sub")
    shutil.rmtree(root / "models" / REPO)
    saelens(root, f"{REPO}/sub", seed=1)
    faults.commit = OTHER
    new = sae.load(f"{REPO}/sub")
    assert new.spec.training["released"]["revision"] == OTHER
    assert not torch.equal(new.W_enc, old.W_enc)
    again = sae.load(f"{REPO}/sub", revision=COMMIT)
    assert torch.equal(again.W_enc, old.W_enc)


def test_a_branch_that_moves_between_two_files_gives_no_mixture(hub, faults):
    root, _ = hub
    files = HubFiles(REPO)
    files.path("sub/cfg.json")
    shutil.rmtree(root / "models" / REPO)
    saelens(root, f"{REPO}/sub", seed=1)
    faults.commit = OTHER
    with pytest.raises(DataError, match=f"hf://own/coder/{WEIGHTS} is not cached and cannot be fetched .*{COMMIT}"):
        files.path(WEIGHTS)


def test_a_file_that_cannot_be_had_names_the_commit_of_which_it_is_cached(hub, faults):
    root, _ = hub
    old = sae.load(f"{REPO}/sub")
    shutil.rmtree(root / "models" / REPO)
    saelens(root, f"{REPO}/sub", seed=1)
    faults.commit = OTHER
    faults.cut[WEIGHTS] = 0
    with pytest.raises(DataError, match=f"{WEIGHTS} is not cached") as told:
        sae.load(f"{REPO}/sub")
    assert f"; of revision {COMMIT} it is cached; " in str(told.value)
    assert torch.equal(sae.load(f"{REPO}/sub", revision=COMMIT).W_enc, old.W_enc)


def test_a_download_that_breaks_off_leaves_no_file_and_goes_on_where_it_was(hub, faults, cached, caplog):
    root, _ = hub
    size = (root / "models" / REPO / WEIGHTS).stat().st_size
    faults.cut[WEIGHTS] = size // 2
    with pytest.raises(DataError, match=f"hf://own/coder/{WEIGHTS} is not cached and cannot be fetched"):
        sae.load(f"{REPO}/sub")
    assert not (cached / "snapshots" / COMMIT / WEIGHTS).exists()
    faults.down = True
    with pytest.raises(DataError, match=f"{WEIGHTS} is not cached"):
        sae.load(f"{REPO}/sub")
    faults.down = False
    faults.cut.clear()
    assert torch.equal(sae.load(f"{REPO}/sub").W_enc, sae.load(root / "models" / REPO).W_enc)


def test_a_connection_that_breaks_once_is_taken_up_again(hub, faults):
    root, asked = hub

    class Once(dict):
        def get(self, name, default):
            return self.pop(name, default)

    faults.cut = Once({WEIGHTS: 100})
    found = sae.load(f"{REPO}/sub")
    assert torch.equal(found.W_enc, sae.load(root / "models" / REPO).W_enc)
    assert len([request for request in asked if request.startswith("GET") and WEIGHTS in request]) == 2


@pytest.mark.parametrize(("name", "kind"), [(WEIGHTS, "sha256"), ("sub/cfg.json", "git sha1")])
def test_bytes_that_are_not_those_of_the_hub_are_named(hub, faults, name, kind, cached):
    faults.flipped.add(name)
    with pytest.raises(DataError) as told:
        sae.load(f"{REPO}/sub")
    path = cached / "snapshots" / COMMIT / name
    assert str(told.value).startswith(f"{path} is damaged: its {kind} is ")
    blob = str(told.value).partition("; delete ")[2].partition(" and load again")[0]
    assert blob == str(path.resolve())
    faults.flipped.clear()
    os.unlink(blob)
    os.unlink(path)
    sae.load(f"{REPO}/sub")


def test_a_lazy_load_reads_no_weights_to_compare_them(hub, faults):
    faults.flipped.add(WEIGHTS)
    sae.load(f"{REPO}/sub", lazy=True)
    with pytest.raises(DataError, match="is damaged: its sha256"):
        sae.load(f"{REPO}/sub")


def test_a_cached_file_that_changed_later_is_named(hub, cached):
    sae.load(f"{REPO}/sub")
    path = cached / "snapshots" / COMMIT / WEIGHTS
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.resolve().write_bytes(raw)
    for address in (f"{REPO}/sub", path.parent):
        with pytest.raises(DataError, match=r"sae_weights\.safetensors is damaged: its sha256"):
            sae.load(address)


def test_a_folder_that_was_fetched_is_compared_with_the_digests_beside_it(hub, tmp_path):
    files = HubFiles(REPO)
    for name in ("sub/cfg.json", WEIGHTS):
        files.copy_into(name, tmp_path / "there")
    sae.load(tmp_path / "there" / "sub")
    path = tmp_path / "there" / WEIGHTS
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=f"{path} is damaged: its sha256"):
        sae.load(tmp_path / "there" / "sub")


@pytest.mark.parametrize("name", ["../../evil/params.npz", "/etc/passwd", "a/../../b", "a\\..\\b"])
def test_names_that_lead_out_of_a_repository_are_refused(hub, faults, name, tmp_path):
    faults.listed.append(name)
    with pytest.raises(DataError, match=r"is refused: it points outside of hf://own/coder"):
        sae.load(f"{REPO}/sub")
    with pytest.raises(DataError, match="is refused"):
        HubFiles(REPO).path(name)


def test_a_commit_that_is_none_is_refused(hub, faults):
    faults.commit = "../../x"
    with pytest.raises(DataError, match=r"its commit is '\.\./\.\./x'"):
        sae.load(f"{REPO}/sub")


def test_links_out_of_the_cache_and_of_a_folder_are_refused(hub, cached, tmp_path):
    sae.load(f"{REPO}/sub")
    outside = tmp_path / "outside.safetensors"
    link = cached / "snapshots" / COMMIT / WEIGHTS
    shutil.copy(link, outside)
    link.unlink()
    link.symlink_to(outside)
    with pytest.raises(DataError, match="is refused: it points outside of"):
        sae.load(f"{REPO}/sub")
    with pytest.raises(DataError, match="is refused: it points outside of"):
        sae.load(link.parent)
    folder = native(tmp_path / "folder")
    shutil.move(folder / "sae.safetensors", outside)
    (folder / "sae.safetensors").symlink_to(outside)
    with pytest.raises(DataError, match="is refused: it points outside of"):
        sae.load(folder)


def test_a_cache_that_cannot_be_written_to_still_serves(hub, cached, monkeypatch):
    sae.load(f"{REPO}/sub")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sae.loading.remote.write_json", full)
    sae.load(f"{REPO}/sub")


def test_a_header_that_cannot_be_had_is_one_line(hub, faults):
    root, _ = hub
    gemma(root)
    files = HubFiles(GEMMA)
    name = next(name for name in files.names() if name.endswith(".npz"))
    faults.gated.add(GEMMA)
    with pytest.raises(ConfigError, match="is gated"):
        files.shapes(name)
    faults.gated.clear()
    faults.cut[name] = 10
    with pytest.raises(DataError, match=r"params\.npz is not cached and cannot be fetched"):
        files.shapes(name)
