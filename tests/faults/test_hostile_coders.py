"""Rows 9 and 20: coders whose tensors or configs are damaged, contradict each other, or declare what nobody has."""

import json
import os
import random
import re

import numpy as np
import pytest
import torch
from rigs.hostile import flips, memory_at_peak
from rigs.released.every import EVERY
from safetensors.torch import load_file, save_file

import sae
from cli.evaluate import main as sae_eval
from sae import formats
from sae.base.errors import ConfigError, DataError
from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.selection.jumprelu import JumpReLU
from sae.untrusted.files import LocalFiles

D_IN, D_SAE = 6, 20
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
FILES = {"native": "sae.safetensors", "saelens": "sae_weights.safetensors", "gemma_scope": "params.npz"}
SAELENS = {
    "architecture": "jumprelu",
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "float32",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "metadata": {"sae_lens_version": "6.0.0", "context_size": 128},
}


def drawn(kind):
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(D_SAE, generator=draw) for name in ("b_enc", "threshold")}
    tensors |= {"W_enc": torch.randn(D_SAE, D_IN, generator=draw), "W_dec": torch.randn(D_SAE, D_IN, generator=draw)}
    tensors |= {"b_dec": torch.randn(D_IN, generator=draw)}
    if kind != "native":
        tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    return tensors


def written(folder, kind, change=lambda tensors: None):
    """Writes a coder in the layout of a format, its tensors changed, and returns its folder."""
    folder.mkdir(exist_ok=True)
    tensors = drawn(kind)
    if kind == "native":
        coder = SparseCoder(CoderSpec(D_IN, D_IN, D_SAE, JumpReLU()))
        coder.load_state_dict(tensors)
        sae.save(coder, folder)
        changed_config(folder, sha256=None)
    elif kind == "saelens":
        (folder / "cfg.json").write_text(json.dumps(SAELENS))
    change(tensors)
    if kind == "gemma_scope":
        np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILES[kind])
    return folder


def changed_config(folder, **changes):
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def error_of(folder, kind=(DataError, ConfigError), **options):
    """Returns the one line that loading ends in."""
    with pytest.raises(kind) as error:
        sae.load(folder, **options)
    line = str(error.value)
    assert line.isprintable()
    assert len(line) < len(str(folder)) + 600
    return line


# ---- tensors: every reader, by each way in which one may be wrong


def rewritten(path, change):
    """Changes the tensors of a weight file by `change(tensors)`; those of a pair of config and state lie in it."""
    if path.suffix == ".npz":
        tensors = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    else:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    change(tensors)
    if path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)


def of_nan(tensors, name):
    tensors[name] = torch.full_like(tensors[name], torch.nan)


def absent(tensors, name):
    del tensors[name]


def another_axis(tensors, name):
    tensors[name] = tensors[name][None]


def another_shape(tensors, name):
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])


def whole_numbers(tensors, name):
    tensors[name] = tensors[name].to(torch.int32)


def none_at_all(tensors, name):
    tensors[name] = tensors[name][:0]


def one_number(tensors, name):
    tensors[name] = torch.tensor(1.0)


def beside(tensors, name):
    tensors[f"{name}_2"] = tensors[name].clone()


WRONG = (of_nan, absent, another_axis, another_shape, whole_numbers, none_at_all, one_number, beside)
UNSAID = {"crosscoder_diff": {"scale": (0.5, 2.0)}}
REFUSED = ("temporal",)  # whatever it holds
BY_CLASS = ("dunefsky",)  # whose state lies beside an object of a class that is not there (tests/formats)
READ = [*(name for name in EVERY if " " not in name), "dictionary_learning AutoEncoder"]
FITS = {  # what is another coder, and no wrong one
    ("cross_layer_transcoder", whole_numbers),  # layers are put together in the precision of the others
    ("llama_scope", whole_numbers),  # all is made float32 before it is folded
    ("gemma_scope_2", another_shape),  # a transcoder of another width
    ("gemma_scope_2", none_at_all),
}


@pytest.mark.parametrize("name", [name for name in READ if name not in (*REFUSED, *BY_CLASS)])
def test_tensors_that_do_not_fit_are_named_by_every_reader(tmp_path, name):
    hints = UNSAID.get(name, {})
    for wrong in (wrong for wrong in WRONG if (name, wrong) not in FITS):
        folder = tmp_path / wrong.__name__
        EVERY[name](folder)
        if name == "native":  # whose digest would tell first
            changed_config(folder / "x", sha256=None)
        (place,) = formats.candidates(LocalFiles(folder))
        path = folder / place.weights
        sae.load(folder, **hints)
        largest = {}

        def spoil(tensors, wrong=wrong, largest=largest):
            found = [n for n, t in tensors.items() if isinstance(t, torch.Tensor)]
            largest["name"] = max(found, key=lambda n: (tensors[n].ndim, n))
            wrong(tensors, largest["name"])

        rewritten(path, spoil)
        line = error_of(folder, **hints)
        assert str(folder) in line, (wrong, line)
        if wrong is of_nan:
            assert re.search("tensor .* holds NaN or Inf, read as", line)
            sae.load(folder, lazy=True, **hints)  # which looks at nothing
        assert "tensor" in line or "coder as they are known" in line or "is in no known format" in line, (wrong, line)


def test_what_breaks_a_reader_is_damage_of_the_file_that_it_read(tmp_path):
    folder = written(tmp_path / "coder", "gemma_scope", lambda tensors: tensors.update(b_enc=torch.tensor(1.0)))
    line = error_of(folder, DataError)
    assert line.startswith(f"{folder / FILES['gemma_scope']} is damaged, or no gemma_scope coder as they are known: ")


def test_the_command_says_it_too(tmp_path, capsys):
    folder = written(tmp_path / "coder", "gemma_scope", lambda tensors: tensors["threshold"].fill_(torch.nan))
    assert sae_eval([str(folder)]) == 1
    assert "tensor threshold holds NaN or Inf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stored", "dtype", "number"),
    [(torch.float64, torch.float32, 1e300), (torch.bfloat16, torch.float16, 1e38)],
)
def test_numbers_too_large_for_the_precision_asked_for_name_the_tensor(tmp_path, stored, dtype, number):
    def enlarge(tensors):
        tensors["W_dec"] = tensors["W_dec"].to(stored)
        tensors["W_dec"][0, 0] = number

    folder = written(tmp_path / "coder", "native", enlarge)
    assert "tensor W_dec holds NaN or Inf, read as " in error_of(folder, DataError, dtype=dtype)
    assert sae.load(folder, dtype=torch.float64).W_dec[0, 0] == torch.tensor(number, dtype=stored)


@pytest.mark.parametrize("name", ["W_enc", "W_dec"])
@pytest.mark.parametrize("kind", ["native", "saelens"])
def test_matrices_that_lie_the_other_way_are_named(tmp_path, kind, name):
    def turn(tensors):
        tensors[name] = tensors[name].T

    shapes = sorted([(D_SAE, D_IN), (D_IN, D_SAE)], reverse=kind == "saelens" and name == "W_enc")
    line = error_of(written(tmp_path / "coder", kind, turn), DataError)
    assert line.endswith(f"tensor {name} has shape {shapes[0]}, expected {shapes[1]}")


# ---- configs


VALUES = ["abc", -1, 0, 10**12, 10**15, 10**400, True, 1.5, "1e400", None, [20], {"a": 1}, "20"]


def with_value(folder, field, value):
    path = folder / "cfg.json"
    text = json.dumps({**json.loads(path.read_text()), field: "VALUE"})
    path.write_text(text.replace('"VALUE"', "1e400" if value == "1e400" else json.dumps(value)))


@pytest.mark.parametrize("kind", ["native", "saelens"])
def test_widths_of_another_type_or_size_name_the_field_or_the_tensor(tmp_path, kind):
    folder = written(tmp_path / "coder", kind)
    whole = (folder / "cfg.json").read_text()
    for field in ("d_in", "d_sae"):
        for value in VALUES:
            (folder / "cfg.json").write_text(whole)
            with_value(folder, field, value)
            line = error_of(folder)
            assert field in line or ("expected (" in line and str(value) in line), (field, value)


def test_k_of_another_type_or_size_names_the_field(tmp_path):
    folder = written(tmp_path / "coder", "saelens", lambda tensors: tensors.pop("threshold"))
    changed_config(folder, architecture="topk", k=3)
    assert sae.load(folder).spec.selection.k == 3
    for value in VALUES:
        if value not in (True, "20"):
            with_value(folder, "k", value)
            assert "k" in error_of(folder).removeprefix(str(folder)), value


def test_words_that_are_not_known_name_the_field(tmp_path):
    folder = written(tmp_path / "coder", "saelens")
    whole = (folder / "cfg.json").read_text()
    for field in ("architecture", "normalize_activations", "metadata"):
        for value in ("abc", -1, [1], True, 10**400, "x" * 10**6, "a\nb\x1b[31m"):
            if (field, value) == ("normalize_activations", True):  # which SAELens 2 wrote
                continue
            (folder / "cfg.json").write_text(whole)
            with_value(folder, field, value)
            line = error_of(folder)
            assert field in line or "scale" in line, (field, value)


@pytest.mark.parametrize("kind", ["native", "saelens"])
def test_nothing_is_allocated_for_what_a_config_declares(tmp_path, kind):
    folder = written(tmp_path / kind, kind)
    for field in ("d_in", "d_out", "d_sae"):
        if field in json.loads((folder / "cfg.json").read_text()):
            changed_config(folder, **{field: 2**30})
    before = memory_at_peak(anew=True)
    assert "has shape (20, 6), expected (1073741824, 1073741824)" in error_of(folder)
    assert memory_at_peak() - before < 50 * 2**20


# ---- digests: a version of ours has one of its weights; files of others are held to their structure


def test_every_changed_bit_of_our_weights_is_found(tmp_path):
    coder = SparseCoder(CoderSpec(D_IN, D_IN, D_SAE, JumpReLU()))
    coder.load_state_dict(drawn("native"))
    sae.save(coder, tmp_path / "coder")
    path = tmp_path / "coder" / "sae.safetensors"
    raw = path.read_bytes()
    for _, changed in flips(raw, 60):
        path.write_bytes(changed)
        with pytest.raises(DataError, match=r"sae\.safetensors is damaged: "):
            sae.load(tmp_path / "coder")
    ends = random.Random(0).sample(range(len(raw)), 20)
    for end in (0, 1, 7, 8, len(raw) - 1, *ends):
        path.write_bytes(raw[:end])
        with pytest.raises(DataError, match=r"sae\.safetensors is damaged"):
            sae.load(tmp_path / "coder")
    path.write_bytes(raw + b"\0")
    with pytest.raises(DataError, match=r"sae\.safetensors is damaged"):
        sae.load(tmp_path / "coder")
    path.write_bytes(raw)
    assert torch.equal(sae.load(tmp_path / "coder").W_enc, coder.W_enc)


def test_every_changed_number_of_an_npz_is_found(tmp_path):
    folder = written(tmp_path / "coder", "gemma_scope")
    path = folder / "params.npz"
    raw = path.read_bytes()
    start = raw.index(drawn("gemma_scope")["W_dec"].numpy().tobytes())
    for at, changed in flips(raw[start : start + 4 * D_IN * D_SAE], 60):
        path.write_bytes(raw[:start] + changed + raw[start + len(changed) :])
        with pytest.raises(DataError, match=r"params\.npz is damaged: its member W_dec\.npy: Bad CRC-32"):
            sae.load(folder)
        assert at < len(changed)


def test_of_safetensors_of_others_only_the_structure_is_checked(tmp_path):
    folder = written(tmp_path / "coder", "saelens")
    path = folder / FILES["saelens"]
    raw = path.read_bytes()
    first = 8 + int.from_bytes(raw[:8], "little")
    path.write_bytes(raw[:first] + bytes([raw[first] ^ 1]) + raw[first + 1 :])
    sae.load(folder)  # one number is another: nothing in the file could tell
    for end in range(0, len(raw), 37):
        path.write_bytes(raw[:end])
        assert "damaged" in error_of(folder, DataError)
    path.write_bytes(raw + b"\0")
    assert "damaged" in error_of(folder, DataError)


# ---- folders


LINKS = [(kind, which) for kind in FILES for which in ("weights", "config", "folder")]


@pytest.mark.parametrize(("kind", "which"), [case for case in LINKS if case != ("gemma_scope", "config")])  # has none
def test_links_out_of_the_folder_are_not_followed(tmp_path, kind, which):
    outside, folder = written(tmp_path / "outside", kind), tmp_path / "coder"
    if which == "folder":
        folder.mkdir()
        (folder / "sub").symlink_to(outside)
        assert "holds no coder" in error_of(folder, ConfigError)
        return
    written(folder, kind)
    name = FILES[kind] if which == "weights" else "cfg.json"
    (folder / name).unlink()
    (folder / name).symlink_to(outside / name)
    assert error_of(folder, DataError) == f"'{name}' is refused: it points outside of {folder}"


def test_what_is_no_file_in_place_of_the_weights_does_not_hang(tmp_path):
    folder = written(tmp_path / "coder", "saelens")
    path = folder / FILES["saelens"]
    for make in (
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path),
        path.touch,
        path.mkdir,
    ):
        path.unlink()
        make()
        assert str(folder) in error_of(folder)
        assert str(folder) in error_of(path)


def test_a_pipe_in_place_of_a_config_does_not_hang(tmp_path):
    folder = written(tmp_path / "coder", "saelens")
    (folder / "cfg.json").unlink()
    os.mkfifo(folder / "cfg.json")
    assert "is in no known format" in error_of(folder, ConfigError)
