"""The latents of a model as symbols: what is coded, group by group from the top down.

Encoder and decoder call the same compiled functions with the same inputs, as a difference in the
last bit of a probability would break the code. So the functions are small, one for each step.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int64

from jaxvae.compression.ans import BUCKETS, Distribution, Table, centers, expect_gaussian
from jaxvae.errors import InputError
from jaxvae.models.categorical import Categorical
from jaxvae.models.codebooks import UniformCodes, codebook_of
from jaxvae.models.distributions import Gaussian, UnitGaussian
from jaxvae.models.ladder import LadderVAE
from jaxvae.models.protocols import Likelihood
from jaxvae.models.vae import VAE, Params
from jaxvae.validation import is_image

# On one thread: the order of the sums in a product depends on the number of threads.
program = partial(jax.jit, compiler_options={"xla_cpu_multi_thread_eigen": False})

Batch = Int64[np.ndarray, "batch symbols"]


class Latents(Protocol):
    """The latents of a batch, as symbols of equal probability under the prior."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of symbols of an image in each group, from the top down."""

    @property
    def values(self) -> int:
        """K, the number of values of a symbol."""

    def encoded(self, images: Float[np.ndarray, "batch height width channels"]) -> Any:
        """Return what the posteriors of all groups need of the images."""

    def start(self, batch: int) -> Any:
        """Return the state before the first group."""

    def prior(self, g: int, state: Any) -> Any:
        """Return the state with the prior of group g."""

    def posterior(self, g: int, state: Any, encoded: Any, n: int) -> Distribution:
        """Return the posterior of group g of the first n images, given its prior."""

    def update(self, g: int, state: Any, symbols: Batch) -> Any:
        """Return the state after group g, given its symbols."""

    def likelihood(self, state: Any) -> Likelihood:
        """Return p(x|z), given the state after the last group."""


def latents_of(params: Params) -> Latents:
    """Return the latents of a model.

    Raises:
      InputError: the model is not supported.
    """
    config, model = params.config, params.model
    names = config.specs()
    if not is_image(config.image_shape):
        raise InputError(
            f"the model is of examples of shape {config.image_shape}: expected a model of images, "
            "(height, width, channels)"
        )
    if config.condition_dim:
        field = "num_covariates" if config.num_covariates else "num_classes"
        raise InputError(
            f"the model is conditional ({field}={config.condition_dim}), and compression does not "
            "store classes or covariates: expected an unconditional model"
        )
    if isinstance(model, LadderVAE):
        return GroupsOfNoise(params)
    if isinstance(model, VAE):
        x = jax.ShapeDtypeStruct((1, *config.image_shape), jnp.float32)
        posterior, prior = jax.eval_shape(lambda p, x: (p.model.posterior(p, x), p.model.prior(p)),
                                          params, x)  # fmt: skip
        if isinstance(prior, UnitGaussian) and isinstance(posterior, Gaussian):
            return Vector(params)
        if isinstance(prior, UniformCodes):
            return Codes(params)
    raise InputError(
        f"the prior {names['prior']!r} and the posterior {names['posterior']!r} cannot be used for "
        "compression: expected 'standard_normal' and 'gaussian', or 'uniform_codes' and a "
        "posterior over codes"
    )


@dataclass(frozen=True)
class Vector:
    """A vector with the prior N(0, I) and a Gaussian posterior.

    Attributes:
      params: the model.
    """

    params: Params
    values = 2**BUCKETS

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of latents."""
        return (self.params.config.latent_dim,)

    def encoded(self, images: Float[np.ndarray, "batch height width channels"]) -> Any:
        """Return means and standard deviations."""
        return _mean_and_sd(self.params, images)

    def start(self, batch: int) -> None:
        """Return nothing: there is no state."""

    def prior(self, g: int, state: None) -> None:
        """Return nothing: the prior is N(0, I)."""

    def posterior(self, g: int, state: None, encoded: Any, n: int) -> Distribution:
        """Return the posterior of the first n images."""
        return expect_gaussian(*(np.asarray(x)[:n] for x in encoded))

    def update(self, g: int, state: None, symbols: Batch) -> Float[np.ndarray, "batch latent"]:
        """Return the latents."""
        return centers(symbols)

    def likelihood(self, state: Float[np.ndarray, "batch latent"]) -> Likelihood:
        """Return p(x|z)."""
        return _likelihood(self.params, state)


@program
def _mean_and_sd(params: Params, images: Array) -> tuple[Array, Array]:
    posterior = params.model.posterior(params, images, None)
    return posterior.mean, jnp.exp(posterior.log_var / 2)


@program
def _likelihood(params: Params, z: Array) -> Likelihood:
    return params.model.likelihood(params, z, None)


@dataclass(frozen=True)
class Codes:
    """Independent codes with a uniform prior.

    A posterior with all probability on one sequence of codes gives no bits back.

    Attributes:
      params: the model.
    """

    params: Params

    @property
    def values(self) -> int:
        """K, the number of codes."""
        return codebook_of(self.params).num_codes

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of codes."""
        return (self.params.config.latent_dim // codebook_of(self.params).dim,)

    def encoded(self, images: Float[np.ndarray, "batch height width channels"]) -> Any:
        """Return the cumulative probabilities of the codes."""
        return _cdf_of_codes(self.params, images)

    def start(self, batch: int) -> None:
        """Return nothing: there is no state."""

    def prior(self, g: int, state: None) -> None:
        """Return nothing: the prior is uniform."""

    def posterior(self, g: int, state: None, encoded: Any, n: int) -> Distribution:
        """Return the posterior of the first n images."""
        cdf = np.asarray(encoded)[:n]
        return Table.of_cdf(cdf.reshape(-1, cdf.shape[-1]))

    def update(self, g: int, state: None, symbols: Batch) -> Float[Array, "batch latent"]:
        """Return the latents of the codes."""
        return _embed(self.params, symbols.astype(np.int32))

    def likelihood(self, state: Float[Array, "batch latent"]) -> Likelihood:
        """Return p(x|z)."""
        return _likelihood(self.params, state)


@program
def _cdf_of_codes(params: Params, images: Array) -> Float[Array, "batch n ends"]:
    posterior = params.model.posterior(params, images, None)
    if isinstance(posterior, Categorical):
        p = jax.nn.softmax(posterior.logits)
    else:
        p = codebook_of(params).one_hot(posterior.center)
    return jnp.cumsum(p, axis=-1)[..., :-1]


@program
def _embed(params: Params, codes: Int[Array, "batch n"]) -> Float[Array, "batch latent"]:
    return codebook_of(params).embed(codes)


@dataclass(frozen=True)
class GroupsOfNoise:
    """The groups of a ladder, as the noise of N(0, I) of which its prior makes latents.

    Attributes:
      params: the model.

    References:
      Townsend, Bird, Kunze and Barber (2020), HiLLoC: Lossless image compression with hierarchical
      latent variable models.
    """

    params: Params
    values = 2**BUCKETS

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of latents of each group."""
        return tuple(group.size for group in self._model.groups)

    @property
    def _model(self) -> LadderVAE:
        model = self.params.model
        assert isinstance(model, LadderVAE)
        return model

    def encoded(self, images: Float[np.ndarray, "batch height width channels"]) -> Any:
        """Return the features of the images."""
        return _features(self.params, images)

    def start(self, batch: int) -> Any:
        """Return the features before the first group."""
        return _start(self.params, batch)

    def prior(self, g: int, state: Any) -> Any:
        """Return the prior of a group, and the features before and after it."""
        return _group_prior(self.params, g, state)

    def posterior(self, g: int, state: Any, encoded: Any, n: int) -> Distribution:
        """Return the posterior of a group, in units of its prior."""
        terms = _group_posterior(self.params, g, state, encoded)
        return expect_gaussian(*(np.asarray(x)[:n] for x in terms))

    def update(self, g: int, state: Any, symbols: Batch) -> Any:
        """Return the features after a group."""
        return _group_update(self.params, g, state, centers(symbols))

    def likelihood(self, state: Any) -> Likelihood:
        """Return p(x|z)."""
        return _likelihood_of_features(self.params, state)


@program
def _features(params: Any, images: Array) -> tuple[Array, ...]:
    return params.model.encoded(params, images)


@partial(program, static_argnames="batch")
def _start(params: Any, batch: int) -> Array:
    return params.model.start(params.decoder, batch)


@partial(program, static_argnames="g")
def _group_prior(params: Any, g: int, h: Array) -> tuple[Gaussian, Array, Array]:
    p, h_p = params.model.group_prior(params.decoder, g, h)
    return p, h, h_p


@partial(program, static_argnames="g")
def _group_posterior(params: Any, g: int, state: Any, features: Any) -> tuple[Array, Array]:
    p, h, _ = state
    q = params.model.group_posterior(params.encoder, g, p, h, features)
    return (q.mean - p.mean) * jnp.exp(-p.log_var / 2), jnp.exp((q.log_var - p.log_var) / 2)


@partial(program, static_argnames="g")
def _group_update(params: Any, g: int, state: Any, noise: Array) -> Array:
    p, _, h_p = state
    z = p.mean + jnp.exp(p.log_var / 2) * noise.reshape(p.mean.shape)
    return params.model.group_update(params.decoder, g, h_p, z)


@program
def _likelihood_of_features(params: Any, h: Array) -> Likelihood:
    return params.model.likelihood_of_features(params, h)
