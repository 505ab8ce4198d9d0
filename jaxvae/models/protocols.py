"""Protocols of the components of a model: distributions, their families, and networks.

A family belongs to the configuration: it is frozen and hashable, and its fields are its options. It
initialises its learned parameters, a dict of arrays that may be empty, and binds them to a
distribution, which is a pytree.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Key, Num

if TYPE_CHECKING:
    from jaxvae.models.config import ModelConfig
    from jaxvae.models.vae import Params
    from jaxvae.validation import AnyKey, Support

Learned = Mapping[str, Any]


class Elbo(NamedTuple):
    """The evidence lower bound and its two terms, in nats per image.

        value = log_likelihood - kl

    Attributes:
      value: the bound.
      log_likelihood: E_q(z|x)[log p(x|z)], or an estimate.
      kl: KL(q(z|x) || p(z)), or an estimate.
    """

    value: Float[Array, " batch"]
    log_likelihood: Float[Array, " batch"]
    kl: Float[Array, " batch"]


class Draw(NamedTuple):
    """Samples z ~ q(z|x) for every image, and the log-densities at them, in nats.

    Attributes:
      z: the samples.
      log_likelihood: log p(x|z).
      log_prior: log p(z).
      log_posterior: log q(z|x).
      kl: KL(q(z|x) || p(z)) in closed form, or an estimate with less variance than `log_ratio`;
        None if there is neither.
      posterior: q(z|x).
      kl_per_group: in a hierarchy, the KL of each group of latents given the groups above; else
        None.
      penalty: term that the posterior adds to every loss, such as the losses of a code book.
    """

    z: Float[Array, "samples batch latent"]
    log_likelihood: Float[Array, "samples batch"]
    log_prior: Float[Array, "samples batch"]
    log_posterior: Float[Array, "samples batch"]
    kl: Float[Array, " batch"] | None
    posterior: "Posterior"
    kl_per_group: Float[Array, "samples batch groups"] | None = None
    penalty: Float[Array, " batch"] | float = 0.0

    @property
    def log_ratio(self) -> Float[Array, "samples batch"]:
        """An estimate of the KL at each sample, log q(z|x) - log p(z)."""
        return self.log_posterior - self.log_prior

    def elbo(self, *, exact: bool = True) -> Elbo:
        """Average the ELBO over the samples.

        Args:
          exact: use `kl` where there is one, instead of `log_ratio`.

        Returns:
          The ELBO and its terms.
        """
        log_likelihood = jnp.mean(self.log_likelihood, axis=0)
        kl = self.kl if exact and self.kl is not None else jnp.mean(self.log_ratio, axis=0)
        return Elbo(log_likelihood - kl, log_likelihood, kl)


@runtime_checkable
class Prior(Protocol):
    """p(z), bound to its parameters: a pytree.

    It may have `marginal(latent)`, the `Prior` of one latent, which figures then draw as a curve
    instead of a histogram of samples. A mixture, whose samples are not differentiable by its
    weights, has `weights`, [K], and `sample_component(key, k)`, [latent]: the objective "mmd" sums
    over the components. `sample` may take `temperature`, a factor of the standard deviations.
    """

    def log_prob(self, z: Float[Array, "*batch latent"]) -> Float[Array, "*batch"]:
        """Compute log p(z), in nats."""

    def sample(self, key: Key[Array, ""], n: int) -> Float[Array, "n latent"]:
        """Draw n latents."""


@runtime_checkable
class Posterior(Protocol):
    """q(z|x) of a batch: a pytree.

    A posterior that can evaluate its density at any z also has `log_prob(z)`, which the objectives
    "stl", "dreg" and "beta_tc" need. A posterior may have `penalty`, [batch], which is added to
    every loss, and `relaxation`, the posterior that the objective "elbo" samples in its place, or
    None.
    """

    @property
    def mean(self) -> Float[Array, "batch latent"]:
        """The mean of q(z|x), or of the Gaussian to which a flow is applied."""

    @property
    def log_var(self) -> Float[Array, "batch latent"]:
        """The log variance of the distribution whose mean is `mean`."""

    @property
    def center(self) -> Float[Array, "batch latent"]:
        """The latents that `reconstruct` decodes."""

    def sample_and_log_prob(
        self, keys: Key[Array, " batch"]
    ) -> tuple[Float[Array, "batch latent"], Float[Array, " batch"]]:
        """Draw z by a key for each row; also return log q(z|x), in nats."""

    def kl(self, prior: Prior) -> Float[Array, " batch"] | None:
        """Compute KL(q(z|x) || p(z)), in nats; return None if it has no closed form."""


@runtime_checkable
class Likelihood(Protocol):
    """p(x|z) of a batch: a pytree.

    Examples are images, [batch, height, width, channels], or arrays [batch, ...] of another rank.

    NaN marks missing entries: `log_prob` is then the log-probability of the others, with finite
    derivatives, as `jaxvae.models.pixels.sum_observed` computes it. A likelihood given the total of
    x, a library size, has `with_size_of(images)`, which returns it at the totals of examples.

    A likelihood of discrete pixels may have `level_cdf(images, channel)`,
    [batch, height, width, levels - 1], by which images are compressed: for all levels k but the
    last, P(x_c <= k | x_<c), given the earlier channels of the same pixel in `images`, of which it
    reads no others. Pixels are independent.
    """

    @property
    def mean(self) -> Float[Array, " batch *shape"]:
        """The mean of p(x|z), float32."""

    def log_prob(self, images: Num[ArrayLike, " batch *shape"]) -> Float[Array, " batch"]:
        """Compute log p(x|z), in nats per image."""

    def sample(self, key: "AnyKey") -> Float[Array, " batch *shape"]:
        """Draw images."""


@runtime_checkable
class PriorFamily(Protocol):
    """A choice of the prior: `ModelConfig(prior=...)`.

    It may have `validate(config)`, which raises InputError for a model that it does not support,
    and `init_from(key, params, images, labels)`, which returns the initial parameters of a prior
    that is fitted to a trained model, given training images and, if the model is conditional,
    their labels. The family of a prior over codes has `over_codes = True`.
    """

    def init(self, key: Key[Array, ""], config: "ModelConfig") -> Learned:
        """Return the initial parameters of the prior."""

    def bind(self, learned: Learned, params: "Params") -> Prior:
        """Return the prior.

        Args:
          learned: parameters of the prior.
          params: parameters of the whole model, for a prior that needs its encoder.
        """


@runtime_checkable
class PosteriorFamily(Protocol):
    """A choice of the posterior: `ModelConfig(posterior=...)`.

    It may have `validate(config)`, as a prior's family does. One whose latents are codes has the
    attributes of `jaxvae.models.codebooks.CodebookFamily` besides.
    """

    def init(self, key: Key[Array, ""], encoded: tuple[Array, ...]) -> Learned:
        """Return the initial parameters of the posterior.

        Args:
          key: PRNG key.
          encoded: the encoder's results for one image: mean, log_var and, if it returns them,
            features, each [1, ...].
        """

    def bind(self, learned: Learned, encoded: tuple[Array, ...]) -> Posterior:
        """Return the posterior of a batch, from the encoder's results for it."""


@runtime_checkable
class LikelihoodFamily(Protocol):
    """A choice of the likelihood: `ModelConfig(likelihood=...)`.

    Where the number of outputs is not a multiple of the number of channels, the family has
    `outputs_per_pixel(channels)`, which returns it, in the place of `outputs_per_channel`.

    Attributes:
      outputs_per_channel: number of decoder outputs for each channel of a pixel.
      support: the possible values of pixels: "binary" (0 and 1), "levels" (k / 255), "unit" (the
        interval from 0 to 1) or "real". Images are scaled to [0, 1] for these. The values of
        others never are: "count" (whole, at least 0), "one_hot" (columns of 0 and 1), or for mixed
        columns ((support, columns), ...).
    """

    outputs_per_channel: int
    support: "Support"

    def init(self, channels: int) -> Learned:
        """Return the initial parameters that all pixels have in common."""

    def from_outputs(
        self, outputs: Float[Array, " batch *outputs"], learned: Learned
    ) -> Likelihood:
        """Return the likelihood of a batch.

        Args:
          outputs: the decoder's unbounded outputs: channels * outputs_per_channel for each pixel,
            or outputs_per_pixel(channels).
          learned: parameters that all pixels have in common.
        """


@runtime_checkable
class Model(Protocol):
    """A whole model, frozen and hashable, which belongs to the static part of `Params`.

    A model that evaluates log p(x|z), log p(z) and log q(z|x) in one pass may have
    `draw(params, posterior, keys, images, labels)`, which returns the `Draw` of keys
    [samples, batch]: see `jaxvae.objectives.draw_at`.

    Labels are classes, int [batch], or covariates, floats [batch, covariates].

    A hierarchy has `groups`, each with its number of latents, `size`. For the explorer it also has
    `noise_of(params, z)`, the noise of N(0, I) of which its prior makes latents, and, also for
    annealed importance sampling, `likelihood_of_noise(params, noise, labels)`.
    """

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Return the initial parameters: the fields of `Params` except `config`."""

    def prior(self, params: "Params") -> Prior:
        """Return p(z)."""

    def posterior(
        self,
        params: "Params",
        images: Float[Array, " batch *shape"],
        labels: Num[Array, " batch *covariates"] | None,
    ) -> Posterior:
        """Return q(z|x) of images in [0, 1] and, if the model is conditional, their labels.

        Other examples than images are taken as they are. Missing entries are 0.
        """

    def likelihood(
        self,
        params: "Params",
        z: Float[Array, "batch latent"],
        labels: Num[Array, " batch *covariates"] | None,
    ) -> Likelihood:
        """Return p(x|z) of latents and, if the model is conditional, their labels."""


@runtime_checkable
class Network(Protocol):
    """A choice of encoder and decoder: `ModelConfig(network=...)`.

    It may have `model(config)`, which returns the whole `Model` instead of a `VAE`, and a method
    `latent_dim(image_shape)`, which sets the number of latents. One for images alone, not for
    vectors, has `images_only = True`.
    """

    def modules(
        self, latent_dim: int, outputs_shape: tuple[int, ...], dtype: Any
    ) -> tuple[nn.Module, nn.Module]:
        """Return encoder and decoder.

        Args:
          latent_dim: number of latents.
          outputs_shape: (height, width, outputs) of the decoder's outputs for one image, or
            (..., outputs) for another example.
          dtype: of the layers' inputs, kernels and products; None: that of the inputs.

        Returns:
          The encoder maps images [batch, height, width, channels] to (mean, log_var), each
          [batch, latent], and may return features [batch, ...] as a third result. The decoder
          maps latents [batch, latent] to [batch, height, width, outputs]. In a conditional model
          both, or the one that `ModelConfig.conditions` names, take one-hot classes,
          [batch, classes], or covariates, [batch, covariates], as a second argument.
        """
