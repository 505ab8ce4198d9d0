"""What the experiments share."""

import importlib.util
import shlex
from dataclasses import replace
from pathlib import Path

from jaxvae.cli.commands import _COMMANDS
from jaxvae.cli.parser import make_parser
from jaxvae.data.covariates import Covariate
from jaxvae.runs.config import configured


def test_a_run_is_kept_with_the_command_that_makes_it(tmp_path):
    path = Path(__file__).parents[1] / "experiments" / "record.py"
    made = importlib.util.spec_from_file_location("record", path)
    record = importlib.util.module_from_spec(made)
    made.loader.exec_module(record)
    flags = {"data": str(tmp_path / "cells.h5ad"), "covariate_columns": "batch,age"}
    shape = {"image_shape": (5,), "num_covariates": 2, "network": "mlp:width=8"}
    config = configured({**flags, **shape, "likelihood": "gaussian", "label_column": "a b"})
    config = replace(config, covariates=(Covariate("batch"), Covariate("age")))
    command = record.command(config)
    assert command == (
        "jaxvae train --data cells.h5ad --covariate-columns batch,age --label-column 'a b' "
        "--likelihood gaussian --network mlp:width=8"
    )
    make_parser(_COMMANDS).parse_args(shlex.split(command)[1:])
    named = record.command(configured({"data": "tfds:oxford_flowers102/small"}))
    assert named == "jaxvae train --data tfds:oxford_flowers102/small"
