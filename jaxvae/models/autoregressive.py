"""An autoregressive prior over codes."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxvae.errors import InputError
from jaxvae.models.codebooks import Codebook, codebook_of, expect_codes_of_posterior
from jaxvae.models.protocols import Learned
from jaxvae.validation import at_least_float32, whole_number

if TYPE_CHECKING:
    from jaxvae.models.config import ModelConfig
    from jaxvae.models.vae import Params

_HEADS = 4


class CausalTransformer(nn.Module):
    """The logits of every code, given the codes before it.

    Layer norm comes before attention and before the two dense layers of a block. The logits start
    at 0: all codes are equally probable.

    Attributes:
      n: number of codes of a sequence.
      num_codes: K, the number of values of a code.
      width: features of a position.
      layers: number of blocks.
      decode: whether it is called for one position after another, with the keys and values of
        earlier positions in the collection "cache".

    References:
      Vaswani et al. (2017), Attention Is All You Need. Radford et al. (2019), Language Models are
      Unsupervised Multitask Learners, section 2.3, for the places of the layer norms.
    """

    n: int
    num_codes: int
    width: int
    layers: int
    decode: bool = False

    @nn.compact
    def __call__(
        self, before: Float[Array, "batch length codes"], at: Int[Array, " length"]
    ) -> Float[Array, "batch length codes"]:
        """Compute the logits.

        Args:
          before: for each position the code before it, one-hot; zeros for the first.
          at: the positions.

        Returns:
          The logits of the code at each position.
        """
        places = self.param("positions", nn.initializers.normal(0.02), (self.n, self.width))
        x = nn.Dense(self.width, use_bias=False, name="codes")(before) + places[at]
        mask = None if self.decode else nn.make_causal_mask(before[..., 0])
        for i in range(1, self.layers + 1):
            y = nn.LayerNorm(name=f"norm_{i}a")(x)
            attention = nn.MultiHeadDotProductAttention(
                _HEADS, decode=self.decode, name=f"attention_{i}"
            )
            x = x + attention(y, mask=mask)
            y = nn.LayerNorm(name=f"norm_{i}b")(x)
            y = nn.gelu(nn.Dense(4 * self.width, name=f"dense_{i}a")(y))
            x = x + nn.Dense(self.width, name=f"dense_{i}b")(y)
        x = nn.LayerNorm(name="norm")(x)
        zeros = nn.initializers.zeros
        return nn.Dense(self.num_codes, kernel_init=zeros, name="logits")(x)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AutoregressiveCodes:
    """A distribution over sequences of n codes, in the order of z: a pytree.

        log p(z) = sum_i log softmax(logits_i(c_1, ..., c_{i-1}))_{c_i}

    Attributes:
      weights: the "params" collection of the network.
      book: the code book.
      network: computes the logits.
    """

    weights: Any
    book: Codebook
    network: CausalTransformer = field(metadata={"static": True})

    def log_prob(self, z: Float[Array, "*batch latent"]) -> Float[Array, "*batch"]:
        """Compute log p(z), in nats, in one pass of the network."""
        codes = self.book.one_hot(z.reshape(-1, z.shape[-1]))
        log_p = jax.nn.log_softmax(self.logits(codes))
        return jnp.sum(codes * log_p, axis=(-2, -1)).reshape(z.shape[:-1])

    def logits(self, codes: Float[Array, "batch n codes"]) -> Float[Array, "batch n codes"]:
        """Compute the logits of every code of one-hot sequences, given the codes before it."""
        before = jnp.pad(codes[:, :-1], ((0, 0), (1, 0), (0, 0)))
        return self.network.apply({"params": self.weights}, before, jnp.arange(self.network.n))

    def sample(self, key: Key[Array, ""], n: int) -> Float[Array, "n latent"]:
        """Draw n latents, one code after another."""
        network = self.network.clone(decode=True)
        positions = jnp.arange(network.n)

        def apply(variables: Any, before: Array, at: Array) -> tuple[Array, Any]:
            return network.apply(
                {"params": self.weights} | variables, before, at, mutable=["cache"]
            )

        def draw(carry: tuple[Any, Array], step: tuple[Array, Array]) -> Any:
            cache, before = carry
            at, key = step
            logits, cache = apply(cache, before[:, None], at[None])
            code = jax.random.categorical(key, logits[:, 0])
            return (cache, jax.nn.one_hot(code, network.num_codes)), code

        empty = jnp.zeros((n, network.n, network.num_codes))
        cache = jax.eval_shape(apply, {}, empty, positions)[1]
        cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
        steps = positions, jax.random.split(key, network.n)
        _, codes = lax.scan(draw, (cache, empty[:, 0]), steps)
        return self.book.embed(codes.T)


@dataclass(frozen=True)
class Autoregressive:
    """A causal transformer over the codes, which starts as the uniform distribution.

    It is trained with the rest of the model, as log p(z) is a term of the ELBO.

    Attributes:
      width: features of a position, a multiple of 4.
      layers: number of blocks of attention and two dense layers.

    References:
      van den Oord, Vinyals and Kavukcuoglu (2017), Neural Discrete Representation Learning,
      section 3.3, for an autoregressive prior over codes.
    """

    width: int = 64
    layers: int = 3
    over_codes = True

    def __post_init__(self) -> None:
        for name in ("width", "layers"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        if self.width % _HEADS:
            raise InputError(
                f"width is {self.width}: expected a multiple of {_HEADS}, the number of heads"
            )

    def validate(self, config: "ModelConfig") -> None:
        """Raise InputError if the posterior is not over codes."""
        expect_codes_of_posterior(config)

    def init(self, key: jax.Array, config: "ModelConfig") -> Learned:
        """Return the parameters of the network."""
        network = self._network(config)
        before = jnp.zeros((1, network.n, network.num_codes), jnp.float32)
        return network.init(key, before, jnp.arange(network.n))["params"]

    def bind(self, learned: Learned, params: "Params") -> AutoregressiveCodes:
        """Return the distribution."""
        weights = jax.tree.map(at_least_float32, learned)
        return AutoregressiveCodes(weights, codebook_of(params), self._network(params.config))

    def _network(self, config: "ModelConfig") -> CausalTransformer:
        family = config.posterior
        n = config.latent_dim // family.dim
        return CausalTransformer(n, family.num_codes, self.width, self.layers)
