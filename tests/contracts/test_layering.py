"""The tree's order: sae knows neither interp nor cli, interp does not know cli, and help is instant."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "datasets", "openai", "accelerate", "matplotlib")


def imports(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                yield path.relative_to(ROOT), name.split(".")[0]


@pytest.mark.parametrize(("folder", "forbidden"), [("sae", {"interp", "cli", "tests"}), ("interp", {"cli", "tests"})])
def test_lower_layers_do_not_import_higher_ones(folder, forbidden):
    assert not [(str(path), name) for path, name in imports(folder) if name in forbidden]


def test_no_pickle_anywhere():
    assert not [
        (str(path), name)
        for folder in ("sae", "interp", "cli")
        for path, name in imports(folder)
        if name in {"pickle", "dill", "joblib", "cloudpickle"}
    ]


@pytest.mark.parametrize("module", ["cli.train", "cli.evaluate", "cli.explain", "cli.load"])
def test_help_loads_nothing_heavy(module):
    code = f"""
import sys
import {module} as command
try:
    command.main(["--help"])
except SystemExit as ended:
    assert ended.code == 0
print("LOADED", *[name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "usage: sae-" in done.stdout
    loaded = done.stdout.splitlines()[-1].split()[1:]
    assert not loaded
