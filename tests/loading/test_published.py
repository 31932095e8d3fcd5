"""from_pretrained, save_pretrained and push_to_hub, as users of transformers type them."""

import subprocess
import sys

import pytest
import torch
import yaml
from rigs.hub_coders import AJT, D_IN, GEMMA, native

import sae
from sae import SparseCoder
from sae.base.errors import ConfigError, DataError

REPO = "own/coder"


@pytest.fixture
def mine(hub):
    """A coder of ours on the hub, in a folder, and the requests that are made."""
    root, asked = hub
    native(root / "models" / REPO / "layers.1", k=3)
    return sae.load(root / "models" / REPO / "layers.1"), asked


def equal(one, other):
    assert one.spec == other.spec
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (REPO, {"subfolder": "layers.1"}),
        (f"{REPO}/layers.1", {}),
        (REPO, {"subfolder": "/layers.1/", "revision": "main", "token": "hf_mine", "device_map": {"": "cpu"}}),
        (REPO, {"device": "cpu", "device_map": "cpu", "dtype": "float32", "torch_dtype": torch.float32}),
        (REPO, {"device_map": "auto", "dtype": "auto", "token": False}),
    ],
)
def test_a_coder_comes_by_the_arguments_that_people_know(mine, name, options):
    coder, _ = mine
    found = SparseCoder.from_pretrained(name, **options)
    assert type(found) is SparseCoder
    equal(found, coder)


def test_released_coders_come_alike(hub):
    release, _, name = AJT.partition("/")
    assert SparseCoder.from_pretrained(AJT).spec.d_in == D_IN
    assert SparseCoder.from_pretrained(release + "/" + name).spec.d_in == D_IN
    address, below = GEMMA, "layer_3/width_16k/average_l0_59"
    equal(SparseCoder.from_pretrained(address, below), sae.load(f"{address}/{below}"))
    with pytest.raises(ConfigError, match=r"scale: .* complete without it"):
        SparseCoder.from_pretrained(address, below, scale=2.0)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "torch.bfloat16"])
def test_precision_has_names(mine, dtype, tmp_path):
    for found in (SparseCoder.from_pretrained(REPO, dtype=dtype), sae.load(REPO, dtype=dtype)):
        assert found.W_dec.dtype == torch.bfloat16
    found.save_pretrained(tmp_path / "low")
    assert SparseCoder.from_pretrained(tmp_path / "low", torch_dtype="auto").W_dec.dtype == torch.bfloat16
    assert SparseCoder.from_pretrained(str(tmp_path / "low")).W_dec.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat61"}, r"dtype: bfloat61 is not one of auto, .*bfloat16"),
        ({"dtype": torch.int8}, "dtype: int8 is not one of auto, float32"),
        ({"dtype": "float16", "torch_dtype": "float32"}, "dtype: float16 and torch_dtype: float32 are two answers"),
        ({"device": "cpu", "device_map": "meta"}, "device: cpu and device_map: meta are two answers"),
        (
            {"device_map": {"encoder": "cpu", "decoder": "cuda:1"}},
            "it is latents that are dealt out; allowed",
        ),
        ({"device": "gpu"}, "device: 'gpu' is not available here"),
        ({"revison": "main"}, "revison: not something to say of a coder"),
        ({"trust_remote_code": True}, "trust_remote_code: not something to say of a coder"),
    ],
)
def test_arguments_that_say_nothing_are_one_line(mine, options, message):
    with pytest.raises(ConfigError, match=message):
        SparseCoder.from_pretrained(REPO, **options)


def test_the_token_goes_to_the_hub_and_none_where_it_is_false(mine, monkeypatch):
    sent = []
    monkeypatch.setattr("rigs.fake_hub._Handler._about", kept(sent, "_about"))
    monkeypatch.setattr("rigs.fake_hub._Handler._file", kept(sent, "_file"))
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    for token, header in (("hf_mine", "Bearer hf_mine"), (False, None), (None, "Bearer hf_environment")):
        sent.clear()
        SparseCoder.from_pretrained(REPO, token=token)
        assert sent
        assert set(sent) == {header}


def kept(sent, name):
    from rigs.fake_hub import _Handler

    own = getattr(_Handler, name)

    def act(self, *arguments):
        sent.append(self.headers.get("Authorization"))
        return own(self, *arguments)

    return act


def test_local_files_only_asks_for_nothing(mine, tmp_path):
    coder, asked = mine
    with pytest.raises(ConfigError, match=r"path: the hub cannot be asked for own/coder \(local_files_only\)"):
        SparseCoder.from_pretrained(REPO, local_files_only=True)
    assert asked == []
    SparseCoder.from_pretrained(REPO)
    asked.clear()
    for options in ({}, {"revision": "main"}):
        equal(SparseCoder.from_pretrained(REPO, local_files_only=True, **options), coder)
    assert [*sae.load_all(REPO, local_files_only=True)] == ["layers.1"]
    assert asked == []
    with pytest.raises(DataError, match=r"not cached and cannot be fetched"):
        SparseCoder.from_pretrained(GEMMA, "layer_3/width_16k/average_l0_59", local_files_only=known(GEMMA))
    with pytest.raises(ConfigError, match="no copy is cached"):
        SparseCoder.from_pretrained(REPO, local_files_only=True, cache_dir=tmp_path / "empty")


def known(repo):
    """Whether a repository's list of files was fetched, and none of them."""
    from sae.loading.remote import HubFiles

    return bool(HubFiles(repo).names())


def test_a_gated_repository_says_what_to_do(mine, faults):
    faults.gated.add(REPO)
    with pytest.raises(ConfigError, match=r"own/coder is gated: accept its terms .*`hf auth login`"):
        SparseCoder.from_pretrained(REPO)


@pytest.mark.parametrize("name", ["me/made", "made"])
def test_what_is_pushed_comes_back(mine, hub, monkeypatch, name):
    coder, asked = mine
    root, _ = hub
    coder.spec.metrics["note"] = "<b>mine</b>"
    said = {"private": True, "token": "hf_mine", "commit_message": "Mine"}
    assert coder.push_to_hub(name, **said).endswith("/me/made/commit/0123456789abcdef0123456789abcdef01234567")
    assert "private: True" in asked
    assert any(request.startswith("POST /api/models/me/made/commit/main Bearer hf_mine") for request in asked)
    equal(SparseCoder.from_pretrained("me/made"), coder)
    assert sorted(p.name for p in (root / "models/me/made").iterdir()) == ["README.md", "cfg.json", "sae.safetensors"]


def test_a_branch_is_made_to_be_pushed_to(mine):
    coder, asked = mine
    coder.push_to_hub("me/made", token="hf_mine", revision="dev")
    asked = [request.partition(" Bearer")[0] for request in asked]
    assert asked.index("POST /api/models/me/made/branch/dev") < asked.index("POST /api/models/me/made/commit/dev")


def test_a_coder_in_the_format_of_saelens_is_one_of_its_library(mine, hub):
    coder, _ = mine
    coder.push_to_hub("me/made", token="hf_mine", format="saelens")
    folder = hub[0] / "models/me/made"
    readme = (folder / "README.md").read_text()
    assert yaml.safe_load(readme.split("---\n")[1])["library_name"] == "saelens"
    assert 'sae = SAE.from_pretrained("me/made", "sae")' in readme
    assert 'coder = sae.load("me/made/sae")' in readme
    assert (folder / "sae" / "cfg.json").is_file()
    assert torch.equal(SparseCoder.from_pretrained("me/made").W_dec, coder.W_dec)


def test_saving_can_push(mine, tmp_path):
    coder, _ = mine
    coder.save_pretrained(tmp_path / "made")
    equal(SparseCoder.from_pretrained(tmp_path / "made"), coder)
    coder.save_pretrained(tmp_path / "made", push_to_hub=True, token="hf_mine")
    coder.save_pretrained(tmp_path / "made", push_to_hub=True, repo_id="me/other", token="hf_mine")
    for repo in ("me/made", "me/other"):
        equal(SparseCoder.from_pretrained(repo), coder)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda c, t: c.push_to_hub("a/b/c", token="hf_x"), "repo: 'a/b/c' is not OWNER/NAME"),
        (lambda c, t: c.push_to_hub("me/made"), "repo: pushing needs a token"),
        (lambda c, t: c.push_to_hub("me/made", token=False), "repo: pushing needs a token"),
        (lambda c, t: c.push_to_hub("made"), "repo_id: 'made' has no owner"),
        (lambda c, t: c.push_to_hub("me/made", token="hf_x", format="sealens"), "Did you mean saelens|saelens"),
        (
            lambda c, t: c.save_pretrained(t / "x", repo_id="me/made"),
            "repo_id: 'me/made' is of push_to_hub, which is off",
        ),
        (lambda c, t: c.save_pretrained(t / "x", private=True), "private: True is of push_to_hub, which is off"),
        (lambda c, t: c.save_pretrained(t / "file"), "is a file; name a folder"),
    ],
)
def test_what_cannot_be_put_anywhere_is_one_line_and_nothing_is_sent(mine, tmp_path, act, message):
    coder, asked = mine
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=message):
        act(coder, tmp_path)
    assert not [request for request in asked if request.startswith("POST")]
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_methods_need_no_other_import(tmp_path):
    folder = native(tmp_path / "mine")
    for line in ("from sae import SparseCoder", "from sae.coder.coder import SparseCoder"):
        code = f"{line}; print(SparseCoder.from_pretrained({str(folder)!r}).spec.d_in)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == f"{D_IN}\n"
