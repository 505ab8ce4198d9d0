"""The configuration of a training checks itself."""

import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import refused

from jaxvae import InputError, TrainConfig
from jaxvae.objectives import ELBO, OBJECTIVES, ImportanceWeighted, Linear, MaximumMeanDiscrepancy


def test_the_defaults_are_the_notebooks_and_a_batch_of_128():
    assert TrainConfig() == TrainConfig(
        batch_size=128,
        epochs=10,
        learning_rate=1e-3,
        optimizer="rmsprop",
        schedule="constant",
        objective="elbo",
        beta=1,
        warmup="none",
        binarization="none",
        clip_norm=0,
        skip_norm=0,
        accumulate=1,
        ema=0,
        trainable=(),
        patience=0,
    )
    assert TrainConfig().to_dict() == {
        "batch_size": 128,
        "epochs": 10,
        "learning_rate": 1e-3,
        "optimizer": "rmsprop",
        "schedule": "constant",
        "objective": "elbo",
        "beta": 1.0,
        "warmup": "none",
        "binarization": "none",
        "clip_norm": 0.0,
        "skip_norm": 0.0,
        "accumulate": 1,
        "ema": 0.0,
        "trainable": [],
        "patience": 0,
    }
    assert TrainConfig().objective == ELBO(num_samples=1, free_bits=0.0)


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(
            batch_size=20,
            epochs=3,
            learning_rate=3e-4,
            beta=0.5,
            objective="iwae:num_samples=5",
            warmup="cyclical:steps=100",
            optimizer="adam:eps=1e-4",
            schedule="burda",
            binarization="dynamic",
            clip_norm=2.5,
            skip_norm=100,
            accumulate=4,
            ema=0.999,
            trainable=("prior", "encoder"),
            patience=7,
        ),
        TrainConfig(objective="elbo:free_bits=0.25"),
        TrainConfig(objective="mmd:weight=10"),
        TrainConfig(schedule="warmup_cosine_decay_schedule:warmup_steps=50"),
    ],
    ids=["the default", "another", "free bits", "MMD", "a schedule of optax"],
)
def test_a_config_survives_json(config):
    back = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert hash(back) == hash(config)


def test_a_field_that_a_file_lacks_has_its_default():
    assert TrainConfig.from_dict({"learning_rate": 1e-3}) == TrainConfig(beta=1.0)
    assert TrainConfig.from_dict({}) == TrainConfig()


OLD = {  # as version 0.1 wrote it
    "batch_size": 128,
    "epochs": 10,
    "learning_rate": 1e-3,
    "beta": 1.0,
    "objective": "elbo",
    "num_samples": 1,
    "warmup": "none",
    "warmup_steps": 0,
    "free_bits": 0.0,
    "mmd_weight": 100.0,
    "optimizer": "rmsprop",
    "epsilon": 1e-7,
    "schedule": "constant",
    "binarization": "none",
}


def test_numbers_may_be_numpys():
    config = TrainConfig(learning_rate=np.float32(0.5), beta=np.int64(2))
    assert config == TrainConfig(learning_rate=0.5, beta=2.0)
    assert json.loads(json.dumps(config.to_dict()))["learning_rate"] == 0.5


@pytest.mark.parametrize(
    ("fields", "config"),
    [
        ({}, TrainConfig()),
        ({"num_samples": 3}, TrainConfig(objective="elbo:num_samples=3")),
        ({"objective": "iwae", "num_samples": 5}, TrainConfig(objective=ImportanceWeighted(5))),
        ({"free_bits": 0.25}, TrainConfig(objective=ELBO(free_bits=0.25))),
        ({"free_bits": 0.5, "num_samples": 2}, TrainConfig(objective=ELBO(2, 0.5))),
        ({"objective": "mmd"}, TrainConfig(objective="mmd")),
        (
            {"objective": "mmd", "mmd_weight": 10.0},
            TrainConfig(objective=MaximumMeanDiscrepancy(10.0)),
        ),
        ({"mmd_weight": 10.0}, TrainConfig()),  # of no effect there
        ({"warmup": "linear", "warmup_steps": 4}, TrainConfig(warmup=Linear(4))),
        ({"warmup": "cyclical", "warmup_steps": 4}, TrainConfig(warmup="cyclical:steps=4")),
        ({"warmup_steps": 4}, TrainConfig()),
        ({"optimizer": "adam"}, TrainConfig(optimizer="adam:eps=1e-07")),
        ({"optimizer": "adam", "epsilon": 1e-4}, TrainConfig(optimizer="adam:eps=0.0001")),
        ({"epsilon": 1e-3}, TrainConfig(optimizer="rmsprop:eps=0.001")),
        ({"schedule": "burda", "beta": 0.5}, TrainConfig(schedule="burda", beta=0.5)),
    ],
)
def test_the_fields_of_version_0_1_are_taken(fields, config):
    written = json.loads(json.dumps(OLD | fields))
    assert TrainConfig.from_dict(written) == config
    assert written == json.loads(json.dumps(OLD | fields))  # and left as they are


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"batch_size": -1}, "batch_size is -1: expected at least 1"),
        ({"epochs": 0}, "epochs is 0: expected at least 1"),
        ({"epochs": "ten"}, "epochs is 'ten': expected a whole number"),
        ({"accumulate": 0}, "accumulate is 0: expected at least 1"),
        ({"patience": -1}, "patience is -1: expected at least 0"),
        ({"patience": 2.5}, "patience is 2.5: expected a whole number"),
        ({"learning_rate": 0}, "learning_rate is 0: expected a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'"),
        ({"beta": -0.1}, "beta is -0.1: expected a number of at least 0"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"beta": True}, "beta is True"),
        ({"clip_norm": -1}, "clip_norm is -1: expected a number of at least 0"),
        ({"skip_norm": float("inf")}, "skip_norm is inf: expected a number of at least 0, below"),
        ({"ema": 1}, "ema is 1: expected a number of at least 0, below 1"),
        ({"ema": "on"}, "ema is 'on': expected a number"),
        ({"binarization": "static"}, "binarization is 'static': expected 'none', 'dynamic' or"),
        ({"binarization": None}, "binarization is None: expected 'none'"),
        ({"trainable": "body"}, "trainable is 'body': expected parts among 'encoder', 'decoder'"),
        ({"trainable": ["decoder", "x"]}, r"trainable is \['decoder', 'x'\]: expected parts among"),
        ({"trainable": 3}, "trainable is 3: expected parts among"),
        ({"trainable": None}, "trainable is None: expected parts among"),
        ({"trainable": [["decoder"]]}, r"trainable is \[\['decoder'\]\]: expected parts among"),
        ({"objective": "vae"}, "objective is 'vae': expected 'elbo', 'stl', 'iwae', 'miwae'"),
        ({"objective": None}, "objective is None: expected a name or a function"),
        ({"objective": "elbo:free_bits=-1"}, "objective 'elbo': free_bits is -1: expected a numb"),
        ({"objective": "elbo:free_bits=true"}, "objective 'elbo': free_bits is True: expected a"),
        ({"objective": "elbo:num_samples=0"}, "objective 'elbo': num_samples is 0: expected at l"),
        ({"objective": "iwae:num_samples=2.5"}, "objective 'iwae': num_samples is 2.5: expected"),
        ({"objective": "mmd:weight=inf"}, "objective 'mmd': weight is inf: expected a number of"),
        ({"num_samples": 0}, "objective 'elbo': num_samples is 0: expected at least 1"),
        ({"free_bits": -1}, "objective 'elbo': free_bits is -1: expected a number of at least 0"),
        ({"warmup": "linear"}, "warmup 'linear' needs the option 'steps': expected linear:steps="),
        ({"warmup": "cyclical"}, "warmup 'cyclical' needs the option 'steps': expected cyclical:s"),
        ({"warmup": "linear:steps=0"}, "warmup 'linear': steps is 0: expected at least 1"),
        ({"warmup": "linear", "warmup_steps": -1}, "warmup 'linear': steps is -1: expected at lea"),
        ({"warmup": "none:steps=3"}, "warmup 'none' has no option 'steps': it has none"),
        ({"optimizer": "adm"}, "optimizer is 'adm': expected 'adabelief', .* 'adam', .* 'yogi'"),
        ({"optimizer": "lbfgs"}, "optimizer is 'lbfgs': expected 'adabelief', "),  # needs the loss
        ({"optimizer": "chain"}, "optimizer is 'chain': expected 'adabelief', "),
        ({"optimizer": "scale_by_adam"}, "optimizer is 'scale_by_adam': expected 'adabelief', "),
        (
            {"optimizer": "adam:epsilon=1"},
            "optimizer 'adam' has no option 'epsilon': expected amon",
        ),
        ({"optimizer": "adam:learning_rate=1"}, "optimizer 'adam' has no option 'learning_rate'"),
        ({"optimizer": "adam:eps=big"}, "optimizer is 'adam:eps=big', which optax refuses: "),
        ({"schedule": "step"}, "schedule is 'step': expected 'constant', 'cosine', 'burda', "),
        ({"schedule": "cosine:alpha=1"}, "schedule 'cosine' has no option 'alpha': it has none"),
        (
            {"schedule": "linear_schedule:steps=1"},
            "schedule 'linear_schedule' has no option 'steps': expected among 'init_value', ",
        ),
        (
            {"schedule": "warmup_cosine_decay_schedule:warmup_steps=ten"},
            "schedule is 'warmup_cosine_decay_schedule:warmup_steps=ten', which optax refuses: ",
        ),
        ({"momentum": 0.9}, "TrainConfig has no field 'momentum': expected accumulate, batch_"),
        (
            {"learningrate": 0.9},
            r"TrainConfig has no field 'learningrate' \(do you mean 'learning_rate'\?\): expected",
        ),
        ({"lr": 0.9}, r"no field 'lr' \(do you mean 'learning_rate'\?\): expected"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected(fields, says):
    with pytest.raises(InputError, match=says) as error:
        TrainConfig.from_dict(fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_several_samples_are_for_objectives_that_take_several(objective):
    assert TrainConfig(objective=objective).objective.num_samples == 1
    if objective not in ("beta_tc", "mmd"):
        assert TrainConfig(objective=f"{objective}:num_samples=4").objective.num_samples == 4
        return
    for fields in ({"objective": f"{objective}:num_samples=4"},
                   {"objective": objective, "num_samples": 4}):  # fmt: skip
        with refused(f"objective {objective!r} has no option 'num_samples': "):
            TrainConfig.from_dict(fields)


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "elbo"])
def test_free_bits_are_of_the_elbo(objective):
    assert TrainConfig(objective="elbo:free_bits=0.5").objective.free_bits == 0.5
    for fields in ({"objective": f"{objective}:free_bits=0.5"},
                   {"objective": objective, "free_bits": 0.5}):  # fmt: skip
        with refused(f"objective {objective!r} has no option 'free_bits': "):
            TrainConfig.from_dict(fields)


def test_parts_to_train_are_a_set():
    for parts in (("decoder", "encoder"), ["encoder", "decoder", "encoder"]):
        assert TrainConfig(trainable=parts).trainable == ("encoder", "decoder")
    assert TrainConfig(trainable="prior").trainable == ("prior",)
    assert TrainConfig(trainable=[]) == TrainConfig()


def test_a_transformation_has_a_learning_rate_of_its_own():
    with refused("optimizer is an optax.GradientTransformation, which has its own learning rate: "
                 "expected the schedule 'constant'"):  # fmt: skip
        TrainConfig(optimizer=optax.adam(1e-3), schedule="cosine")
    assert TrainConfig(optimizer=optax.adam, schedule="cosine").optimizer is optax.adam


def test_names_are_optaxs_and_its_defaults_but_for_rmsprops():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    for ours, theirs in (
        (TrainConfig().optimizer(0.1), optax.rmsprop(0.1, 0.9, eps=1e-7, eps_in_sqrt=True)),
        (TrainConfig(optimizer="adam").optimizer(0.1), optax.adam(0.1)),
        (TrainConfig(optimizer="sgd:momentum=0.9").optimizer(0.1), optax.sgd(0.1, momentum=0.9)),
    ):
        updates, _ = ours.update(params, ours.init(params), params)
        expected, _ = theirs.update(params, theirs.init(params), params)
        for name in params:
            assert jnp.array_equal(updates[name], expected[name])
