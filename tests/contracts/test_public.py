"""The public names of sae and interp: what completion offers, and what using them leaves as it was."""

import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from rigs.fakes import sampled_rows, tiny_config, tiny_lm
from transformers import LlamaConfig

import interp
import sae
from sae.base.errors import ConfigError
from sae.base.settings import to_yaml
from sae.base.version import version
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.spec import CoderSpec
from sae.lm.masking import MaskSpec
from sae.lm.site import Site
from sae.selection.topk import TopK

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


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def coder():
    sites = (Site("model.layers.1", model="tiny"),)
    made = SparseCoder(CoderSpec(16, 16, 32, TopK(4), sites, sites, mask=MaskSpec((0, 1, 2), 1)))
    initialize(made, torch.zeros(16), 0)
    return made.requires_grad_(False)


THINGS = {
    "None": None,
    "a number": 7,
    "a list": ["a"],
    "an array": np.zeros((2, 3)),
    "a tensor": torch.zeros(2, 3),
    "a class": SparseCoder,
    "another config": LlamaConfig(),
    "a device": torch.device("cpu"),
    "a dtype": torch.float32,
}
"""What nobody means by any argument below."""


NAMES = [
    "load.path",
    "load_all.path",
    "save.coder",
    "save.folder",
    "evaluate.coders",
    "evaluate.coders.a",
    "evaluate.model",
    "evaluate.rows",
    "evaluate.tokens",
    "diagnose.coder",
    "diagnose.model",
    "diagnose.tokens",
    "diagnose.text",
    "activations.model",
    "activations.coder",
    "activations.text",
    "splice.model",
    "splice.coder",
    "list_released.model",
    "list_released.release",
    "load_language_model.model",
    "train.config",
    "train.resume",
    "store_activations.config",
    "store_activations.shard",
    "to_pandas.found",
]


def calls(lm, coder, folder):
    """Returns, by function and argument, a call with something else in its place, and what may be there in fact."""
    rows = sampled_rows(lm, 12, 4)
    return {
        "load.path": (lambda x: sae.load(x), ()),
        "load_all.path": (lambda x: sae.load_all(x), ()),
        "save.coder": (lambda x: sae.save(x, folder), ()),
        "save.folder": (lambda x: sae.save(coder, x), ()),
        "evaluate.coders": (lambda x: sae.evaluate(x, lm, rows, progress=False), ()),
        "evaluate.coders.a": (lambda x: sae.evaluate({"a": x}, lm, rows, progress=False), ()),
        "evaluate.model": (lambda x: sae.evaluate(coder, x, rows, progress=False), ("None",)),
        "evaluate.rows": (lambda x: sae.evaluate(coder, lm, x, progress=False), ("None",)),
        "evaluate.tokens": (lambda x: sae.evaluate(coder, lm, rows, x, progress=False), ("a number",)),
        "diagnose.coder": (lambda x: sae.diagnose(x, lm), ()),
        "diagnose.model": (lambda x: sae.diagnose(coder, x), ()),
        "diagnose.tokens": (lambda x: sae.diagnose(coder, lm, x), ("a number",)),
        "diagnose.text": (lambda x: sae.diagnose(coder, lm, 9, x), ("None",)),
        "activations.model": (lambda x: sae.activations(x, coder, "a"), ("None",)),
        "activations.coder": (lambda x: sae.activations(lm, x, "a"), ()),
        "activations.text": (lambda x: sae.activations(lm, coder, x), ("a list",)),
        "splice.model": (lambda x: sae.splice(x, coder).__enter__(), ()),
        "splice.coder": (lambda x: sae.splice(lm, x).__enter__(), ()),
        "list_released.model": (lambda x: sae.list_released(x), ("None",)),
        "list_released.release": (lambda x: sae.list_released(release=x), ("None",)),
        "load_language_model.model": (lambda x: sae.load_language_model(x), ()),
        "train.config": (lambda x: sae.train(x), ()),
        "train.resume": (lambda x: sae.train({}, resume=x), ()),
        "store_activations.config": (lambda x: sae.store_activations(x), ()),
        "store_activations.shard": (lambda x: sae.store_activations({}, x), ()),
        "to_pandas.found": (lambda x: sae.to_pandas(x), ()),
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_argument_is_one_line_that_names_it(name, lm, coder, tmp_path):
    call, taken = calls(lm, coder, tmp_path)[name]
    argument = name.partition(".")[2]
    for kind, thing in THINGS.items():
        if kind not in taken:
            with pytest.raises(TypeError) as raised:
                call(thing)
            told = str(raised.value)
            assert told.startswith(f"{argument}: "), (kind, told)
            assert " was given; it takes " in told, (kind, told)
            assert "\n" not in told


def test_a_coder_may_be_where_it_is_and_a_model_its_object(lm, coder, tmp_path):
    sae.save(coder, tmp_path / "coder")
    rows = sampled_rows(lm, 12, 4)
    wanted = sae.evaluate(coder, lm, rows, progress=False)
    for where in (tmp_path / "coder", str(tmp_path / "coder")):
        assert sae.evaluate(where, lm, rows, progress=False) == wanted
        assert sae.evaluate({"a": where}, lm, rows, progress=False) == {"a": wanted}
        assert sae.activations(lm, where, "abc").top() == sae.activations(lm, coder, "abc").top()
    for ids in (rows.data, rows.data.numpy(), rows.data.tolist()):
        assert sae.evaluate(coder, lm, ids, 1e3, progress=False) == wanted
    tokens = rows.data[:1].clamp_min(0).long()
    with torch.no_grad():
        clean = lm.model(tokens).logits
        logits = []
        for model, where in ((lm.model, coder), (lm, coder), (lm, tmp_path / "coder")):
            with sae.splice(model, where):
                logits.append(lm.model(tokens).logits)
    assert not torch.equal(clean, logits[0])
    assert all(torch.equal(found, logits[0]) for found in logits)


def test_no_coder_at_all_and_swapped_arguments_are_told(lm, coder):
    with pytest.raises(ValueError, match=r"^coders: there is none among them$"):
        sae.evaluate({})
    with pytest.raises(TypeError, match=r"^coder: sae.LanguageModel was given; it takes a SparseCoder"):
        sae.activations(coder, lm, "abc")
    with pytest.raises(TypeError, match=r"^coders: sae.LanguageModel was given"):
        sae.evaluate(lm, coder)
    with pytest.raises(ConfigError, match=r"^path: no such folder: /absent"):
        sae.evaluate("/absent", lm)


UNTOUCHED = """
import logging, os, random, signal, sys, warnings
from pathlib import Path

import datasets, numpy, pyarrow, scipy.stats, sklearn, tokenizers, torch, transformers

model, text, folder = sys.argv[1:]
handler = logging.NullHandler()
logging.getLogger().addHandler(handler)
torch.set_num_threads(3)


def state():
    root = logging.getLogger()
    return {
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


@pytest.mark.slow
def test_importing_and_using_leaves_the_process_as_it_was(tiny_model, tiny_text, tmp_path):
    few = {"tokens": 4 * 128, "eval.every_steps": 2}
    (tmp_path / "config.yaml").write_text(to_yaml(tiny_config(tiny_model, tiny_text, few)), encoding="utf-8")
    command = [sys.executable, "-c", UNTOUCHED, str(tiny_model), str(tiny_text), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
