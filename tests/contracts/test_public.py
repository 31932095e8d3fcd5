"""The public names of sae and interp: what completion offers, and what using them leaves as it was."""

import subprocess
import sys
from importlib import import_module

import pytest

import interp
import sae
from sae.base.version import version

PACKAGES = [sae, interp]


@pytest.mark.parametrize("package", PACKAGES)
def test_completion_offers_the_public_names_and_each_of_them_is_there(package):
    assert dir(package) == sorted(package.__all__)
    for name in dir(package):
        assert getattr(package, name) is not None
        home = package._HOMES.get(name)
        assert name == "__version__" or getattr(import_module(home), name) is getattr(package, name)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_version_is_that_of_the_code(package):
    assert package.__version__ == version()


def test_a_name_that_is_none_is_told_with_the_nearest():
    assert not hasattr(sae, "lod")
    done = subprocess.run([sys.executable, "-c", "import sae; sae.lod"], capture_output=True, text=True, check=False)
    assert done.stderr.endswith("AttributeError: module 'sae' has no attribute 'lod'. Did you mean: 'load'?\n")


def test_importing_takes_no_torch_and_completing_neither():
    code = "import sys, sae, interp; dir(sae); sae.__version__; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
