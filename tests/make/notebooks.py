"""Executes the notebooks of docs/ and writes what they print into them: python tests/make/notebooks.py [NAME ...]."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import nbformat
from rigs.notebooks import NOTEBOOKS, execute, read

for path in NOTEBOOKS:
    if path.stem in (sys.argv[1:] or [path.stem]):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(execute(read(path), Path(folder)), path)
        print(path)
