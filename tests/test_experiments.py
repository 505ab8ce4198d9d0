"""What the experiments share."""

import importlib.util
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jaxvae.cli.commands import _COMMANDS
from jaxvae.cli.parser import make_parser
from jaxvae.data.covariates import Covariate
from jaxvae.runs.config import configured


def load(name):
    path = Path(__file__).parents[1] / "experiments" / f"{name}.py"
    made = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    return module


def test_a_killed_call_measures_only_what_the_file_of_results_lacks(tmp_path):
    path, calls = tmp_path / "new" / "results.json", []

    def measure(name):
        calls.append(name)
        if calls == ["a", "b"]:
            raise KeyboardInterrupt
        if name == "b":  # another call writes meanwhile
            path.write_text(json.dumps(json.loads(path.read_text()) | {"d": "D"}))
        return {name: name.upper()}

    measure_missing = load("resumable").measure_missing
    with pytest.raises(KeyboardInterrupt):
        measure_missing(path, [], ["a", "b", "c"], measure)
    results = measure_missing(path, [], ["a", "b", "c"], measure)
    assert calls == ["a", "b", "b", "c"]
    assert results == json.loads(path.read_text()) == {"a": "A", "b": "B", "c": "C", "d": "D"}


def test_an_unknown_name_of_a_model_is_refused_before_any_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", "mnist", str(tmp_path), "a", "x"])
    with pytest.raises(SystemExit, match="unknown name 'x': expected one of 'a', 'b'"):
        load("resumable").compare("usage", ["a", "b"], pytest.fail, pytest.fail)


def test_a_run_is_kept_with_the_command_that_makes_it(tmp_path):
    record = load("record")
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
