"""Configurations check themselves."""

import json

import pytest

from jaxvae import InputError, ModelConfig, TrainConfig


def test_the_defaults_are_the_notebooks_model_and_a_batch_of_128():
    assert ModelConfig() == ModelConfig(image_shape=(28, 28, 1), latent_dim=2)
    assert TrainConfig() == TrainConfig(batch_size=128, epochs=10, learning_rate=1e-3)


def test_a_config_survives_json():
    config = ModelConfig(image_shape=(7, 5, 3), latent_dim=9, compute_dtype="bfloat16")
    back = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert hash(back) == hash(config)


def test_a_field_that_an_older_file_lacks_has_its_default():
    assert ModelConfig.from_dict({"image_shape": [28, 28, 1], "latent_dim": 2}) == ModelConfig()
    assert TrainConfig.from_dict({"learning_rate": 1e-3}) == TrainConfig(beta=1.0)


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        (ModelConfig, {"image_shape": (28, 28)}, r"image_shape is \(28, 28\): expected \(height"),
        (ModelConfig, {"image_shape": (28, 0, 1)}, r"image_shape\[1\] is 0: expected at least 1"),
        (ModelConfig, {"image_shape": None}, "image_shape is None"),
        (ModelConfig, {"latent_dim": 0}, "latent_dim is 0: expected at least 1"),
        (ModelConfig, {"latent_dim": 2.5}, "latent_dim is 2.5: expected a whole number"),
        (ModelConfig, {"latent_dim": True}, "latent_dim is True: expected a whole number"),
        (ModelConfig, {"compute_dtype": "half"}, "compute_dtype is 'half': expected 'float32' or"),
        (ModelConfig, {"compute_dtype": None}, "compute_dtype is None: expected"),
        (TrainConfig, {"batch_size": -1}, "batch_size is -1: expected at least 1"),
        (TrainConfig, {"epochs": 0}, "epochs is 0: expected at least 1"),
        (TrainConfig, {"epochs": "ten"}, "epochs is 'ten': expected a whole number"),
        (TrainConfig, {"learning_rate": 0}, "learning_rate is 0: expected a number above 0"),
        (TrainConfig, {"learning_rate": float("nan")}, "learning_rate is nan"),
        (TrainConfig, {"learning_rate": "fast"}, "learning_rate is 'fast'"),
        (TrainConfig, {"beta": -0.1}, "beta is -0.1: expected a number of at least 0"),
        (TrainConfig, {"beta": float("nan")}, "beta is nan"),
        (TrainConfig, {"beta": True}, "beta is True"),
        (TrainConfig, {"momentum": 0.9}, "TrainConfig has no field 'momentum': expected batch_"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected(kind, fields, says):
    with pytest.raises(InputError, match=says):
        kind.from_dict(fields)


def test_something_else_than_an_object_is_refused():
    with pytest.raises(InputError, match="expected an object of named fields"):
        ModelConfig.from_dict([1, 2])
