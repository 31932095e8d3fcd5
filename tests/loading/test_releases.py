"""The table of released coders: every name leads to the stated repository and path; unknown names name the nearest."""

import json
from importlib.resources import files

import pytest
import yaml
from make.releases_table import ORIGIN, check, folded, main, table

import sae
from sae.base.errors import ConfigError, DataError
from sae.formats import formats
from sae.loading import releases
from sae.loading.releases import Table, expand
from sae.untrusted.hints import Hints

STATED = {
    "gemma": {
        "conversion_func": "gemma_2",
        "model": "gemma-2-2b",
        "repo_id": "google/g",
        "saes": [
            {"id": f"layer_{n}/width_16k/canonical", "path": f"layer_{n}/width_16k/average_l0_{l0}"}
            for n, l0 in ((0, 105), (1, 90), (10, 77))
        ]
        + [{"id": "embedding/width_4k/average_l0_6", "path": "embedding/width_4k/average_l0_6"}],
    },
    "words": {
        "conversion_func": "gemma_3",
        "model": "google/gemma-3-4b-pt",
        "repo_id": "google/w",
        "saes": [
            {"id": f"layer_{n}_l0_{word}", "path": f"resid/layer_{n}_l0_{word}", "l0": 10 * n, "neuronpedia": np}
            for n in (2, 0, 1)
            for word, np in (("big", f"g/{n}-big"), ("small", None))
        ],
    },
    "zeros": {
        "conversion_func": "connor_rob_hook_z",
        "model": "gpt2-small",
        "repo_id": "c/z",
        "saes": [
            {
                "id": f"blocks.{n}.hook_z",
                "path": f"L{n}_lr1.20e-0{n}_v9.pt",
                "l0": 9.4,
                "norm_scaling_factor": 1 / (n + 2),
            }
            for n in range(3)
        ],
    },
    "twice": {
        "conversion_func": None,
        "model": "gpt2-small",
        "repo_id": "o/t",
        "config_overrides": {"normalize_activations": "constant_norm_rescale"},
        "saes": [{"id": "blocks.1.x", "path": "1-x-1"}, {"id": "blocks.2.x", "path": "2-x-3"}],
    },
    "layers": {
        "conversion_func": "mntss_clt_layer_transcoder",
        "model": "gemma-2-2b",
        "repo_id": "m/clt",
        "saes": [{"id": "layer_0", "path": 0}, {"id": "layer_1", "path": 1}],
    },
}


@pytest.fixture
def stated_file(tmp_path):
    (tmp_path / "sae_lens-9.8.7.dist-info").mkdir()
    (tmp_path / "sae_lens").mkdir()
    path = tmp_path / "sae_lens" / "pretrained_saes.yaml"
    path.write_text(yaml.safe_dump(STATED))
    return path


def test_every_stated_coder_comes_back_as_it_was_stated(stated_file, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert main([str(stated_file), "--out", str(out)]) == 0
    assert "5 releases, 17 coders of the package" in capsys.readouterr().out
    made = Table(json.loads(out.read_text()))
    assert made.source["version"] == "9.8.7"
    assert made.source["license"] == "MIT"
    for name, release in STATED.items():
        found = {coder.id: coder for coder in expand(made.rows[name])}
        assert found.keys() == {coder["id"] for coder in release["saes"]}
        for coder in release["saes"]:
            mine = found[coder["id"]]
            assert (mine.repo, mine.path) == (release["repo_id"], str(coder["path"]))
            assert mine.neuronpedia == coder.get("neuronpedia")
            assert mine.scale == coder.get("norm_scaling_factor")
            if "l0" in coder:
                assert mine.l0 == coder["l0"]
            assert not mine.verified
    assert [coder.l0 for coder in expand(made.rows["gemma"])] == [105, 90, 77, 6]  # as the paths say
    assert made.rows["twice"]["overrides"] == {"normalize_activations": "constant_norm_rescale"}
    assert main([str(stated_file), "--out", str(out), "--check"]) == 0


def test_coders_whose_names_differ_in_numbers_are_one_pattern():
    rows = [
        {"id": f"a{n}_b{n}", "path": f"x/a{n}_b{n}", "neuronpedia": None, "l0": n, "scale": 2.5} for n in range(5, 30)
    ]
    pattern = {"id": "a{0}_b{0}", "path": "x/a{0}_b{0}", "l0": "{0}", "scale": 2.5, "columns": ["5-29"]}
    assert folded(rows) == [pattern]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda row: row.update(repo="other/repo"), "gemma/layer_0/width_16k/canonical: stated as"),
        (lambda row: row["coders"][0].update(columns=["0-2", [105, 90, 78]]), "gemma/layer_"),
        (lambda row: row["coders"].pop(), "gemma: 4 coders are stated, 3 in the table"),
    ],
)
def test_a_table_that_says_otherwise_is_found(change, named):
    made = table(STATED, "1")
    change(next(row for row in made["releases"] if row["name"] == "gemma"))
    with pytest.raises(DataError, match=named):
        check(STATED, Table(made))


def test_what_the_script_does_not_know_is_one_line(stated_file, tmp_path, capsys):
    broken = STATED | {"new": {**STATED["twice"], "conversion_func": "of_tomorrow"}}
    stated_file.write_text(yaml.safe_dump(broken))
    assert main([str(stated_file), "--out", str(tmp_path / "out.json")]) == 2
    assert "conversion_func: 'of_tomorrow' of new is not known" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
    (tmp_path / "lost.yaml").write_text(yaml.safe_dump(STATED))
    (tmp_path / "sae_lens-9.8.7.dist-info").rmdir()
    assert main([str(tmp_path / "lost.yaml"), "--out", str(tmp_path / "out.json")]) == 2
    assert "lies in no installed sae-lens" in capsys.readouterr().err


def test_the_shipped_table_is_whole_small_and_of_known_formats():
    shipped = releases.shipped_table()
    assert shipped.source["package"] == "sae-lens"
    assert (files("sae") / "assets" / "releases.json").stat().st_size < 300_000
    everything = {name: list(expand(row)) for name, row in shipped.rows.items()}
    package = [coder for found in everything.values() for coder in found if coder.notes != ORIGIN]
    assert len({coder.name for coder in package}) == 170
    assert len({coder.address for coder in package}) == len(package) == 13_857
    assert sum(coder.scale is not None for coder in package) == 304
    assert sum(coder.neuronpedia is not None for coder in package) == len(shipped.neuronpedia) == 2_441
    assert not any(coder.verified for coder in package)
    known = {*formats(), "temporal"}
    assert {row["format"] for row in shipped.rows.values()} <= known
    for row in shipped.rows.values():
        assert row["repo"].count("/") == 1
        assert row["model"].count("/") == 1, row["model"]


@pytest.mark.parametrize(
    ("address", "repo", "path"),
    [
        (
            "gpt2-small-res_sce-ajt/blocks.2.hook_resid_pre",
            "neuronpedia/gpt2-small__res_sce-ajt",
            "2-res_sce-ajt",
        ),
        (
            "gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical",
            "google/gemma-scope-2b-pt-res",
            "layer_12/width_16k/average_l0_82",
        ),
        (
            "gemma-2-2b/12-gemmascope-res-16k",
            "google/gemma-scope-2b-pt-res",
            "layer_12/width_16k/average_l0_82",
        ),
        ("gpt2-small-resid-post-v5-32k/blocks.7.hook_resid_post", "jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs", None),
        ("llama_scope_lxr_8x/l15r_8x", "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L15R-8x"),
        ("goodfire-llama-3.1-8b-instruct", "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", None),
        ("sae-llama-3-8b-32x/layers.10", "EleutherAI/sae-llama-3-8b-32x", "layers.10"),
        ("sae-llama-3-8b-32x", "EleutherAI/sae-llama-3-8b-32x", ""),
        ("llama_scope_lxtc_8x/l8tc_8x", "fnlp/Llama3_1-8B-Base-LXTC-8x", "Llama3_1-8B-Base-L8TC-8x"),
    ],
)
def test_names_lead_to_repositories(address, repo, path):
    found = releases.find_release(address)
    assert found is not None
    assert found.repo == repo
    assert path is None or found.path == path


def test_what_is_known_beside_the_place():
    found = releases.find_release("llama_scope_lxr_8x/l0r_8x")
    assert (found.l0, found.scale, found.model) == (50, 58.935251798561154, "meta-llama/Llama-3.1-8B")
    assert found.hints() == {"model": "meta-llama/Llama-3.1-8B", "scale": 58.935251798561154}
    assert (
        releases.find_release("gemma-scope-9b-it-res/layer_20/width_16k/average_l0_91").model == "google/gemma-2-9b-it"
    )
    centered = releases.find_release("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    assert centered.overrides["model_from_pretrained_kwargs"] == {"center_writing_weights": True}


def test_hints_are_what_can_be_said_and_nothing_that_must_be_said_is_left_out():
    for name in releases.names():
        for coder in releases.coders_of(name):
            said = Hints(**coder.hints())  # no other name is taken
            assert (said.model, said.scale, said.format) == (coder.model, coder.scale, None)
            assert said.processed is (True if "center_writing_weights" in str(coder.overrides) else None)
            assert said.normalization == ("constant_norm_rescale" if name == "mistral-7b-res-wg" else None)


@pytest.mark.parametrize(
    ("address", "named"),
    [
        (
            "gpt2-small-res-jb/blocks.88.hook_resid_pre",
            "gpt2-small-res-jb has no coder 'blocks.88.hook_resid_pre'. Did you mean 'blocks.8.hook_resid_pre'",
        ),
        ("gpt2-small-res-jb", "the release gpt2-small-res-jb has 13 coders. It has: blocks.0.hook_resid_pre, "),
        ("gpt2-small-res-jb/", "the release gpt2-small-res-jb has 13 coders."),
        (
            "gemma-2-2b/12-gemascope-res-16k",
            "no source '12-gemascope-res-16k' of gemma-2-2b. Did you mean 'gemma-2-2b/12-gemmascope-res-16k'",
        ),
        ("temporal-sae-gemma-2-2b/blocks.12.hook_resid_post", "is refused: its codes depend on the whole context"),
        ("gemma-2-2b/12-temporal-res", "temporal-sae-gemma-2-2b/blocks.12.hook_resid_post is refused"),
        ("mntss-gemma-2-2b-2.5m-clt-as-per-layer/layer_3", "load all of them together: mntss/clt-gemma-2-2b-2.5M"),
    ],
)
def test_unknown_and_refused_names_are_told(address, named):
    with pytest.raises(ConfigError) as told:
        releases.find_release(address)
    assert named in str(told.value)


@pytest.mark.parametrize("address", ["google/gemma-scope-2b-pt-res", "owner/repo/x", "nothing", "hf://a/b", ""])
def test_other_addresses_are_nobodys(address):
    assert releases.find_release(address) is None


def test_the_table_speaks_of_coders_that_are_loaded_by_their_place():
    by_name = releases.find_release("gpt2-small-mlp-tm/blocks.1.hook_mlp_out")
    for path in (by_name.path, f"{by_name.path}/sae_weights.safetensors"):
        assert releases.release_at(by_name.repo, path) == by_name
    canonical = releases.release_at("google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82/params.npz")
    assert (canonical.neuronpedia, canonical.l0) == ("gemma-2-2b/12-gemmascope-res-16k", 82)
    plain = releases.release_at("google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_22/params.npz")
    assert plain.address == "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_22"
    assert releases.release_at(f"{by_name.repo}/{by_name.path}", "sae_weights.safetensors") == by_name
    assert releases.release_at(f"/home/me/{by_name.repo}", by_name.path) == by_name
    assert releases.release_at(f"x{by_name.repo}", by_name.path) is None
    assert releases.release_at(by_name.repo, f"{by_name.path}x") is None
    assert releases.release_at(by_name.repo, "other") is None
    assert releases.release_at("some/repo", by_name.path) is None
    assert releases.release_at(by_name.repo, "") is None


def test_the_list_can_be_had_for_one_model():
    rows = sae.list_released("gpt2")
    assert [row.name for row in rows] == sorted(row.name for row in rows)
    assert {row.model for row in rows} == {"openai-community/gpt2"}
    assert rows == sae.list_released("openai-community/GPT2")
    assert {row.model for row in sae.list_released("Gemma2")} >= {"google/gemma-2-2b", "google/gemma-2-9b"}
    assert sae.list_released("GPT 2") == rows
    by_name = {row.name: row for row in sae.list_released()}
    assert len(by_name) == len(releases.names()) > 180
    scope = by_name["gemma-scope-2b-pt-res"]
    assert (scope.coders, scope.layers, scope.l0) == (316, tuple(range(26)), (6, 457))
    assert scope.widths == ("4k", "16k", "32k", "65k", "131k", "262k", "524k", "1m")
    assert by_name["sae_bench_gemma-2-2b_topk_width-2pow12_date-1109"].widths == ("2^12",)
    assert by_name["sae-llama-3-8b-32x"].coders is None
    assert "depend on the whole context" in by_name["temporal-sae-gemma-2-2b"].notes
    with pytest.raises(ConfigError, match=r"model: no coder of 'gemma-2-3b' is known\. Did you mean 'gemma-2-9b'"):
        sae.list_released("gemma-2-3b")


def test_the_table_is_expanded_once_for_all_names_of_neuronpedia(monkeypatch):
    expanded = []
    original = releases.expand
    monkeypatch.setattr(releases, "expand", lambda row, *more: expanded.append(row["name"]) or original(row, *more))
    releases.shipped_table.cache_clear()
    for address in ("gemma-2-2b/12-gemmascope-res-16k", "gpt2-small/8-res-jb"):
        assert releases.find_release(address)
    assert sorted(expanded) == sorted(releases.names())
