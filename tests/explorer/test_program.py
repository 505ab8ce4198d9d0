"""The page's script computes what the decoder computes."""

from importlib import resources

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OF_IMAGES, OwnDecoder, OwnEncoder, moved, refused
from traced import FUNCTIONS, X

import jaxvae
from jaxvae.explorer.program import decoder_program, translate

pytestmark = pytest.mark.usefixtures("compile_quickly")

RUN = """([program, constants, inputs]) =>
    Array.from(compile(program, constants.map((x) => Float32Array.from(x)))(...inputs))"""


@pytest.fixture(scope="module")
def carry_out(browser):
    """What runtime.js makes of a program, in Chromium."""
    page = browser.new_page()
    page.add_script_tag(content=(resources.files("jaxvae.explorer") / "runtime.js").read_text())

    def run(program, *inputs):
        constants = [x.tolist() for x in program.constants]
        told = program._replace(constants=[])._asdict()
        return np.array(
            page.evaluate(RUN, [told, constants, [np.ravel(x).tolist() for x in inputs]])
        )

    yield run
    page.close()


def model(**fields):
    """A model with no weight at 0, as fresh biases and some kernels are."""
    params = jaxvae.init(jax.random.key(0), jaxvae.ModelConfig(**{"latent_dim": 3} | fields))
    return moved(params, 0.1)


def latents(params, n=3):
    return np.asarray(2 * jax.random.normal(jax.random.key(2), (n, params.config.latent_dim)))


def check(carry_out, params, atol=2e-6, latents_of=lambda z: z):
    program = decoder_program(params)
    z, classes = latents(params), params.config.num_classes
    labels = jnp.arange(len(z)) % classes if classes else None
    expected = jaxvae.decode(params, latents_of(z), labels).mean
    assert np.ptp(expected) > 0.01
    for i, row in enumerate(z):
        given = (row, [i % classes]) if classes else (row,)
        got = carry_out(program, *given).reshape(expected[i].shape)
        np.testing.assert_allclose(got, expected[i], atol=atol)


@pytest.mark.parametrize(
    "fields",
    [
        {"network": "conv", "image_shape": (7, 8, 1)},
        {"network": "residual:width=4", "image_shape": (9, 7, 3)},
        {"network": "spatial:width=4", "latent_dim": 12, "image_shape": (10, 8, 2),
         "num_classes": 2},
    ],
    ids=lambda fields: fields["network"],
)  # fmt: skip
def test_the_program_gives_the_mean_of_every_network(carry_out, fields):
    check(carry_out, model(**fields))


def test_the_coordinates_of_a_hierarchy_are_the_noise_of_its_prior(carry_out):
    params = model(
        network="ladder:groups=4x1+2x2,width=4", image_shape=(8, 6, 1), num_classes=2, latent_dim=2
    )

    def latents_of(noise):
        return params.model.top_down(params.decoder, noise=jnp.asarray(noise)).z

    check(carry_out, params, atol=5e-6, latents_of=latents_of)


@pytest.mark.parametrize("likelihood", OF_IMAGES)
def test_the_program_gives_the_mean_of_every_likelihood_of_images(carry_out, likelihood):
    fields = {"image_shape": (4, 4, 3), "network": "mlp:width=10", "num_classes": 3}
    check(carry_out, model(likelihood=likelihood, **fields))


def test_bfloat16_is_rounded_to_as_the_layers_do(carry_out):
    """On a CPU, XLA keeps what it fuses in float32: they agree to bfloat16's 8 bits."""
    params = model(image_shape=(8, 8, 1), network="mlp:width=30", compute_dtype="bfloat16")
    check(carry_out, params, atol=0.01)
    rounded = translate(jax.make_jaxpr(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32))(
        jnp.zeros(4)))  # fmt: skip
    numbers = np.float32([1.00390625, 1.01171875, -3.14159265, 1e-30])  # the first two lie between
    expected = np.float32(jnp.bfloat16(numbers))
    np.testing.assert_array_equal(carry_out(rounded, numbers), expected)


class OddDecoder(nn.Module):
    """What the library's own decoders do not use."""

    image_shape: tuple[int, int, int]

    @nn.compact
    def __call__(self, z, labels=None):
        x = nn.gelu(nn.LayerNorm()(nn.Dense(4 * 4 * 8)(z)), approximate=False)
        x = nn.GroupNorm(2)(x.reshape(-1, 4, 4, 8))
        x = nn.silu(nn.Conv(8, (3, 3), feature_group_count=4)(x))
        x = x + nn.Conv(8, (3, 3), kernel_dilation=2, strides=1)(x)
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return nn.ConvTranspose(self.image_shape[2], (2, 3), padding="SAME")(x)


@pytest.mark.parametrize("decoder", [OwnDecoder((8, 8, 1)), OddDecoder((8, 8, 1))])
def test_networks_of_ones_own_are_carried_out(carry_out, decoder):
    check(carry_out, model(image_shape=(8, 8, 1), network=(OwnEncoder(3), decoder)), atol=5e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_operation_does_what_jax_does(carry_out, name):
    f = FUNCTIONS[name]
    program = translate(jax.make_jaxpr(f)(X))
    np.testing.assert_allclose(carry_out(program, X), np.ravel(f(X)), rtol=2e-6, atol=2e-6)


def test_a_convolution_is_one_operation_whatever_it_is_on_this_machine():
    params = model(image_shape=(8, 8, 1))
    jaxvae.decode(params, latents(params, 1))  # traced for a CPU, of the same shape
    kinds = [operation["kind"] for operation in decoder_program(params).operations]
    assert kinds.count("conv") == 2


def test_what_the_result_does_not_need_is_left_out():
    """Its log scale is no part of the Gaussian's mean."""
    params = model(image_shape=(8, 8, 1), network="mlp", likelihood="gaussian")
    kinds = [operation["kind"] for operation in decoder_program(params).operations]
    assert kinds.count("dot") == 3
    assert sum(map(len, decoder_program(params).constants)) < 1.01 * sum(
        x.size for x in jax.tree.leaves(params.decoder)
    )


class Sorting(OwnDecoder):
    @nn.compact
    def __call__(self, z, labels=None):
        return jnp.sort(super().__call__(z, labels), axis=1)


def test_an_operation_without_a_translation_is_named():
    params = model(image_shape=(8, 8, 1), network=(OwnEncoder(3), Sorting((8, 8, 1))))
    with refused("the operation 'sort'"):
        decoder_program(params)
