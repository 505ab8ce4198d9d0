"""Lossless compression of images by a trained model: bits back with asymmetric numeral systems.

For each chunk of images x, with the latents z rounded to symbols, on one stack:

    compress      pop z by q(z|x); push x by p(x|z); push z by p(z)
    decompress    pop z by p(z); pop x by p(x|z); push z by q(z|x)

The popped bits come back in decompression, so an image takes log q(z|x) - log p(x|z) - log p(z)
nats, the negative ELBO on average. Only the first images find no bits to pop and take random ones.

References:
  Townsend, Bird and Barber (2019), Practical lossless compression with latent variables using bits
  back coding. Townsend, Bird, Kunze and Barber (2020), HiLLoC, for hierarchies.
"""

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Num, UInt8, UInt32

from jaxvae.compression.ans import BUCKETS, LEAST_HEAD, Stack, Table, Uniform
from jaxvae.compression.container import (
    Body,
    Header,
    digest_of_images,
    digest_of_model,
    pack,
    unpack,
)
from jaxvae.compression.latents import Latents, latents_of, program
from jaxvae.errors import InputError
from jaxvae.models.protocols import Likelihood
from jaxvae.models.vae import Params, expected_images
from jaxvae.validation import expect_unit_interval

# Images at once: with more, the first chunk that is full needs more random bits, or comes later.
# Convolutions process up to 8 images as one block on any number of devices.
_BATCH = 8
# Heads, one for so many pixels: more are faster, but each takes 6 bytes of the file.
_PIXELS_OF_HEAD, _LEAST_HEADS, _MOST_HEADS = 2**14, 16, 1024
_ROUNDING = 1e-3  # of a level, in floats
_LEVELS = {"binary": 2, "levels": 256}

Progress = Callable[[int, int], object]


def compress(
    params: Params,
    images: Num[np.ndarray, "n height width channels"],
    *,
    progress: Progress | None = None,
) -> bytes:
    """Compress images.

    The computation runs on the CPU, on one thread for each product of matrices, whatever devices
    there are, as decompression must repeat it to the last bit.

    Args:
      params: the model: a vector of latents with the prior "standard_normal" and the posterior
        "gaussian", a ladder, or codes with the prior "uniform_codes"; its likelihood is over binary
        pixels or levels.
      images: uint8, or floats in [0, 1] that are levels k / 255. For a likelihood of binary pixels
        all of them are 0 or 1, which is 255 of uint8: see `jaxvae.models.likelihoods.binarize`.
      progress: called with the number of images that are done, and that of all, after each chunk.

    Returns:
      The content of a file, which `decompress` takes with the same model.

    Raises:
      InputError: a model that is not supported, or other images.
    """
    latents_of(params)  # refuses what is not supported
    levels = _levels(params)
    symbols = _as_symbols(images, params, levels)
    n, height, width, channels = symbols.shape
    initial = _Initial()
    heads = np.full(
        np.clip(symbols.size // _PIXELS_OF_HEAD, _LEAST_HEADS, _MOST_HEADS), LEAST_HEAD, np.uint64
    )
    stack = Stack(heads, np.zeros(0, np.uint32), initial)
    chunks: list[int] = []
    with _on_cpu(params) as latents:
        while (done := sum(chunks)) < n:
            # As many images as find bits to pop, of which an image needs at most about these.
            needed = sum(latents.sizes) * BUCKETS
            chunks.append(max(1, min(_BATCH, n - done, 32 * len(stack.words) // needed)))
            _push(stack, latents, symbols[done : done + chunks[-1]], levels, len(chunks))
            if progress is not None:
                progress(done + chunks[-1], n)
    header = Header(
        n,
        (height, width, channels),
        32 * (initial.drawn + len(heads)),
        _made_by(),
        digest_of_model(params),
        digest_of_images(symbols),
    )
    return pack(header, Body(np.array(chunks, np.uint8), stack.heads, stack.words))


def decompress(
    params: Params, data: bytes, *, progress: Progress | None = None
) -> UInt8[np.ndarray, "n height width channels"]:
    """Decompress images.

    Args:
      params: the model by which they were compressed.
      data: the result of `compress`. It may be from anyone: sizes are checked before memory is
        allocated.
      progress: as for `compress`.

    Returns:
      The images, uint8; binary pixels are 0 or 255.

    Raises:
      InputError: `data` is damaged, something else or of another model, or this machine computes
        the probabilities otherwise than the one that compressed the images.
    """
    header, body = unpack(data)
    if header.model != digest_of_model(params):
        raise InputError(
            "it was compressed by another model, or by this one before further training: pass "
            "those parameters"
        )
    if header.image_shape != params.config.image_shape or np.any(body.chunks > _BATCH):
        raise InputError(
            f"it is damaged: its images have shape {header.image_shape}, in chunks of up to "
            f"{body.chunks.max(initial=0)}: expected {params.config.image_shape}, up to {_BATCH}"
        )
    levels = _levels(params)
    stack = Stack(body.heads, body.words)
    images = np.empty((header.images, *params.config.image_shape), np.uint8)
    left = header.images
    other = InputError(
        f"it was compressed with {header.made_by}, and here, with {_made_by()}, the probabilities "
        "are others: decompress it where it was compressed"
    )
    with _on_cpu(params) as latents:
        for number, size in reversed(list(enumerate(body.chunks.tolist(), start=1))):
            try:
                images[left - size : left] = _pop(stack, latents, params, size, levels, number)
            except InputError:
                raise other from None
            left -= size
            if progress is not None:
                progress(header.images - left, header.images)
    if not _is_initial(stack, header) or digest_of_images(images) != header.content:
        raise other
    return images * np.uint8(255 // (levels - 1))


def header_of(data: bytes) -> Header:
    """Return what a file says of its images.

    Args:
      data: the result of `compress`.

    Returns:
      The header.

    Raises:
      InputError: it is damaged or something else.
    """
    return unpack(data)[0]


def _push(
    stack: Stack,
    latents: Latents,
    symbols: UInt8[np.ndarray, "n height width channels"],
    levels: int,
    number: int,
) -> None:
    """Push the images of a chunk, whose number is the seed of its samples."""
    n, *_, channels = symbols.shape
    x = _padded(symbols)
    encoded = latents.encoded(_scaled(x, levels))
    state, found = latents.start(_BATCH), []
    for g, size in enumerate(latents.sizes):
        state = latents.prior(g, state)
        z = stack.pop(latents.posterior(g, state, encoded, n), seed=(number, g))
        found.append(z)
        state = latents.update(g, state, _padded(z.reshape(n, size)))
    likelihood = latents.likelihood(state)
    for channel in reversed(range(channels)):
        known = np.where(np.arange(channels) < channel, x, 0)
        table = _table(likelihood, _scaled(known, levels), channel, n)
        stack.push(table, symbols[..., channel].reshape(-1).astype(np.int64))
    for z in reversed(found):
        stack.push(Uniform(latents.values, len(z)), z)


def _pop(
    stack: Stack, latents: Latents, params: Params, n: int, levels: int, number: int
) -> UInt8[np.ndarray, "n height width channels"]:
    """Pop a chunk of n images: the inverse of `_push`, step by step."""
    state, found = latents.start(_BATCH), []
    for g, size in enumerate(latents.sizes):
        state = latents.prior(g, state)
        z = stack.pop(Uniform(latents.values, n * size))
        found.append((state, z))
        state = latents.update(g, state, _padded(z.reshape(n, size)))
    likelihood = latents.likelihood(state)
    x = np.zeros((_BATCH, *params.config.image_shape), np.uint8)
    for channel in range(x.shape[-1]):
        table = _table(likelihood, _scaled(x, levels), channel, n)
        x[:n, ..., channel] = stack.pop(table).reshape(n, *x.shape[1:3])
    encoded = latents.encoded(_scaled(x, levels))
    for g, (state, z) in reversed(list(enumerate(found))):
        stack.push(latents.posterior(g, state, encoded, n), z, seed=(number, g))
    return x[:n]


def _table(
    likelihood: Likelihood,
    known: Float[np.ndarray, "batch height width channels"],
    channel: int,
    n: int,
) -> Table:
    """Return the distributions of a channel of the first n images, given the earlier channels."""
    if not hasattr(likelihood, "level_cdf"):
        raise InputError(
            f"the likelihood {type(likelihood).__name__} has no level_cdf, by which pixels are "
            "coded: see jaxvae.models.protocols.Likelihood"
        )
    cdf = np.asarray(_level_cdf(likelihood, known, channel))[:n]
    return Table.of_cdf(cdf.reshape(-1, cdf.shape[-1]))


@partial(program, static_argnames="channel")
def _level_cdf(likelihood: Any, known: Array, channel: int) -> Array:
    return likelihood.level_cdf(known, channel)


def _levels(params: Params) -> int:
    """Return the number of values of a pixel."""
    likelihood = params.config.likelihood
    if likelihood.support not in _LEVELS:
        raise InputError(
            f"the likelihood {params.config.specs()['likelihood']!r} is a density, and images are "
            "compressed by probabilities: expected a likelihood of levels or of binary pixels, "
            "such as 'logistic_mixture' or 'bernoulli'"
        )
    return _LEVELS[likelihood.support]


def _as_symbols(
    images: Any, params: Params, levels: int
) -> UInt8[np.ndarray, "n height width channels"]:
    """Return images as whole numbers below `levels`."""
    x = np.asarray(images)
    if x.dtype == np.bool_:
        x = x.astype(np.float32)
    expected_images(params, x[:1])
    expect_unit_interval(x)
    step = 255 // (levels - 1)
    if x.dtype != np.uint8:
        scaled = 255 * x.astype(np.float32)
        if x.dtype.kind != "f" or not np.all(np.abs(scaled - np.round(scaled)) < _ROUNDING):
            raise InputError(
                f"images are of type {x.dtype}, and not all pixels are levels k / 255: expected "
                "uint8, as other pixels would not be restored exactly"
            )
        x = np.round(scaled).astype(np.uint8)
    if np.any(x % step):
        raise InputError(
            "the likelihood is of pixels that are 0 or 1, but the images have others: binarize "
            "them first, for example with jaxvae.models.likelihoods.binarize, or train with "
            "binarization"
        )
    return x // np.uint8(step)


def _scaled(symbols: UInt8[np.ndarray, "*shape"], levels: int) -> Float[np.ndarray, "*shape"]:
    return symbols.astype(np.float32) / np.float32(levels - 1)


def _padded(x: np.ndarray) -> np.ndarray:
    """Add rows of 0 up to the batch size, so that one compiled function serves all chunks."""
    return np.concatenate([x, np.zeros((_BATCH - len(x), *x.shape[1:]), x.dtype)])


class _Initial:
    """Random words below an empty stack, the same ones for every file.

    Attributes:
      drawn: number of words that were taken.
    """

    def __init__(self) -> None:
        self.drawn = 0
        self._bits = np.random.PCG64(0)

    def __call__(self, n: int) -> UInt32[np.ndarray, " n"]:
        """Return the next n words below."""
        self.drawn += n
        return (np.asarray(self._bits.random_raw(n)) >> 32).astype(np.uint32)[::-1]


def _is_initial(stack: Stack, header: Header) -> bool:
    """Return whether a stack is as it was before the first image."""
    drawn = len(stack.words)
    return (
        32 * (drawn + len(stack.heads)) == header.initial_bits
        and bool(np.all(stack.heads == LEAST_HEAD))
        and np.array_equal(stack.words, _Initial()(drawn))
    )


@contextmanager
def _on_cpu(params: Params) -> Iterator[Latents]:
    """Compute on the CPU, with these parameters."""
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise InputError(
            "compression computes on the CPU, which JAX may not use here: add cpu to JAX_PLATFORMS"
        ) from None
    with jax.default_device(cpu):
        yield latents_of(jax.device_put(params, cpu))


def _made_by() -> str:
    return f"JAX {jax.__version__}, NumPy {np.__version__} on {platform.machine()}"
