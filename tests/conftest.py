"""Shared set-up: shapes in signatures are checked while tests run, the network is closed, randomness is seeded."""

import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PYTHONPATH"] = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")  # of children
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as commands have it
os.environ.setdefault(  # what is compiled, once for all tests
    "TORCH_EXTENSIONS_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "native")
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of every process: on tensors so small more only wait for one another
os.environ.setdefault("MKL_NUM_THREADS", "1")

from rigs import shapes

shapes.install()
sys.dont_write_bytecode = False  # else every process would compile all tests anew
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 8 << 30:
    os.environ.setdefault("TMPDIR", str(MEMORY))  # a disk takes longer for a test's folder than most tests take
    tempfile.tempdir = None

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from sae.kernels import dispatch, segmented  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_xdist_auto_num_workers(config):
    """Returns how many processes run the tests: one more than cores, as many tests wait for others; eight at most; none
    where one file is asked for.
    """
    files = [Path(argument.split("::")[0]) for argument in config.args]
    return 0 if len(files) == 1 and files[0].is_file() else min(8, len(os.sched_getaffinity(0)) + 1)


def pytest_collection_finish(session):
    """Takes what is imported and collected, millions of objects, out of every collection of garbage to come."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded(tmp_path, monkeypatch):
    shapes.begin_test()
    torch.manual_seed(0)
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dispatch, "_chosen", ("torch", segmented))  # a run in this process chooses for this test alone


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    from rigs.fakes import tiny_model_folder

    return tiny_model_folder(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory):
    from rigs.fakes import tiny_text_folder

    return tiny_text_folder(tmp_path_factory.mktemp("tiny-text"))


@pytest.fixture(scope="session")
def explained_coder(tmp_path_factory):
    """The folder of a tiny coder, twelve latents of which are explained (explain/); model and text lie beside it."""
    from rigs.interp_runs import SMALL, tiny_coder

    from cli.explain import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAE_CACHE", str(tmp_path_factory.mktemp("cache")))
        coder = tiny_coder(tmp_path_factory.mktemp("explained"))
        assert main([str(coder), *SMALL, "--latents", "0-11"]) == 0
    return coder


@pytest.fixture
def quick(monkeypatch):
    """Leaves out what takes long in a run and only a person or a power cut would miss: pictures, estimate, flushing."""
    monkeypatch.setattr("sae.training.loop.write_report", lambda run_dir: None)
    nothing = SimpleNamespace(lines=list, disk=0)
    monkeypatch.setattr("sae.training.estimate.estimate", lambda config, trust_remote_code=False: nothing)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def tiny_train(quick, tmp_path, tiny_model, tiny_text, capsys):
    """Returns sae-train on the tiny setting: (changed fields, options, folder) -> (exit code, all that it printed)."""
    from rigs.fakes import tiny_config

    from cli.train import main
    from sae.base.settings import to_yaml

    def run(changes=None, options=(), folder=tmp_path / "run", model=tiny_model, text=tiny_text):
        argv = [str(option) for option in options]
        if "--resume" not in argv:
            config = tmp_path / "config.yaml"
            config.write_text(to_yaml(tiny_config(model, text, changes)), encoding="utf-8")
            argv = ["--config", str(config), "--run-dir", str(folder), *argv]
        capsys.readouterr()
        code = main(argv)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.fixture
def no_model(monkeypatch):
    """Makes loading a model an error, for what must be known before."""

    def loaded(*_args, **_kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("sae.training.preparing.load_language_model", loaded)
