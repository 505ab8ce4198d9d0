"""Priors p(z), and the initial parameters of the learned ones."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key, Num

from jaxvae.errors import InputError
from jaxvae.models.distributions import GaussianMixture, UnitGaussian
from jaxvae.models.pixels import sigmoid
from jaxvae.models.protocols import Learned
from jaxvae.validation import (
    as_floats,
    at_least_float32,
    is_image,
    is_of_pixels,
    scale_images,
    support_of,
    whole_number,
)

if TYPE_CHECKING:
    from jaxvae.models.config import ModelConfig
    from jaxvae.models.vae import Params

_EM_STEPS = 30


@dataclass(frozen=True)
class StandardNormal:
    """The standard normal distribution N(0, I)."""

    def init(self, key: Key[Array, ""], config: "ModelConfig") -> Learned:
        """Return no parameters: nothing is learned."""
        return {}

    def bind(self, learned: Learned, params: "Params") -> UnitGaussian:
        """Return N(0, I) over the model's latents."""
        return UnitGaussian(params.config.latent_dim)


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians, with learned weights, means and variances.

        p(z) = sum_k softmax(logits)_k N(z; mean_k, diag(exp(log_var_k)))

    Attributes:
      components: K, the number of Gaussians.
    """

    components: int = 500

    def __post_init__(self) -> None:
        object.__setattr__(self, "components", whole_number("components", self.components))

    def init(self, key: Key[Array, ""], config: "ModelConfig") -> Learned:
        """Return components of equal weight whose mixture is close to N(0, I).

        mean_k ~ N(0, I/4) and variances of 3/4 give N(0, I) on average over the means. The means
        differ, so the gradients of the components differ too.
        """
        shape = self.components, config.latent_dim
        return {
            "logits": jnp.zeros(self.components, jnp.float32),
            "mean": 0.5 * jax.random.normal(key, shape, jnp.float32),
            "log_var": jnp.full(shape, math.log(0.75), jnp.float32),
        }

    def init_from(
        self,
        key: Key[Array, ""],
        params: "Params",
        images: Num[Array, " n *shape"],
        labels: Num[Array, " n *covariates"] | None,
    ) -> Learned:
        """Return a fit to latents of the images by the EM algorithm.

        It starts from the kernel density estimate of K latents, with Scott's rule. The variances
        count one more latent at the distance of the standard deviation of all, and the weights
        one more latent in each component, so that no component collapses.

        References:
          Dempster, Laird and Rubin (1977), Maximum Likelihood from Incomplete Data via the EM
          Algorithm. Scott (1992), Multivariate Density Estimation, equation 6.42.
        """
        x = as_floats(support_of(params), images)
        posterior = params.model.posterior(params, x, labels)
        draws = -(-self.components // len(images))
        keys = jax.random.split(key, (draws, len(images)))
        z = jnp.concatenate([posterior.sample_and_log_prob(each)[0] for each in keys])
        n, latent = z.shape
        spread = jnp.var(z, axis=0) + 1e-6
        var = self.components ** (-2 / (latent + 4)) * spread
        logits = jnp.zeros(self.components, z.dtype)
        start = logits, z[: self.components], jnp.tile(jnp.log(var), (self.components, 1))

        def improve(_: Array, mixture: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            r = jax.nn.softmax(GaussianMixture(*mixture).log_joint(z), axis=-1)
            count = jnp.sum(r, axis=0)[:, None]
            mean = r.T @ z / (count + 1e-6)
            square = r.T @ z**2 - 2 * mean * (r.T @ z) + count * mean**2
            var = (jnp.maximum(square, 0) + spread) / (count + 1)
            return jnp.log((count[:, 0] + 1) / (n + self.components)), mean, jnp.log(var)

        logits, mean, log_var = lax.fori_loop(0, _EM_STEPS, improve, start)
        return {"logits": logits, "mean": mean, "log_var": log_var}

    def bind(self, learned: Learned, params: "Params") -> GaussianMixture:
        """Return the mixture."""
        return GaussianMixture(**jax.tree.map(at_least_float32, dict(learned)))


@dataclass(frozen=True)
class Vamp:
    """A mixture, with equal weights, of the posteriors of learned pseudo-inputs u_k.

        p(z) = 1/K sum_k q(z|u_k)

    With a flow posterior the components are the Gaussians to which the flow is applied.

    Attributes:
      components: K, the number of pseudo-inputs.

    References:
      Tomczak and Welling (2018), VAE with a VampPrior, equation 9.
    """

    components: int = 500

    def __post_init__(self) -> None:
        object.__setattr__(self, "components", whole_number("components", self.components))

    def validate(self, config: "ModelConfig") -> None:
        """Raise InputError for a conditional encoder, or a model of counts or categories.

        Pseudo-inputs have no labels, and their numbers are neither whole nor one-hot.
        """
        if config.conditional("encoder"):
            what, field = "classes", "num_classes"
            if config.num_covariates:
                what, field = "covariates", "num_covariates"
            raise InputError(
                f"prior is 'vamp', whose pseudo-inputs have no {what}: expected "
                f"'standard_normal' or 'mixture' with {field}, or conditions 'decoder'"
            )
        if not is_of_pixels(getattr(config.likelihood, "support", "unit")):
            raise InputError(
                "prior is 'vamp', whose pseudo-inputs are no counts or categories: expected "
                "'standard_normal' or 'mixture' with this likelihood"
            )

    def init(self, key: Key[Array, ""], config: "ModelConfig") -> Learned:
        """Return pseudo-inputs: smooth dark images with bright spots, or standard normal examples.

        In short runs on digits the images gave the same bound as training images, and the same as
        or a better one than independent pixels, each with a warm-up of beta.
        """
        if not is_image(config.image_shape):
            shape = self.components, *config.image_shape
            return {"pseudo_inputs": jax.random.normal(key, shape, jnp.float32)}
        height, width, channels = config.image_shape
        spots = (self.components, -(-height // 4), -(-width // 4), channels)
        shape = self.components, height, width, channels
        smooth = jax.image.resize(jax.random.normal(key, spots, jnp.float32), shape, "cubic")
        return {"pseudo_inputs": 3.5 * smooth - 2}

    def init_from(
        self,
        key: Key[Array, ""],
        params: "Params",
        images: Num[Array, " n *shape"],
        labels: Num[Array, " n *covariates"] | None,
    ) -> Learned:
        """Return training images as pseudo-inputs."""
        x = scale_images(images)[jnp.arange(self.components) % len(images)]
        if is_image(x.shape[1:]):
            x = jnp.clip(x, 0.02, 0.98)
            x = jnp.log(x) - jnp.log1p(-x)
        return {"pseudo_inputs": x.astype(jnp.float32)}

    def bind(self, learned: Learned, params: "Params") -> GaussianMixture:
        """Return the mixture of the posteriors of the pseudo-inputs."""
        mean, log_var = params.model.encoded(params, pseudo_images(learned))[:2]  # type: ignore[attr-defined]
        return GaussianMixture(jnp.zeros(len(mean), mean.dtype), mean, log_var)


def pseudo_images(learned: Learned) -> Float[Array, " components *shape"]:
    """Return the pseudo-inputs of a VampPrior: images in [0, 1], or other examples.

    Images by a sigmoid, whose gradient is nowhere 0, instead of the clipping of Tomczak and Welling
    (2018).
    """
    x = learned["pseudo_inputs"]
    return sigmoid(x) if is_image(x.shape[1:]) else x
