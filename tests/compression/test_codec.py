"""Compressed images: the same bytes come back, at the rate of the ELBO, or a line says why not."""

import os
import subprocess
import sys
import zlib

import jax
import numpy as np
import pytest
from conftest import KEPT_PROGRAMS, moved, refused

import jaxvae
from jaxvae.compression import compress, decompress, header_of
from jaxvae.compression.container import Body, Header, pack, unpack
from jaxvae.models.vae import prior

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(0)
SHAPE = (4, 4, 1)
RNG = np.random.default_rng(0)


def params_of(image_shape=SHAPE, latent_dim=2, **fields):
    config = jaxvae.ModelConfig(image_shape, latent_dim, **{"network": "mlp:width=8"} | fields)
    # With larger parameters posteriors leave the prior, and buckets in its tails cost less.
    return moved(jaxvae.init(KEY, config), 0.05 if "ladder" in fields.get("network", "") else 0.2)


def images_of(params, n=20):
    """Random images, binary if the model's are; and one that is constant."""
    levels = 2 if params.config.likelihood.support == "binary" else 256
    x = RNG.integers(0, levels, (n, *params.config.image_shape), np.uint8)
    x[1] = 0
    return x * np.uint8(255 // (levels - 1))


CODES = {"prior": "uniform_codes"}
MODELS = {
    "vector": {},
    "discretized_logistic": {"likelihood": "discretized_logistic", "image_shape": (4, 3, 2)},
    "logistic_mixture": {"likelihood": "logistic_mixture:components=2", "image_shape": (3, 4, 3)},
    "ladder": {
        "image_shape": (5, 3, 3),
        "network": "ladder:groups=2x1+1x1,width=4,latents=1",
        "likelihood": "logistic_mixture:components=2",
    },
    "categorical": {"latent_dim": 6, "posterior": "categorical:classes=3"} | CODES,
    "fsq": {"posterior": "fsq:levels=3x2"} | CODES,
    "vq": {"latent_dim": 4, "posterior": "vq:codes=4,dim=2"} | CODES,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_bytes_come_back(name):
    params = params_of(**MODELS[name])
    images = images_of(params)
    seen = []
    data = compress(params, images, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (20, 20)
    again = decompress(params, data)
    assert again.dtype == np.uint8
    np.testing.assert_array_equal(again, images)
    header = header_of(data)
    assert header.images == 20
    assert header.image_shape == params.config.image_shape


@pytest.mark.parametrize("name", MODELS)
def test_the_rate_is_the_elbo(name):
    params = params_of(**MODELS[name])
    # Of the model, as to other images it may give less than the least mass.
    z = prior(params).sample(KEY, 1000)
    images = np.asarray(jaxvae.decode(params, z).sample(KEY))
    data = compress(params, images)
    header, body = unpack(data)
    bits = 64 * len(body.heads) + 32 * len(body.words) - header.initial_bits
    estimates = [jaxvae.elbo(params, jax.random.key(i), images).value.mean() for i in range(20)]
    # The heads end about half full: 16 bits each.
    of_an_image = (bits - 16 * len(body.heads)) / len(images)
    assert of_an_image == pytest.approx(-np.mean(estimates) / np.log(2), rel=0.01)
    assert len(data) < bits / 8 + header.initial_bits / 8 + 300


def test_the_first_images_need_few_random_bits():
    """They grow with the latents of one image, not with the number of images."""
    params = params_of(**MODELS["ladder"])
    few, many = (header_of(compress(params, images_of(params, n))) for n in (10, 100))
    assert many.initial_bits < few.initial_bits + 200


def test_another_process_with_other_devices_restores_the_images(tmp_path):
    """The tests have eight devices, and the other process has one."""
    fields = dict(MODELS["ladder"])
    params = params_of(**fields)
    images = images_of(params, 30)
    (tmp_path / "x.jaxvae").write_bytes(compress(params, images))
    np.savez(tmp_path / "params.npz", *jax.tree.leaves(params))
    program = f"""
import jax, numpy as np, jaxvae
from jaxvae.compression import decompress
assert jax.local_device_count() == 1
fields = {fields!r}
config = jaxvae.ModelConfig(fields.pop("image_shape"), **fields)
params = jaxvae.init(jax.random.key(1), config)
leaves = np.load("params.npz", allow_pickle=False)
params = jax.tree.unflatten(jax.tree.structure(params), [leaves[f"arr_{{i}}"] for i in range(len(leaves))])
np.save("images.npy", decompress(params, open("x.jaxvae", "rb").read()))
"""  # noqa: E501
    command, environment = [sys.executable, "-c", program], os.environ | KEPT_PROGRAMS
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy", allow_pickle=False), images)


@pytest.fixture(scope="module")
def compressed():
    params = params_of()
    return params, compress(params, images_of(params))


def test_damage_anywhere_is_refused(compressed):
    params, data = compressed
    for place in range(8, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 4
        with refused("it is of format" if place == 8 else "it is damaged"):
            decompress(params, bytes(damaged))
    for length in (8, 9, 50, 150, len(data) - 1):
        with refused("it is damaged"):
            decompress(params, data[:length])
    with refused("it is damaged"):
        decompress(params, data + b"more")


def test_another_file_is_refused(compressed):
    params, _ = compressed
    for data in (b"", b"jaxvae", b"\x89PNG\r\n\x1a\n" + bytes(500), bytes(500)):
        with refused("it is not a file of compressed images: expected one of jaxvae compress"):
            decompress(params, data)


def with_checksum(data):
    return data + zlib.crc32(data).to_bytes(4, "little")


def test_an_invented_file_is_refused_before_memory_is_allocated(compressed):
    params, data = compressed
    header, body = unpack(data)
    with refused("it is damaged"):
        decompress(params, pack(header._replace(images=2**32 - 1), body))
    bomb = Body(np.ones(2**22, np.uint8), body.heads, body.words)  # 4 KB when compressed
    with refused("it is damaged"):
        decompress(params, pack(header._replace(images=5), bomb))
    with refused("it is damaged"):
        decompress(params, pack(header, body._replace(heads=body.heads[:0])))
    with refused("it is damaged"):
        decompress(params, with_checksum(data[:-5]))
    with refused("it is damaged"):  # without pixels, which need no memory
        decompress(params, pack(header._replace(images=2**31, image_shape=(0, 1, 1)), body))
    with refused("it is damaged: its images have shape (1, 1, 1)", f"expected {SHAPE}"):
        decompress(params, pack(header._replace(image_shape=(1, 1, 1)), body))
    chunk = np.array([header.images], np.uint8)
    with refused("it is damaged", f"in chunks of up to {header.images}: expected", ", up to 8"):
        decompress(params, pack(header, body._replace(chunks=chunk)))


def test_another_model_is_refused(compressed):
    params, data = compressed
    with refused("it was compressed by another model, or by this one before further training: "):
        decompress(moved(params, 1e-6), data)
    with refused("it was compressed by another model"):
        decompress(params_of(likelihood="discretized_logistic"), data)


@pytest.mark.parametrize("change", ["content", "words", "heads", "initial_bits"])
def test_other_probabilities_are_noticed(compressed, change):
    """As a machine that rounds otherwise would restore other images, or leave other bits."""
    params, data = compressed
    header, body = unpack(data)
    if change == "content":
        header = header._replace(content=bytes(32))
    elif change == "initial_bits":
        header = header._replace(initial_bits=0)
    else:
        other = getattr(body, change).copy()
        other[-1] ^= np.array(64, other.dtype)
        body = body._replace(**{change: other})
    with refused("it was compressed with JAX", "decompress it where it was compressed"):
        decompress(params, pack(header, body))


def test_models_and_images_that_cannot_be_compressed_are_refused():
    images = images_of(params_of())
    for fields, text in (
        ({"num_classes": 3}, "expected an unconditional model"),
        ({"posterior": "iaf"}, "the posterior 'iaf' cannot be used"),
        ({"prior": "mixture:components=3"}, "the prior 'mixture:components=3'"),
        ({"prior": "realnvp"}, "the prior 'realnvp'"),
        (
            {"prior": "autoregressive:width=8", "posterior": "fsq:levels=3x2"},
            "the prior 'autoregressive:width=8'",
        ),
        ({"likelihood": "gaussian"}, "the likelihood 'gaussian' is a density"),
        ({"likelihood": "continuous_bernoulli"}, "is a density"),
    ):
        with refused(text, "expected"):
            config = jaxvae.ModelConfig(SHAPE, **{"network": "mlp:width=8"} | fields)
            compress(jax.eval_shape(lambda config=config: jaxvae.init(KEY, config)), images)
    grey = np.full((2, *SHAPE), 100, np.uint8)
    with refused("the likelihood is of pixels that are 0 or 1", "binarize them first"):
        compress(params_of(), grey)
    levels = params_of(likelihood="discretized_logistic")
    with refused("images are of type float32, and not all pixels are levels k / 255"):
        compress(levels, grey / np.float32(254))
    for outside in (-1 / 255, 2, np.nan):
        with refused("images have", "expected floats between 0 and 1, or uint8 from 0 to 255"):
            compress(levels, np.full((2, *SHAPE), outside, np.float32))
    with refused("images are of type int64"):
        compress(levels, grey.astype(np.int64))
    with refused("images have shape"):
        compress(params_of(), grey[0])
    nan = jax.tree.map(lambda x: x * np.nan, params_of())
    with refused("the model returns NaN or infinity"):
        compress(nan, images)


def test_floats_and_booleans_that_are_levels_come_back_as_uint8():
    params = params_of()
    images = images_of(params)
    for same in (images / np.float32(255), images / 255, images > 0):
        np.testing.assert_array_equal(decompress(params, compress(params, same)), images)


def test_a_header_says_what_the_file_holds():
    header = Header(3, (4, 5, 1), 640, "JAX", b"m" * 32, b"c" * 32)
    body = Body(*(np.array(x, t) for x, t in (([1, 2], "u1"), ([2**40], "u8"), ([7, 8], "u4"))))
    assert header_of(pack(header, body)) == header
