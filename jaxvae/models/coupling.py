"""A prior that affine coupling layers make of N(0, I)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Key

from jaxvae.models.distributions import UnitGaussian
from jaxvae.models.protocols import Learned
from jaxvae.validation import at_least_float32, whole_number

if TYPE_CHECKING:
    from jaxvae.models.config import ModelConfig
    from jaxvae.models.vae import Params

Layer = dict[str, Array]
Carry = tuple[Array, Array]  # the latents and the log-determinant so far

# Bounds a layer's log scale softly: a layer scales by e^2 at most.
_MAX_LOG_SCALE = 2.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CouplingFlow:
    """The distribution of z_0 = (f_1 o ... o f_T)(eps), eps ~ N(0, I): a pytree.

    A layer keeps the latents of its mask b and transforms the others, given those of the mask:

        z_{t-1} = b z_t + (1 - b) (z_t exp(s(b z_t)) + m(b z_t))
        log p(z_0) = log N(z_T; 0, I) - sum_t sum_j (1 - b_j) s_j

    where s and m are the outputs of a network with two hidden layers.

    Attributes:
      layers: parameters of the layers, each array [T, ...], in the order of `log_prob`.

    References:
      Dinh, Sohl-Dickstein and Bengio (2017), Density Estimation Using Real NVP, equations 7 to 9.
    """

    layers: Layer

    def log_prob(self, z: Float[ArrayLike, "*batch latent"]) -> Float[Array, "*batch"]:
        """Compute log p(z).

        Args:
          z: latents.

        Returns:
          The log-density of each, in nats.
        """

        def invert(carry: Carry, step: tuple[Array, Layer]) -> tuple[Carry, None]:
            z, log_det = carry
            mask, layer = step
            log_scale, shift = _scale_and_shift(layer, mask, z)
            z = jnp.where(mask, z, (z - shift) * jnp.exp(-log_scale))
            return (z, log_det - jnp.sum(log_scale, axis=-1)), None

        z = jnp.asarray(z, jnp.result_type(z, self.layers["kernel_1"]))
        start = z, jnp.zeros(z.shape[:-1], z.dtype)
        (eps, log_det), _ = lax.scan(invert, start, (self._masks(), self.layers))
        return UnitGaussian(z.shape[-1]).log_prob(eps) + log_det

    def sample(
        self, key: Key[Array, ""], n: int, temperature: float = 1.0
    ) -> Float[Array, "n latent"]:
        """Draw n latents, from noise scaled by the temperature."""

        def transform(z: Array, step: tuple[Array, Layer]) -> tuple[Array, None]:
            mask, layer = step
            log_scale, shift = _scale_and_shift(layer, mask, z)
            return jnp.where(mask, z, z * jnp.exp(log_scale) + shift), None

        eps = UnitGaussian(self._latent_dim).sample(key, n).astype(self.layers["kernel_1"].dtype)
        return lax.scan(transform, temperature * eps, (self._masks(), self.layers), reverse=True)[0]

    @property
    def _latent_dim(self) -> int:
        return self.layers["kernel_1"].shape[-2]

    def _masks(self) -> Bool[Array, "layers latent"]:
        return jnp.asarray(masks(len(self.layers["kernel_1"]), self._latent_dim))


def masks(layers: int, latent_dim: int) -> Bool[np.ndarray, "layers latent"]:
    """Return the latents that each coupling layer keeps.

    Layers 2k and 2k + 1 keep complementary halves: the latents whose index has bit k set, and
    those where it is not set. With at least 2 ceil(log2(latent_dim)) layers any two latents are in
    different halves of some pair of layers; with fewer, some latents always keep each other's side.
    """
    bits = max(1, (latent_dim - 1).bit_length())
    layer, latent = np.arange(layers)[:, None], np.arange(latent_dim)
    return (latent >> (layer // 2 % bits) & 1) == layer % 2


def _scale_and_shift(
    layer: Layer, mask: Bool[Array, " latent"], z: Float[Array, "*batch latent"]
) -> tuple[Float[Array, "*batch latent"], Float[Array, "*batch latent"]]:
    """Compute s and m of a layer, both 0 for the latents of the mask."""
    x = jnp.where(mask, z, 0)
    x = jax.nn.relu(x @ layer["kernel_1"] + layer["bias_1"])
    x = jax.nn.relu(x @ layer["kernel_2"] + layer["bias_2"])
    outputs = x @ layer["kernel_3"] + layer["bias_3"]
    log_scale, shift = (jnp.where(mask, 0, half) for half in jnp.split(outputs, 2, axis=-1))
    return _MAX_LOG_SCALE * jnp.tanh(log_scale / _MAX_LOG_SCALE), shift


@dataclass(frozen=True)
class RealNVP:
    """A flow of affine coupling layers on N(0, I), which starts as N(0, I).

    Attributes:
      layers: number of coupling layers.
      hidden: units of the two hidden layers in each.

    References:
      Dinh, Sohl-Dickstein and Bengio (2017), Density Estimation Using Real NVP. As the prior of a
      VAE: Xu, Lam, Liu and others (2019), On the Necessity and Effectiveness of Learning the Prior
      of Variational Auto-Encoder, arXiv 1905.13452.
    """

    layers: int = 8
    hidden: int = 128

    def __post_init__(self) -> None:
        for name in ("layers", "hidden"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))

    def init(self, key: Key[Array, ""], config: "ModelConfig") -> Learned:
        """Return the parameters of the layers: Glorot uniform kernels, the last of each 0."""
        widths = config.latent_dim, self.hidden, self.hidden
        glorot = jax.nn.initializers.glorot_uniform(in_axis=-2, out_axis=-1, batch_axis=0)
        learned = {
            "kernel_3": jnp.zeros((self.layers, self.hidden, 2 * config.latent_dim), jnp.float32),
            "bias_3": jnp.zeros((self.layers, 2 * config.latent_dim), jnp.float32),
        }
        for i, kernel_key in enumerate(jax.random.split(key), start=1):
            shape = self.layers, *widths[i - 1 : i + 1]
            learned[f"kernel_{i}"] = glorot(kernel_key, shape, jnp.float32)
            learned[f"bias_{i}"] = jnp.zeros((self.layers, shape[-1]), jnp.float32)
        return learned

    def bind(self, learned: Learned, params: "Params") -> CouplingFlow:
        """Return the flow."""
        return CouplingFlow(jax.tree.map(at_least_float32, dict(learned)))
