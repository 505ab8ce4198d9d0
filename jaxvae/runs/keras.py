"""Import of a saved Keras model as a run directory."""

from dataclasses import replace
from pathlib import Path

import jax

from jaxvae.interchange.keras import load_keras_layers
from jaxvae.runs.checkpoints import open_checkpoints, write
from jaxvae.runs.config import configured
from jaxvae.runs.directory import expect_no_run, make_directory, write_config
from jaxvae.training.state import state_of


def import_keras(
    path: str | Path, run_dir: str | Path, decoder: str | Path | None = None, data: str = "mnist-5k"
) -> str:
    """Make a run directory from a Keras model, to evaluate, to draw and to start from.

    Args:
      path: a .keras, .weights.h5 or .h5 file.
      run_dir: the directory to make.
      decoder: the file of the decoder, if it is a separate file.
      data: the data set for evaluation and figures, as in `jaxvae train --data`.

    Returns:
      A line that names the role of each layer.

    Raises:
      InputError: the model cannot be read, as for `load_keras`; the directory already holds a
        run, or cannot be written.
    """
    run_dir = Path(run_dir)
    expect_no_run(run_dir)
    params, layers = load_keras_layers(path, decoder)
    config = replace(configured({"data": data}), model=params.config)
    make_directory(run_dir)
    with open_checkpoints(run_dir) as checkpoints:
        write(checkpoints, state_of(params, jax.random.key(config.seed), config.train), {})
    write_config(run_dir, config)  # last, as it makes the directory a run
    return layers
