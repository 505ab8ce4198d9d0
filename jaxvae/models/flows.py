"""A posterior that applies an inverse autoregressive flow to a Gaussian."""

from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import DotGeneralT, Dtype
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from jaxvae.models.distributions import Gaussian, reparameterize
from jaxvae.models.networks import dense
from jaxvae.models.protocols import Learned, Prior
from jaxvae.validation import AnyKey, whole_number


class AutoregressiveNetwork(nn.Module):
    """A MADE: two outputs for every latent, which depend on the latents before it and the context.

    The degree of a latent is its position in the order, from 1. A hidden unit of degree d is
    connected to the latents of degree at most d, and the outputs for the latent of degree d to the
    hidden units of lower degree. The context has degree 0: it is connected to all units, and the
    outputs for the first latent depend on it alone.

    Attributes:
      hidden: units of the hidden layer.
      backwards: whether the order starts at the last latent.
      dtype: of the layers' inputs, kernels and products.

    References:
      Germain, Gregor, Murray and Larochelle (2015), MADE, equations 8 and 9.
    """

    hidden: int
    backwards: bool = False
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, z: Float[Array, "*batch latent"], context: Float[Array, "*batch features"]
    ) -> tuple[Float[Array, "*batch latent"], Float[Array, "*batch latent"]]:
        """Return the two outputs for every latent, m and s."""
        latents = z.shape[-1]
        order = 1 + np.arange(latents)[:: -1 if self.backwards else 1]
        inputs = np.concatenate([order, np.zeros(context.shape[-1], order.dtype)])
        units = np.arange(self.hidden) % latents
        x = jnp.concatenate([z, context.astype(z.dtype)], axis=-1)
        connected = _masked(inputs[:, None] <= units)
        x = nn.elu(dense(self.hidden, dtype=self.dtype, name="dense", dot_general=connected)(x))
        # The outputs start at 0, whatever the scale of the context.
        x = dense(
            2 * latents,
            dtype=self.dtype,
            name="outputs",
            kernel_init=nn.initializers.zeros,
            dot_general=_masked(units[:, None] < np.tile(order, 2)),
        )(x)
        return x[..., :latents], x[..., latents:]


def _masked(mask: Bool[np.ndarray, "inputs units"]) -> DotGeneralT:
    """Return the product for a dense layer whose kernel is 0 outside the mask."""

    def dot_general(x: Array, kernel: Array, *args: Any, **options: Any) -> Array:
        return lax.dot_general(x, jnp.where(mask, kernel, 0), *args, **options)

    return dot_general


class InverseAutoregressiveFlow(nn.Module):
    """An inverse autoregressive flow of T steps, in alternating order of the latents.

        m_t, s_t = AutoregressiveNetwork_t(z_{t-1}, context)
        sigma_t  = sigmoid(s_t + 2)
        z_t      = sigma_t z_{t-1} + (1 - sigma_t) m_t
        log det  = sum_t sum_j log sigma_tj

    m and s are 0 at initialisation, where the flow is a scaling by sigmoid(2)^T = 0.88^T.

    Attributes:
      steps: T.
      hidden: hidden units of the network of each step.
      dtype: of the layers' inputs, kernels and products.

    References:
      Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling (2016), Improving Variational
      Inference with Inverse Autoregressive Flow, algorithm 1.
    """

    steps: int
    hidden: int = 320
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, z: Float[Array, "*batch latent"], context: Float[Array, "*batch features"]
    ) -> tuple[Float[Array, "*batch latent"], Float[Array, "*batch"]]:
        """Return z_T and log |det dz_T / dz_0| of z_0."""
        log_det = jnp.zeros(z.shape[:-1], z.dtype)
        for t in range(self.steps):
            network = AutoregressiveNetwork(
                self.hidden, backwards=t % 2 == 1, dtype=self.dtype, name=f"step_{t + 1}"
            )
            m, s = network(z, context)
            s = s + 2
            z = nn.sigmoid(s) * z + nn.sigmoid(-s) * m
            log_det = log_det + jnp.sum(nn.log_sigmoid(s), axis=-1)
        return z, log_det


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlowPosterior:
    """The distribution of a flow's output for z_0 ~ N(mean, diag(exp(log_var))): a pytree.

        log q(z_T|x) = log N(z_0; mean, exp(log_var)) - log |det dz_T / dz_0|

    The density is computed only at the posterior's own samples: inverting the flow would take one
    sequential step per latent.

    Attributes:
      mean: of the Gaussian.
      log_var: log variances of the Gaussian.
      context: further input of the flow, which depends on x.
      params: the flow's "params" collection.
      flow: the Flax module (static).
    """

    mean: Float[Array, "batch latent"]
    log_var: Float[Array, "batch latent"]
    context: Float[Array, "batch features"]
    params: Any
    flow: InverseAutoregressiveFlow = field(metadata={"static": True})

    @property
    def center(self) -> Float[Array, "batch latent"]:
        """The flow's output for the mean of the Gaussian, which `reconstruct` decodes."""
        return self._apply(self.mean)[0]

    def sample(self, key: AnyKey) -> Float[Array, "batch latent"]:
        """Draw z once for every row."""
        return self._apply(reparameterize(key, self.mean, self.log_var))[0]

    def sample_and_log_prob(
        self, keys: Key[Array, " batch"]
    ) -> tuple[Float[Array, "batch latent"], Float[Array, " batch"]]:
        """Draw z by a key for each row; also return log q(z|x), in nats."""
        z_0 = jax.vmap(reparameterize)(keys, self.mean, self.log_var)
        z, log_det = self._apply(z_0)
        return z, Gaussian(self.mean, self.log_var).log_prob(z_0) - log_det

    def kl(self, prior: Prior) -> None:
        """Return None: the KL divergence has no closed form."""
        return

    def _apply(
        self, z: Float[Array, "batch latent"]
    ) -> tuple[Float[Array, "batch latent"], Float[Array, " batch"]]:
        return self.flow.apply({"params": self.params}, z, self.context)


@dataclass(frozen=True)
class InverseAutoregressive:
    """An inverse autoregressive flow applied to a diagonal Gaussian.

    Attributes:
      steps: number of autoregressive transformations.
      hidden: units of the hidden layer of each.

    References:
      Kingma et al. (2016), Improving Variational Inference with Inverse Autoregressive Flow,
      algorithm 1.
    """

    steps: int = 2
    hidden: int = 320

    def __post_init__(self) -> None:
        for name in ("steps", "hidden"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))

    def init(self, key: Key[Array, ""], encoded: tuple[Array, ...]) -> Learned:
        """Return the parameters of the autoregressive networks."""
        return self._flow().init(key, encoded[0], _context(encoded))["params"]

    def bind(self, learned: Learned, encoded: tuple[Array, ...]) -> FlowPosterior:
        """Return the posterior of a batch."""
        mean, log_var = encoded[:2]
        return FlowPosterior(mean, log_var, _context(encoded), learned, self._flow())

    def _flow(self) -> InverseAutoregressiveFlow:
        return InverseAutoregressiveFlow(self.steps, self.hidden)


def _context(encoded: tuple[Array, ...]) -> Float[Array, "batch features"]:
    """Return the flow's context: the encoder's features, or else its mean and log_var."""
    return encoded[2] if len(encoded) > 2 else jnp.concatenate(encoded, axis=1)
