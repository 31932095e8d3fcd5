"""The notebooks run from top to bottom, are short, and show what they print."""

import pytest
from rigs.notebooks import MOST_CELLS, NOTEBOOKS, execute, read

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_six():
    assert len(NOTEBOOKS) == 6


@each
def test_it_is_short_and_shows_what_it_prints(path):
    notebook = read(path)
    assert len(notebook.cells) <= MOST_CELLS
    assert notebook.cells[0].source.startswith("# ")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run tests/make/notebooks.py"
    assert sum(bool(cell.outputs) for cell in code) >= len(code) // 2
    assert all(output.output_type != "error" for cell in code for output in cell.outputs)
    for cell in code:
        compile(cell.source, path.name, "exec")


@pytest.mark.slow
@each
def test_it_runs(path, tmp_path):
    before = read(path)
    after = execute(read(path), tmp_path)
    shown = [[[output.output_type for output in cell.get("outputs", [])] for cell in n.cells] for n in (before, after)]
    assert shown[0] == shown[1], "run tests/make/notebooks.py"
