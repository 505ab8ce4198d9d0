"""A posterior that an inverse autoregressive flow makes of a Gaussian."""

from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import DotGeneralT, Dtype
from jax import lax

from jaxvae.models.distributions import Gaussian, reparameterize
from jaxvae.models.networks import dense
from jaxvae.models.protocols import Learned, Prior
from jaxvae.validation import whole_number


class AutoregressiveNetwork(nn.Module):
    """Two numbers for every latent, from the latents before it and the context: a MADE.

    Every latent has a degree, its place in the order, from 1 to the number of latents. A hidden
    unit of degree d sees the latents of degree at most d; a result for the latent of degree d sees
    the units of lower degree. The context is an input of degree 0: all see it, and the first
    latent's results see nothing else.

    Germain, Gregor, Murray and Larochelle (2015), MADE, equations 8 and 9.

    hidden: units of the one hidden layer.
    backwards: the last latent is the first in order.
    """

    hidden: int
    backwards: bool = False
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, z: jax.Array, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        latents = z.shape[-1]
        order = 1 + np.arange(latents)[:: -1 if self.backwards else 1]
        inputs = np.concatenate([order, np.zeros(context.shape[-1], order.dtype)])
        units = np.arange(self.hidden) % latents
        x = jnp.concatenate([z, context.astype(z.dtype)], axis=-1)
        seen = _masked(inputs[:, None] <= units)
        x = nn.elu(dense(self.hidden, dtype=self.dtype, name="dense", dot_general=seen)(x))
        # From zero on, whatever the scale of the context.
        x = dense(
            2 * latents,
            dtype=self.dtype,
            name="outputs",
            kernel_init=nn.initializers.zeros,
            dot_general=_masked(units[:, None] < np.tile(order, 2)),
        )(x)
        return x[..., :latents], x[..., latents:]


def _masked(mask: np.ndarray) -> DotGeneralT:
    """The product of a dense layer that has only the kernel's entries in `mask`."""

    def dot_general(x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
        return lax.dot_general(x, jnp.where(mask, kernel, 0), *args, **options)

    return dot_general


class InverseAutoregressiveFlow(nn.Module):
    """z_0 to z_T and log |det dz_T / dz_0|, in T steps, of which every other runs backwards.

        m_t, s_t = AutoregressiveNetwork_t(z_{t-1}, context)
        sigma_t  = sigmoid(s_t + 2)
        z_t      = sigma_t z_{t-1} + (1 - sigma_t) m_t
        log det  = sum_t sum_j log sigma_tj

    m and s begin at 0, and so the flow as a scaling by sigmoid(2)^T = 0.88^T.

    Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling (2016), Improving Variational
    Inference with Inverse Autoregressive Flow, algorithm 1.

    steps: T.
    hidden: units of each step's network.
    """

    steps: int
    hidden: int = 320
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, z: jax.Array, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """z: [..., latent]; context: [..., features]. Returns [..., latent] and [...]."""
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
    """What a flow makes of N(mean, diag(exp(log_var))): a pytree.

        log q(z_T|x) = log N(z_0; mean, exp(log_var)) - log |det dz_T / dz_0|

    The density is known at the posterior's own samples alone: to go from z_T back to z_0 would
    take the latents one at a time.

    mean, log_var: [batch, latent], of the Gaussian.
    context: [batch, features], what else the flow may know of x.
    params: the flow's "params" collection.
    """

    mean: jax.Array
    log_var: jax.Array
    context: jax.Array
    params: Any
    flow: InverseAutoregressiveFlow = field(metadata={"static": True})

    @property
    def center(self) -> jax.Array:
        """Where the flow takes the Gaussian's mean, [batch, latent]."""
        return self._apply(self.mean)[0]

    def sample(self, key: jax.Array) -> jax.Array:
        """One draw for every row: [batch, latent]."""
        return self._apply(reparameterize(key, self.mean, self.log_var))[0]

    def sample_and_log_prob(self, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A draw for every row by a key of its own, [batch, latent], and log q of it, [batch]."""
        z_0 = jax.vmap(reparameterize)(keys, self.mean, self.log_var)
        z, log_det = self._apply(z_0)
        return z, Gaussian(self.mean, self.log_var).log_prob(z_0) - log_det

    def kl(self, prior: Prior) -> None:
        """Return None: the KL divergence is not known in closed form."""
        return

    def _apply(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.flow.apply({"params": self.params}, z, self.context)


@dataclass(frozen=True)
class InverseAutoregressive:
    """An inverse autoregressive flow on top of a diagonal Gaussian.

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

    def init(self, key: jax.Array, encoded: tuple[jax.Array, ...]) -> Learned:
        """Return the parameters of the autoregressive networks."""
        return self._flow().init(key, encoded[0], _context(encoded))["params"]

    def bind(self, learned: Learned, encoded: tuple[jax.Array, ...]) -> FlowPosterior:
        """Return the flow's posterior of a batch."""
        mean, log_var = encoded[:2]
        return FlowPosterior(mean, log_var, _context(encoded), learned, self._flow())

    def _flow(self) -> InverseAutoregressiveFlow:
        return InverseAutoregressiveFlow(self.steps, self.hidden)


def _context(encoded: tuple[jax.Array, ...]) -> jax.Array:
    """Return what the flow may depend on: the encoder's third result, or else its first two."""
    return encoded[2] if len(encoded) > 2 else jnp.concatenate(encoded, axis=1)
