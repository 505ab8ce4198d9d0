"""What is shown of a training."""

import io
import logging
from dataclasses import replace

import jax
import nbformat
import pytest
from nbclient import NotebookClient
from rich.console import Console

from jaxvae.runs.callbacks import Training
from jaxvae.runs.config import RunConfig
from jaxvae.runs.progress import Progress, _Compilations, counting, working

RECORD = {
    "epoch": 1,
    "train": {"elbo": -205.0},
    "test": {"elbo": -190.0, "log_likelihood": -186.5, "kl": 3.5},
    "seconds": 2.0,
}
LINE = "epoch 1/2  ELBO -205.00 train, -190.00 test (log-likelihood -186.50, KL 3.50)  2.0 s, "


# What a bar needs to know of one: two epochs of 1000 images.
TRAINING = Training(RunConfig(), None, 2, 1000, 0, 0, [], None, None)


def shown(training=TRAINING, record=RECORD, **kind):
    file = io.StringIO()
    progress = Progress(Console(file=file, width=100, **kind))
    progress.start(training)
    progress.dispatch(500, {"elbo": -210.0})
    progress.dispatch(496, {"elbo": -201.5})
    progress.epoch(record, None)
    progress.end(None)
    return file.getvalue()


def test_without_a_terminal_there_is_one_plain_line_for_each_epoch():
    assert shown() == LINE + "500 images/s\n"


def test_a_first_training_elbo_far_below_the_test_elbo_is_explained_once():
    """At the notebook's learning rate it is: -18,367 beside -190."""
    record = {**RECORD, "train": {"elbo": -18_367.0}}
    line, explained = shown(record=record).splitlines()
    assert line.startswith("epoch 1/2  ELBO -18367.00 train, -190.00 test (")
    assert explained.startswith(
        "  (train is the mean over all steps of the epoch, and the first st"
    )
    assert shown(record={**record, "epoch": 2}).count("\n") == 1


def test_the_spread_of_many_models_is_told_beside_their_mean():
    record = {**RECORD, "test_sd": {"elbo": 1.25}}
    assert "ELBO -205.00 train, -190.00 ± 1.25 test (" in shown(record=record)


def test_a_terminal_gets_a_bar_with_time_rate_and_elbo_as_well():
    written = shown(force_terminal=True)
    assert LINE in written
    assert "epoch 2/2" in written
    assert "elapsed" in written
    assert "left" in written
    assert "ELBO -201.5" in written
    assert "images/s" in written


def test_a_resumed_training_starts_its_bar_where_it_was():
    """Even where the lines of its epochs are lost."""
    resumed = replace(TRAINING, epochs=4, step=24, done=3)
    written = shown(resumed, {**RECORD, "epoch": 4}, force_terminal=True)
    assert "epoch 4/4" in written
    assert "epoch 1/4" not in written


CELL = """
import numpy as np
import jaxvae
from jaxvae.figures import manifold
images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
model = jaxvae.ModelConfig(network="mlp:width=8")
result = jaxvae.fit(images, model, jaxvae.TrainConfig(batch_size=12, epochs=2))
manifold(result.params, n=3)
"""


def test_a_jupyter_notebook_gets_the_lines_and_shows_figures_as_they_are():
    """In a real kernel, without any magic command and without a warning."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    assert not [output for output in outputs if output.output_type in ("error", "stream")]
    texts = [output.get("data", {}).get("text/plain", "") for output in outputs]
    for epoch in ("1/2", "2/2"):
        assert any(f"epoch {epoch}  ELBO -" in text and "images/s" in text for text in texts)
    assert outputs[-1].output_type == "execute_result"
    assert "image/png" in outputs[-1].data


def terminal(file):
    return Console(file=file, width=100, force_terminal=True)


def test_the_name_of_a_function_is_shown_while_it_is_compiled():
    def third(x):
        return x / 3

    seen = []
    with _Compilations(seen.append).listening():
        jax.jit(third)(2.0)
    assert seen == ["compiling third", ""]


@pytest.mark.parametrize("name", ["interpreters.pxla", "dispatch"])
def test_the_log_of_jax_is_left_as_it_was(name):
    logger = logging.getLogger(f"jax._src.{name}")
    before = logger.level, logger.propagate, list(logger.handlers)
    with working("evaluating", terminal(io.StringIO())):
        pass
    assert (logger.level, logger.propagate, logger.handlers) == before


def test_a_terminal_shows_that_a_training_is_prepared_and_then_its_bar():
    file = io.StringIO()
    progress = Progress(terminal(file))
    with progress.preparing():
        jax.jit(lambda x: x / 3)(2.0)
        progress.start(TRAINING)
        before = len(file.getvalue())
        progress.end(None)
    assert "preparing" in file.getvalue()[:before]
    assert "epoch 1/2" not in file.getvalue()[: file.getvalue().index("preparing")]
    assert "preparing" not in file.getvalue()[before:]
    assert "epoch 1/2" in file.getvalue()


def test_an_error_before_the_training_ends_the_line_of_its_preparation():
    file = io.StringIO()
    with pytest.raises(KeyError), Progress(terminal(file)).preparing():
        raise KeyError
    shows, hides = "\x1b[?25h", "\x1b[?25l"
    assert file.getvalue().rindex(shows) > file.getvalue().rindex(hides)  # the cursor


def test_images_that_are_done_are_counted():
    file = io.StringIO()
    with counting("encoding", "row", terminal(file)) as count:
        count(3, 10)
    assert "encoding" in file.getvalue()
    assert "3/10 rows" in file.getvalue()


def test_without_a_terminal_they_are_counted_in_plain_lines():
    file = io.StringIO()
    with counting("encoding", "row", Console(file=file), interval=0) as count:
        count(3, 10)
        count(10, 10)
    assert file.getvalue() == "encoding: 3/10 rows\nencoding: 10/10 rows\n"


def test_without_a_terminal_nothing_is_shown_of_what_takes_less_than_a_minute():
    file = io.StringIO()
    with working("evaluating", Console(file=file)), counting("x", console=Console(file=file)) as n:
        n(1, 2)
    with Progress(Console(file=file)).preparing():
        pass
    assert file.getvalue() == ""
