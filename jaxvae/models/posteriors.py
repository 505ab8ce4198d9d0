"""Posteriors q(z|x)."""

from dataclasses import dataclass
from typing import Any

import jax

from jaxvae.components import Registry
from jaxvae.models.distributions import Gaussian
from jaxvae.models.flows import InverseAutoregressive
from jaxvae.models.protocols import Learned


@dataclass(frozen=True)
class DiagonalGaussian:
    """A Gaussian with a diagonal covariance, N(mean, diag(exp(log_var))).

    References:
      Kingma and Welling (2014), Auto-Encoding Variational Bayes, section 3.
    """

    def init(self, key: jax.Array, encoded: tuple[jax.Array, ...]) -> Learned:
        """Return no parameters: the encoder learns all there is."""
        return {}

    def bind(self, learned: Learned, encoded: tuple[jax.Array, ...]) -> Gaussian:
        """Return the Gaussian of a batch."""
        return Gaussian(*encoded[:2])


POSTERIORS: Registry[Any] = Registry(
    "posterior", {"gaussian": DiagonalGaussian, "iaf": InverseAutoregressive}
)
