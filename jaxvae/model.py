"""The VAE as pure functions of its parameters."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxvae.config import ModelConfig
from jaxvae.convolution import in_blocks
from jaxvae.distributions import Bernoulli, Gaussian, scale_images
from jaxvae.errors import InputError
from jaxvae.networks import Decoder, Encoder


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Params:
    """A VAE: a pytree whose leaves are its weights and whose static part is its architecture.

    encoder, decoder: the Flax modules' "params" collections.
    config: the architecture they belong to.
    """

    encoder: Any
    decoder: Any
    config: ModelConfig = field(metadata={"static": True})


@partial(jax.jit, static_argnames="config")
def init(key: jax.Array, config: ModelConfig) -> Params:
    """Fresh parameters: Glorot uniform kernels, zero biases.

    Glorot and Bengio (2010), equation 16, as Keras initialises.
    """
    encoder_key, decoder_key = jax.random.split(key)
    images = jnp.zeros((1, *config.image_shape))
    latents = jnp.zeros((1, config.latent_dim))
    encoder, decoder = modules(config)
    return Params(
        encoder=encoder.init(encoder_key, images)["params"],
        decoder=decoder.init(decoder_key, latents)["params"],
        config=config,
    )


def modules(config: ModelConfig) -> tuple[Encoder, Decoder]:
    """The Flax modules of an architecture."""
    # None, not float32: parameters made wider are computed with as they are.
    dtype = jnp.bfloat16 if config.compute_dtype == "bfloat16" else None
    return Encoder(config.latent_dim, dtype), Decoder(config.image_shape, dtype)


@jax.jit
def encode(params: Params, images: jax.Array) -> Gaussian:
    """The posterior q(z|x): a Gaussian whose `.mean` and `.log_var` are [batch, latent].

    Args:
      images: [batch, height, width, channels], float32 in [0, 1] or uint8.
    Raises:
      InputError: images of another shape than the model's.
    """
    images = jnp.asarray(images)
    if images.ndim != 4 or images.shape[1:] != params.config.image_shape or not len(images):
        expected = ", ".join(map(str, params.config.image_shape))
        raise InputError(
            f"images have shape {images.shape}: expected (batch, {expected}), batch at least 1"
        )
    encoder, _ = modules(params.config)
    apply = partial(encoder.apply, {"params": params.encoder})
    mean, log_var, _ = in_blocks(apply, scale_images(images))
    return Gaussian(mean, log_var)


@jax.jit
def decode(params: Params, z: jax.Array) -> Bernoulli:
    """The likelihood p(x|z): Bernoulli pixels of [batch, height, width, channels].

    Args:
      z: latents, [batch, latent].
    Raises:
      InputError: latents of another shape than the model's.
    """
    z = jnp.asarray(z)
    if z.ndim != 2 or z.shape[1] != params.config.latent_dim or not len(z):
        raise InputError(
            f"latents have shape {z.shape}: expected (batch, {params.config.latent_dim}), "
            "batch at least 1"
        )
    _, decoder = modules(params.config)
    return Bernoulli(in_blocks(partial(decoder.apply, {"params": params.decoder}), z))


@jax.jit
def reconstruct(params: Params, images: jax.Array) -> jax.Array:
    """The decoder's mean at the posterior's mean: float32 [batch, height, width, channels].

    Args:
      images: [batch, height, width, channels], float32 in [0, 1] or uint8.
    Raises:
      InputError: images of another shape than the model's.
    """
    return decode(params, encode(params, images).mean).mean


@partial(jax.jit, static_argnames="n")
def sample(params: Params, key: jax.Array, n: int) -> jax.Array:
    """Decoder means of n draws from the prior N(0, I): float32 [n, height, width, channels].

    Raises InputError if n is below 1.
    """
    if n < 1:
        raise InputError(f"n is {n}: expected at least 1")
    return decode(params, jax.random.normal(key, (n, params.config.latent_dim))).mean
