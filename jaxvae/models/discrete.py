"""Codes of images and images of codes, for models with discrete latents."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Integer, Num

from jaxvae.errors import InputError
from jaxvae.models.codebooks import codebook_of
from jaxvae.models.protocols import Likelihood
from jaxvae.models.vae import Labels, Params, decode, encode
from jaxvae.validation import as_array, jit


@jit()
def codes(
    params: Params,
    images: Num[ArrayLike, " batch *shape"],
    labels: Labels = None,
) -> Int[Array, "batch n"]:
    """Compute the codes of images, the most probable ones.

    Args:
      params: a model with a posterior over codes.
      images: float32 in [0, 1], or uint8.
      labels: classes or covariates of the images, if the model is conditional.

    Returns:
      n codes of each image, from 0 to K - 1, in the order of the latents.

    Raises:
      InputError: the latents of the model are continuous; images or labels as of `jaxvae.encode`.
    """
    return codebook_of(params).codes(encode(params, images, labels).center)


def decode_codes(
    params: Params,
    codes: Integer[ArrayLike, "batch n"],
    labels: Labels = None,
) -> Likelihood:
    """Decode codes.

    Args:
      params: a model with a posterior over codes.
      codes: as of `codes`.
      labels: classes or covariates of the images, if the model is conditional.

    Returns:
      p(x|z), as `jaxvae.decode` does.

    Raises:
      InputError: the latents of the model are continuous; codes of another shape or type, or out
        of range.
    """
    book = codebook_of(params)
    n = params.config.latent_dim // book.dim
    codes = as_array("codes", codes)
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise InputError(f"codes are of type {codes.dtype}: expected whole numbers")
    if codes.ndim != 2 or codes.shape[1] != n or codes.shape[0] < 1:
        raise InputError(f"codes have shape {codes.shape}: expected (batch, {n}), batch at least 1")
    if not isinstance(codes, jax.core.Tracer):  # inside jit the values are not known
        least, most = int(codes.min()), int(codes.max())
        if least < 0 or most >= book.num_codes:
            raise InputError(
                f"codes are from {least} to {most}: expected codes from 0 to {book.num_codes - 1}"
            )
    return decode(params, book.embed(codes), labels)


def perplexity(codes: Int[Array, "*batch n"], num_codes: int) -> Float[Array, ""]:
    """Compute the perplexity of codes, the effective number of codes in use.

        exp(-sum_k f_k log f_k)

    where f_k is the frequency of code k over all images and positions.

    Args:
      codes: the codes of images.
      num_codes: K.

    Returns:
      A number from 1, where all codes are equal, to K, where all are used equally often.
    """
    frequency = jnp.bincount(codes.ravel(), length=num_codes) / codes.size
    return jnp.exp(jnp.sum(jax.scipy.special.entr(frequency)))
