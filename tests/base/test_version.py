"""The version is that of the code which runs, and is known without torch."""

import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from sae.base import version as module
from sae.base.version import version

ROOT = Path(__file__).parents[2]


def test_a_checkout_tells_its_own():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert version() == told


def test_an_installation_tells_what_its_metadata_say(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "sae" / "base" / "version.py"))
    monkeypatch.setattr(module, "installed", lambda name: {"sae-interp": "7.8.9"}[name])
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\nversion = "1"\n')  # lies where it may
    assert version() == "7.8.9"

    def unknown(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "installed", unknown)
    assert version() == "0+unknown"


def test_it_imports_nothing_of_ours(tmp_path):
    shutil.copy(module.__file__, tmp_path / "alone.py")
    run = [sys.executable, "-c", "import alone, sys; alone.version(); print({'sae', 'torch'} & set(sys.modules))"]
    assert subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip() == "set()"
