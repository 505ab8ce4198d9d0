"""The configuration of a model checks itself."""

import json
from dataclasses import dataclass, replace

import pytest
from conftest import OwnDecoder, OwnEncoder, refused

from jaxvae import InputError, ModelConfig
from jaxvae.models.networks import MLP, Modules
from jaxvae.models.priors import Mixture

OWN = (OwnEncoder(2), OwnDecoder((28, 28, 1)))


def test_the_defaults_are_the_notebooks_model():
    assert ModelConfig() == ModelConfig(
        image_shape=(28, 28, 1),
        latent_dim=2,
        network="conv",
        likelihood="bernoulli",
        prior="standard_normal",
        posterior="gaussian",
        num_classes=0,
        num_covariates=0,
        conditions="both",
        classifier=False,
        compute_dtype="float32",
    )
    assert ModelConfig().to_dict() == {
        "image_shape": [28, 28, 1],
        "latent_dim": 2,
        "network": "conv",
        "likelihood": "bernoulli",
        "prior": "standard_normal",
        "posterior": "gaussian",
        "num_classes": 0,
        "num_covariates": 0,
        "conditions": "both",
        "classifier": False,
        "compute_dtype": "float32",
    }


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
            num_covariates=10,
            conditions="decoder",
        ),
    ],
    ids=["the default model", "another"],
)
def test_a_config_survives_json(config):
    back = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert hash(back) == hash(config)


def test_a_config_is_shown_as_the_call_that_makes_it():
    config = ModelConfig((8, 8, 1), prior=Mixture(components=5), likelihood="gaussian")
    shown = repr(config)
    assert "prior='mixture:components=5', posterior='gaussian'" in shown
    assert eval(shown) == config


def test_a_field_that_a_file_lacks_has_its_default():
    assert ModelConfig.from_dict({"image_shape": [28, 28, 1], "latent_dim": 2}) == ModelConfig()
    assert ModelConfig.from_dict({}) == ModelConfig()


OLD = {  # as version 0.1 wrote it
    "image_shape": [28, 28, 1],
    "latent_dim": 2,
    "network": "notebook",
    "width": None,
    "likelihood": "bernoulli",
    "prior": "standard_normal",
    "prior_components": 500,
    "posterior": "gaussian",
    "flow_steps": 2,
    "num_classes": 0,
    "compute_dtype": "float32",
}


@pytest.mark.parametrize(
    ("fields", "config"),
    [
        ({}, ModelConfig()),
        ({"network": "mlp"}, ModelConfig(network="mlp")),
        ({"network": "mlp", "width": 16}, ModelConfig(network=MLP(16))),
        ({"network": "residual", "width": 8}, ModelConfig(network="residual:width=8")),
        ({"network": "spatial", "width": 8}, ModelConfig(network="spatial:width=8")),
        ({"prior": "mixture"}, ModelConfig(prior="mixture")),
        ({"prior": "mixture", "prior_components": 5}, ModelConfig(prior=Mixture(5))),
        ({"prior": "vamp", "prior_components": 5}, ModelConfig(prior="vamp:components=5")),
        ({"prior_components": 5}, ModelConfig()),  # of no effect there
        ({"posterior": "iaf"}, ModelConfig(posterior="iaf:steps=2")),
        ({"posterior": "iaf", "flow_steps": 4}, ModelConfig(posterior="iaf:steps=4")),
        ({"flow_steps": 4}, ModelConfig()),
    ],
)
def test_the_fields_of_version_0_1_are_taken(fields, config):
    written = json.loads(json.dumps(OLD | fields))
    assert ModelConfig.from_dict(written) == config
    assert written == json.loads(json.dumps(OLD | fields))  # and left as they are


def test_modules_of_ones_own_of_version_0_1_are_handed_over_as_now():
    with refused("pair of Flax modules, which are not saved: pass network=(encoder, decoder)"):
        ModelConfig.from_dict(OLD | {"network": "own"})
    found = ModelConfig.from_dict(OLD | {"network": "own"}, network=OWN)
    assert found == ModelConfig(network=OWN)


def test_modules_of_ones_own_are_a_network():
    config = ModelConfig(network=OWN, likelihood="gaussian")
    assert config.network == Modules(*OWN)
    assert config.network.modules(2, (28, 28, 1), None) == OWN
    for again in (list(OWN), config.network):
        assert ModelConfig(network=again, likelihood="gaussian") == config
        assert hash(ModelConfig(network=again, likelihood="gaussian")) == hash(config)
    assert config != ModelConfig(network=(OwnEncoder(3), OWN[1]), likelihood="gaussian")


def test_a_network_of_ones_own_may_have_a_field_latent_dim():
    @dataclass(frozen=True)
    class Fixed:
        latent_dim: int = 3

        def modules(self, latent_dim, outputs_shape, dtype):
            return OWN

    config = ModelConfig(network=Fixed(), latent_dim=5)
    assert config.with_image_shape((14, 14, 1)).latent_dim == 5


def test_of_modules_of_ones_own_json_keeps_only_that_there_are_some():
    config = ModelConfig(image_shape=(6, 5, 2), network=OWN, posterior="iaf")
    written = json.loads(json.dumps(config.to_dict()))
    assert written == replace(config, network="mlp").to_dict() | {
        "image_shape": [6, 5, 2],
        "network": "own",
    }
    with refused("pair of Flax modules, which are not saved: pass network=(encoder, decoder)"):
        ModelConfig.from_dict(written)
    assert ModelConfig.from_dict(written, network=OWN) == config
    assert ModelConfig.from_dict(written | {"network": OWN}) == config
    with refused("network is own, but the recorded one is mlp: pass that one"):
        ModelConfig.from_dict(written | {"network": "mlp"}, network=OWN)


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
    with refused(
        "network is ", "expected 'conv', 'mlp', 'residual', 'spatial' or 'ladder', or a pair of"
    ):
        ModelConfig(network=network)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"image_shape": (28, 28)}, r"image_shape is \(28, 28\): expected \(height"),
        ({"image_shape": (28, 0, 1)}, r"image_shape\[1\] is 0: expected at least 1"),
        ({"image_shape": None}, "image_shape is None"),
        ({"latent_dim": 0}, "latent_dim is 0: expected at least 1"),
        ({"latent_dim": 2.5}, "latent_dim is 2.5: expected a whole number"),
        ({"latent_dim": True}, "latent_dim is True: expected a whole number"),
        ({"compute_dtype": "half"}, "compute_dtype is 'half': expected 'float32' or"),
        ({"compute_dtype": None}, "compute_dtype is None: expected"),
        ({"network": "cnn"}, "network is 'cnn': expected 'conv', 'mlp', "),
        ({"network": "notebook:width=3"}, "network is 'notebook:width=3': expected 'conv', 'mlp'"),
        ({"network": "mlp:width=0"}, "network 'mlp': width is 0: expected at least 1"),
        (
            {"network": "mlp:blocks=1"},
            "network 'mlp' has no option 'blocks': expected among 'width",
        ),
        ({"network": "residual:blocks=1.5"}, "network 'residual': blocks is 1.5: expected a whole"),
        ({"network": "conv:width=8"}, "network 'conv' has no option 'width': it has none"),
        ({"width": 8}, "network 'conv' has no option 'width': it has none"),
        ({"network": "mlp", "width": 0}, "network 'mlp': width is 0: expected at least 1"),
        ({"likelihood": "bernoulli:logits=3"}, "likelihood 'bernoulli' has no option 'logits'"),
        ({"prior": "mixture:components=0"}, "prior 'mixture': components is 0: expected at least"),
        ({"prior": "vamp:components=many"}, "prior 'vamp': components is 'many': expected a whole"),
        ({"prior": "standard_normal:scale=2"}, "prior 'standard_normal' has no option 'scale'"),
        ({"prior": "vamp", "prior_components": 0}, "prior 'vamp': components is 0: expected at"),
        ({"posterior": "iaf:steps=0"}, "posterior 'iaf': steps is 0: expected at least 1"),
        ({"posterior": "iaf:hidden=1.5"}, "posterior 'iaf': hidden is 1.5: expected a whole"),
        ({"posterior": "gaussian:steps=2"}, "posterior 'gaussian' has no option 'steps'"),
        ({"posterior": "iaf", "flow_steps": 1.5}, "posterior 'iaf': steps is 1.5: expected a who"),
        ({"num_classes": -1}, "num_classes is -1: expected at least 0"),
        ({"num_classes": "ten"}, "num_classes is 'ten': expected a whole number"),
        ({"num_covariates": -1}, "num_covariates is -1: expected at least 0"),
        (
            {"num_classes": 2, "num_covariates": 3},
            "num_classes is 2 and num_covariates 3: expected one of them to be 0",
        ),
        (
            {"conditions": "prior"},
            "conditions is 'prior': expected 'both', 'encoder' or 'decoder'",
        ),
        ({"classifier": True}, "classifier is true, but num_classes is 0: expected at least 2"),
        (
            {"classifier": True, "num_classes": 3, "network": "spatial", "latent_dim": 49},
            "network is 'spatial', whose encoder is no classifier: expected 'mlp', 'conv' or",
        ),
        (
            {
                "classifier": True,
                "num_classes": 3,
                "posterior": "vq",
                "prior": "uniform_codes",
                "latent_dim": 8,
            },
            "the latents are codes: expected the posterior 'gaussian' or 'iaf'",
        ),
        (
            {"prior": "vamp", "num_covariates": 2},
            "whose pseudo-inputs have no covariates: expected 'standard_normal' or 'mixture'",
        ),
        (
            {"prior": "vamp", "num_classes": 10},
            "prior is 'vamp', whose pseudo-inputs have no classes: expected 'standard_normal' or",
        ),
        (
            {"depth": 3},
            "ModelConfig has no field 'depth': expected classifier, compute_dtype, conditions",
        ),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected(fields, says):
    with pytest.raises(InputError, match=says) as error:
        ModelConfig.from_dict(fields)
    assert "\n" not in str(error.value)


def test_a_prior_of_ones_own_may_refuse_a_model():
    @dataclass(frozen=True)
    class Plane:
        def init(self, key, config):
            return {}

        def bind(self, learned, params):
            raise NotImplementedError

        def validate(self, config):
            if config.latent_dim != 2:
                raise InputError(f"latent_dim is {config.latent_dim}: expected 2 with this prior")

    assert ModelConfig(prior=Plane()).prior == Plane()
    with refused("latent_dim is 3: expected 2 with this prior"):
        ModelConfig(latent_dim=3, prior=Plane())


@pytest.mark.parametrize("kind", ["prior", "posterior", "likelihood", "network"])
def test_an_object_that_lacks_what_its_kind_has_is_refused(kind):
    class Half:
        outputs_per_channel = 1

        def init(self, *_):
            return {}

    with refused(f"{kind} is <", "expected "):
        ModelConfig(**{kind: Half()})
