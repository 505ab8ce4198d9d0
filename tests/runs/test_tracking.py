"""MLflow and Weights & Biases hold what the run did, and are read back."""

import importlib.util
import json
import shutil
import warnings

import jax
import numpy as np
import pytest
from conftest import SignalAt, refused

import jaxvae
from jaxvae.errors import NotTracked, Preempted
from jaxvae.runs import directory, loop, sweep, tracking
from jaxvae.runs.config import configured, read_config, resumed
from jaxvae.runs.data import load_run_data
from jaxvae.runs.drawing import Figures
from jaxvae.runs.files import read_metrics

pytestmark = [
    pytest.mark.usefixtures("compile_quickly"),
    # SQLAlchemy 2.1 deprecates what MLflow calls.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

FLAGS = {"network": "mlp:width=8", "batch_size": 64, "epochs": 2}
FIGURE = b"a figure"


def tracked(run_dir, flags, callbacks, *, resume=False):
    config = resumed(run_dir, flags) if resume else configured(flags)
    data = load_run_data(config)
    config = directory.start(run_dir, config, data, resume=resume)
    return loop.train(run_dir, config, data, callbacks=callbacks)


def metrics_of(line):
    return {"epoch": line["epoch"], "seconds": line["seconds"]} | {
        f"{split}/{name}": x for split in ("train", "test") for name, x in line[split].items()
    }
