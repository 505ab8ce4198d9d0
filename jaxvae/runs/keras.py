"""A run directory made of a model that Keras has saved."""

from dataclasses import replace
from pathlib import Path

import jax

from jaxvae.interchange.keras import load_keras_layers
from jaxvae.runs.checkpoints import save
from jaxvae.runs.config import configured
from jaxvae.runs.directory import expect_no_run, make_directory, write_config
from jaxvae.training.state import state_of


def import_keras(
    path: str | Path, run_dir: str | Path, decoder: str | Path | None = None, data: str = "mnist-5k"
) -> str:
    """Make a run directory of a Keras model, to evaluate, to draw and to start from.

    Args:
      path: a .keras, .weights.h5 or .h5 file.
      run_dir: the directory to make.
      decoder: the same as `path`, where the decoder is in a file of its own.
      data: the data set to evaluate and draw it with, as of `jaxvae train`.

    Returns:
      A line that says which layer was taken for what.

    Raises:
      InputError: as of `load_keras`; there is a run in the directory already, or it cannot be
        written.
    """
    run_dir = Path(run_dir)
    expect_no_run(run_dir)
    params, layers = load_keras_layers(path, decoder)
    config = replace(configured({"data": data}), model=params.config)
    make_directory(run_dir)
    save(run_dir, state_of(params, jax.random.key(config.seed), config.train))
    write_config(run_dir, config)  # last: now it is a run
    return layers
