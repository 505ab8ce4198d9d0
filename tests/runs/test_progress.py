"""What is shown of a training."""

import io

import nbformat
from nbclient import NotebookClient
from rich.console import Console

from jaxvae.runs.progress import Progress

RECORD = {
    "epoch": 1,
    "train": {"elbo": -205.0},
    "test": {"elbo": -190.0, "log_likelihood": -186.5, "kl": 3.5},
    "seconds": 2.0,
}
LINE = "epoch 1/2  ELBO -205.00 train, -190.00 test (log-likelihood -186.50, KL 3.50)  2.0 s, "


def shown(**kind):
    file = io.StringIO()
    with Progress(Console(file=file, width=100, **kind)).training(2, 1000, 0) as training:
        training.advance(500, elbo=-210.0)
        training.advance(496, elbo=-201.5)
        training.finish_epoch(RECORD)
    return file.getvalue()


def test_without_a_terminal_there_is_one_plain_line_for_each_epoch():
    assert shown() == LINE + "500 images/s\n"


def test_the_spread_of_many_models_is_told_beside_their_mean():
    file = io.StringIO()
    with Progress(Console(file=file, width=100)).training(2, 1000, 0) as training:
        training.finish_epoch({**RECORD, "test_sd": {"elbo": 1.25}})
    assert "ELBO -205.00 train, -190.00 ± 1.25 test (" in file.getvalue()


def test_a_terminal_gets_a_bar_with_time_rate_and_elbo_as_well():
    written = shown(force_terminal=True)
    assert LINE in written
    assert "epoch 2/2" in written
    assert "elapsed" in written
    assert "to go" in written
    assert "ELBO -201.5" in written
    assert "images/s" in written


CELL = """
from jaxvae.runs.progress import Progress
with Progress().training(2, 1000, 0) as training:
    training.advance(500, elbo=-210.0)
    training.finish_epoch({record})

import jax, jaxvae
from jaxvae.figures import manifold
manifold(jaxvae.init(jax.random.key(0), jaxvae.ModelConfig((8, 8, 1), network="mlp")), n=3)
"""


def test_a_jupyter_notebook_gets_the_lines_and_shows_figures_as_they_are():
    """In a real kernel, without any magic command and without a warning."""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(CELL.format(record=RECORD))]
    )
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    assert not [output for output in outputs if output.output_type in ("error", "stream")]
    assert any(LINE in output.get("data", {}).get("text/plain", "") for output in outputs)
    assert outputs[-1].output_type == "execute_result"
    assert "image/png" in outputs[-1].data
