"""Bounds on log p(x), and what training minimises.

What training minimises has one signature,

    loss, terms = objective(params, key, images, labels, beta=..., num_samples=..., ...)

where the loss is [batch], nats per image, and the terms are the ELBO's. `beta` weights all that
posterior and prior contribute: log p(z) - log q(z|x), or its expectation, the negative KL.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxvae.config import TrainConfig, whole_number
from jaxvae.errors import InputError
from jaxvae.models.likelihoods import Gaussian, scale_images
from jaxvae.models.vae import Params, Posterior, decode, encode, expected_images, prior
from jaxvae.validation import as_key, jit


class Elbo(NamedTuple):
    """The bound and its two terms, each [batch], nats per image: value = log_likelihood - kl."""

    value: jax.Array
    log_likelihood: jax.Array
    kl: jax.Array


# (params, keys [batch], images [batch, ...], labels) -> (loss [batch], the ELBO's terms)
Objective = Callable[..., tuple[jax.Array, Elbo]]


@jit()
def elbo(
    params: Params, key: jax.Array, images: jax.Array, labels: jax.Array | None = None
) -> Elbo:
    """The evidence lower bound on log p(x), estimated with one sample per image.

        ELBO(x) = E_q(z|x)[log p(x|z)] - KL(q(z|x) || p(z))

    The KL is exact between a Gaussian posterior and the standard normal prior; otherwise it is
    log q(z|x) - log p(z) at the sample.

    Args:
      key: a PRNG key, or [batch] keys, one for each image.
      images: [batch, height, width, channels], float32 in [0, 1] or uint8.
      labels: [batch], the images' classes, where the model is conditional.
    Returns:
      Elbo, each field [batch], nats per image.
    Raises:
      InputError: images of another shape than the model's; labels as of `jaxvae.encode`.

    Kingma and Welling (2014), Auto-Encoding Variational Bayes, equation 10.
    """
    posterior = encode(params, images, labels)
    keys = example_keys(key, posterior.mean.shape[0])
    return _elbo(params, posterior, keys, images, labels)


def negative_elbo(
    params: Params,
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array | None = None,
    *,
    beta: jax.Array | float = 1.0,
    num_samples: int = 1,
    free_bits: float = 0.0,
    axis_name: str | None = None,
) -> tuple[jax.Array, Elbo]:
    """The negative ELBO with its KL weighted: "elbo".

        loss = -E_q(z|x)[log p(x|z)] + beta KL(q(z|x) || p(z))

    With free bits lambda, a latent whose KL is below lambda on the batch's average costs lambda:

        loss = -E_q(z|x)[log p(x|z)] + beta sum_j max(lambda, mean_x KL_j)

    Args:
      num_samples: of the posterior, averaged over.
      free_bits: lambda, nats per latent.
      axis_name: of the `pmap` whose devices share the batch.
    Raises:
      InputError: free bits without a Gaussian posterior and the standard normal prior.

    Higgins et al. (2017), beta-VAE, equation 4. Kingma et al. (2016), Improving Variational
    Inference with Inverse Autoregressive Flow, equation 15.
    """
    posterior = encode(params, images, labels)
    keys = example_keys(key, posterior.mean.shape[0])
    terms = _mean_elbo(params, posterior, keys, images, labels, num_samples)
    kl = terms.kl
    if free_bits:
        if not isinstance(posterior, Gaussian) or params.config.prior != "standard_normal":
            raise InputError(
                "free_bits needs the KL of every latent: expected the posterior 'gaussian' and "
                "the prior 'standard_normal'"
            )
        kls = posterior.kl_per_latent()
        mean = _mean(lax.stop_gradient(kls), axis_name)
        kl = jnp.sum(jnp.where(mean > free_bits, kls, free_bits), axis=-1)
    return -(terms.log_likelihood - beta * kl), terms


def sticking_the_landing(
    params: Params,
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array | None = None,
    *,
    beta: jax.Array | float = 1.0,
    num_samples: int = 1,
) -> tuple[jax.Array, Elbo]:
    """The negative ELBO by samples, with the path derivative as its gradient: "stl".

        loss = -(log p(x|z) + beta (log p(z) - log q(z|x))),    z = mean + exp(log_var / 2) eps

    log q(z|x) is differentiated through z alone, not through its own mean and log_var. What is
    left out has expectation 0, and all that varies where q(z|x) is the true posterior.

    num_samples: of the posterior, averaged over.

    Raises InputError for a posterior that is not Gaussian.

    Not to be differentiated twice: what is left out has a derivative of its own, whose expectation
    is not 0. For second derivatives take "elbo".

    Roeder, Wu and Duvenaud (2017), Sticking the Landing, equation 7.
    """
    posterior, z = _path(params, key, images, labels, num_samples)
    log_p_x, log_ratio = _at_samples(params, z, posterior, images, labels)
    terms = _terms(log_p_x, log_ratio)
    return -(terms.log_likelihood - beta * terms.kl), terms


def importance_weighted(
    params: Params,
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array | None = None,
    *,
    beta: jax.Array | float = 1.0,
    num_samples: int = 1,
) -> tuple[jax.Array, Elbo]:
    """The negative importance-weighted bound: "iwae".

        loss = -log 1/k sum_i w_i,    w_i = p(x|z_i) (p(z_i) / q(z_i|x))^beta,    z_i ~ q(z|x)

    num_samples: k.

    Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders, equation 8.
    """
    posterior, p_z = encode(params, images, labels), prior(params)
    keys = example_keys(key, posterior.mean.shape[0])
    z, log_q = _samples(posterior, keys, jnp.arange(num_samples))
    log_p_x, log_ratio = _log_p_x(params, z, images, labels), log_q - p_z.log_prob(z)
    bound = _log_mean_exp(log_p_x - beta * log_ratio)
    return -bound, _terms(log_p_x, log_ratio)


def doubly_reparameterized(
    params: Params,
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array | None = None,
    *,
    beta: jax.Array | float = 1.0,
    num_samples: int = 1,
) -> tuple[jax.Array, Elbo]:
    """The negative importance-weighted bound, with the encoder's gradient reparameterized twice:
    "dreg".

    With v_i = w_i / sum_j w_j, and log q in log w_i differentiated through z_i alone:

        decoder, prior   sum_i v_i   d log w_i / d theta
        encoder          sum_i v_i^2 (d log w_i / d z_i) (d z_i / d phi)

    It has the expectation of the bound's own gradient, and less variance. At another beta than 1,
    by the same argument, v_i^2 is (1 - beta) v_i + beta v_i^2.

    num_samples: k.

    Raises InputError for a posterior that is not Gaussian.

    Derivatives by the images and by beta are reparameterized alike, and have the expectation of
    the bound's own; those of the terms are of the averages that they are. Not to be differentiated
    twice: the derivative of the estimator is no estimator of the second derivative. For that take
    "iwae".

    Tucker, Lawson, Gu and Maddison (2019), Doubly Reparameterized Gradient Estimators for Monte
    Carlo Objectives, equation 8.
    """
    posterior, z = _path(params, key, images, labels, num_samples)
    scaled = scale_images(images)  # which may be differentiated by, as uint8 may not
    bound, (log_p_x, log_ratio) = _doubly(params, z, beta, posterior, scaled, labels)
    return -bound, _terms(log_p_x, log_ratio)


def beta_tc(
    params: Params,
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array | None = None,
    *,
    beta: jax.Array | float = 1.0,
    axis_name: str | None = None,
) -> tuple[jax.Array, Elbo]:
    """The negative ELBO with its KL taken apart and the total correlation weighted: "beta_tc".

        loss = -log p(x|z) + [log q(z|x) - log q(z)]                mutual information
                           + beta [log q(z) - sum_j log q(z_j)]     total correlation
                           + [sum_j log q(z_j) - log p(z)]          KL of every latent

    The aggregate posterior is estimated from the batch of M images, for z and for every z_j:

        log q(z) = log 1/M sum_m q(z|x_m)

    The paper divides by the number N of training images besides, which moves the parts by
    constants and leaves the gradient as it is.

    Args:
      axis_name: of the `pmap` whose devices share the batch; the sum is over all of it.
    Raises:
      InputError: a posterior that is not Gaussian.

    Chen, Li, Grosse and Duvenaud (2018), Isolating Sources of Disentanglement in Variational
    Autoencoders, equations 2 and 4.
    """
    posterior = _gaussian(encode(params, images, labels))
    z, log_q_z_x = posterior.sample_and_log_prob(example_keys(key, len(posterior.mean)))
    log_p_x = decode(params, z, labels).log_prob(images)
    log_p_z = prior(params).log_prob(z)
    others = _gathered(posterior, axis_name)
    log_q = Gaussian(others.mean, others.log_var).log_prob_per_latent(z[:, None])  # [z, x, latent]
    log_m = math.log(len(others.mean))
    log_q_z = jax.nn.logsumexp(jnp.sum(log_q, axis=-1), axis=1) - log_m
    log_q_z_j = jnp.sum(jax.nn.logsumexp(log_q, axis=1) - log_m, axis=-1)
    information, correlation, latents = (
        log_q_z_x - log_q_z,
        log_q_z - log_q_z_j,
        log_q_z_j - log_p_z,
    )
    loss = -log_p_x + information + beta * correlation + latents
    kl = _kl(params, posterior, z, log_q_z_x)
    return loss, Elbo(log_p_x - kl, log_p_x, kl)


def maximum_mean_discrepancy(
    params: Params,
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array | None = None,
    *,
    beta: jax.Array | float = 1.0,
    mmd_weight: float = 100.0,
    axis_name: str | None = None,
) -> tuple[jax.Array, Elbo]:
    """The negative ELBO and the discrepancy between aggregate posterior and prior: "mmd".

        loss = -E_q(z|x)[log p(x|z)] + beta KL(q(z|x) || p(z)) + lambda MMD^2(q(z), p(z))

        MMD^2 = E[k(z, z')] + E[k(y, y')] - 2 E[k(z, y)],    z, z' ~ q(z),  y, y' ~ p(z)
        k(z, y) = C / (C + |z - y|^2),    C = 2 latent_dim

    At beta 0 a Wasserstein autoencoder, at beta 1 - alpha the InfoVAE. The expectations are
    over pairs of different images of the batch. Over a prior of K components of weights w_k they
    are sums, as the choice of a component has no derivative by its weights:

        E[f(y)] = sum_k w_k E[f(y_k)],    y_k ~ component k

    Args:
      mmd_weight: lambda, nats.
      axis_name: of the `pmap` whose devices share the batch; the pairs are of all of it.

    Zhao, Song and Ermon (2019), InfoVAE, equation 6. Tolstikhin et al. (2018), Wasserstein
    Auto-Encoders, algorithm 2.
    """
    posterior, p_z = encode(params, images, labels), prior(params)
    keys = example_keys(key, len(posterior.mean))
    z, log_q = posterior.sample_and_log_prob(keys)
    terms = _elbo_at(params, z, log_q, posterior, images, labels)
    all_z = _gathered(z, axis_name)
    c, batch, whole = 2 * z.shape[1], len(z), len(all_z)
    first = _first(axis_name, batch)

    # Draw i of the batch's is of component i mod K. Every component has two draws or more, so
    # that there are pairs of each with each.
    components = len(p_z.weights)
    each = -(-2 * components // whole)
    own = first * each + jnp.arange(batch * each)
    everyone = jnp.arange(whole * each)
    draws = (len(everyone) - 1 - jnp.arange(components)) // components + 1  # of each component
    draws = draws.astype(z.dtype)
    weights = (p_z.weights / draws)[everyone % components]

    def draw(key: jax.Array, own: jax.Array) -> jax.Array:
        keys = jax.vmap(partial(jax.random.fold_in, key))(1 + jnp.arange(each))
        return jax.vmap(p_z.sample_component)(keys, own % components)

    y = jax.vmap(draw)(keys, own.reshape(batch, each)).reshape(-1, z.shape[1])
    all_y = _gathered(y, axis_name)

    def kernel(a: jax.Array, b: jax.Array) -> jax.Array:
        # |a - b|^2 by one matrix product: beside C the rounding does not show, and differences of
        # a thousand draws would take a hundred times as long.
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
    return -(terms.log_likelihood - beta * terms.kl) + mmd_weight * squared, terms


OBJECTIVES: dict[str, Objective] = {
    "elbo": negative_elbo,
    "stl": sticking_the_landing,
    "iwae": importance_weighted,
    "dreg": doubly_reparameterized,
    "beta_tc": beta_tc,
    "mmd": maximum_mean_discrepancy,
}


def chosen(
    config: TrainConfig, beta: jax.Array | float, axis_name: str | None = None
) -> tuple[Objective, bool]:
    """The objective that a configuration names, and whether it needs the batch in one piece."""
    own: dict[str, Any] = {}
    if config.objective in ("elbo", "stl", "iwae", "dreg"):
        own["num_samples"] = config.num_samples
    if config.objective == "mmd":
        own["mmd_weight"] = config.mmd_weight
    if config.free_bits:
        own["free_bits"] = config.free_bits
    whole = config.objective in ("beta_tc", "mmd") or config.free_bits > 0
    if whole:
        own["axis_name"] = axis_name
    return partial(OBJECTIVES[config.objective], beta=beta, **own), whole


def beta_at(
    config: TrainConfig, step: jax.Array, beta: jax.Array | float | None = None
) -> jax.Array | float:
    """The weight of the KL at a step, warmed up over W = `warmup_steps`.

        linear      beta min(1, step / W)
        cyclical    beta min(1, (step mod 2 W) / W)

    beta: instead of the configuration's.

    Bowman et al. (2016), Generating Sentences from a Continuous Space, section 3.1. Fu et al.
    (2019), Cyclical Annealing Schedule, equation 6, with half of every cycle for the growth.
    """
    beta = config.beta if beta is None else beta
    if config.warmup == "none":
        return beta
    if config.warmup == "cyclical":
        step = step % (2 * config.warmup_steps)
    return beta * jnp.minimum(1, step / config.warmup_steps)


@jit(static_argnames="num_samples")
def log_likelihood(
    params: Params,
    key: jax.Array,
    images: jax.Array,
    num_samples: int = 5000,
    labels: jax.Array | None = None,
) -> jax.Array:
    """An importance-weighted estimate of log p(x), with the posterior as the proposal.

        log p(x) >= E[log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x)],    z_k ~ q(z|x)

    Memory does not grow with the number of samples.

    Args:
      key: a PRNG key, or [batch] keys, one for each image.
      images: [batch, height, width, channels], float32 in [0, 1] or uint8.
      num_samples: K.
      labels: [batch], the images' classes, where the model is conditional.
    Returns:
      [batch], nats per image.
    Raises:
      InputError: images of another shape than the model's, or num_samples below 1.

    Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders, equation 8.
    """
    num_samples = whole_number("num_samples", num_samples)
    images = expected_images(params, images)
    posterior, p_z = encode(params, images, labels), prior(params)
    batch = images.shape[0]
    keys = example_keys(key, batch)

    def log_weights(k: jax.Array) -> jax.Array:
        z, log_q = _samples(posterior, keys, k)
        return _log_p_x(params, z, images, labels) + p_z.log_prob(z) - log_q

    # Enough samples at once to fill the machine when there are few images.
    at_once = min(num_samples, max(1, 1024 // batch))

    def add(total: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
        k = first + jnp.arange(at_once)
        weights = jnp.where(k[:, None] < num_samples, log_weights(k), -jnp.inf)
        return jnp.logaddexp(total, jax.nn.logsumexp(weights, axis=0)), None

    nothing = jnp.full(batch, -jnp.inf, posterior.mean.dtype)
    total, _ = lax.scan(add, nothing, jnp.arange(0, num_samples, at_once))
    return total - jnp.log(num_samples)


def example_keys(key: jax.Array, batch: int, first: jax.Array | int = 0) -> jax.Array:
    """One key for each example, by its index: [batch] keys.

    An example's noise then depends neither on the device nor on the block that computes it.

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


def _elbo(
    params: Params,
    posterior: Posterior,
    keys: jax.Array,
    images: jax.Array,
    labels: jax.Array | None,
) -> Elbo:
    z, log_q = posterior.sample_and_log_prob(keys)
    return _elbo_at(params, z, log_q, posterior, images, labels)


def _elbo_at(
    params: Params,
    z: jax.Array,
    log_q: jax.Array,
    posterior: Posterior,
    images: jax.Array,
    labels: jax.Array | None,
) -> Elbo:
    log_p_x = decode(params, z, labels).log_prob(jnp.asarray(images))
    kl = _kl(params, posterior, z, log_q)
    return Elbo(log_p_x - kl, log_p_x, kl)


def _mean_elbo(
    params: Params,
    posterior: Posterior,
    keys: jax.Array,
    images: jax.Array,
    labels: jax.Array | None,
    num_samples: int,
) -> Elbo:
    """The ELBO averaged over so many samples."""
    if num_samples == 1:
        return _elbo(params, posterior, keys, images, labels)
    z, log_q = _samples(posterior, keys, jnp.arange(num_samples))
    log_p_x = _log_p_x(params, z, images, labels)
    return _terms(log_p_x, jnp.broadcast_to(_kl(params, posterior, z, log_q), log_p_x.shape))


def _terms(log_p_x: jax.Array, log_ratio: jax.Array) -> Elbo:
    """The ELBO's terms from log p(x|z) and log q(z|x) - log p(z), each [samples, batch]."""
    log_likelihood, kl = jnp.mean(log_p_x, axis=0), jnp.mean(log_ratio, axis=0)
    return Elbo(log_likelihood - kl, log_likelihood, kl)


def _path(
    params: Params,
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array | None,
    num_samples: int,
) -> tuple[Gaussian, jax.Array]:
    """The posterior, held fixed, and samples [samples, batch, latent] that move with it."""
    posterior = _gaussian(encode(params, images, labels))
    keys = example_keys(key, len(posterior.mean))
    z, _ = _samples(posterior, keys, jnp.arange(num_samples))
    return lax.stop_gradient(posterior), z


def _at_samples(
    params: Params,
    z: jax.Array,
    posterior: Gaussian,
    images: jax.Array,
    labels: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """log p(x|z) and log q(z|x) - log p(z) of samples [samples, batch, latent]."""
    log_ratio = posterior.log_prob(z) - prior(params).log_prob(z)
    return _log_p_x(params, z, images, labels), log_ratio


def _log_p_x(
    params: Params, z: jax.Array, images: jax.Array, labels: jax.Array | None
) -> jax.Array:
    """log p(x|z) of samples [samples, batch, latent]: [samples, batch].

    The samples are rows of one batch: convolutions under `vmap` take half as long again.
    """

    def repeated(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (len(z), *x.shape)).reshape(-1, *x.shape[1:])

    images = repeated(jnp.asarray(images))
    labels = None if labels is None else repeated(jnp.asarray(labels))
    log_p_x = decode(params, z.reshape(-1, z.shape[-1]), labels).log_prob(images)
    return log_p_x.reshape(z.shape[:2])


@jax.custom_jvp
def _doubly(
    params: Params,
    z: jax.Array,
    beta: jax.Array | float,
    posterior: Gaussian,
    images: jax.Array,
    labels: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The importance-weighted bound, and what its weights are made of.

    In the bound's derivative through z_i, v_i counts as (1 - beta) v_i + beta v_i^2. By the
    posterior, which is held fixed, there is no derivative.
    """
    log_p_x, log_ratio = _at_samples(params, z, posterior, images, labels)
    return _log_mean_exp(log_p_x - beta * log_ratio), (log_p_x, log_ratio)


@_doubly.defjvp
def _doubly_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    params, z, beta, posterior, images, labels = primals
    of_params, of_z, of_beta, _, of_images, _ = tangents

    def log_weights(params: Params, z: jax.Array, beta: Any, images: jax.Array) -> Any:
        log_p_x, log_ratio = _at_samples(params, z, posterior, images, labels)
        return log_p_x - beta * log_ratio, (log_p_x, log_ratio)

    # Of all samples at once, as the weights v depend on all of them. The networks are evaluated
    # here; both uses of the derivative are linear, and the second is dropped where it is not used.
    (log_w, parts), derivative = jax.linearize(log_weights, params, z, beta, images)
    v = jax.nn.softmax(log_w, axis=0)
    scaled = ((1 - beta) + beta * v)[..., None] * of_z
    of_log_w, _ = derivative(of_params, scaled, of_beta, of_images)
    _, of_parts = derivative(of_params, of_z, of_beta, of_images)
    return (_log_mean_exp(log_w), parts), (jnp.sum(v * of_log_w, axis=0), of_parts)


def _kl(params: Params, posterior: Posterior, z: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(q(z|x) || p(z)), exact where that is known, or its estimate at z."""
    if isinstance(posterior, Gaussian) and params.config.prior == "standard_normal":
        return posterior.kl()
    return log_q - prior(params).log_prob(z)


def _gaussian(posterior: Posterior) -> Gaussian:
    if not isinstance(posterior, Gaussian):
        raise InputError(
            "this objective needs log q(z|x) at any z: expected the posterior 'gaussian'; "
            "with a flow train by 'elbo', 'iwae' or 'mmd'"
        )
    return posterior


def _log_mean_exp(log_weights: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(log_weights, axis=0) - math.log(len(log_weights))


def _samples(posterior: Posterior, keys: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Every image's samples of these numbers, [samples, batch, latent], and log q(z|x) of them."""

    def sample(k: jax.Array) -> tuple[jax.Array, jax.Array]:
        return posterior.sample_and_log_prob(jax.vmap(jax.random.fold_in, (0, None))(keys, k))

    return jax.vmap(sample)(k)


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
