"""The public names of sae and interp: what completion offers, and what using them leaves as it was."""

import subprocess
import sys
from importlib import import_module

import pytest
from rigs.fakes import tiny_config

import interp
import sae
from sae.base.settings import to_yaml
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


UNTOUCHED = """
import logging, os, random, signal, sys, warnings
from pathlib import Path

import datasets, matplotlib, numpy, pyarrow, scipy.stats, sklearn, tokenizers, torch, transformers
from matplotlib import pyplot

model, text, folder = sys.argv[1:]
matplotlib.use("agg")
handler = logging.NullHandler()
logging.getLogger().addHandler(handler)
torch.set_num_threads(3)


def state():
    root = logging.getLogger()
    return {
        "backend": matplotlib.get_backend(),
        "figures": pyplot.get_fignums(),
        "rc": dict(matplotlib.rcParams),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "root": (root.level, root.handlers[:], root.filters[:], root.disabled, logging.root.manager.disable),
        "warnings": [f for f in warnings.filters if f[2].__module__[:5] != "sympy" and "torch" not in str(f[3])],
        "showwarning": warnings.showwarning,
        "signals": {s: signal.getsignal(s) for s in signal.valid_signals()},
        "environment": dict(os.environ),
        "random": random.getstate(),
        "numpy": str(numpy.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "printing": (numpy.get_printoptions(), torch._tensor_str.PRINT_OPTS),
        "hooks": (sys.excepthook, sys.displayhook, sys.stdout, sys.stderr, sys.path[:], sys.getrecursionlimit()),
        "bars": (datasets.is_progress_bar_enabled(), transformers.utils.logging.is_progress_bar_enabled()),
        "levels": (transformers.utils.logging.get_verbosity(), datasets.logging.get_verbosity()),
        "folder": os.getcwd(),
    }


before = state()
import sae, interp

for package in (sae, interp):
    for name in dir(package):
        getattr(package, name)
imported = state()
run = sae.train(Path(folder, "config.yaml"), run_dir=Path(folder, "run"))
folder += "/run"
assert "report.html" in os.listdir(folder)
(coder,) = run.coders.values()
lm = sae.load_language_model(model)
sae.evaluate(coder, lm, tokens=256, nulls=True)
sae.diagnose(coder, lm, tokens=256, text=text)
sae.activations(lm, coder, "abc").top()
with sae.splice(lm.model, coder):
    pass
sae.save(sae.load(folder), folder + "/copy")
sae.load_all(folder)
sae.list_released("gpt2")
after = state()
for name in before:
    for when, found in (("importing", imported), ("use", after)):
        assert found[name] == before[name], f"{when} changed {name}: {before[name]} -> {found[name]}"
"""


def test_importing_and_using_leaves_the_process_as_it_was(tiny_model, tiny_text, tmp_path):
    few = {"tokens": 4 * 128, "eval.every_steps": 2}
    (tmp_path / "config.yaml").write_text(to_yaml(tiny_config(tiny_model, tiny_text, few)), encoding="utf-8")
    command = [sys.executable, "-c", UNTOUCHED, str(tiny_model), str(tiny_text), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
