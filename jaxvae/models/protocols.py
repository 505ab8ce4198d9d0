"""What the components of a model are: distributions, the families that make them, networks.

A family belongs to the configuration: it is frozen and hashable, its fields are its options. It
initialises the parameters that it learns, `learned`, a dict of arrays that may be empty, and binds
them to a distribution, which is a pytree.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxvae.models.config import ModelConfig
    from jaxvae.models.vae import Params

Learned = Mapping[str, Any]


class Elbo(NamedTuple):
    """The bound and its two terms, each [batch], nats per image: value = log_likelihood - kl."""

    value: jax.Array
    log_likelihood: jax.Array
    kl: jax.Array


class Draw(NamedTuple):
    """Samples z ~ q(z|x) of every image, and what objectives need to know of them, in nats.

    Attributes:
      z: [samples, batch, latent].
      log_likelihood: log p(x|z), [samples, batch].
      log_prior: log p(z), [samples, batch].
      log_posterior: log q(z|x), [samples, batch].
      kl: KL(q(z|x) || p(z)), [batch], where it is known exactly, or more exactly than by
        log_ratio; else None.
      posterior: q(z|x).
      kl_per_group: of a hierarchy, the KL of every group of latents given the groups above,
        [samples, batch, groups]; else None.
      penalty: what the posterior adds to every loss, such as the losses of a code book: [batch].
    """

    z: jax.Array
    log_likelihood: jax.Array
    log_prior: jax.Array
    log_posterior: jax.Array
    kl: jax.Array | None
    posterior: "Posterior"
    kl_per_group: jax.Array | None = None
    penalty: jax.Array | float = 0.0

    @property
    def log_ratio(self) -> jax.Array:
        """log q(z|x) - log p(z), [samples, batch]: an estimate of the KL."""
        return self.log_posterior - self.log_prior

    def elbo(self, *, exact: bool = True) -> Elbo:
        """Average the ELBO over the samples, with the exact KL where it is known and wanted."""
        log_likelihood = jnp.mean(self.log_likelihood, axis=0)
        kl = self.kl if exact and self.kl is not None else jnp.mean(self.log_ratio, axis=0)
        return Elbo(log_likelihood - kl, log_likelihood, kl)


class Prior(Protocol):
    """p(z), bound to its parameters: a pytree.

    It may have `marginal(latent)`, the `Prior` of one latent alone, which figures then draw as a
    curve instead of a histogram of draws. A mixture, whose samples are no differentiable function
    of its weights, has `weights`, [K], and `sample_component(key, k)`, [latent]: the objective
    "mmd" sums over the components. `sample` may take `temperature`, a factor of the standard
    deviations.
    """

    def log_prob(self, z: jax.Array) -> jax.Array:
        """Compute log p(z) in nats: z is [..., latent], the result [...]."""

    def sample(self, key: jax.Array, n: int) -> jax.Array:
        """Draw n latents, [n, latent]."""


@runtime_checkable
class Posterior(Protocol):
    """q(z|x) of a batch: a pytree.

    A posterior whose density is known at any z has `log_prob(z)` besides, which the objectives
    "stl", "dreg" and "beta_tc" need.
    """

    @property
    def mean(self) -> jax.Array:
        """The mean of q(z|x), or of the Gaussian that it is made from: [batch, latent]."""

    @property
    def log_var(self) -> jax.Array:
        """The log variance that belongs to `mean`: [batch, latent]."""

    @property
    def center(self) -> jax.Array:
        """The latents that `reconstruct` decodes, [batch, latent]."""

    def sample_and_log_prob(self, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Draw [batch, latent] by a key for each row; also return log q of the draw, [batch]."""

    def kl(self, prior: Prior) -> jax.Array | None:
        """Compute KL(q(z|x) || p(z)) in nats, [batch], where it is known exactly; else None."""


class Likelihood(Protocol):
    """p(x|z) of a batch: a pytree."""

    @property
    def mean(self) -> jax.Array:
        """The mean of p(x|z): float32 [batch, height, width, channels]."""

    def log_prob(self, images: jax.Array) -> jax.Array:
        """Compute log p(x|z) in nats per image: [batch]."""

    def sample(self, key: jax.Array) -> jax.Array:
        """Draw images, [batch, height, width, channels]."""


class PriorFamily(Protocol):
    """A choice of the prior: `ModelConfig(prior=...)`.

    It may have `validate(config)`, which raises InputError for a model it does not go with.
    """

    def init(self, key: jax.Array, config: "ModelConfig") -> Learned:
        """Return the parameters that the prior starts from."""

    def bind(self, learned: Learned, params: "Params") -> Prior:
        """Return the prior; `params` are the whole model's, for one that needs its encoder."""


class PosteriorFamily(Protocol):
    """A choice of the posterior: `ModelConfig(posterior=...)`."""

    def init(self, key: jax.Array, encoded: tuple[jax.Array, ...]) -> Learned:
        """Return the parameters that the posterior starts from.

        Args:
          key: PRNG key.
          encoded: what the encoder returns for one image: mean, log_var and, where it has them,
            features, each [1, ...].
        """

    def bind(self, learned: Learned, encoded: tuple[jax.Array, ...]) -> Posterior:
        """Return the posterior of a batch from what the encoder returns for it."""


class LikelihoodFamily(Protocol):
    """A choice of the likelihood: `ModelConfig(likelihood=...)`.

    Attributes:
      outputs_per_channel: numbers that the decoder returns for each channel of a pixel.
      support: the values that pixels take: "binary" (0 and 1), "levels" (k / 255), "unit" (the
        interval from 0 to 1) or "real".
    """

    outputs_per_channel: int
    support: str

    def init(self, channels: int) -> Learned:
        """Return the parameters that all pixels have in common."""

    def from_outputs(self, outputs: jax.Array, learned: Learned) -> Likelihood:
        """Return the likelihood of a batch.

        Args:
          outputs: what the decoder returns, [batch, height, width,
            channels * outputs_per_channel], unbounded.
          learned: as of `init`, trained.
        """


class Model(Protocol):
    """A whole model, frozen and hashable: what the static part of `Params` describes.

    A model that evaluates log p(x|z), log p(z) and log q(z|x) in one pass may have
    `draw(params, posterior, keys, images, labels)`, which returns the `Draw` of keys
    [samples, batch]: see `jaxvae.objectives.draw_at`.
    """

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Return fresh parameters: the fields of `Params` but for `config`."""

    def prior(self, params: "Params") -> Prior:
        """Return p(z)."""

    def posterior(self, params: "Params", images: jax.Array, labels: jax.Array | None) -> Posterior:
        """Return q(z|x) of images [batch, ...], floats in [0, 1], and of their classes [batch]."""

    def likelihood(self, params: "Params", z: jax.Array, labels: jax.Array | None) -> Likelihood:
        """Return p(x|z) of latents [batch, latent], and of their classes [batch]."""


class Network(Protocol):
    """A choice of encoder and decoder: `ModelConfig(network=...)`.

    It may have `model(config)`, which returns the whole `Model`, where that is no `VAE`.
    """

    def modules(
        self, latent_dim: int, outputs_shape: tuple[int, int, int], dtype: Any
    ) -> tuple[nn.Module, nn.Module]:
        """Return encoder and decoder.

        Args:
          latent_dim: number of latents.
          outputs_shape: (height, width, outputs) of what the decoder returns for one image.
          dtype: of the layers' inputs, kernels and products; None: as they come in.

        Returns:
          The encoder takes images [batch, height, width, channels] to (mean, log_var), each
          [batch, latent], and may return features [batch, ...] as a third result. The decoder
          takes latents [batch, latent] to [batch, height, width, outputs]. Of a conditional model
          both take the classes as a second argument, one-hot [batch, classes].
        """
