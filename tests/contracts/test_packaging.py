"""What an installation brings, told from pyproject.toml and setup.py; .ci/run builds, installs and runs one."""

import re
import runpy
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import setuptools
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def packages():
    """Returns {package: its folder} of an installation."""
    with pytest.MonkeyPatch.context() as patch:
        given = {}
        patch.setattr(setuptools, "setup", given.update)
        patch.chdir(ROOT)
        runpy.run_path(str(ROOT / "setup.py"))
    return {name: given["package_dir"].get(name, name.replace(".", "/")) for name in given["packages"]}


def test_packages_are_the_folders_that_git_knows(packages):
    listed = subprocess.run(
        ["git", "ls-files", "sae", "interp", "cli", "configs"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("no git here")
    folders = {str(Path(name).parent) for name in listed.stdout.splitlines()}
    assert set(packages.values()) == folders | {"configs"}


def test_nothing_has_a_name_that_could_be_anyones(packages):
    assert {name.split(".")[0] for name in packages} == {"sae", "interp", "sae_interp"}
    for command, target in PROJECT["scripts"].items():
        module, function = target.split(":")
        package, _, name = module.rpartition(".")
        text = (ROOT / packages[package] / f"{name}.py").read_text(encoding="utf-8")
        assert command.startswith("sae-")
        assert f"\ndef {function}(" in text


def test_what_stands_outside_of_python_tells_the_same():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    author = PROJECT["authors"][0]["name"]
    assert (cited["version"], cited["license"], cited["authors"][0]["name"]) == (
        *(PROJECT["version"], PROJECT["license"], author),
    )
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines()[1]
    assert set(cited["keywords"]) <= set(PROJECT["keywords"])


def test_the_versions_of_python_are_those_that_may_be_installed():
    least = int(re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"])[1])
    told = [int(m[1]) for kind in PROJECT["classifiers"] if (m := re.fullmatch(r".*:: Python :: 3\.(\d+)", kind))]
    assert told[0] == least
    assert told == sorted(told)


@pytest.mark.parametrize("declared", PROJECT["dependencies"])
def test_what_is_installed_here_is_what_is_declared(declared):
    name, least = re.fullmatch(r"([\w-]+)>=([\d.]+)", declared).groups()
    found = re.match(r"[\d.]+", metadata.version(name))[0]
    assert [*map(int, found.strip(".").split("."))] >= [*map(int, least.split("."))]


ON_WINDOWS = """
import builtins, importlib, pkgutil, signal

LACKING = {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}


def hiding(name, globals=None, locals=None, fromlist=(), level=0, real=builtins.__import__):
    if name in LACKING and (globals or {}).get("__name__", "").partition(".")[0] in ("sae", "interp", "cli"):
        raise ModuleNotFoundError(name)
    return real(name, globals, locals, fromlist, level)


builtins.__import__ = hiding
del signal.SIGUSR1
import cli, interp, sae

modules = [m.name for top in (sae, interp, cli) for m in pkgutil.walk_packages(top.__path__, top.__name__ + ".")]
for name in modules:
    importlib.import_module(name)
with importlib.import_module("sae.parallel.stopping").stop_flag() as flag:
    assert not flag()
print(len(modules))
"""


@pytest.mark.slow
def test_every_module_is_imported_where_there_is_no_posix():
    done = subprocess.run([sys.executable, "-c", ON_WINDOWS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 200
