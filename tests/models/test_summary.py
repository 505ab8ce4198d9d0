"""The layer table."""

import re

import flax.linen as nn
import jax
import pytest
from conftest import OwnDecoder, OwnEncoder

import jaxvae
from jaxvae.models.config import LIKELIHOODS, NETWORKS, PRIORS
from jaxvae.models.summary import summary

pytestmark = pytest.mark.usefixtures("compile_quickly")

SMALL = jaxvae.ModelConfig((9, 7, 3), 2, network="mlp")


def test_the_notebooks_table():
    lines = summary(jaxvae.ModelConfig()).splitlines()
    rows = [" ".join(line.split()) for line in lines]
    assert "conv_1 28 x 28 x 32 3 x 3 x 1 x 32 320" in rows
    assert "conv_2 14 x 14 x 64 3 x 3 x 32 x 64 18,496" in rows
    assert "dense 32 12544 x 32 401,440" in rows
    assert "conv_transpose 28 x 28 x 32 3 x 3 x 64 x 32 18,464" in rows
    assert "conv 28 x 28 x 1 3 x 3 x 32 x 1 289" in rows
    assert "494,244" in rows
    assert "56,385" in rows
    assert rows[-1] == "550,629 parameters"


def test_layers_stand_in_the_order_in_which_images_pass_them():
    names = [line.split()[0] for line in summary(jaxvae.ModelConfig()).splitlines() if line]
    encoder = ["images", "conv_1", "conv_2", "conv_3", "conv_4", "dense", "mean", "log_var"]
    assert names[2:10] == encoder
    assert names[13:17] == ["latents", "dense", "conv_transpose", "conv"]


def test_any_image_shape_has_one():
    assert "13 x 9 x 3" in summary(jaxvae.ModelConfig(image_shape=(13, 9, 3), latent_dim=7))


def small(prior):
    """A learned prior of few components."""
    return {"mixture": "mixture:components=5", "vamp": "vamp:components=5"}.get(prior, prior)


def posterior_of(prior):
    """A posterior that goes with a prior."""
    return "fsq" if hasattr(PRIORS.parse(prior), "over_codes") else "gaussian"


class Gain(nn.Module):
    """A decoder with parameters of its own beside its layers', and layers without any."""

    @nn.compact
    def __call__(self, z):
        x = nn.LayerNorm(use_bias=False, use_scale=False)(z * self.param("gain", nn.ones, (2,)))
        return nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(189)])(x).reshape(-1, 9, 7, 3)


class Two(nn.Module):
    """An encoder whose body gives two results at once."""

    @nn.compact
    def __call__(self, images):
        return OwnEncoder(2, name="body")(images)


# A ladder has its own number of latents, beside the default of 2.
LATENTS = {name: {"latent_dim": 2 if name == "ladder" else 6} for name in NETWORKS}
MODELS = {
    **{name: {"network": name} | LATENTS[name] for name in NETWORKS},
    **{
        f"{name}, 10 classes": {"network": name, "num_classes": 10} | LATENTS[name]
        for name in NETWORKS
    },
    **{name: {"likelihood": name} for name in LIKELIHOODS if name != "columns"},
    "columns": {"likelihood": "columns:of=gaussianx2+poisson", "image_shape": (3,)},
    **{name: {"prior": small(name), "posterior": posterior_of(name)} for name in PRIORS},
    "iaf": {"posterior": "iaf"},
    "all": {
        "likelihood": "gaussian",
        "prior": "mixture:components=5",
        "posterior": "iaf",
        "num_classes": 4,
    },
    "own": {"network": (OwnEncoder(2), OwnDecoder((9, 7, 3))), "num_classes": 4},
    "own, with more than layers": {"network": (Two(), Gain())},
}


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_rows_and_totals_add_up_to_the_number_of_parameters(fields):
    config = jaxvae.ModelConfig(**(vars(SMALL) | fields))
    params = jax.eval_shape(lambda: jaxvae.init(jax.random.key(0), config))
    *tables, last = summary(config).split("\n\n")
    total = 0
    for table in tables:
        _, _, *rows, sum_ = (number(line) for line in table.splitlines())
        assert sum(rows) == sum_
        total += sum_
    entries = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert last == f"{entries:,} parameters"
    assert total == entries


def number(line):
    """The parameters at the end of a row."""
    match = re.search(r"([\d,]+)$", line)
    return int(match[1].replace(",", "")) if match else None


def test_each_part_that_learns_has_a_table_of_its_own():
    config = jaxvae.ModelConfig(**(vars(SMALL) | MODELS["all"]))
    heads = [re.split("  +", table)[0] for table in summary(config).split("\n\n")[:-1]]
    assert heads == [
        "encoder, q(z|x)",
        "decoder, p(x|z)",
        "posterior, iaf",
        "prior, mixture:components=5",
        "likelihood, gaussian",
    ]
    assert len(summary(SMALL).split("\n\n")) == 3


def test_columns_stand_below_each_other():
    config = jaxvae.ModelConfig(
        (64, 64, 3),
        64,
        network="residual",
        prior="mixture:components=20",
        posterior="iaf:steps=3,hidden=32",
        likelihood="gaussian",
    )
    lines = [line for line in summary(config).splitlines()[:-1] if line]
    assert len({len(line) for line in lines}) == 1
