"""Configurations check themselves."""

import json
from dataclasses import replace

import pytest
from conftest import OwnDecoder, OwnEncoder, refused

from jaxvae import InputError, ModelConfig, TrainConfig
from jaxvae.models.config import CHOICES, NETWORKS
from jaxvae.models.likelihoods import LIKELIHOODS
from jaxvae.models.networks import NETWORKS as MODULES
from jaxvae.objectives import OBJECTIVES

OWN = (OwnEncoder(2), OwnDecoder((28, 28, 1)))


def test_the_defaults_are_the_notebooks_model_and_a_batch_of_128():
    assert ModelConfig() == ModelConfig(
        image_shape=(28, 28, 1),
        latent_dim=2,
        network="conv",
        likelihood="bernoulli",
        prior="standard_normal",
        posterior="gaussian",
        num_classes=0,
    )
    assert TrainConfig() == TrainConfig(
        batch_size=128,
        epochs=10,
        learning_rate=1e-3,
        beta=1,
        objective="elbo",
        num_samples=1,
        warmup="none",
        free_bits=0,
        optimizer="rmsprop",
        schedule="constant",
        binarization="none",
    )


def test_every_name_is_carried_out_somewhere():
    assert set(CHOICES["model"]["likelihood"]) == set(LIKELIHOODS)
    assert set(CHOICES["train"]["objective"]) == set(OBJECTIVES)
    assert set(NETWORKS) == set(MODULES)


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (config, name, value)
        for config, kind in ((ModelConfig(), "model"), (TrainConfig(warmup_steps=1), "train"))
        for name, values in CHOICES[kind].items()
        for value in values
    ]
    + [(ModelConfig(), "network", value) for value in NETWORKS],
)
def test_every_name_is_taken_and_no_other(config, name, value):
    assert getattr(replace(config, **{name: value}), name) == value
    for other in (value.upper(), None, 1, (value,)):
        with refused(f"{name} is {other!r}: expected ", repr(value)):
            replace(config, **{name: other})


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(),
        ModelConfig(
            image_shape=(7, 5, 3),
            latent_dim=9,
            compute_dtype="bfloat16",
            network="residual:width=8",
            likelihood="discretized_logistic",
            prior="mixture:components=17",
            posterior="iaf:steps=4",
            num_classes=10,
        ),
        TrainConfig(),
        TrainConfig(
            batch_size=20,
            epochs=3,
            learning_rate=3e-4,
            beta=0.5,
            objective="iwae",
            num_samples=5,
            warmup="cyclical",
            warmup_steps=100,
            mmd_weight=10,
            optimizer="adam",
            epsilon=1e-4,
            schedule="burda",
            binarization="dynamic",
        ),
        TrainConfig(free_bits=0.25),
    ],
    ids=["the default model", "another", "the default training", "another", "free bits"],
)
def test_a_config_survives_json(config):
    back = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert hash(back) == hash(config)


def test_a_field_that_an_older_file_lacks_has_its_default():
    assert ModelConfig.from_dict({"image_shape": [28, 28, 1], "latent_dim": 2}) == ModelConfig()
    assert TrainConfig.from_dict({"learning_rate": 1e-3}) == TrainConfig(beta=1.0)


def test_modules_of_ones_own_are_a_network():
    config = ModelConfig(network=OWN, likelihood="gaussian")
    assert config.network == OWN
    assert hash(config) == hash(ModelConfig(network=list(OWN), likelihood="gaussian"))
    assert config != ModelConfig(network=(OwnEncoder(3), OWN[1]), likelihood="gaussian")


def test_of_modules_of_ones_own_json_keeps_only_that_there_are_some():
    config = ModelConfig(image_shape=(6, 5, 2), network=OWN, posterior="iaf")
    written = json.loads(json.dumps(config.to_dict()))
    assert written == replace(config, network="mlp").to_dict() | {
        "image_shape": [6, 5, 2],
        "network": "own",
    }
    with refused("network of its own: hand its modules over, network=(encoder, decoder)"):
        ModelConfig.from_dict(written)
    assert ModelConfig.from_dict(written | {"network": OWN}) == config


@pytest.mark.parametrize(
    "network",
    [
        OWN[0],
        OWN[:1],
        (*OWN, OWN[0]),
        (OwnEncoder, OwnDecoder),
        ("mlp", "mlp"),
        (OWN[0], None),
        lambda images: images,
    ],
    ids=["one module", "a tuple of one", "three", "classes", "names", "half a pair", "a function"],
)
def test_a_network_that_is_no_pair_of_modules_is_refused(network):
    with refused("network is ", "expected 'notebook', 'mlp', 'residual' or 'spatial', or a"):
        ModelConfig(network=network)


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
        (ModelConfig, {"network": "cnn"}, "network is 'cnn': expected 'notebook', 'mlp', "),
        (ModelConfig, {"network": "mlp:width=0"}, "width is 0: expected at least 1"),
        (ModelConfig, {"width": 8}, "width is 8, but this network has a width of its own: expec"),
        (ModelConfig, {"prior_components": 0}, "prior_components is 0: expected at least 1"),
        (ModelConfig, {"flow_steps": 0}, "flow_steps is 0: expected at least 1"),
        (ModelConfig, {"flow_steps": 1.5}, "flow_steps is 1.5: expected a whole number"),
        (ModelConfig, {"num_classes": -1}, "num_classes is -1: expected at least 0"),
        (ModelConfig, {"num_classes": "ten"}, "num_classes is 'ten': expected a whole number"),
        (
            ModelConfig,
            {"prior": "vamp", "num_classes": 10},
            "prior is 'vamp', but its pseudo-inputs have no classes: expected 'standard_normal' or",
        ),
        (TrainConfig, {"batch_size": -1}, "batch_size is -1: expected at least 1"),
        (TrainConfig, {"epochs": 0}, "epochs is 0: expected at least 1"),
        (TrainConfig, {"epochs": "ten"}, "epochs is 'ten': expected a whole number"),
        (TrainConfig, {"learning_rate": 0}, "learning_rate is 0: expected a number above 0"),
        (TrainConfig, {"learning_rate": float("nan")}, "learning_rate is nan"),
        (TrainConfig, {"learning_rate": "fast"}, "learning_rate is 'fast'"),
        (TrainConfig, {"epsilon": 0}, "epsilon is 0: expected a number above 0"),
        (TrainConfig, {"beta": -0.1}, "beta is -0.1: expected a number of at least 0"),
        (TrainConfig, {"beta": float("nan")}, "beta is nan"),
        (TrainConfig, {"beta": True}, "beta is True"),
        (TrainConfig, {"free_bits": -1}, "free_bits is -1: expected a number of at least 0"),
        (TrainConfig, {"mmd_weight": float("inf")}, "mmd_weight is inf: expected a number of"),
        (TrainConfig, {"num_samples": 0}, "num_samples is 0: expected at least 1"),
        (TrainConfig, {"warmup_steps": -1}, "warmup_steps is -1: expected at least 0"),
        (TrainConfig, {"warmup": "linear"}, "warmup_steps is 0: expected at least 1"),
        (TrainConfig, {"warmup": "cyclical"}, "warmup_steps is 0: expected at least 1"),
        (TrainConfig, {"momentum": 0.9}, "TrainConfig has no field 'momentum': expected batch_"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected(kind, fields, says):
    with pytest.raises(InputError, match=says) as error:
        kind.from_dict(fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("objective", ["elbo", "stl", "iwae", "dreg", "beta_tc", "mmd"])
def test_several_samples_are_for_objectives_that_take_several(objective):
    assert TrainConfig(objective=objective).num_samples == 1
    if objective not in ("beta_tc", "mmd"):
        assert TrainConfig(objective=objective, num_samples=4).num_samples == 4
        return
    with refused("num_samples is 4: expected 1 with the objective", repr(objective)):
        TrainConfig(objective=objective, num_samples=4)


@pytest.mark.parametrize("objective", ["stl", "iwae", "dreg", "beta_tc", "mmd"])
def test_free_bits_are_of_the_elbo(objective):
    assert TrainConfig(objective="elbo", free_bits=0.5).free_bits == 0.5
    with refused("free_bits is 0.5: expected 0 with the objective", repr(objective)):
        TrainConfig(objective=objective, free_bits=0.5)


def test_something_else_than_an_object_is_refused():
    with pytest.raises(InputError, match="expected an object of named fields"):
        ModelConfig.from_dict([1, 2])
