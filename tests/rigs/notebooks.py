"""The notebooks of docs/: executed from top to bottom in a kernel of their own, as a reader would."""

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from rigs.markdown import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
MOST_CELLS = 15
SECONDS = 600  # of a cell, on a busy machine


def read(path: Path) -> NotebookNode:
    """Returns a notebook; nbformat's own error if it is none."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Returns the notebook with what its cells print in a folder; nbclient's error, with the cell, if one fails.

    Bars are left out: a page shows every state of theirs.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    options = {"timeout": SECONDS, "kernel_name": "python3", "coalesce_streams": True}
    client = NotebookClient(notebook, resources={"metadata": {"path": folder}}, **options)
    client.execute(env=environment)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the clock
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook
