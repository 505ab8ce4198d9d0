"""A VAE with two stochastic layers, as a model of the user's own: `--network two_layers.TwoLayers`.

    p(x, z) = p(x|h1) p(h1|h2) p(h2)        q(z|x) = q(h2|h1) q(h1|x)        z = (h1, h2)

References:
  Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders, appendix C: two
  stochastic layers.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxvae.models.distributions import Gaussian, UnitGaussian

KERNEL = nn.initializers.glorot_uniform()
LOWER, UPPER = 100, 50  # latents of h1 and of h2


class Outputs(nn.Module):
    """Two hidden layers of tanh units, and a linear layer."""

    hidden: int
    outputs: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return [batch, outputs]."""
        for _ in range(2):
            x = jnp.tanh(nn.Dense(self.hidden, kernel_init=KERNEL)(x))
        return nn.Dense(self.outputs, kernel_init=KERNEL)(x)


def gaussian(module: Outputs, params: Any, x: Array) -> Gaussian:
    """Return the Gaussian of which the module computes mean and log variance."""
    return Gaussian(*jnp.split(module.apply({"params": params}, x), 2, axis=-1))


H1_OF_X, H2_OF_H1 = Outputs(200, 2 * LOWER), Outputs(100, 2 * UPPER)
H1_OF_H2 = Outputs(100, 2 * LOWER)


@dataclass(frozen=True)
class TwoLayers:
    """Two stochastic layers of 100 and 50 latents."""

    def latent_dim(self, image_shape: tuple[int, int, int]) -> int:
        """Return the number of latents of both layers."""
        return LOWER + UPPER

    def model(self, config: Any) -> "TwoLayerVAE":
        """Return the model."""
        return TwoLayerVAE(config)


@dataclass(frozen=True)
class TwoLayerVAE:
    """The model: `jaxvae.models.protocols.Model`."""

    config: Any

    @property
    def x_of_h1(self) -> Outputs:
        """The network of p(x|h1)."""
        height, width, outputs = self.config.outputs_shape
        return Outputs(200, height * width * outputs)

    def init(self, key: Array) -> dict[str, Any]:
        """Return the initial parameters."""
        keys = jax.random.split(key, 4)
        height, width, channels = self.config.image_shape
        modules = (H1_OF_X, H2_OF_H1, H1_OF_H2, self.x_of_h1)
        inputs = (height * width * channels, LOWER, UPPER, LOWER)
        h1_of_x, h2_of_h1, h1_of_h2, x_of_h1 = (
            module.init(key, jnp.zeros((1, n)))["params"]
            for module, key, n in zip(modules, keys, inputs, strict=True)
        )
        return {
            "encoder": {"h1": h1_of_x, "h2": h2_of_h1},
            "decoder": {"h1": h1_of_h2, "x": x_of_h1},
            "likelihood": self.config.likelihood.init(channels),
            "prior": {},
            "posterior": {},
        }

    def prior(self, params: Any) -> "TwoLayerPrior":
        """Return p(h1|h2) p(h2)."""
        return TwoLayerPrior(params.decoder["h1"])

    def posterior(self, params: Any, images: Array, labels: None = None) -> "TwoLayerPosterior":
        """Return q(h2|h1) q(h1|x)."""
        x = images.reshape(len(images), -1)
        h1 = gaussian(H1_OF_X, params.encoder["h1"], x)
        return TwoLayerPosterior(h1, params.encoder["h2"])

    def likelihood(self, params: Any, z: Array, labels: None = None) -> Any:
        """Return p(x|h1)."""
        outputs = self.x_of_h1.apply({"params": params.decoder["x"]}, z[:, :LOWER])
        shaped = outputs.reshape(-1, *self.config.outputs_shape)
        return self.config.likelihood.from_outputs(shaped, params.likelihood)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TwoLayerPrior:
    """p(h1|h2) p(h2)."""

    h1: Any

    def log_prob(self, z: Array) -> Array:
        """Compute log p(z), in nats."""
        h1, h2 = z[..., :LOWER], z[..., LOWER:]
        return UnitGaussian(UPPER).log_prob(h2) + gaussian(H1_OF_H2, self.h1, h2).log_prob(h1)

    def sample(self, key: Array, n: int, temperature: float = 1.0) -> Array:
        """Draw n latents."""
        upper, lower = jax.random.split(key)
        h2 = UnitGaussian(UPPER).sample(upper, n, temperature)
        mean, log_var = gaussian(H1_OF_H2, self.h1, h2)
        noise = jax.random.normal(lower, mean.shape)
        return jnp.concatenate([mean + temperature * jnp.exp(log_var / 2) * noise, h2], axis=-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TwoLayerPosterior:
    """q(h2|h1) q(h1|x) of a batch."""

    h1: Gaussian
    h2: Any

    def at_means(self) -> Gaussian:
        """Return the Gaussians of both layers, q(h2|h1) at the mean of h1."""
        h2 = gaussian(H2_OF_H1, self.h2, self.h1.mean)
        return Gaussian(*(jnp.concatenate(x, axis=-1) for x in zip(self.h1, h2, strict=True)))

    @property
    def mean(self) -> Array:
        """The mean of h1, and that of h2 given it."""
        return self.at_means().mean

    @property
    def log_var(self) -> Array:
        """The log variances of the same."""
        return self.at_means().log_var

    @property
    def center(self) -> Array:
        """The means, which `reconstruct` decodes."""
        return self.mean

    def log_prob(self, z: Array) -> Array:
        """Compute log q(z|x), in nats."""
        h1, h2 = z[..., :LOWER], z[..., LOWER:]
        return self.h1.log_prob(h1) + gaussian(H2_OF_H1, self.h2, h1).log_prob(h2)

    def sample_and_log_prob(self, keys: Array) -> tuple[Array, Array]:
        """Draw z by a key for each row; also return log q(z|x), in nats."""
        lower, upper = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        h1, log_q_h1 = self.h1.sample_and_log_prob(lower)
        h2, log_q_h2 = gaussian(H2_OF_H1, self.h2, h1).sample_and_log_prob(upper)
        return jnp.concatenate([h1, h2], axis=-1), log_q_h1 + log_q_h2

    def kl(self, prior: TwoLayerPrior) -> None:
        """Return None: there is no closed form."""
        return
