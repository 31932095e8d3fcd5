"""Makes tests/golden/run-v0: a run ended by a kill, an explanation ended by a signal, and what both came to in the end.

Run where `sae`, `interp` and the helpers of tests are those of commit 42b0534, the last before modules had rooms:

    git archive 42b0534 | tar -x -C /tmp/v0
    PYTHONPATH=/tmp/v0:/tmp/v0/tests:/tmp/v0/tests/interp python tests/make/run_v0.py tests/golden/run-v0

All paths in it are relative to that folder, so that it is the same run wherever it lies. `made_by.json` tells the
versions, and a hash of the model's activations, which says whether a machine computes as the one did that made it.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import sae.trainer
import torch
import transformers
from fake_llm import Asked, FakeLLM
from fakes import tiny_config, tiny_model_folder, tiny_text_folder
from interp_runs import scripted
from sae.activations import capture
from sae.models import load_language_model
from sae.settings import to_yaml
from sae.spec import Site

import cli.explain
import cli.train

KILLED_AT = 13  # three steps after the checkpoint
STOPPED_AFTER = 15  # calls, of about twice as many
SETTINGS = {
    "tokens": 20 * 128,
    "optim.ema": 0.9,
    "eval.tokens": 64,
    "eval.every_steps": 8,
    "checkpoints.every_steps": 10,
    "grid": {
        "coder.selection": {
            "topk": {"type": "topk", "k": 4},
            "mutual": {"type": "mutual_choice", "k": 4},
        }
    },
}
EXPLAIN = """
run_dir: explained
coder: {path: expected/coders/model.layers.1/topk}
model: {device: cpu}
evidence: {tokens: 4000, sizes: {explain: 10, valid: 6, test: 12, top: 6}}
latents: "23,55,57"
examples: {shown: 6, contrast: 3, valid: 3, test: 10}
scorers:
  detection: {type: detection, layout: batch, windows_per_request: 5}
  embedding: {type: embedding}
models: {explainer: {model: fake}}
null_latents: 4
in_flight: 1
"""


def main(folder: Path) -> None:
    os.environ["SAE_CACHE"] = tempfile.mkdtemp()
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    tiny_model_folder(Path("model"), initializer_range=0.5)
    tiny_text_folder(Path("text"), documents=12, words=100)
    Path("config.yaml").write_text(to_yaml(tiny_config(Path("model"), Path("text"), SETTINGS)))
    if os.fork() == 0:
        train_and_die()
    os.wait()
    Path("config.yaml").unlink()
    shutil.copytree("run", "expected")
    assert cli.train.main(["--resume", "expected"]) == 0
    Path("explain.yaml").write_text(EXPLAIN)
    calls = []

    def cut_off(asked: Asked) -> str:
        calls.append(asked)
        if len(calls) == STOPPED_AFTER:
            os.kill(os.getpid(), signal.SIGTERM)
        return scripted(asked)

    with FakeLLM(cut_off) as server:
        assert cli.explain.main(explain(server)) == 75
    shutil.copytree("explained", "begun")
    with FakeLLM(scripted) as server:
        assert cli.explain.main(explain(server)) == 0
        calls_to_go_on = len(server.calls)
    shutil.move("explained/results.parquet", "expected")
    shutil.rmtree("explained")
    shutil.move("begun", "explained")
    for name in ("checkpoints", "report.html", "timings.jsonl", "config.yaml", "env.json", ".lock"):
        path = Path("expected", name)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for lock in Path().rglob(".lock"):
        lock.unlink()
    lm = load_language_model("model", device="cpu")
    seen = capture(lm, [Site("model.layers.1")], torch.arange(512).view(8, 64) % 250)["model.layers.1"]
    made_by = {
        "commit": "42b0534",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "config": lm.fingerprint()["config"],
        "activations": hashlib.sha256(seen.numpy().tobytes()).hexdigest(),
        "calls_to_go_on": calls_to_go_on,
    }
    Path("made_by.json").write_text(json.dumps(made_by, indent=2) + "\n")


def train_and_die() -> None:
    original = sae.trainer.CoderTrainer.step

    def step(self, x, index):
        if index == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, x, index)

    sae.trainer.CoderTrainer.step = step
    cli.train.main(["--config", "config.yaml", "--run-dir", "run"])


def explain(server: FakeLLM) -> list[str]:
    return ["--config", "explain.yaml", f"--models.explainer.base_urls=[{server.url}]"]


if __name__ == "__main__":
    main(Path(sys.argv.pop()).absolute())
