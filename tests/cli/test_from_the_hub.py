"""Model and data set by hub id: the real clients, against a hub on loopback."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from rigs.fake_hub import COMMIT, fake_hub
from rigs.fakes import tiny_config

from sae.base.settings import to_yaml

CODE = """
import sys
from cli.train import main
for line in sys.stdin:
    print("EXIT", main(line.split()), flush=True)
    print("EXIT", file=sys.stderr, flush=True)
"""
SHORT = {"tokens": 512, "model.name": "tiny/llama", "text.source": "tiny/words", "text.column": "words"}


@pytest.fixture
def hub(tmp_path, tiny_model, tiny_text):
    root = tmp_path / "hub"
    shutil.copytree(tiny_model, root / "models" / "tiny" / "llama")
    data = root / "datasets" / "tiny" / "words"
    data.mkdir(parents=True)
    rows = [json.dumps({"words": path.read_text(encoding="utf-8")}) for path in sorted(tiny_text.iterdir())]
    (data / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (data / "README.md").write_text("# Words\n", encoding="utf-8")
    with fake_hub(root, tmp_path / "home") as (environment, asked):
        yield environment, asked


@pytest.mark.slow
def test_a_run_from_hub_ids_and_what_is_not_there(hub, tmp_path, tiny_model, tiny_text):
    environment, asked = hub
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(tiny_config(tiny_model, tiny_text, SHORT)), encoding="utf-8")
    commands = [
        f"--config {config} --run-dir {tmp_path}/streamed --model.revision {COMMIT}",
        f"--config {config} --run-dir {tmp_path}/whole --text.streaming false --text.revision {COMMIT}",
        f"--config {config} --run-dir {tmp_path}/a --model.name tiny/lama",
        f"--config {config} --run-dir {tmp_path}/b --model.revision missing",
        f"--config {config} --run-dir {tmp_path}/c --text.source tiny/word",
        f"--config {config} --run-dir {tmp_path}/d --text.column text",
    ]
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        input="\n".join(commands),
        env={**os.environ, **environment, "SAE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    codes = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("EXIT")]
    assert codes == ["0", "0", "2", "2", "2", "2"], done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    fields = [
        "model.name: 'tiny/lama'",
        "model",
        "text.source: 'tiny/word'",
        "text.column: tiny/words has no column 'text'",
    ]
    assert len(errors) == len(fields)
    for line, start in zip(errors, fields, strict=True):
        assert line.startswith(f"error: {start}")
    assert "missing" in errors[1]
    assert any("/tiny/llama/resolve/" in request and "safetensors" in request for request in asked)
    assert any("/datasets/tiny/words/resolve/" in request for request in asked)
    streamed, whole = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("streamed", "whole"))
    assert streamed == whole
