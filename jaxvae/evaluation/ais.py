"""Annealed importance sampling: bounds on log p(x) from below and, of simulated images, above.

Between the prior, beta = 0, and the posterior, beta = 1, are the unnormalised densities

    f_t(z) = p(z) p(x|z)^beta_t,    0 = beta_0 < ... < beta_T = 1

A chain starts at z_0 ~ p(z), and its transition to z_t leaves f_t invariant:

    w = prod_t f_t(z_{t-1}) / f_{t-1}(z_{t-1}),    E[w] = p(x)

A chain through the same densities in reverse order, which starts at an exact sample of the
posterior, has E[w] = 1 / p(x). An image that the model generates comes with such a sample.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, Key, Num

from jaxvae.devices.convolution import block_size, in_blocks
from jaxvae.errors import InputError
from jaxvae.models.codebooks import is_discrete
from jaxvae.models.distributions import UnitGaussian
from jaxvae.models.protocols import Likelihood, Prior
from jaxvae.models.vae import Labels, Params, expected_images, expected_labels, prior
from jaxvae.objectives import example_keys, numbered_keys
from jaxvae.validation import AnyKey, as_floats, jit, support_of, whole_number

_STEEPNESS = 4.0  # of the sigmoidal schedule
_ACCEPTANCE = 0.65  # acceptance rate to which step sizes are adapted
_FIRST_STEP_SIZE = 0.5
_ADAPTATION = 0.2  # change of the logarithm of a step size, per unit of the acceptance rate
_JITTER = (0.8, 1.2)  # range of the random factor of a step size
_AT_ONCE = 1024  # rows whose gradients are computed at once, which bounds memory


class Sandwich(NamedTuple):
    """Bounds on log p(x) of images that the model has generated, in nats.

    Attributes:
      lower: at most log p(x), in expectation.
      upper: at least log p(x), in expectation.
      images: the images, as floats.
    """

    lower: Float[Array, " n"]
    upper: Float[Array, " n"]
    images: Float[Array, " n *shape"]


@jit(static_argnames=("num_steps", "num_chains", "num_leapfrog"))
def ais(
    params: Params,
    key: AnyKey,
    images: Num[ArrayLike, " batch *shape"],
    num_steps: int = 1000,
    labels: Labels = None,
    *,
    num_chains: int = 16,
    num_leapfrog: int = 10,
) -> Float[Array, " batch"]:
    """Estimate log p(x) by annealed importance sampling that starts from the prior.

        log p(x) >= E[log 1/K sum_k w_k]

    The estimate is a lower bound in expectation, which grows with the numbers of steps and chains.
    It does not use the encoder. An image takes num_steps * (num_chains + 1) * num_leapfrog
    gradients of the decoder. Memory does not grow with num_steps.

    Transitions are Hamiltonian Monte Carlo. Their step sizes are adapted to an acceptance rate of
    0.65 by one more chain for each image, whose weight is not used: if a chain adapted its own step
    sizes, they would depend on its past, and E[w] = p(x) would no longer hold.

    Args:
      params: the model.
      key: a PRNG key, or [batch] keys, one for each image.
      images: float32 in [0, 1], or uint8.
      num_steps: T, the number of steps from the prior to the posterior. With 1 the estimate is
        importance sampling with the prior as the proposal.
      labels: classes or covariates of the images, if the model is conditional.
      num_chains: K, the number of chains for each image.
      num_leapfrog: leapfrog steps of a transition.

    Returns:
      log p(x) of each image, in nats.

    Raises:
      InputError: images of another shape than the model's, a number below 1, or a model whose
        latents are codes.

    References:
      Neal (2001), Annealed Importance Sampling, section 2. Wu, Burda, Salakhutdinov and Grosse
      (2017), On the Quantitative Analysis of Decoder-Based Generative Models, section 3.
    """
    images = expected_images(params, images)
    labels = expected_labels(params, labels, len(images))
    x = as_floats(support_of(params), images)
    chains = _Chains(*_densities(params), x, labels, params, num_leapfrog)
    betas = sigmoidal_schedule(num_steps, chains.dtype)
    lower, _ = chains.lower_bound(example_keys(key, len(images)), num_chains, betas)
    return lower


@jit(static_argnames=("n", "num_steps", "num_chains", "num_leapfrog"))
def bidirectional_ais(
    params: Params,
    key: AnyKey,
    n: int,
    num_steps: int = 1000,
    labels: Labels = None,
    *,
    num_chains: int = 16,
    num_leapfrog: int = 10,
) -> Sandwich:
    """Generate images by the model, and bound log p(x) of them from below and from above.

        E[log 1/K sum_k w_k] <= log p(x) <= E[-log 1/K sum_k w'_k]

    The weights w are those of `ais`. The weights w' are of chains from the posterior to the prior,
    which start at the latents z from which the image was generated: given the image, z is an exact
    sample of p(z|x). The gap between the bounds limits the error of each.

    Counts with a library size are drawn at that `size`, and log p(x) is given their own total. z is
    then an exact sample of p(z|x) for `poisson`, whose shares do not depend on the size. For the
    other counts it is not, and the upper bound is approximate.

    Args:
      params: the model.
      key: a PRNG key, or [n] keys, one for each image.
      n: number of images.
      num_steps: as in `ais`.
      labels: classes or covariates of the images, if the model is conditional; None: all
        classes in turn.
      num_chains: chains for each image and direction.
      num_leapfrog: as in `ais`.

    Returns:
      The bounds and the images.

    Raises:
      InputError: n below 1; otherwise as in `ais`.

    References:
      Grosse, Ghahramani and Adams (2015), Sandwiching the Marginal Likelihood Using Bidirectional
      Monte Carlo. Grosse, Ancha and Roy (2016), Measuring the Reliability of MCMC Inference with
      Bidirectional Monte Carlo, section 2.
    """
    n = whole_number("n", n)
    if params.config.num_classes and labels is None:
        labels = jnp.arange(n) % params.config.num_classes
    labels = expected_labels(params, labels, n)
    p_z, likelihood = _densities(params)
    numbered = numbered_keys(example_keys(key, n), jnp.arange(4))
    z_keys, x_keys, forward_keys, reverse_keys = numbered
    z = _draws(p_z, z_keys)

    def generate(
        key: Key[Array, ""], z: Float[Array, " latent"], label: Num[Array, "*covariates"] | None
    ) -> Float[Array, "*shape"]:
        return likelihood(z[None], None if label is None else label[None]).sample(key)[0]

    images = jax.vmap(generate)(x_keys, z, labels)
    chains = _Chains(p_z, likelihood, images, labels, params, num_leapfrog)
    betas = sigmoidal_schedule(num_steps, chains.dtype)
    lower, step_sizes = chains.lower_bound(forward_keys, num_chains, betas)
    upper = chains.upper_bound(reverse_keys, num_chains, betas, step_sizes, z)
    return Sandwich(lower, upper, images)


def sigmoidal_schedule(num_steps: int, dtype: Any = jnp.float32) -> Float[Array, " betas"]:
    """Compute beta_0, ..., beta_T, which change slowly near the prior and near the posterior.

        beta_t = (s_t - s_0) / (s_T - s_0),    s_t = sigmoid(4 (2 t / T - 1))

    Args:
      num_steps: T.
      dtype: of the result.

    Returns:
      The sequence, from 0 to 1.

    Raises:
      InputError: T below 1.

    References:
      Grosse, Ghahramani and Adams (2015), Sandwiching the Marginal Likelihood Using Bidirectional
      Monte Carlo, section 6.2.
    """
    num_steps = whole_number("num_steps", num_steps)
    s = jax.nn.sigmoid(jnp.linspace(-_STEEPNESS, _STEEPNESS, num_steps + 1, dtype=dtype))
    return (s - s[0]) / (s[-1] - s[0])


class _Point(NamedTuple):
    """Latents, and the log-densities with their gradients there."""

    z: Float[Array, "*rows latent"]
    log_prior: Float[Array, "*rows"]
    log_likelihood: Float[Array, "*rows"]
    prior_gradient: Float[Array, "*rows latent"]
    likelihood_gradient: Float[Array, "*rows latent"]

    def log_density(self, beta: Float[Array, ""]) -> Float[Array, "*rows"]:
        """Compute log p(z) p(x|z)^beta."""
        return self.log_prior + beta * self.log_likelihood

    def gradient(self, beta: Float[Array, ""]) -> Float[Array, "*rows latent"]:
        """Compute the gradient of `log_density` by z."""
        return self.prior_gradient + beta * self.likelihood_gradient


@dataclass(frozen=True)
class _Chains:
    """Markov chains for the densities p(z) p(x|z)^beta of a batch of images."""

    prior: Prior
    likelihood: Callable[..., Likelihood]
    images: Float[Array, " batch *shape"]
    labels: Num[Array, " batch *covariates"] | None
    params: Params
    num_leapfrog: int

    def __post_init__(self) -> None:
        whole_number("num_leapfrog", self.num_leapfrog)

    @property
    def dtype(self) -> Any:
        return jnp.result_type(jnp.float32, *jax.tree.leaves(self.params))

    def lower_bound(
        self, keys: Key[Array, " batch"], num_chains: int, betas: Float[Array, " betas"]
    ) -> tuple[Float[Array, " batch"], Float[Array, "steps batch"]]:
        """Run chains from the prior to the posterior; also return the step sizes.

        Chain 0 adapts the step sizes.
        """
        chain_keys = _chain_keys(keys, whole_number("num_chains", num_chains) + 1)
        z = jax.vmap(partial(_draws, self.prior))(_folded(chain_keys, 0))
        log_w, step_sizes = self.anneal(chain_keys, z, betas)
        return _log_mean_exp(log_w[1:]), step_sizes

    def upper_bound(
        self,
        keys: Key[Array, " batch"],
        num_chains: int,
        betas: Float[Array, " betas"],
        step_sizes: Float[Array, "steps batch"],
        z: Float[Array, "batch latent"],
    ) -> Float[Array, " batch"]:
        """Run chains from z, exact samples of the posterior, to the prior."""
        chain_keys = _chain_keys(keys, num_chains)
        z = jnp.broadcast_to(z, (num_chains, *z.shape))
        step_sizes = jnp.concatenate([step_sizes[:1], step_sizes[:0:-1]])
        log_w, _ = self.anneal(chain_keys, z, betas[::-1], step_sizes)
        return -_log_mean_exp(log_w)

    def anneal(
        self,
        keys: Key[Array, "chains batch"],
        z: Float[Array, "chains batch latent"],
        betas: Float[Array, " betas"],
        step_sizes: Float[Array, "steps batch"] | None = None,
    ) -> tuple[Float[Array, "chains batch"], Float[Array, "steps batch"]]:
        """Run chains from z, samples of p(z) p(x|z)^beta_0.

            log w = sum_t (beta_{t+1} - beta_t) log p(x|z_t)

        Args:
          keys: a PRNG key for each chain.
          z: start of each chain.
          betas: a sequence of any direction.
          step_sizes: of the transition to z_t, for each t and image; 0 for t = 0, the start. None:
            they are adapted by chain 0.

        Returns:
          log w of each chain, and the step sizes.
        """
        chains, batch = keys.shape

        def step(carry: tuple[_Point, Array, Array], x: tuple[Any, ...]) -> Any:
            point, log_w, log_step = carry
            t, beta, increment, step_size = x
            if step_size is None:
                step_size = jnp.where(t > 0, jnp.exp(log_step), 0)
            point, acceptance = self.transition(_folded(keys, t + 1), point, beta, step_size)
            change = _ADAPTATION * (acceptance[0] - _ACCEPTANCE)
            log_step = jnp.where(t > 0, log_step + change, log_step)
            return (point, log_w + increment * point.log_likelihood, log_step), step_size

        # The first transition has a step size of 0: it only evaluates the densities at the start.
        # An evaluation outside of the loop would be another decoder to compile.
        zeros = jnp.zeros((chains, batch), self.dtype)
        z = z.astype(self.dtype)
        start = _Point(z, zeros, zeros, jnp.zeros_like(z), jnp.zeros_like(z))
        log_step = jnp.full(batch, math.log(_FIRST_STEP_SIZE), self.dtype)
        xs = jnp.arange(len(betas) - 1), betas[:-1], jnp.diff(betas), step_sizes
        (_, log_w, _), taken = lax.scan(step, (start, zeros, log_step), xs)
        return log_w, taken

    def transition(
        self,
        keys: Key[Array, "chains batch"],
        point: _Point,
        beta: Float[Array, ""],
        step_size: Float[Array, " batch"],
    ) -> tuple[_Point, Float[Array, "chains batch"]]:
        """Make a transition of Hamiltonian Monte Carlo, which leaves p(z) p(x|z)^beta invariant.

        A random factor of the step size prevents trajectories that return to their start because
        their length is a period of the dynamics.

        Args:
          keys: a PRNG key for each chain.
          point: states of the chains.
          beta: of the density.
          step_size: of the leapfrog steps, for each image.

        Returns:
          The new states, and the acceptance probabilities.

        References:
          Neal (2011), MCMC Using Hamiltonian Dynamics, section 3.2.
        """
        latent = point.z.shape[-1]

        def noise(key: Key[Array, ""]) -> tuple[Array, Array, Array]:
            momentum_key, jitter_key, u_key = jax.random.split(key, 3)
            return (
                jax.random.normal(momentum_key, (latent,), self.dtype),
                jax.random.uniform(jitter_key, (), self.dtype, *_JITTER),
                jax.random.uniform(u_key, (), self.dtype),
            )

        momentum, jitter, u = jax.vmap(jax.vmap(noise))(keys)
        proposal, last = self.leapfrog(point, momentum, beta, step_size * jitter)
        log_ratio = proposal.log_density(beta) - point.log_density(beta)
        log_ratio += 0.5 * jnp.sum(momentum**2 - last**2, axis=-1)
        # A trajectory that diverged has the ratio NaN, and is rejected.
        probability = jnp.where(jnp.isnan(log_ratio), 0, jnp.exp(jnp.minimum(log_ratio, 0)))
        accepted = (u < probability) | (step_size == 0)

        def select(new: Array, old: Array) -> Array:
            return jnp.where(accepted.reshape(*accepted.shape, *(1,) * (new.ndim - 2)), new, old)

        return jax.tree.map(select, proposal, point), probability

    def leapfrog(
        self,
        point: _Point,
        momentum: Float[Array, "chains batch latent"],
        beta: Float[Array, ""],
        step_size: Float[Array, "chains batch"],
    ) -> tuple[_Point, Float[Array, "chains batch latent"]]:
        """Simulate Hamiltonian dynamics with the energy -log p(z) p(x|z)^beta and unit masses.

            v(s + eps/2) = v(s) + eps/2 grad log f(z(s))
            z(s + eps) = z(s) + eps v(s + eps/2)
            v(s + eps) = v(s + eps/2) + eps/2 grad log f(z(s + eps))

        References:
          Neal (2011), MCMC Using Hamiltonian Dynamics, equations 2.28 to 2.30.
        """
        eps = step_size[..., None]

        def step(_: Any, state: tuple[_Point, Array]) -> tuple[_Point, Array]:
            point, v = state
            point = self.at(point.z + eps * v)
            return point, v + eps * point.gradient(
                beta
            )  # two half steps, of this step and the next

        v = momentum + eps / 2 * point.gradient(beta)
        point, v = lax.fori_loop(0, self.num_leapfrog, step, (point, v))
        return point, v - eps / 2 * point.gradient(beta)

    def at(self, z: Float[Array, "chains batch latent"]) -> _Point:
        """Evaluate the log-densities and their gradients."""

        def evaluate(rows: tuple[Array, Array, Array | None]) -> _Point:
            z, images, labels = rows
            log_prior, prior_gradient = _with_gradient(self.prior.log_prob, z)
            log_likelihood, likelihood_gradient = _with_gradient(
                lambda z: self.likelihood(z, labels).log_prob(images), z
            )
            return _Point(z, log_prior, log_likelihood, prior_gradient, likelihood_gradient)

        def repeated(x: Array) -> Array:
            return jnp.broadcast_to(x, (len(z), *x.shape)).reshape(-1, *x.shape[1:])

        rows = z.reshape(-1, z.shape[-1]), *jax.tree.map(repeated, (self.images, self.labels))
        n = len(rows[0])
        most = min(block_size(n, self.params.decoder), _AT_ONCE)
        # Without a smaller last block, which would be another decoder to compile.
        size = max((s for s in range(-(-most // 2), most + 1) if n % s == 0), default=most)
        point = in_blocks(evaluate, rows, size)
        return jax.tree.map(lambda x: x.reshape(*z.shape[:2], *x.shape[1:]).astype(z.dtype), point)


def _densities(params: Params) -> tuple[Prior, Callable[..., Likelihood]]:
    """Return p(z) and p(x|z); of a hierarchy, those of the noise of which its prior makes z.

    Raises:
      InputError: the latents are codes.
    """
    if is_discrete(params.config):
        raise InputError(
            "annealed importance sampling moves the latents along the gradient of log p(x|z), "
            "which codes do not have: expected a model with continuous latents; for codes use "
            "importance sampling, `jaxvae.log_likelihood`"
        )
    if hasattr(params.model, "likelihood_of_noise"):
        p_z = UnitGaussian(params.config.latent_dim)
        return p_z, partial(params.model.likelihood_of_noise, params)
    return prior(params), partial(params.model.likelihood, params)


def _draws(p_z: Prior, keys: Key[Array, " n"]) -> Float[Array, "n latent"]:
    """Draw from the prior, by a key for each draw."""
    return jax.vmap(lambda key: p_z.sample(key, 1)[0])(keys)


def _chain_keys(keys: Key[Array, " batch"], num_chains: int) -> Key[Array, "chains batch"]:
    return numbered_keys(keys, jnp.arange(num_chains))


def _folded(
    keys: Key[Array, "chains batch"], t: Int[Array, ""] | int
) -> Key[Array, "chains batch"]:
    return jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, t)))(keys)


def _with_gradient(
    f: Callable[[Array], Array], z: Float[Array, "rows latent"]
) -> tuple[Float[Array, " rows"], Float[Array, "rows latent"]]:
    """Compute f of every row, and its gradient by the row."""
    values, pullback = jax.vjp(f, z)
    return values, pullback(jnp.ones_like(values))[0]


def _log_mean_exp(log_w: Float[Array, "chains batch"]) -> Float[Array, " batch"]:
    return jax.nn.logsumexp(log_w, axis=0) - math.log(len(log_w))
