"""Who may read what a command leaves: everybody whom the umask lets, whichever library wrote the file."""

import os
import stat
from pathlib import Path

import pytest
from rigs.interp_runs import tiny_coder
from rigs.released.every import EVERY

import sae
from cli.explain import main as sae_explain
from cli.view import main as sae_view
from sae.base.errors import ConfigError, DataError
from sae.base.files import cache_dir, publish
from sae.loading.converting import convert, writers


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def wrong_modes(folder: Path, umask: int, setgid: int = 0) -> dict[str, str]:
    """Returns {path: mode} of what is not as the umask has it."""
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}
    wanted = {path: (0o777 | setgid if path.is_dir() else 0o666) & ~umask for path in modes}
    return {str(path): oct(modes[path]) for path in modes if modes[path] != wanted[path]}


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o027, 0o022, 0o002, 0o077], indirect=True)
def test_files_and_folders_of_every_command_follow_the_umask(tmp_path, tiny_train, umask):
    run = tmp_path / "run"
    assert tiny_train({"activations.source": "disk"}, folder=run)[0] == 0
    coder = tiny_coder(tmp_path / "made", documents=20)
    options = ["--evidence.tokens", "8000", "--latents", "4", "--examples.test", "10", "--examples.shown", "4"]
    assert sae_explain([str(coder), *options, "--run-dir", str(run / "explain")]) == 0
    names = ["--model-id", "tiny", "--source-id", "1-res"]
    assert sae_view([str(run / "explain"), "--export", "neuronpedia", str(tmp_path / "exported"), *names]) == 0
    for folder in (run, tmp_path / "exported", cache_dir()):
        assert any(path.is_file() for path in folder.rglob("*"))
        assert wrong_modes(folder, umask) == {}


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o002], indirect=True, ids=oct)
@pytest.mark.parametrize("name", writers())
def test_every_format_that_is_written_follows_it_too(tmp_path, umask, name):
    written = 0
    for number, make in enumerate(EVERY.values()):
        (tmp_path / f"{number}").mkdir()
        make(tmp_path / f"{number}")
        target = tmp_path / f"{number}-as-{name}"
        try:
            convert(sae.load(tmp_path / f"{number}"), name, target)
        except (ConfigError, DataError):  # what this format cannot say, or a question that its files leave open
            continue
        assert wrong_modes(target, umask) == {}
        written += 1
    assert written


@pytest.mark.parametrize("umask", [0o027], indirect=True, ids=oct)
def test_what_others_write_into_a_published_folder_is_opened_and_what_a_group_shares_stays_shared(tmp_path, umask):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o2770)
    with publish(shared / "model") as draft:
        (draft / "below").mkdir()
        for path in (draft / "private", draft / "below" / "private"):
            path.write_text("x")
            path.chmod(0o600)
    assert wrong_modes(shared / "model", umask, setgid=stat.S_ISGID) == {}
    assert stat.S_IMODE(shared.stat().st_mode) == 0o2770
