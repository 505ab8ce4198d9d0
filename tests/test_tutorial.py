"""The tutorial, as it would run on a reader's machine but for one epoch instead of ten."""

import ast
from pathlib import Path

import nbformat
import pytest
from conftest import KEPT_PROGRAMS
from nbclient import NotebookClient

DOCS = Path(__file__).parent.parent / "docs"
NAMES = ("tutorial.ipynb", "tutorial.ko.ipynb")


def read(name):
    return nbformat.read(DOCS / name, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell):
    return [output for output in cell.outputs if "image/png" in output.get("data", {})]


@pytest.fixture(scope="module")
def executed():
    """A notebook after every cell of it has run; a cell that fails raises here."""
    notebook = read(NAMES[0])  # whose code the other's is
    first = code_cells(notebook)[0]
    assert first.source.count("EPOCHS = 10\n") == 1
    first.source = first.source.replace("EPOCHS = 10\n", "EPOCHS = 1\n")
    for cell in code_cells(notebook):
        cell.outputs = []
    folder = {"metadata": {"path": str(DOCS)}}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in KEPT_PROGRAMS.items():
            environment.setenv(name, value)
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
    return notebook


def test_every_cell_runs_without_an_error_or_a_warning(executed):
    outputs = [output for cell in code_cells(executed) for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output["text"] for output in outputs if output.get("name") == "stderr"]


def test_it_ends_with_the_picture_of_the_latent_plane(executed):
    last = executed.cells[-1]
    assert "manifold(" in last.source
    assert len(pictures(last)) == 1


def test_the_two_languages_run_the_same_code():
    english, korean = (
        [ast.dump(ast.parse(cell.source.replace("%matplotlib inline", ""))) for cell in cells]
        for cells in map(code_cells, map(read, NAMES))
    )
    assert english == korean


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_outputs_are_of_a_whole_run_in_order(name):
    cells = code_cells(read(name))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert "epoch 10 " in printed
    assert pictures(cells[-1])
    assert (DOCS / name).stat().st_size < 500_000
