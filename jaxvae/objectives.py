"""Bounds on log p(x), and what training minimises.

An objective is a frozen dataclass of its options, called as

    loss, terms = objective(params, key, images, labels, beta=..., axis_name=...)

where the loss is [batch], nats per image, and the terms are the ELBO's. `beta` weights all that
posterior and prior contribute: log p(z) - log q(z|x), or its expectation, the negative KL. All of
them are written in terms of one primitive, `draw`.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import ArrayLike

from jaxvae.components import Registry
from jaxvae.errors import InputError, shown
from jaxvae.models.distributions import Gaussian
from jaxvae.models.likelihoods import scale_images
from jaxvae.models.protocols import Draw, Elbo, Posterior
from jaxvae.models.vae import Params, decode, encode, prior
from jaxvae.validation import as_key, is_number, jit, native, whole_number


class Objective(Protocol):
    """What training minimises: `TrainConfig(objective=...)`.

    A plain function of (params, keys, images[, labels]) to a loss [batch] and an `Elbo` will do as
    well; it treats every image on its own, and the configuration's beta does not reach it.

    Attributes:
      num_samples: latent samples per image.
      across_batch: whether an image's loss depends on the others of the batch, which is then
        taken in one piece and, over several devices, by `axis_name`.
    """

    num_samples: int
    across_batch: bool

    def __call__(
        self,
        params: Params,
        key: jax.Array,
        images: jax.Array,
        labels: jax.Array | None = None,
        *,
        beta: jax.Array | float = 1.0,
        axis_name: str | None = None,
    ) -> tuple[jax.Array, Elbo]:
        """Compute the loss, [batch] in nats per image, and the terms of the ELBO.

        Args:
          params: the model.
          key: a PRNG key, or [batch] keys, one for each image.
          images: [batch, height, width, channels], float32 in [0, 1] or uint8.
          labels: [batch], the images' classes, where the model is conditional.
          beta: weight of the KL term.
          axis_name: of the `pmap` whose devices share the batch.
        """


def draw(
    params: Params,
    key: jax.Array,
    images: ArrayLike,
    labels: ArrayLike | None = None,
    num_samples: int = 1,
    *,
    path: bool = False,
) -> Draw:
    """Sample the posterior and evaluate everything at the samples.

    Args:
      params: the model.
      key: a PRNG key, or [batch] keys, one for each image.
      images: [batch, height, width, channels], float32 in [0, 1] or uint8.
      labels: [batch], the images' classes, where the model is conditional.
      num_samples: samples per image.
      path: whether log q(z|x) is differentiated through z alone and not through the posterior's
        own parameters.

    Returns:
      The samples and their log-densities.

    Raises:
      InputError: as of `jaxvae.encode`; `path` of a posterior without `log_prob`.
    """
    posterior = encode(params, images, labels)
    keys = sample_keys(example_keys(key, jnp.shape(images)[0]), num_samples)
    drawn = draw_at(params, posterior, keys, images, labels)
    if path:
        held = lax.stop_gradient(with_log_prob(posterior))
        drawn = drawn._replace(log_posterior=held.log_prob(drawn.z))
    return drawn


def draw_at(
    params: Params,
    posterior: Posterior,
    keys: jax.Array,
    images: ArrayLike,
    labels: ArrayLike | None = None,
) -> Draw:
    """Sample a posterior by given keys and evaluate everything at the samples.

    A model that evaluates all of it in one pass does so by its own `draw`.

    Args:
      params: the model.
      posterior: q(z|x) of the images.
      keys: PRNG keys, [samples, batch].
      images: [batch, height, width, channels], float32 in [0, 1] or uint8.
      labels: [batch], the images' classes, where the model is conditional.

    Returns:
      The samples and their log-densities.
    """
    if hasattr(params.model, "draw"):
        return params.model.draw(params, posterior, keys, images, labels)
    z, log_posterior = samples(posterior, keys)
    p_z = prior(params)
    return Draw(
        z,
        log_likelihood_at(params, z, images, labels),
        p_z.log_prob(z),
        log_posterior,
        posterior.kl(p_z),
        posterior,
        penalty=getattr(posterior, "penalty", 0.0),
    )


def samples(posterior: Posterior, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draw [samples, batch, latent] by [samples, batch] keys; also return log q(z|x) of them."""
    if len(keys) == 1:
        z, log_q = posterior.sample_and_log_prob(keys[0])
        return z[None], log_q[None]
    return jax.vmap(posterior.sample_and_log_prob)(keys)


def sample_keys(keys: jax.Array, num_samples: int) -> jax.Array:
    """Return keys of samples, [samples, batch], from a key of each image, [batch]."""
    return keys[None] if num_samples == 1 else numbered_keys(keys, jnp.arange(num_samples))


def numbered_keys(keys: jax.Array, numbers: jax.Array) -> jax.Array:
    """Return the keys of the samples of these numbers, [samples, batch]."""
    fold_in = jax.vmap(jax.random.fold_in, (0, None))
    return jax.vmap(lambda number: fold_in(keys, number))(numbers)


def log_likelihood_at(
    params: Params, z: jax.Array, images: ArrayLike, labels: ArrayLike | None
) -> jax.Array:
    """Compute log p(x|z) of samples [samples, batch, latent]: [samples, batch], in nats.

    The samples are rows of one batch: convolutions under `vmap` take half as long again.
    """

    def repeated(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (len(z), *x.shape)).reshape(-1, *x.shape[1:])

    images = repeated(jnp.asarray(native(images)))
    labels = None if labels is None else repeated(jnp.asarray(native(labels)))
    log_p_x = decode(params, z.reshape(-1, z.shape[-1]), labels).log_prob(images)
    return log_p_x.reshape(z.shape[:2])


@jit()
def elbo(
    params: Params, key: jax.Array, images: ArrayLike, labels: ArrayLike | None = None
) -> Elbo:
    """Estimate the evidence lower bound on log p(x) with one sample per image.

        ELBO(x) = E_q(z|x)[log p(x|z)] - KL(q(z|x) || p(z))

    The KL is exact between a Gaussian posterior and the standard normal prior; otherwise it is
    log q(z|x) - log p(z) at the sample.

    Args:
      params: the model.
      key: a PRNG key, or [batch] keys, one for each image.
      images: [batch, height, width, channels], float32 in [0, 1] or uint8.
      labels: [batch], the images' classes, where the model is conditional.

    Returns:
      Elbo, each field [batch], nats per image.

    Raises:
      InputError: images of another shape than the model's; labels as of `jaxvae.encode`.

    References:
      Kingma and Welling (2014), Auto-Encoding Variational Bayes, equation 10.
    """
    return draw(params, key, images, labels).elbo()


@dataclass(frozen=True)
class ELBO:
    """The negative ELBO, with its KL weighted.

        loss = -E_q(z|x)[log p(x|z)] + beta KL(q(z|x) || p(z))

    With free bits lambda, a latent whose KL is below lambda on the batch's average costs lambda:

        loss = -E_q(z|x)[log p(x|z)] + beta sum_j max(lambda, mean_x KL_j)

    Attributes:
      num_samples: samples of the posterior, averaged over.
      free_bits: lambda, KL per latent in nats below which it is not penalised; needs a Gaussian
        posterior and the standard normal prior.

    References:
      Higgins et al. (2017), beta-VAE, equation 4. Kingma et al. (2016), Improving Variational
      Inference with Inverse Autoregressive Flow, equation 15.
    """

    num_samples: int = 1
    free_bits: float = 0.0

    def __post_init__(self) -> None:
        _check_samples(self)
        _check_number(self, "free_bits")

    @property
    def across_batch(self) -> bool:
        """Whether there are free bits, which depend on the batch's average KL."""
        return self.free_bits > 0

    def __call__(
        self,
        params: Params,
        key: jax.Array,
        images: jax.Array,
        labels: jax.Array | None = None,
        *,
        beta: jax.Array | float = 1.0,
        axis_name: str | None = None,
    ) -> tuple[jax.Array, Elbo]:
        """Compute the loss and the ELBO's terms, as of `Objective`."""
        drawn = draw(params, key, images, labels, self.num_samples)
        terms = drawn.elbo()
        kl = terms.kl
        if self.free_bits:
            if drawn.kl_per_group is not None:
                kls = jnp.mean(drawn.kl_per_group, axis=0)
            elif isinstance(drawn.posterior, Gaussian) and drawn.kl is not None:
                kls = drawn.posterior.kl_per_latent()
            else:
                raise InputError(
                    "free_bits needs the KL of every latent or group: expected the posterior "
                    "'gaussian' and the prior 'standard_normal'"
                )
            mean = _mean(lax.stop_gradient(kls), axis_name)
            kl = jnp.sum(jnp.where(mean > self.free_bits, kls, self.free_bits), axis=-1)
        return -(terms.log_likelihood - beta * kl) + drawn.penalty, terms


@dataclass(frozen=True)
class StickingTheLanding:
    """The negative ELBO by samples, with the path derivative as its gradient.

        loss = -(log p(x|z) + beta (log p(z) - log q(z|x))),    z = mean + exp(log_var / 2) eps

    log q(z|x) is differentiated through z alone, not through its own mean and log_var. What is
    left out has expectation 0, and is all that varies where q(z|x) is the true posterior. As an
    estimator of a gradient it cannot be differentiated a second time: what is left out has a
    derivative whose expectation is not 0. For second derivatives take "elbo".

    Attributes:
      num_samples: samples of the posterior, averaged over.

    References:
      Roeder, Wu and Duvenaud (2017), Sticking the Landing, equation 7.
    """

    num_samples: int = 1
    across_batch = False

    def __post_init__(self) -> None:
        _check_samples(self)

    def __call__(
        self,
        params: Params,
        key: jax.Array,
        images: jax.Array,
        labels: jax.Array | None = None,
        *,
        beta: jax.Array | float = 1.0,
        axis_name: str | None = None,
    ) -> tuple[jax.Array, Elbo]:
        """Compute the loss and the ELBO's terms, as of `Objective`.

        Raises:
          InputError: a posterior without `log_prob`.
        """
        drawn = draw(params, key, images, labels, self.num_samples, path=True)
        terms = drawn.elbo(exact=False)
        return -(terms.log_likelihood - beta * terms.kl) + drawn.penalty, terms


@dataclass(frozen=True)
class ImportanceWeighted:
    """The negative importance-weighted bound.

        loss = -log 1/k sum_i w_i,    w_i = p(x|z_i) (p(z_i) / q(z_i|x))^beta,    z_i ~ q(z|x)

    Attributes:
      num_samples: k.

    References:
      Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders, equation 8.
    """

    num_samples: int = 1
    across_batch = False

    def __post_init__(self) -> None:
        _check_samples(self)

    def __call__(
        self,
        params: Params,
        key: jax.Array,
        images: jax.Array,
        labels: jax.Array | None = None,
        *,
        beta: jax.Array | float = 1.0,
        axis_name: str | None = None,
    ) -> tuple[jax.Array, Elbo]:
        """Compute the loss and the ELBO's terms, as of `Objective`."""
        drawn = draw(params, key, images, labels, self.num_samples)
        log_w = drawn.log_likelihood - beta * drawn.log_ratio
        return -_log_mean_exp(log_w) + drawn.penalty, drawn.elbo(exact=False)


@dataclass(frozen=True)
class DoublyReparameterized:
    """The negative importance-weighted bound, its encoder's gradient reparameterized twice.

    With v_i = w_i / sum_j w_j, and log q in log w_i differentiated through z_i alone:

        decoder, prior   sum_i v_i   d log w_i / d theta
        encoder          sum_i v_i^2 (d log w_i / d z_i) (d z_i / d phi)

    It has the expectation of the bound's own gradient, and less variance. At another beta than 1,
    by the same argument, v_i^2 is (1 - beta) v_i + beta v_i^2.

    Derivatives by the images and by beta are reparameterized alike, and have the expectation of
    the bound's own; those of the terms are of the averages that they are. As an estimator of a
    gradient it cannot be differentiated a second time: for that take "iwae".

    Attributes:
      num_samples: k.

    References:
      Tucker, Lawson, Gu and Maddison (2019), Doubly Reparameterized Gradient Estimators for Monte
      Carlo Objectives, equation 8.
    """

    num_samples: int = 1
    across_batch = False

    def __post_init__(self) -> None:
        _check_samples(self)

    def __call__(
        self,
        params: Params,
        key: jax.Array,
        images: jax.Array,
        labels: jax.Array | None = None,
        *,
        beta: jax.Array | float = 1.0,
        axis_name: str | None = None,
    ) -> tuple[jax.Array, Elbo]:
        """Compute the loss and the ELBO's terms, as of `Objective`.

        Raises:
          InputError: a posterior without `log_prob`.
        """
        posterior = with_log_prob(encode(params, images, labels))
        keys = example_keys(key, len(images))
        z, _ = samples(posterior, sample_keys(keys, self.num_samples))
        images = scale_images(images)  # which may be differentiated by, as uint8 may not
        bound, (log_p_x, log_ratio) = _doubly(
            params, z, beta, lax.stop_gradient(posterior), images, native(labels)
        )
        log_likelihood, kl = jnp.mean(log_p_x, axis=0), jnp.mean(log_ratio, axis=0)
        return -bound, Elbo(log_likelihood - kl, log_likelihood, kl)


@jax.custom_jvp
def _doubly(
    params: Params,
    z: jax.Array,
    beta: jax.Array | float,
    posterior: Any,
    images: jax.Array,
    labels: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Compute the importance-weighted bound, and what its weights are made of.

    In the bound's derivative through z_i, v_i counts as (1 - beta) v_i + beta v_i^2. By the
    posterior, which is held fixed, there is no derivative.
    """
    log_w, parts = _log_weights(params, z, beta, posterior, images, labels)
    return _log_mean_exp(log_w), parts


@_doubly.defjvp
def _doubly_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    params, z, beta, posterior, images, labels = primals
    of_params, of_z, of_beta, _, of_images, _ = tangents

    def log_weights(params: Params, z: jax.Array, beta: Any, images: jax.Array) -> Any:
        return _log_weights(params, z, beta, posterior, images, labels)

    # Of all samples at once, as the weights v depend on all of them. The networks are evaluated
    # here; both uses of the derivative are linear, and the second is dropped where it is not used.
    (log_w, parts), derivative = jax.linearize(log_weights, params, z, beta, images)
    v = jax.nn.softmax(log_w, axis=0)
    scaled = ((1 - beta) + beta * v)[..., None] * of_z
    of_log_w, _ = derivative(of_params, scaled, of_beta, of_images)
    _, of_parts = derivative(of_params, of_z, of_beta, of_images)
    return (_log_mean_exp(log_w), parts), (jnp.sum(v * of_log_w, axis=0), of_parts)


def _log_weights(
    params: Params,
    z: jax.Array,
    beta: jax.Array | float,
    posterior: Any,
    images: jax.Array,
    labels: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Compute log w of samples [samples, batch, latent], and log p(x|z) and log q - log p(z)."""
    log_ratio = posterior.log_prob(z) - prior(params).log_prob(z)
    log_p_x = log_likelihood_at(params, z, images, labels)
    return log_p_x - beta * log_ratio, (log_p_x, log_ratio)


@dataclass(frozen=True)
class BetaTC:
    """The negative ELBO with its KL decomposed and the total correlation weighted.

        loss = -log p(x|z) + [log q(z|x) - log q(z)]                mutual information
                           + beta [log q(z) - sum_j log q(z_j)]     total correlation
                           + [sum_j log q(z_j) - log p(z)]          KL of every latent

    The aggregate posterior is estimated from the batch of M images, for z and for every z_j:

        log q(z) = log 1/M sum_m q(z|x_m)

    The paper divides by the number N of training images besides, which moves the parts by
    constants and leaves the gradient as it is.

    References:
      Chen, Li, Grosse and Duvenaud (2018), Isolating Sources of Disentanglement in Variational
      Autoencoders, equations 2 and 4.
    """

    num_samples = 1
    across_batch = True

    def __call__(
        self,
        params: Params,
        key: jax.Array,
        images: jax.Array,
        labels: jax.Array | None = None,
        *,
        beta: jax.Array | float = 1.0,
        axis_name: str | None = None,
    ) -> tuple[jax.Array, Elbo]:
        """Compute the loss and the ELBO's terms, as of `Objective`.

        Raises:
          InputError: a posterior that is not Gaussian.
        """
        drawn = draw(params, key, images, labels)
        z, log_p_x, log_p_z, log_q_z_x = (x[0] for x in drawn[:4])
        if not isinstance(with_log_prob(drawn.posterior), Gaussian):
            raise InputError(
                "the objective 'beta_tc' needs the density of every latent: expected the "
                "posterior 'gaussian'"
            )
        others = _gathered(drawn.posterior, axis_name)
        # [z, x, latent]
        log_q = Gaussian(others.mean, others.log_var).log_prob_per_latent(z[:, None])
        log_m = math.log(len(others.mean))
        log_q_z = jax.nn.logsumexp(jnp.sum(log_q, axis=-1), axis=1) - log_m
        log_q_z_j = jnp.sum(jax.nn.logsumexp(log_q, axis=1) - log_m, axis=-1)
        information, correlation, latents = (
            log_q_z_x - log_q_z,
            log_q_z - log_q_z_j,
            log_q_z_j - log_p_z,
        )
        return -log_p_x + information + beta * correlation + latents, drawn.elbo()


@dataclass(frozen=True)
class MaximumMeanDiscrepancy:
    """The negative ELBO and the discrepancy between aggregate posterior and prior.

        loss = -E_q(z|x)[log p(x|z)] + beta KL(q(z|x) || p(z)) + lambda MMD^2(q(z), p(z))

        MMD^2 = E[k(z, z')] + E[k(y, y')] - 2 E[k(z, y)],    z, z' ~ q(z),  y, y' ~ p(z)
        k(z, y) = C / (C + |z - y|^2),    C = 2 latent_dim

    At beta 0 a Wasserstein autoencoder, at beta 1 - alpha the InfoVAE. The expectations are
    over pairs of different images of the batch. Over a prior of K components of weights w_k they
    are sums, as the choice of a component has no derivative by its weights:

        E[f(y)] = sum_k w_k E[f(y_k)],    y_k ~ component k

    Attributes:
      weight: lambda, nats.

    References:
      Zhao, Song and Ermon (2019), InfoVAE, equation 6. Tolstikhin et al. (2018), Wasserstein
      Auto-Encoders, algorithm 2.
    """

    weight: float = 100.0
    num_samples = 1
    across_batch = True

    def __post_init__(self) -> None:
        _check_number(self, "weight")

    def __call__(
        self,
        params: Params,
        key: jax.Array,
        images: jax.Array,
        labels: jax.Array | None = None,
        *,
        beta: jax.Array | float = 1.0,
        axis_name: str | None = None,
    ) -> tuple[jax.Array, Elbo]:
        """Compute the loss and the ELBO's terms, as of `Objective`."""
        drawn = draw(params, key, images, labels)
        z, terms, p_z = drawn.z[0], drawn.elbo(), prior(params)
        keys = example_keys(key, len(z))
        # A prior that is no mixture is one component.
        of_component = getattr(p_z, "sample_component", lambda key, k: p_z.sample(key, 1)[0])
        prior_weights = getattr(p_z, "weights", jnp.ones(1, z.dtype))
        all_z = _gathered(z, axis_name)
        c, batch, whole = 2 * z.shape[1], len(z), len(all_z)
        first = _first(axis_name, batch)

        # Draw i of the batch's is of component i mod K. Every component has two draws or more, so
        # that there are pairs of each with each.
        components = len(prior_weights)
        each = -(-2 * components // whole)
        own = first * each + jnp.arange(batch * each)
        everyone = jnp.arange(whole * each)
        draws = (len(everyone) - 1 - jnp.arange(components)) // components + 1  # of each component
        draws = draws.astype(z.dtype)
        weights = (prior_weights / draws)[everyone % components]

        def draws_of(key: jax.Array, own: jax.Array) -> jax.Array:
            keys = jax.vmap(partial(jax.random.fold_in, key))(1 + jnp.arange(each))
            return jax.vmap(of_component)(keys, own % components)

        y = jax.vmap(draws_of)(keys, own.reshape(batch, each)).reshape(-1, z.shape[1])
        all_y = _gathered(y, axis_name)

        def kernel(a: jax.Array, b: jax.Array) -> jax.Array:
            # |a - b|^2 by one matrix product: beside C the rounding does not show, and differences
            # of a thousand draws take fifty times as long.
            products = jnp.matmul(a, b.T, precision=lax.Precision.HIGHEST)
            return c / (c + jnp.sum(a**2, axis=1)[:, None] + jnp.sum(b**2, axis=1) - 2 * products)

        others = jnp.arange(whole) != (first + jnp.arange(batch))[:, None]
        of_z = jnp.sum(jnp.where(others, kernel(z, all_z), 0), axis=1) / max(1, whole - 1)
        # Of n draws of a component, n (n - 1) ordered pairs stand for all n^2.
        alike = own[:, None] % components == everyone % components
        pairs = jnp.where(alike, (draws / (draws - 1))[own % components][:, None], 1)
        pairs = jnp.where(own[:, None] == everyone, 0, pairs) * weights[own][:, None] * weights
        of_y = whole * jnp.sum((pairs * kernel(y, all_y)).reshape(batch, -1), axis=1)
        squared = of_z + of_y - 2 * (kernel(z, all_y) @ weights)
        return -(
            terms.log_likelihood - beta * terms.kl
        ) + self.weight * squared + drawn.penalty, terms


OBJECTIVES: Registry[Any] = Registry(
    "objective",
    {
        "elbo": ELBO,
        "stl": StickingTheLanding,
        "iwae": ImportanceWeighted,
        "dreg": DoublyReparameterized,
        "beta_tc": BetaTC,
        "mmd": MaximumMeanDiscrepancy,
    },
)


def parse_objective(value: Any) -> Any:
    """Return the objective that `value` names, or `value` itself where it is a function.

    Raises:
      InputError: an unknown name or option, or no function.
    """
    if not isinstance(value, str) and not callable(value):
        raise InputError(f"objective is {shown(value)}: expected a name or a function")
    return OBJECTIVES.parse(value, protocol=("__call__",))


@dataclass(frozen=True)
class NoWarmup:
    """beta as it is."""

    def __call__(self, beta: jax.Array | float, step: jax.Array) -> jax.Array | float:
        """Return beta."""
        return beta


@dataclass(frozen=True)
class Linear:
    """beta grows linearly over the first steps.

        beta min(1, step / W)

    Attributes:
      steps: W.

    References:
      Bowman et al. (2016), Generating Sentences from a Continuous Space, section 3.1.
    """

    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", whole_number("steps", self.steps))

    def __call__(self, beta: jax.Array | float, step: jax.Array) -> jax.Array | float:
        """Return beta at a step."""
        return beta * jnp.minimum(1, step / self.steps)


@dataclass(frozen=True)
class Cyclical(Linear):
    """beta grows linearly over W steps, stays for W, and starts again from 0.

        beta min(1, (step mod 2 W) / W)

    Attributes:
      steps: W.

    References:
      Fu et al. (2019), Cyclical Annealing Schedule, equation 6, with half of every cycle for
      the growth.
    """

    def __call__(self, beta: jax.Array | float, step: jax.Array) -> jax.Array | float:
        """Return beta at a step."""
        return super().__call__(beta, step % (2 * self.steps))


WARMUPS: Registry[Any] = Registry(
    "warmup", {"none": NoWarmup, "linear": Linear, "cyclical": Cyclical}
)


def example_keys(key: ArrayLike, batch: int, first: jax.Array | int = 0) -> jax.Array:
    """Return one key for each example, by its index: [batch] keys, of Threefry.

    An example's noise then depends neither on the device nor on the block that computes it. That
    holds for keys of every implementation ("rbg" too), whose bits are taken for Threefry's.

    Args:
      key: one PRNG key; [batch] keys are handed back as they are.
      batch: number of examples.
      first: index of the first of them.
    Raises:
      InputError: another number of keys than one or `batch`.
    """
    key = as_key(key, several=True)
    if key.shape == (batch,):
        return key
    if key.shape:
        raise InputError(f"there are {key.shape} keys: expected one, or one for each of {batch}")
    return jax.vmap(partial(jax.random.fold_in, key))(first + jnp.arange(batch))


def with_log_prob(posterior: Any) -> Any:
    """Return a posterior whose density is known at any z.

    Raises:
      InputError: it has no `log_prob`, as a flow's is known at its own samples alone.
    """
    if not hasattr(posterior, "log_prob"):
        raise InputError(
            "this objective needs log q(z|x) at any z: expected the posterior 'gaussian'; "
            "with a flow train by 'elbo', 'iwae' or 'mmd'"
        )
    return posterior


def _log_mean_exp(log_weights: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(log_weights, axis=0) - math.log(len(log_weights))


def _check_samples(objective: Any) -> None:
    number = whole_number("num_samples", objective.num_samples)
    object.__setattr__(objective, "num_samples", number)


def _check_number(objective: Any, name: str) -> None:
    value = getattr(objective, name)
    if not is_number(value) or not 0 <= value < 1e6:
        raise InputError(f"{name} is {shown(value)}: expected a number of at least 0")
    object.__setattr__(objective, name, float(value))


def _mean(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Over the whole batch."""
    mean = jnp.mean(x, axis=0)
    return lax.pmean(mean, axis_name) if axis_name else mean


def _gathered(tree: Any, axis_name: str | None) -> Any:
    """The rows of all devices that share the batch, in their order."""
    return lax.all_gather(tree, axis_name, tiled=True) if axis_name else tree


def _first(axis_name: str | None, batch: int) -> jax.Array | int:
    """The index, in the whole batch, of this device's first image."""
    return lax.axis_index(axis_name) * batch if axis_name else 0
