"""Rows 9 and 20: coders whose tensors or configs are damaged, contradict each other, or declare what nobody has."""

import json
import os
import random
import resource
import time
from functools import partial

import numpy as np
import pytest
import torch
from rigs.children import Child
from rigs.hostile import flips
from safetensors.torch import save_file

import sae
from cli.evaluate import main as sae_eval
from sae.base.errors import ConfigError, DataError
from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.selection.jumprelu import JumpReLU

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


@pytest.mark.parametrize("kind", FILES)
def test_what_is_whole_is_loaded(tmp_path, kind):
    coder = sae.load(written(tmp_path / "coder", kind))
    assert torch.equal(coder.W_dec, drawn(kind)["W_dec"])
    assert torch.equal(coder.threshold, drawn(kind)["threshold"])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", FILES)
def test_nan_and_infinity_name_the_tensor(tmp_path, kind, name, bad):
    def spoil(tensors):
        tensors[name].view(-1)[-1] = bad

    folder = written(tmp_path / "coder", kind, spoil)
    assert (
        error_of(folder, DataError) == f"{folder / FILES[kind]}: tensor {name} holds NaN or Inf, read as torch.float32"
    )
    sae.load(folder, lazy=True)  # which looks at nothing


def test_the_command_says_it_too(tmp_path, capsys):
    folder = written(tmp_path / "coder", "gemma_scope", lambda tensors: tensors["threshold"].fill_(torch.nan))
    assert sae_eval([str(folder)]) == 1
    assert "tensor threshold holds NaN or Inf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stored", "dtype", "number"),
    [(torch.float64, torch.float32, 1e300), (torch.float32, torch.float16, 1e5), (torch.bfloat16, torch.float16, 1e38)],
)
def test_numbers_too_large_for_the_precision_asked_for_name_the_tensor(tmp_path, stored, dtype, number):
    def enlarge(tensors):
        tensors["W_dec"] = tensors["W_dec"].to(stored)
        tensors["W_dec"][0, 0] = number

    folder = written(tmp_path / "coder", "native", enlarge)
    assert "tensor W_dec holds NaN or Inf, read as " in error_of(folder, DataError, dtype=dtype)
    assert sae.load(folder, dtype=torch.float64).W_dec[0, 0] == torch.tensor(number, dtype=stored)


def absent(tensors, name):
    del tensors[name]


def renamed(tensors, name):
    tensors[f"{name}_"] = tensors.pop(name)


def longer(tensors, name):
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])


def another_axis(tensors, name):
    tensors[name] = tensors[name][None]


def whole_numbers(tensors, name):
    tensors[name] = tensors[name].to(torch.int32)


def none_at_all(tensors, name):
    tensors[name] = tensors[name][:0]


def one_number(tensors, name):
    tensors[name] = torch.tensor(1.0)


def beside(tensors, name):
    tensors[f"{name}_2"] = tensors[name].clone()


WRONG = (absent, renamed, longer, another_axis, whole_numbers, none_at_all, one_number, beside)


MISFITS = [(kind, name, wrong) for kind in FILES for name in NAMES for wrong in WRONG]
FITS = [("gemma_scope", "W_enc", longer), ("gemma_scope", "W_enc", none_at_all)]  # a transcoder of another width


@pytest.mark.parametrize(
    ("kind", "name", "wrong"),
    [case for case in MISFITS if case not in FITS],
    ids=lambda part: part if isinstance(part, str) else part.__name__,
)
def test_tensors_that_do_not_fit_are_named(tmp_path, kind, name, wrong):
    folder = written(tmp_path / "coder", kind, lambda tensors: wrong(tensors, name))
    line = error_of(folder)
    assert str(folder / FILES[kind]) in line
    if kind == "gemma_scope" and wrong in (absent, renamed):
        assert "is in no known format; it holds" in line
    elif kind == "gemma_scope" and name in ("b_enc", "b_dec"):  # the widths are theirs: the others do not fit them
        assert "tensor" in line or "no gemma_scope coder as they are known" in line
    else:
        assert f"tensor {name}".lower() in line.lower()


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


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:8])
@pytest.mark.parametrize("field", ["d_in", "d_sae"])
@pytest.mark.parametrize("kind", ["native", "saelens"])
def test_widths_of_another_type_or_size_name_the_field_or_the_tensor(tmp_path, kind, field, value):
    folder = written(tmp_path / "coder", kind)
    with_value(folder, field, value)
    started = time.process_time()
    line = error_of(folder)
    assert field in line or ("expected (" in line and str(value) in line)
    assert time.process_time() - started < 2


@pytest.mark.parametrize("value", [v for v in VALUES if v not in (True, "20")], ids=lambda value: repr(value)[:8])
def test_k_of_another_type_or_size_names_the_field(tmp_path, value):
    folder = written(tmp_path / "coder", "saelens", lambda tensors: tensors.pop("threshold"))
    changed_config(folder, architecture="topk", k=3)
    assert sae.load(folder).spec.selection.k == 3
    with_value(folder, "k", value)
    assert "k" in error_of(folder).removeprefix(str(folder))


NO_WORDS = ["abc", -1, [1], True, 10**400, "x" * 10**6, "a\nb\x1b[31m"]
WORDS = [(field, value) for field in ("architecture", "normalize_activations", "metadata") for value in NO_WORDS]


@pytest.mark.parametrize(
    ("field", "value"),
    [case for case in WORDS if case != ("normalize_activations", True)],  # which SAELens 2 wrote
    ids=lambda v: repr(v)[:20],
)
def test_words_that_are_not_known_name_the_field(tmp_path, field, value):
    folder = written(tmp_path / "coder", "saelens")
    with_value(folder, field, value)
    line = error_of(folder)
    assert field in line or "scale" in line


def declares(folders, log):
    """Loads coders that declare terabytes, and prints the errors, and how much memory it took at most."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for folder in folders:
        try:
            sae.load(folder)
        except (DataError, ConfigError) as error:
            print(error)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    return 0


def test_nothing_is_allocated_for_what_a_config_declares(tmp_path):
    folders = [written(tmp_path / kind, kind) for kind in ("native", "saelens")]
    for folder in folders:
        for field in ("d_in", "d_out", "d_sae"):
            if field in json.loads((folder / "cfg.json").read_text()):
                changed_config(folder, **{field: 2**30})
    child = Child(tmp_path / "log.txt", partial(declares, folders, None))
    assert child.wait() == 0, child.output
    *errors, mebibytes = child.output.splitlines()
    assert len(errors) == 2
    for line in errors:
        assert "has shape (20, 6), expected (1073741824, 1073741824)" in line
    assert float(mebibytes) < 50


# ---- digests: a version of ours has one of its weights; files of others are held to their structure


def test_every_changed_bit_of_our_weights_is_found(tmp_path):
    coder = SparseCoder(CoderSpec(D_IN, D_IN, D_SAE, JumpReLU()))
    coder.load_state_dict(drawn("native"))
    sae.save(coder, tmp_path / "coder")
    path = tmp_path / "coder" / "sae.safetensors"
    raw = path.read_bytes()
    for _, changed in flips(raw, 150):
        path.write_bytes(changed)
        with pytest.raises(DataError, match=r"sae\.safetensors is damaged: "):
            sae.load(tmp_path / "coder")
    ends = random.Random(0).sample(range(len(raw)), 40)
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


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("what", ["pipe", "device", "loop", "folder", "empty"])
def test_what_is_no_file_in_place_of_the_weights_does_not_hang(tmp_path, kind, what):
    folder = written(tmp_path / "coder", kind)
    path = folder / FILES[kind]
    path.unlink()
    make = {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
        "folder": path.mkdir,
        "empty": path.touch,
    }
    make[what]()
    assert str(folder) in error_of(folder)
    assert str(folder) in error_of(path)


def test_a_pipe_in_place_of_a_config_does_not_hang(tmp_path):
    folder = written(tmp_path / "coder", "saelens")
    (folder / "cfg.json").unlink()
    os.mkfifo(folder / "cfg.json")
    assert "is in no known format" in error_of(folder, ConfigError)
