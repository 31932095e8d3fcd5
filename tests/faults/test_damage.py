"""Rows 1 and 9 to 12: what a kill, a full disk, damage or a foreign file does to what is stored, and the way out."""

import json
import os
import random
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from rigs.children import Child, at_step, ranks, sae_train
from rigs.fakes import tiny_config, tiny_model_folder, tiny_text_folder
from rigs.runs import assert_equal, checkpoints, files, wait_for_checkpoint
from safetensors.torch import load_file, save_file

import sae
import sae.training.loop
from cli.evaluate import main as sae_eval
from sae.base.errors import DataError
from sae.base.files import cache_dir, load_tensors, save_tensors, sha256_file, verify, write_json
from sae.base.settings import to_yaml
from sae.parallel.agreement import agreed
from sae.parallel.ranks import RanksConfig, process_group
from sae.training import checkpoint, restoring
from sae.training.saving import Part, Saver

# Row 1


def save_for_ever(run: Path) -> int:
    with process_group(RanksConfig(deadline_s=5.0)):
        found, saver = agreed(lambda: str(checkpoint.latest(run) or "")), Saver(run, keep=2)
        step = json.loads(Path(found, checkpoint.STATE).read_text())["step"] if found else 0
        while True:
            step += 1
            saver.save(step, {"coder-0": Part.of({"w": torch.full((50_000,), step)})}, {"saved": step})


@pytest.mark.parametrize(("n_ranks", "kills"), [(1, 10), (2, 1), pytest.param(2, 10, marks=pytest.mark.slow)])
def test_killed_while_saving_the_latest_checkpoint_is_whole(tmp_path, n_ranks, kills):
    draw, before, run = random.Random(n_ranks), 0, tmp_path / "run"
    for _ in range(kills):
        environments = ranks(n_ranks) if n_ranks > 1 else [{}]
        children = [
            Child(tmp_path / f"{rank}.txt", partial(save_for_ever, run), env) for rank, env in enumerate(environments)
        ]
        children[0].wait_for(lambda before=before: len(checkpoints(run)) and checkpoints(run)[-1] > before)
        time.sleep(draw.uniform(0, 0.03))
        killed = draw.choice(children)
        killed.kill()
        assert [child.wait() for child in children] == [-signal.SIGKILL if child is killed else 1 for child in children]
        kept = checkpoints(run)
        found = checkpoint.latest(run)
        assert found is not None
        tensors, values = restoring.load(found)
        assert values["saved"] == values["step"] == kept[-1] > before
        assert (tensors["coder-0"]["w"] == values["step"]).all()
        assert tensors["coder-0"]["w"].shape == (50_000,)
        assert {path.name[:5] for path in (run / "checkpoints").iterdir()} == {"step-"}
        before = kept[-1]


# Row 9


STORED = {"activations.source": "disk", "activations.block_rows": 8}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model, tiny_text):
    """A run on activations from disk, with its cache: folders `run` and `cache`."""
    folder = tmp_path_factory.mktemp("made")
    log, work = folder / "log.txt", partial(sae_train, ["--config", str(folder / "config.yaml")])
    config = tiny_config(tiny_model, tiny_text, {**STORED, "run_dir": str(folder / "run")})
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    child = Child(log, work, {"SAE_CACHE": str(folder / "cache")})
    assert child.wait() == 0, child.output
    return folder


@pytest.mark.parametrize("name", ["b_enc", "W_dec"])
def test_nan_in_saved_weights_names_the_tensor(tmp_path, made, capsys, name):
    folder = shutil.copytree(made / "run" / "coders" / "model.layers.1", tmp_path / "coder")
    tensors = {key: value.clone() for key, value in load_tensors(folder / "sae.safetensors").items()}
    tensors[name].view(-1)[-1] = torch.nan
    save_tensors(folder / "sae.safetensors", tensors)
    config = json.loads((folder / "cfg.json").read_text())
    write_json(folder / "cfg.json", {**config, "sha256": sha256_file(folder / "sae.safetensors")})
    with pytest.raises(DataError, match=f"tensor {name} holds NaN or Inf"):
        sae.load(folder)
    assert sae_eval([str(folder)]) == 1
    assert f"tensor {name} holds NaN" in capsys.readouterr().err


# Row 10: the kernel refuses to let a file grow, which a process can ask for, in place of a full disk


def full(limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def full_once_saved(run: Path, limit: int) -> None:
    wait_for_checkpoint(run, 5)
    full(limit)


def full_for_the_log(run: Path) -> None:
    wait_for_checkpoint(run, 5)
    full((run / "metrics.jsonl").stat().st_size + 10)


def full_before(method: str, limit: int) -> None:
    original = getattr(sae.training.loop.Run, method)

    def last(*args, **kwargs):
        full(limit)
        return original(*args, **kwargs)

    setattr(sae.training.loop.Run, method, last)


LATE, CODER = {"log.every_steps": 100}, "coders/model.layers.1"
FULL = {  # when: (changed fields, what fills up, the file named, the checkpoints left)
    "tokens": ({}, lambda run: partial(full, 10_000), "cache/tokens/", []),
    "activations": (
        {"activations.source": "disk", "activations.block_rows": 16},
        lambda run: partial(full, 20_000),
        "cache/activations/",
        [],
    ),
    "checkpoint": (
        LATE,
        lambda run: partial(at_step, 7, partial(full_once_saved, run, 20_000)),
        "checkpoints/step-000000010",
        [5],
    ),
    "log": ({}, lambda run: partial(at_step, 7, partial(full_for_the_log, run)), "metrics.jsonl", [5]),
    "coder": (LATE, lambda run: partial(full_before, "_saved", 6_000), f"{CODER}/sae.safetensors", [15, 20]),
    "evaluation": (LATE, lambda run: partial(full_before, "_evaluate", 2_500), f"{CODER}/cfg.json", [15, 20]),
}


@pytest.mark.parametrize("when", [w if w == "checkpoint" else pytest.param(w, marks=pytest.mark.slow) for w in FULL])
def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_room(
    tmp_path, made, tiny_model, tiny_text, tiny_train, when
):
    changes, limit, named, kept = FULL[when]
    if when == "activations":
        shutil.copytree(made / "cache" / "tokens", cache_dir() / "tokens")
    run, config = tmp_path / "run", tmp_path / "full.yaml"
    config.write_text(to_yaml(tiny_config(tiny_model, tiny_text, changes)), encoding="utf-8")
    argv = ["--config", str(config), "--run-dir", str(run)]
    child = Child(tmp_path / "log.txt", partial(sae_train, argv, limit(run)))
    assert child.wait() == 1, child.output
    error = child.output.splitlines()[-1]
    assert error.startswith("error: ")
    assert "File too large" in error
    assert named in error
    assert checkpoints(run) == kept
    for step in (run / "checkpoints").glob("step-*"):
        verify(step)
    code, printed = tiny_train(options=("--resume", run))
    assert code == 0, printed
    code, printed = tiny_train(changes, folder=tmp_path / "undisturbed")
    assert code == 0, printed
    assert_equal(run, tmp_path / "undisturbed")


# Row 11


@pytest.fixture
def cached(made, tiny_train):
    """Gives this test the cache and returns the run that uses it, in a folder of its own."""
    shutil.copytree(made / "cache", cache_dir())

    def run(changes: dict | None = None, **more):
        return tiny_train({**STORED, **(changes or {})}, **more)

    return run


def the(pattern: str) -> Path:
    return next(iter(sorted(cache_dir().glob(pattern))))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def other_type(path: Path) -> None:
    save_tensors(path, {name: value.double() for name, value in load_tensors(path).items()})


def other_run(path: Path) -> None:
    save_tensors(path, {name: value.flip(0) for name, value in load_tensors(path).items()})


def lost(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("source", "damage"),
    [
        ("disk", flip),
        ("live", cut),
        *(pytest.param("disk", d, marks=pytest.mark.slow) for d in (cut, other_type, other_run, lost)),
        pytest.param("live", lost, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_shard_is_named_and_repair_makes_it_again(tmp_path, made, cached, source, damage):
    kind = "activations/*/shard-000003" if source == "disk" else "tokens/*/train/shard-000000"
    shard, changes = the(f"{kind}.safetensors"), {"activations.source": source}
    good = {path: path.stat().st_mtime_ns for path in shard.parent.glob("shard-*.safetensors") if path != shard}
    digest = sha256_file(shard)
    damage(shard)
    if damage is not lost or source == "live":  # a lost block is not damage: it is computed like a new one
        code, printed = cached(changes, folder=tmp_path / "damaged")
        assert code == 1
        assert printed.splitlines()[-1].startswith(f"error: {shard}: ")
        assert "run again with --repair" in printed
    code, printed = cached(changes, folder=tmp_path / "run", options=("--repair",))
    assert code == 0, printed
    assert sha256_file(shard) == digest
    assert {path: path.stat().st_mtime_ns for path in good} == good
    assert_equal(tmp_path / "run", made / "run")


def test_an_extra_token_shard_is_named_and_goes_with_a_repair(tmp_path, cached):
    extra = the("tokens/*/train/shard-000000.safetensors").with_name("shard-000001.safetensors")
    shutil.copy(extra.with_name("shard-000000.safetensors"), extra)
    code, printed = cached(folder=tmp_path / "damaged")
    assert code == 1
    assert f"error: {extra}: does not belong" in printed
    assert cached(folder=tmp_path / "run", options=("--repair",))[0] == 0
    assert not extra.exists()


@pytest.mark.slow
def test_a_block_damaged_under_a_running_run_costs_only_what_came_after_the_last_checkpoint(
    tmp_path, cached, monkeypatch
):
    run, original = tmp_path / "run", sae.training.trainer.CoderTrainer.step
    changes = {"tokens": 40 * 512, "batch_tokens": 512, "activations.prefetch_blocks": 0}
    blocks = sorted(cache_dir().glob("activations/*/shard-*.safetensors"))

    def step(self, x, index):
        if index == 8:
            for block in blocks[64:]:  # those of the lanes' next pools
                flip(block)
        return original(self, x, index)

    with monkeypatch.context() as patch:
        patch.setattr(sae.training.trainer.CoderTrainer, "step", step)
        code, printed = cached(changes, folder=run)
    assert code == 1, printed
    assert "run again with --repair" in printed
    assert checkpoints(run) == [25, 30]
    code, printed = cached(options=("--resume", run, "--repair"))
    assert code == 0, printed
    assert "continuing" in printed
    assert cached(changes, folder=tmp_path / "undisturbed")[0] == 0
    assert_equal(run, tmp_path / "undisturbed")


def test_a_damaged_checkpoint_is_passed_over_and_made_again(tmp_path, made, cached):
    run = shutil.copytree(made / "run", tmp_path / "run")
    assert checkpoints(run) == [15, 20]
    flip(run / "checkpoints" / "step-000000020" / "coder-0.safetensors")
    code, printed = cached(options=("--resume", run))
    assert code == 0, printed
    assert "checkpoint passed over" in printed
    assert "continuing" in printed
    assert "at step 15 of 20" in printed
    assert_equal(run, made / "run")
    verify(run / "checkpoints" / "step-000000020")


def test_no_intact_checkpoint_is_said_and_nothing_is_touched(tmp_path, made, cached):
    run = shutil.copytree(made / "run", tmp_path / "run")
    for path in run.glob("checkpoints/*/coder-0.safetensors"):
        cut(path)
    before = files(run)
    code, printed = cached(options=("--resume", run))
    assert code == 1
    assert "none of 2 checkpoints is intact" in printed
    assert files(run) == before


def test_keeping_one_checkpoint_never_prefers_a_damaged_one(tmp_path):
    def save(step: int, keep: int) -> None:
        saver = Saver(tmp_path, keep)
        saver.save(step, {"x": Part.of({"w": torch.zeros(1)})}, {})
        saver.wait()

    save(1, keep=2)
    save(2, keep=2)
    flip(tmp_path / "checkpoints" / "step-000000002" / "x.safetensors")
    save(1, keep=1)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-000000001"


# Row 12


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("activations/*/header.json", "sites", ["model.layers.0"]),
        ("tokens/*/train/header.json", "tokenizer", "0123456789abcdef"),
    ],
)
def test_a_cache_of_something_else_is_refused_with_both_fingerprints(tmp_path, made, cached, kind, key, value):
    path = the(kind)
    header = json.loads(path.read_text())
    ours = header["fingerprint"][key]
    header["fingerprint"][key] = value
    write_json(path, header)
    changes = {"activations.source": "disk" if kind.startswith("activations") else "live"}
    code, printed = cached(changes, folder=tmp_path / "refused")
    assert code == 1
    assert printed.splitlines()[-1] == (
        f"error: {path.parent}: was made with other settings ({key}: {value!r} there, {ours!r} wanted); "
        "run again with --repair, which makes it again"
    )
    code, printed = cached(changes, folder=tmp_path / "run", options=("--repair",))
    assert code == 0, printed
    assert_equal(tmp_path / "run", made / "run")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"\xff\x00", "header.json is not valid JSON: "),
        (b'{"kind": "tokens", "version": 1, "fingerprint": []}', "header.json: not the header of a store; "),
        (b'{"kind": "tokens", "version": 1, "fingerprint": {}}', "holds tokens, not activations; "),
    ],
)
def test_an_unreadable_or_foreign_cache_is_named_and_repair_makes_it_again(tmp_path, made, cached, content, named):
    path = the("activations/*/header.json")
    path.write_bytes(content)
    code, printed = cached(folder=tmp_path / "refused")
    assert code == 1
    error = printed.splitlines()[-1]
    assert error.startswith(f"error: {path.parent}")
    assert named in error
    assert error.endswith("run again with --repair, which makes it again")
    code, printed = cached(folder=tmp_path / "run", options=("--repair",))
    assert code == 0, printed
    assert_equal(tmp_path / "run", made / "run")


@pytest.mark.slow
def test_another_setting_gets_a_cache_of_its_own(tmp_path, cached):
    before = files(cache_dir() / "activations")
    code, printed = cached({"activations.dtype": "bfloat16"}, folder=tmp_path / "run")
    assert code == 0, printed
    assert before < files(cache_dir() / "activations")
    assert len(list((cache_dir() / "activations").iterdir())) == 2


@pytest.mark.parametrize("changed", ["text", "weights", "config"])
def test_a_resume_on_other_text_or_another_model_is_refused(tmp_path, tiny_train, changed):
    model, text, run = tmp_path / "model", tmp_path / "text", tmp_path / "run"
    tiny_model_folder(model)
    tiny_text_folder(text)
    assert tiny_train({"tokens": 256}, model=model, text=text, folder=run)[0] == 0
    before = (run / "metrics.jsonl").read_bytes()
    if changed == "text":
        (text / "000.txt").write_text("something else")
    elif changed == "weights":
        path = model / "model.safetensors"
        save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    else:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    code, printed = tiny_train(options=("--resume", run))
    assert code == 2
    assert f"--resume: the {changed} is not that of the run" in printed
    assert (run / "metrics.jsonl").read_bytes() == before
