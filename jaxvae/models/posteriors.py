"""Posteriors q(z|x)."""

from dataclasses import dataclass

from jaxtyping import Array, Key

from jaxvae.models.distributions import Gaussian
from jaxvae.models.protocols import Learned


@dataclass(frozen=True)
class DiagonalGaussian:
    """A Gaussian with a diagonal covariance, N(mean, diag(exp(log_var))).

    References:
      Kingma and Welling (2014), Auto-Encoding Variational Bayes, section 3.
    """

    def init(self, key: Key[Array, ""], encoded: tuple[Array, ...]) -> Learned:
        """Return no parameters: the encoder returns mean and log_var."""
        return {}

    def bind(self, learned: Learned, encoded: tuple[Array, ...]) -> Gaussian:
        """Return the Gaussian of a batch."""
        return Gaussian(*encoded[:2])
