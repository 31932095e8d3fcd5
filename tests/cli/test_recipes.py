"""Recipes: any family goes on any model, files of a user's own on both, and a wrong name is told what is meant."""

import re
from dataclasses import replace
from functools import cache, partial

import pytest
from rigs.model_configs import model_folder
from torch._subclasses import FakeTensorMode

from cli.common import read_config
from cli.recipes import config_path, configs, fields_of, first_lines, recipe
from cli.train import main as train
from interp.run.config import ExplainConfig
from sae.base.errors import ConfigError
from sae.base.settings import flat, read_yaml, to_yaml
from sae.lm import models
from sae.lm.hooks import site_widths
from sae.training.config import TrainConfig
from sae.training.estimate import estimate
from sae.training.footprint import passed

FAMILIES, MODELS = configs("families"), configs("models")
QUICK = ("quickstart", "pythia-160m", "gemma-2-2b")  # the others take longer


def read(config=None, on=None, *overrides):
    return read_config(TrainConfig, recipe(config, on), list(overrides))


@pytest.fixture
def file(tmp_path):
    """Returns what writes a file and gives its path."""

    def write(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def test_the_default_is_topk_on_the_quickstart():
    config = read()
    assert config == read("topk") == read("quickstart") == read("topk", "quickstart") == read(None, "quickstart")
    assert (config.name, config.activations.sites, config.tokens) == ("quickstart", ("layers.2",), 700_000)
    assert (config.coder.d_sae, vars(config.coder.selection)["k"]) == (2048, 16)


@pytest.mark.parametrize("model", [pytest.param(m, marks=[pytest.mark.slow] * (m not in QUICK)) for m in MODELS])
def test_every_family_on_every_model_is_a_valid_config_that_survives_yaml(model, tmp_path):
    for family in FAMILIES:
        config = read(family, model)
        config.validate()
        (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
        assert read(str(tmp_path / "again.yaml")) == config
        assert config.name == (model if family == "topk" else f"{model}-{family.replace('_', '-')}")
        sparsity = {v for k, v in flat(recipe(family, model)["coder"]).items() if k.endswith((".k", ".target_l0"))}
        assert sparsity == {read_yaml(MODELS[model])["facts"]["k"]}


def traced(known, lm, sites, rows, context, backward):
    """Returns what `passed` does, of the one model that is made: once for all families that read it alike."""
    key = (*(site.name for site in sites), rows, context, backward)
    if key not in known:
        known[key] = passed(lm, sites, rows, context, backward)
    return known[key]


@pytest.mark.parametrize("model", [pytest.param(m, marks=[pytest.mark.slow] * (m != "quickstart")) for m in MODELS])
def test_every_family_on_every_model_is_dry_run_on_the_models_config(model, tmp_path, monkeypatch):
    fake, made = (
        FakeTensorMode(),
        cache(lambda name: models.untrained(models.ModelConfig(name))),
    )  # once, for all of them
    monkeypatch.setattr("sae.training.shaping.FakeTensorMode", lambda: fake)
    monkeypatch.setattr("sae.training.shaping.untrained", lambda found, _: made(found.name))
    monkeypatch.setattr("sae.training.estimate.measured_flops_per_s", lambda device: 1e14)
    monkeypatch.setattr("sae.training.footprint.passed", partial(traced, {}))
    name = read(None, model).model.name
    there = "quickstart" if model == "quickstart" else model_folder(name, tmp_path)
    widths = cache(lambda sites: site_widths(made(there), list(sites)))
    monkeypatch.setattr("sae.training.planning.site_widths", lambda _, sites: dict(widths(tuple(sites))))
    described = models.load_config(there)
    heads = described.num_attention_heads
    attention = heads * (getattr(described, "head_dim", None) or described.hidden_size // heads)
    peaks = {}
    for family in FAMILIES:
        config = read(family, model, "--model.name", there, "--activations.prefetch_blocks", "64")  # as on a GPU
        if config.second_model.name:
            config = replace(config, second_model=replace(config.second_model, name=there))
        found = estimate(config)
        assert set(found.widths.values()) == {attention if family == "attention" else described.hidden_size}, family
        on_gpu = replace(found.footprint, on_host=False).peak(measures=True)
        peaks[family] = on_gpu / 1e9 + 0.6  # of a process that ran no tests
        assert peaks[family] < 80, family
    if told := re.search(r"TopK takes (\d+) GB .* (\w+) takes most, (\d+) GB", MODELS[model].read_text()):
        assert peaks["topk"] == pytest.approx(int(told[1]), abs=1)
        assert peaks[told[2]] == max(peaks.values()) == pytest.approx(int(told[3]), abs=1)


def test_what_differs_between_models_is_the_models():
    assert read("transcoder", "smollm2").activations.sites == ("layers.15.mlp:input", "layers.15.mlp")
    assert read("transcoder").activations.targets == ("layers.2.mlp", "layers.2.mlp")
    assert read("crosscoder", "smollm2").activations.sites == ("layers.7", "layers.15", "layers.22")
    assert read("model_diff", "smollm2").second_model.name == "HuggingFaceTB/SmolLM2-135M"
    clt = read("cross_layer", "smollm2")
    assert (clt.coder.d_sae, clt.activations.block_rows, clt.activations.source) == (30720, 1, "live")
    assert (read("end_to_end").tokens, read("gated").tokens) == (100_000, 700_000)


@pytest.mark.parametrize("kind", ["families", "models", "explain"])
def test_every_file_says_in_its_first_line_what_it_is(kind):
    for path in configs(kind).values():
        assert path.read_text(encoding="utf-8").startswith("# ")
    assert all(len(line) > 15 for line in first_lines(kind).values())


@pytest.mark.parametrize("name", configs("explain"))
def test_every_shipped_config_of_explaining_parses(name, tmp_path):
    said = fields_of(config_path(name, "explain"), "explain")
    read_config(ExplainConfig, said, [f"--coder.path={tmp_path}"]).validate()


def test_a_config_of_explaining_extends_those_of_explaining(file):
    own = file("own.yaml", "extends: keyless\nlatents: random:7\n")
    assert fields_of(config_path(own, "explain"), "explain") == {
        **fields_of(config_path("keyless", "explain"), "explain"),
        "latents": "random:7",
    }


def test_a_file_changes_a_family_on_any_model(file):
    own = file("own.yaml", "extends: jumprelu\ntokens: 2048\ncoder: {objectives: {l0: {target_l0: 9}}}\n")
    for on in (None, "quickstart", "smollm2"):
        config = read(own, on, "--seed", "3")
        assert (config.tokens, config.seed, vars(config.coder.objectives["l0"])["target_l0"]) == (2048, 3, 9)
        assert config.name == f"{on or 'quickstart'}-jumprelu"
        assert config.activations == read("jumprelu", on).activations


def test_a_file_may_say_on_which_model_and_what_is_typed_goes_first(file):
    own = file("own.yaml", "extends: gated on smollm2\nname: mine\nfacts: {k: 5}\n")
    assert (read(own).model.name, read(own).name) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "mine")
    assert vars(read(own).coder.objectives["l1"])["target_l0"] == 5
    assert read(own, "quickstart").model.name == "quickstart"
    file("above.yaml", "extends: own on quickstart\nfacts: {k: 6}\n")
    above = read(own.replace("own", "above"))
    assert (above.model.name, above.name, vars(above.coder.objectives["l1"])["target_l0"]) == ("quickstart", "mine", 6)


def test_a_file_may_extend_a_model_or_a_file_beside_it(file):
    file("base.yaml", "extends: quickstart\ntokens: 2048\ncoder: {selection: {k: 3}}\n")
    own = file("own.yaml", "extends: base.yaml\nname: own\ncoder: {selection: {type: mutual_choice, k: 5}}\n")
    config = read(own, None, "--tokens", "4096")
    assert (config.name, config.tokens, config.coder.d_sae) == ("own", 4096, 2048)
    assert vars(config.coder.selection) == {**vars(config.coder.selection), "k": 5}
    assert vars(read(file("other.yaml", "extends: base\n")).coder.selection)["k"] == 3


def test_a_file_of_a_users_own_may_be_the_model(file):
    own = file(
        "mine.yaml",
        "model: {name: some/model}\nactivations: {sites: [layers.9]}\nfacts: {k: 7, mlp_input: a, mlp_output: b}\n"
        "for: {transcoder: {tokens: 4096}, gated: {tokens: 8192}}\n",
    )
    config = read("transcoder", own)
    assert (config.name, config.model.name, config.activations.sites) == ("mine-transcoder", "some/model", ("a", "b"))
    assert (config.tokens, read("gated", own).tokens, read(None, own).tokens) == (4096, 8192, 1_000_000)
    assert read(own) == read(None, own)
    with pytest.raises(ConfigError, match=r"^facts: mine has no 'layers', which is asked for as \$layers"):
        read("crosscoder", own)
    larger = file("larger.yaml", "extends: smollm2\nmodel: {name: HuggingFaceTB/SmolLM2-360M}\nfacts: {k: 48}\n")
    config = read("topk", larger)
    assert (config.name, config.model.name, vars(config.coder.selection)["k"]) == (
        *("larger", "HuggingFaceTB/SmolLM2-360M"),
        48,
    )


@pytest.mark.parametrize(
    ("config", "on", "message"),
    [
        ("quikstart", None, r"--config: no file and no shipped config 'quikstart'. Did you mean 'quickstart'\?"),
        ("smollm2_gated", None, r"--config: .* Did you mean --config gated --on smollm2\? Shipped: attention, "),
        ("smollm2-model-diff", None, r"Did you mean --config model_diff --on smollm2\?"),
        ("gated on smolm2", None, r"--on: no file about a model 'smolm2'. Did you mean 'smollm2'\?"),
        ("gated", "smolm2", r"--on: no file about a model 'smolm2'. Did you mean 'smollm2'\? There are "),
        (None, "gated", r"--on: no file about a model 'gated'. It is a family: --config gated\."),
        (None, "owner/model", r"any other model: sae-train --model.name owner/model --activations.sites"),
        (None, ".", r"--on: no file about a model '\.'"),
        ("smollm2", "quickstart", r"--on: smollm2 is a model already; name a family"),
        ("alone.yaml", "quickstart", r"--on: .*alone.yaml extends no family, so it stands by itself; .*extends: topk"),
        ("loop.yaml", None, r"extends: .*loop\.yaml extends itself"),
        ("lost.yaml", None, r"extends: .* 'smollm2_topk'. Did you mean 'topk on smollm2'\?"),
        ("asks.yaml", None, r"facts: quickstart has no 'mlp_inpt', .* as \$mlp_inpt. Did you mean 'mlp_input'\?"),
        ("on.yaml", None, r"on: .*on\.yaml says it in `extends`: gated on smollm2"),
        ("topk", "run.yaml", r"facts: run has no 'k', which is asked for as \$k"),
        ("topk", "flat.yaml", r"facts: 3 is not a mapping"),
        ("topk", "typo.yaml", r"for: 'gatd' is not one of .* Did you mean 'gated'\?"),
        ("topk", "model.gguf", r"--on: no file about a model '.*model.gguf'"),
    ],
)
def test_what_cannot_be_found_or_put_together_is_one_line(file, tmp_path, config, on, message):
    file("alone.yaml", "tokens: 2048\n")
    file("loop.yaml", "extends: loop\n")
    file("lost.yaml", "extends: smollm2_topk\n")
    file("asks.yaml", "extends: topk\nactivations: {sites: [$mlp_inpt]}\n")
    file("on.yaml", "extends: gated\non: smollm2\n")
    file("run.yaml", "model: {name: smollm2}\n")
    file("flat.yaml", "facts: 3\n")
    file("typo.yaml", "facts: {k: 3}\nfor: {gatd: {tokens: 4096}}\n")
    file("model.gguf", "GGUF\0")
    paths = [str(tmp_path / name) if name and name.endswith((".yaml", ".gguf")) else name for name in (config, on)]
    with pytest.raises(ConfigError, match=message) as found:
        recipe(*paths)
    assert "\n" not in str(found.value)


@pytest.mark.slow
def test_the_mesh_for_a_node_of_eight_fits_its_gpus(tmp_path, capsys):
    path = next(iter(configs("slurm").values()))
    there = model_folder("meta-llama/Llama-3.1-8B", tmp_path)
    assert train(["--config", str(path), "--model.name", there, "--dry-run", "--ranks", "8"]) == 0
    told = capsys.readouterr()
    printed = told.out + told.err
    assert "mesh         sites 2 x data 1 x latents 4" in printed
    assert "12,886,499,328 in the coders" in printed
    told = re.search(r"a rank takes (\d+) GB, .* the run folder (\d+) GB", path.read_text(encoding="utf-8"))
    peak, disk = re.search(r"([\d.]+) GB at the peak of rank 0", printed), re.search(r"disk +([\d.]+) GB", printed)
    assert float(peak[1]) == pytest.approx(int(told[1]), abs=1), "some of it are the modules that tests import"
    assert (int(told[1]) < 80, int(disk[1])) == (True, int(told[2]))
