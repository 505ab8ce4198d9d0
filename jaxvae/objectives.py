"""Objectives of training, and bounds on log p(x).

An objective is a frozen dataclass of its options, called as

    loss, terms = objective(params, key, images, labels, beta=..., axis_name=...)

where the loss is [batch], in nats per image, and the terms are those of the ELBO. `beta` weights
log p(z) - log q(z|x), or its expectation, the negative KL. All objectives use one primitive,
`draw`.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key, Num

from jaxvae.components import Registry
from jaxvae.errors import InputError, shown
from jaxvae.models.codebooks import is_discrete
from jaxvae.models.distributions import Gaussian
from jaxvae.models.protocols import Draw, Elbo, Posterior
from jaxvae.models.vae import (
    Images,
    Labels,
    Params,
    decode,
    encode,
    encode_observed,
    expected_labels,
    known_classes,
    log_classes,
    prior,
)
from jaxvae.validation import (
    AnyKey,
    as_array,
    as_floats,
    as_key,
    expect_bool,
    is_number,
    jit,
    native,
    support_of,
    whole_number,
)

Scalar = Num[Array, ""] | float
Loss = Float[Array, " batch"]


@runtime_checkable
class Objective(Protocol):
    """A loss that training minimises: `TrainConfig(objective=...)`.

    It may also be a plain function of (params, keys, images[, labels]) that returns a loss [batch]
    and an `Elbo`. The loss of an image must then not depend on the other images, and the
    configuration's beta is not used.

    Attributes:
      num_samples: latent samples per image.
      across_batch: whether the loss of an image depends on the other images of the batch. The
        batch is then not split into blocks, and over several devices `axis_name` is passed.

    An objective for images without a label, -1, has `unlabelled = True`. It may have a
    `labelled_share`, the least share of images with a label in every batch.

    An objective for images with missing entries, NaN, has `missing = True`: without it the training
    step refuses NaN.
    """

    num_samples: int
    across_batch: bool

    def __call__(
        self,
        params: Params,
        key: AnyKey,
        images: Images,
        labels: Labels = None,
        *,
        beta: Scalar = 1.0,
        axis_name: str | None = None,
    ) -> tuple[Loss, Elbo]:
        """Compute the loss, in nats per image, and the terms of the ELBO.

        Args:
          params: the model.
          key: a PRNG key, or [batch] keys, one for each image.
          images: float32 in [0, 1], or uint8.
          labels: classes or covariates of the images, if the model is conditional.
          beta: weight of the KL term.
          axis_name: axis of the `pmap` over which the batch is split.

        Returns:
          The loss and the ELBO of each image.
        """


def draw(
    params: Params,
    key: AnyKey,
    images: Images,
    labels: Labels = None,
    num_samples: int = 1,
    *,
    path: bool = False,
    relaxed: bool = False,
) -> Draw:
    """Sample the posterior and evaluate the log-densities at the samples.

    Args:
      params: the model.
      key: a PRNG key, or [batch] keys, one for each image.
      images: float32 in [0, 1], or uint8.
      labels: classes or covariates of the images, if the model is conditional.
      num_samples: samples per image.
      path: differentiate log q(z|x) only through z, not through the parameters of the posterior.
      relaxed: sample the relaxation of the posterior, if it has one.

    Returns:
      The samples and their log-densities.

    Raises:
      InputError: as in `jaxvae.encode`; `path` with a posterior without `log_prob`.
    """
    posterior = encode(params, images, labels)
    if relaxed:
        posterior = getattr(posterior, "relaxation", None) or posterior
    images = as_array("images", images)
    keys = sample_keys(example_keys(key, len(images)), num_samples)
    drawn = draw_at(params, posterior, keys, images, labels)
    if path:
        held = lax.stop_gradient(with_log_prob(posterior))
        drawn = drawn._replace(log_posterior=held.log_prob(drawn.z))
    return drawn


def draw_at(
    params: Params,
    posterior: Posterior,
    keys: Key[Array, "samples batch"],
    images: Images,
    labels: Labels = None,
) -> Draw:
    """Sample a posterior by given keys and evaluate the log-densities at the samples.

    If the model has `draw`, which evaluates them in one pass, it is called instead.

    Args:
      params: the model.
      posterior: q(z|x) of the images.
      keys: PRNG keys.
      images: float32 in [0, 1], or uint8.
      labels: classes or covariates of the images, if the model is conditional.

    Returns:
      The samples and their log-densities.
    """
    if hasattr(params.model, "draw"):
        labels = expected_labels(params, labels, keys.shape[1], "decoder")
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


def samples(
    posterior: Posterior, keys: Key[Array, "samples batch"]
) -> tuple[Float[Array, "samples batch latent"], Float[Array, "samples batch"]]:
    """Draw z by a key for each sample; also return log q(z|x), in nats."""
    if len(keys) == 1:
        z, log_q = posterior.sample_and_log_prob(keys[0])
        return z[None], log_q[None]
    return jax.vmap(posterior.sample_and_log_prob)(keys)


def sample_keys(keys: Key[Array, " batch"], num_samples: int) -> Key[Array, "samples batch"]:
    """Derive a key for each sample from the key of its image; a single sample takes the key."""
    return keys[None] if num_samples == 1 else numbered_keys(keys, jnp.arange(num_samples))


def numbered_keys(
    keys: Key[Array, " batch"], numbers: Int[Array, " samples"]
) -> Key[Array, "samples batch"]:
    """Derive the keys of the samples with these numbers from the keys of the images."""
    fold_in = jax.vmap(jax.random.fold_in, (0, None))
    return jax.vmap(lambda number: fold_in(keys, number))(numbers)


def log_likelihood_at(
    params: Params, z: Float[Array, "samples batch latent"], images: Images, labels: Labels
) -> Float[Array, "samples batch"]:
    """Compute log p(x|z) of samples, in nats.

    The samples are decoded as one batch: convolutions under `vmap` take 1.5 times as long.
    """

    def repeated(x: Num[Array, "batch ..."]) -> Num[Array, "rows ..."]:
        return jnp.broadcast_to(x, (len(z), *x.shape)).reshape(-1, *x.shape[1:])

    images = repeated(jnp.asarray(native(images)))
    labels = None if labels is None else repeated(jnp.asarray(native(labels)))
    log_p_x = decode(params, z.reshape(-1, z.shape[-1]), labels).log_prob(images)
    return log_p_x.reshape(z.shape[:2])


@jit()
def elbo(params: Params, key: AnyKey, images: Images, labels: Labels = None) -> Elbo:
    """Estimate the evidence lower bound on log p(x) with one sample per image.

        ELBO(x) = E_q(z|x)[log p(x|z)] - KL(q(z|x) || p(z))

    The KL is exact between a Gaussian posterior and the standard normal prior, and between
    categorical codes and uniform ones. Of a ladder it is the sum of the exact KLs of its groups,
    each given the sample of those above. Otherwise it is log q(z|x) - log p(z) at the sample.

    Of a conditional model it is the bound on log p(x|y). Of a model with a classifier and without
    labels it is the bound on log p(x) of `SemiSupervised`.

    Args:
      params: the model.
      key: a PRNG key, or [batch] keys, one for each image.
      images: float32 in [0, 1], or uint8.
      labels: classes or covariates of the images, if the model is conditional.

    Returns:
      The bound and its terms, each [batch], in nats per image.

    Raises:
      InputError: images of another shape than the model's; labels as in `jaxvae.encode`.

    References:
      Kingma and Welling (2014), Auto-Encoding Variational Bayes, equation 10.
    """
    if params.config.classifier and labels is None:
        return SemiSupervised()(params, key, images)[1]
    return draw(params, key, images, labels).elbo()


@dataclass(frozen=True)
class ELBO:
    """The negative ELBO, with its KL weighted.

        loss = -E_q(z|x)[log p(x|z)] + beta KL(q(z|x) || p(z))

    With free bits lambda, the KL of a latent counts as lambda where its batch mean is below that:

        loss = -E_q(z|x)[log p(x|z)] + beta sum_j max(lambda, mean_x KL_j)

    With `balance`, a group of a hierarchy with a small KL is penalised less while beta is below 1,
    so that warm-up does not switch it off:

        loss = -E_q(z|x)[log p(x|z)] + beta sum_g gamma_g KL_g,
        gamma_g proportional to mean_x KL_g / size_g, with a mean of 1 over the groups

    Attributes:
      num_samples: number of posterior samples, over which the loss is averaged.
      free_bits: lambda, KL per latent, or per group of a hierarchy, in nats below which it is not
        penalised; needs a hierarchy, or a Gaussian posterior and the standard normal prior.
      balance: whether the KL of the groups is balanced during warm-up; needs a hierarchy.

    References:
      Higgins et al. (2017), beta-VAE, equation 4. Kingma et al. (2016), Improving Variational
      Inference with Inverse Autoregressive Flow, equation 15. Vahdat and Kautz (2020), NVAE,
      appendix A, for `balance`.
    """

    num_samples: int = 1
    free_bits: float = 0.0
    balance: bool = False

    def __post_init__(self) -> None:
        _check_samples(self)
        _check_number(self, "free_bits")
        expect_bool("balance", self.balance)

    @property
    def across_batch(self) -> bool:
        """Whether the loss depends on the batch mean of the KL."""
        return self.free_bits > 0 or self.balance

    def __call__(
        self,
        params: Params,
        key: AnyKey,
        images: Images,
        labels: Labels = None,
        *,
        beta: Scalar = 1.0,
        axis_name: str | None = None,
    ) -> tuple[Loss, Elbo]:
        """Compute the loss and the ELBO's terms, as in `Objective`."""
        drawn = draw(params, key, images, labels, self.num_samples, relaxed=True)
        terms = drawn.elbo()
        kl = terms.kl
        if self.across_batch:
            if drawn.kl_per_group is not None:
                kls = jnp.mean(drawn.kl_per_group, axis=0)
            elif self.balance:
                raise InputError("balance needs the KL of every group: expected network 'ladder'")
            elif isinstance(drawn.posterior, Gaussian) and drawn.kl is not None:
                kls = drawn.posterior.kl_per_latent()
            else:
                raise InputError(
                    "free_bits needs the KL of every latent or group: expected the posterior "
                    "'gaussian' and the prior 'standard_normal'"
                )
            mean = _mean(lax.stop_gradient(kls), axis_name)
            if self.free_bits:
                kls = jnp.where(mean > self.free_bits, kls, self.free_bits)
            if self.balance:
                groups = params.model.groups  # type: ignore[attr-defined]
                sizes = jnp.array([group.size for group in groups])
                density = (mean + 0.01) / sizes  # no weight is 0
                kls *= jnp.where(beta < 1, density / jnp.mean(density), 1)
            kl = jnp.sum(kls, axis=-1)
        return -(terms.log_likelihood - beta * kl) + drawn.penalty, terms


@dataclass(frozen=True)
class StickingTheLanding:
    """The negative ELBO estimated by samples, with the path derivative as its gradient.

        loss = -(log p(x|z) + beta (log p(z) - log q(z|x))),    z = mean + exp(log_var / 2) eps

    log q(z|x) is differentiated only through z, not through mean and log_var. The omitted term has
    expectation 0, and is the only source of variance where q(z|x) is the true posterior. Second
    derivatives are wrong, as the derivative of the omitted term does not have expectation 0: use
    "elbo" for them.

    Attributes:
      num_samples: number of posterior samples, over which the loss is averaged.

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
        key: AnyKey,
        images: Images,
        labels: Labels = None,
        *,
        beta: Scalar = 1.0,
        axis_name: str | None = None,
    ) -> tuple[Loss, Elbo]:
        """Compute the loss and the ELBO's terms, as in `Objective`.

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

    Its gradient is that of sum_i v_i log w_i with fixed v_i = w_i / sum_j w_j. With `backward=m`, m
    of the k samples are drawn with the probabilities v_i and the gradient is that of the mean of
    their log w_i. Its expectation is the same, its variance larger. k samples then take only the
    forward pass, and m the forward and the backward pass. Second derivatives, and derivatives of
    the ELBO's terms, are then wrong: use `backward=0` for them.

    Attributes:
      num_samples: k.
      backward: m; 0: all samples take the backward pass.

    References:
      Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders, equation 8, and
      section 3 for drawing a sample by its weight.
    """

    num_samples: int = 1
    backward: int = 0
    across_batch = False
    missing = False

    def __post_init__(self) -> None:
        _check_samples(self)
        backward = whole_number("backward", self.backward, least=0, most=self.num_samples)
        object.__setattr__(self, "backward", backward)

    def __call__(
        self,
        params: Params,
        key: AnyKey,
        images: Images,
        labels: Labels = None,
        *,
        beta: Scalar = 1.0,
        axis_name: str | None = None,
    ) -> tuple[Loss, Elbo]:
        """Compute the loss and the ELBO's terms, as in `Objective`.

        Raises:
          InputError: training samples a relaxation of the posterior.
        """
        images = as_array("images", images)
        own = example_keys(key, len(images))
        keys = sample_keys(own, self.num_samples)

        def log_weights(params: Params, keys: Key[Array, "samples batch"]) -> tuple[Array, Draw]:
            posterior = (encode_observed if self.missing else encode)(params, images, labels)
            if getattr(posterior, "relaxation", None) is not None:
                raise InputError(
                    "this objective weights samples by log q(z|x), which relaxed samples do not "
                    "have: expected the objective 'elbo', or the posterior's straight_through=true"
                )
            drawn = draw_at(params, posterior, keys, images, labels)
            return drawn.log_likelihood - beta * drawn.log_ratio - drawn.penalty, drawn

        if not self.backward:
            log_w, drawn = log_weights(params, keys)
            return -_log_mean_exp(log_w), drawn.elbo(exact=False)
        log_w, drawn = log_weights(lax.stop_gradient(params), keys)
        log_w = lax.stop_gradient(log_w)
        (choice,) = numbered_keys(own, jnp.array([self.num_samples]))
        chosen = _resampled(choice, log_w, self.backward)
        log_w_chosen, _ = log_weights(params, keys[chosen, jnp.arange(len(images))])
        mean = jnp.mean(log_w_chosen, axis=0)
        bound = _log_mean_exp(log_w) + mean - lax.stop_gradient(mean)  # mean: for the gradient
        return -bound, drawn.elbo(exact=False)


@dataclass(frozen=True)
class MissingImportanceWeighted(ImportanceWeighted):
    """The negative importance-weighted bound on the log-probability of the observed entries.

        loss = -log 1/k sum_i w_i,    w_i = p(x_o|z_i) (p(z_i) / q(z_i|x_o))^beta,    z_i ~ q(z|x_o)

    NaN marks missing entries, and x_o are the others. The encoder sees zeros in place of missing
    entries, and the likelihood leaves them out. Without any it is "iwae". The bound is on the joint
    probability of x_o alone, so entries must be missing at random: whether an entry is missing may
    depend on x_o, not on the missing values.

    Attributes:
      num_samples: k.
      backward: as in `ImportanceWeighted`.

    References:
      Mattei and Frellsen (2019), MIWAE: Deep Generative Modelling and Imputation of Incomplete Data
      Sets, section 2.
    """

    missing = True


@dataclass(frozen=True)
class DoublyReparameterized:
    """The negative importance-weighted bound, with a doubly reparameterized encoder gradient.

    With v_i = w_i / sum_j w_j, and log q in log w_i differentiated only through z_i:

        decoder, prior   sum_i v_i   d log w_i / d theta
        encoder          sum_i v_i^2 (d log w_i / d z_i) (d z_i / d phi)

    The expectation is that of the gradient of "iwae", and the variance is lower. For other beta
    than 1, the same derivation gives (1 - beta) v_i + beta v_i^2 in the place of v_i^2.

    Derivatives by the images, the covariates and beta are doubly reparameterized too, and have the
    expectation of those of "iwae". The derivatives of the ELBO's terms are those of plain averages.
    Second derivatives are wrong: use "iwae" for them.

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
        key: AnyKey,
        images: Images,
        labels: Labels = None,
        *,
        beta: Scalar = 1.0,
        axis_name: str | None = None,
    ) -> tuple[Loss, Elbo]:
        """Compute the loss and the ELBO's terms, as in `Objective`.

        Raises:
          InputError: a posterior without `log_prob`.
        """
        posterior = with_log_prob(encode(params, images, labels))
        images = as_floats(
            support_of(params), images
        )  # to floats, as the custom derivative includes the images
        keys = example_keys(key, len(images))
        z, _ = samples(posterior, sample_keys(keys, self.num_samples))
        bound, (log_p_x, log_ratio) = _doubly(
            params, z, beta, lax.stop_gradient(posterior), images, native(labels)
        )
        log_likelihood, kl = jnp.mean(log_p_x, axis=0), jnp.mean(log_ratio, axis=0)
        loss = getattr(posterior, "penalty", 0.0) - bound
        return loss, Elbo(log_likelihood - kl, log_likelihood, kl)


@jax.custom_jvp
def _doubly(
    params: Params,
    z: Float[Array, "samples batch latent"],
    beta: Scalar,
    posterior: Any,
    images: Images,
    labels: Labels,
) -> tuple[Loss, tuple[Float[Array, "samples batch"], Float[Array, "samples batch"]]]:
    """Compute the importance-weighted bound, log p(x|z) and log q(z|x) - log p(z).

    In the derivative of the bound through z_i, v_i is replaced by (1 - beta) v_i + beta v_i^2. The
    posterior is held fixed: there is no derivative by it.
    """
    log_w, parts = _log_weights(params, z, beta, posterior, images, labels)
    return _log_mean_exp(log_w), parts


@_doubly.defjvp
def _doubly_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    params, z, beta, posterior, images, labels = primals
    of_params, of_z, of_beta, _, of_images, of_labels = tangents

    def log_weights(params: Params, z: Array, beta: Any, images: Array, labels: Labels) -> Any:
        return _log_weights(params, z, beta, posterior, images, labels)

    # All samples at once, as each v_i depends on all of them. The networks are evaluated only here:
    # `derivative` is linear, and its second call is eliminated if the result is not used.
    (log_w, parts), derivative = jax.linearize(log_weights, params, z, beta, images, labels)
    v = jax.nn.softmax(log_w, axis=0)
    scaled = ((1 - beta) + beta * v)[..., None] * of_z
    of_log_w, _ = derivative(of_params, scaled, of_beta, of_images, of_labels)
    _, of_parts = derivative(of_params, of_z, of_beta, of_images, of_labels)
    return (_log_mean_exp(log_w), parts), (jnp.sum(v * of_log_w, axis=0), of_parts)


def _log_weights(
    params: Params,
    z: Float[Array, "samples batch latent"],
    beta: Scalar,
    posterior: Any,
    images: Images,
    labels: Labels,
) -> tuple[
    Float[Array, "samples batch"],
    tuple[Float[Array, "samples batch"], Float[Array, "samples batch"]],
]:
    """Compute log w of samples, with log p(x|z) and log q(z|x) - log p(z)."""
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

    The paper also divides by the number N of training images, which shifts the parts by constants
    and does not change the gradient.

    References:
      Chen, Li, Grosse and Duvenaud (2018), Isolating Sources of Disentanglement in Variational
      Autoencoders, equations 2 and 4.
    """

    num_samples = 1
    across_batch = True

    def __call__(
        self,
        params: Params,
        key: AnyKey,
        images: Images,
        labels: Labels = None,
        *,
        beta: Scalar = 1.0,
        axis_name: str | None = None,
    ) -> tuple[Loss, Elbo]:
        """Compute the loss and the ELBO's terms, as in `Objective`.

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
        # log q(z_j|x_m) for every pair: [z, x, latent].
        log_q = Gaussian(others.mean, others.log_var).log_prob_per_latent(z[:, None])
        log_m = math.log(len(others.mean))
        log_q_z = jax.nn.logsumexp(jnp.sum(log_q, axis=-1), axis=1) - log_m
        log_q_z_j = jnp.sum(jax.nn.logsumexp(log_q, axis=1) - log_m, axis=-1)
        information, correlation, latents = (
            log_q_z_x - log_q_z,
            log_q_z - log_q_z_j,
            log_q_z_j - log_p_z,
        )
        loss = -log_p_x + information + beta * correlation + latents + drawn.penalty
        return loss, drawn.elbo()


@dataclass(frozen=True)
class MaximumMeanDiscrepancy:
    """The negative ELBO plus the discrepancy between the aggregate posterior and the prior.

        loss = -E_q(z|x)[log p(x|z)] + beta KL(q(z|x) || p(z)) + lambda MMD^2(q(z), p(z))

        MMD^2 = E[k(z, z')] + E[k(y, y')] - 2 E[k(z, y)],    z, z' ~ q(z),  y, y' ~ p(z)
        k(z, y) = C / (C + |z - y|^2),    C = 2 latent_dim

    With beta 0 it is a Wasserstein autoencoder, with beta 1 - alpha the InfoVAE. The expectations
    are over pairs of different images of the batch. For a prior of K components with weights w_k,
    they are sums over the components, as sampling a component has no derivative by the weights:

        E[f(y)] = sum_k w_k E[f(y_k)],    y_k ~ component k

    Attributes:
      weight: lambda, in nats.

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
        key: AnyKey,
        images: Images,
        labels: Labels = None,
        *,
        beta: Scalar = 1.0,
        axis_name: str | None = None,
    ) -> tuple[Loss, Elbo]:
        """Compute the loss and the ELBO's terms, as in `Objective`.

        Raises:
          InputError: the latents are codes.
        """
        if is_discrete(params.config):
            raise InputError(
                "the objective 'mmd' differentiates through samples of the prior, which samples of "
                "codes do not allow: expected the objective 'elbo'"
            )
        drawn = draw(params, key, images, labels)
        z, terms, p_z = drawn.z[0], drawn.elbo(), prior(params)
        keys = example_keys(key, len(z))
        # A prior without components counts as one component.
        of_component = getattr(p_z, "sample_component", lambda key, k: p_z.sample(key, 1)[0])
        prior_weights = getattr(p_z, "weights", jnp.ones(1, z.dtype))
        all_z = _gathered(z, axis_name)
        c, batch, whole = 2 * z.shape[1], len(z), len(all_z)
        first = _first(axis_name, batch)

        # Draw i of the batch is from component i mod K. Every component has two draws or more, as
        # the sums need pairs of draws from the same component.
        components = len(prior_weights)
        each = -(-2 * components // whole)
        own = first * each + jnp.arange(batch * each)
        everyone = jnp.arange(whole * each)
        draws = (len(everyone) - 1 - jnp.arange(components)) // components + 1  # per component
        draws = draws.astype(z.dtype)
        weights = (prior_weights / draws)[everyone % components]

        def draws_of(
            key: Key[Array, ""], own: Int[Array, " draws"]
        ) -> Float[Array, "draws latent"]:
            keys = jax.vmap(partial(jax.random.fold_in, key))(1 + jnp.arange(each))
            return jax.vmap(of_component)(keys, own % components)

        y = jax.vmap(draws_of)(keys, own.reshape(batch, each)).reshape(-1, z.shape[1])
        all_y = _gathered(y, axis_name)

        def kernel(a: Float[Array, "n latent"], b: Float[Array, "m latent"]) -> Float[Array, "n m"]:
            # |a - b|^2 by one matrix product, as the differences themselves, of a thousand draws,
            # take fifty times as long. Its rounding error is small relative to C near the mean.
            center = lax.stop_gradient(jnp.mean(b, axis=0))
            a, b = a - center, b - center
            products = jnp.matmul(a, b.T, precision=lax.Precision.HIGHEST)
            square = jnp.sum(a**2, axis=1)[:, None] + jnp.sum(b**2, axis=1) - 2 * products
            return c / (c + jnp.maximum(square, 0))

        others = jnp.arange(whole) != (first + jnp.arange(batch))[:, None]
        of_z = jnp.sum(jnp.where(others, kernel(z, all_z), 0), axis=1) / max(1, whole - 1)
        # Of n draws from a component, the n (n - 1) pairs of different draws represent all n^2.
        alike = own[:, None] % components == everyone % components
        pairs = jnp.where(alike, (draws / (draws - 1))[own % components][:, None], 1)
        pairs = jnp.where(own[:, None] == everyone, 0, pairs) * weights[own][:, None] * weights
        of_y = whole * jnp.sum((pairs * kernel(y, all_y)).reshape(batch, -1), axis=1)
        squared = of_z + of_y - 2 * (kernel(z, all_y) @ weights)
        return -(
            terms.log_likelihood - beta * terms.kl
        ) + self.weight * squared + drawn.penalty, terms


@dataclass(frozen=True)
class SemiSupervised:
    """The negative bound of the model M2, of which most images have no label.

    With uniform p(y) and the bound of a class

        B(x, y) = E_q(z|x,y)[log p(x|y,z)] - beta KL(q(z|x,y) || p(z)) + log p(y)

    the loss of an image is

        with a label y    -B(x, y) - alpha log q(y|x)
        with label -1     -sum_y q(y|x) B(x, y) - H(q(y|x))

    The sum over the classes is exact, and all of them have the same noise. The terms of the ELBO
    are those of log p(x, y) or log p(x), with log p(y) or KL(q(y|x) || p(y)) in the KL.

    Kingma et al. sum the loss over all images, of which the share f has a label. At least the share
    s of every batch has one: if f < s, the images with a label are repeated, and their loss, with
    its two terms, has s (1 - f) / (f (1 - s)) times the weight of that sum. With
    `labelled_share=0` each image comes once in an epoch, and the weights are those of the sum.

    Attributes:
      alpha: weight of the classification loss of an image with a label. Kingma et al. take 0.1 / f:
        50 for 100 labels of 50,000 images. With repeated images 0.1 (1 - s) / (s (1 - f)), about
        0.9, gives the classification loss the same weight beside the images without a label.
      num_samples: number of posterior samples for each class, over which the loss is averaged.
      labelled_share: s, rounded up to a whole number of images.

    References:
      Kingma, Rezende, Mohamed and Welling (2014), Semi-supervised Learning with Deep Generative
      Models, equations 6 to 9.
    """

    alpha: float = 50.0
    num_samples: int = 1
    labelled_share: float = 0.1
    across_batch = False
    unlabelled = True

    def __post_init__(self) -> None:
        _check_samples(self)
        _check_number(self, "alpha")
        _check_number(self, "labelled_share")
        if self.labelled_share > 1:
            raise InputError(f"labelled_share is {self.labelled_share}: expected at most 1")

    def __call__(
        self,
        params: Params,
        key: AnyKey,
        images: Images,
        labels: Labels = None,
        *,
        beta: Scalar = 1.0,
        axis_name: str | None = None,
    ) -> tuple[Loss, Elbo]:
        """Compute the loss and the ELBO's terms, as in `Objective`; labels None: all are -1.

        Raises:
          InputError: a model without a classifier.
        """
        images = as_array("images", images)
        log_q, classes, batch = log_classes(params, images), params.config.num_classes, len(images)
        keys, every = example_keys(key, batch), jnp.arange(classes)
        drawn = draw(
            params,
            jnp.tile(keys, classes),
            jnp.tile(images, (classes, *[1] * (images.ndim - 1))),
            jnp.repeat(every, batch),
            self.num_samples,
        )
        _, *terms = drawn.elbo()
        penalty = jnp.broadcast_to(drawn.penalty, (classes * batch,))
        log_likelihood, kl, penalty = (x.reshape(classes, batch).T for x in (*terms, penalty))
        y = jnp.full(batch, -1) if labels is None else jnp.asarray(native(labels))
        known, of_label = y >= 0, y[:, None] == every
        # What the bounds are averaged over: the label, or q(y|x).
        weights = jnp.where(known[:, None], of_label, jnp.exp(log_q))
        entropy = jnp.where(known, 0, -jnp.sum(jnp.exp(log_q) * log_q, axis=1))
        of_class = math.log(classes) - entropy
        log_likelihood, kl, penalty = (
            jnp.sum(weights * x, axis=1) for x in (log_likelihood, kl, penalty)
        )
        log_q_y = jnp.sum(jnp.where(of_label, log_q, 0), axis=1)
        loss = -(log_likelihood - beta * kl - of_class) - self.alpha * log_q_y + penalty
        kl = kl + of_class
        return loss, Elbo(log_likelihood - kl, log_likelihood, kl)


@dataclass(frozen=True)
class PriorFit:
    """The cross-entropy of the aggregate posterior and the prior, which fits the prior alone.

        loss = -log p(z),    z ~ q(z|x)

    It has no gradient by the encoder's samples and does not evaluate the decoder. The ELBO among
    the terms is log_likelihood - KL, with a constant for E_q(z|x)[log p(x|z)], which does not
    depend on the prior. Images without a label, -1, have the most probable class.

    Attributes:
      num_samples: number of posterior samples, over which the loss is averaged.
      log_likelihood: mean of E_q(z|x)[log p(x|z)] over the images, in nats per image.

    References:
      Dai and Wipf (2019), Diagnosing and Enhancing VAE Models, section 4: the second stage.
    """

    num_samples: int = 1
    log_likelihood: float = 0.0
    across_batch = False
    unlabelled = True

    def __post_init__(self) -> None:
        _check_samples(self)
        if not is_number(self.log_likelihood):
            raise InputError(
                f"log_likelihood is {shown(self.log_likelihood)}: expected a number of nats"
            )
        object.__setattr__(self, "log_likelihood", float(self.log_likelihood))

    def __call__(
        self,
        params: Params,
        key: AnyKey,
        images: Images,
        labels: Labels = None,
        *,
        beta: Scalar = 1.0,
        axis_name: str | None = None,
    ) -> tuple[Loss, Elbo]:
        """Compute the loss and the ELBO's terms, as in `Objective`; beta has no effect."""
        posterior = encode(params, images, known_classes(params, images, labels))
        keys = sample_keys(example_keys(key, len(posterior.mean)), self.num_samples)
        z, log_posterior = lax.stop_gradient(samples(posterior, keys))
        log_prior = prior(params).log_prob(z)
        kl = jnp.mean(log_posterior - log_prior, axis=0)
        log_likelihood = jnp.full_like(kl, self.log_likelihood)
        return -jnp.mean(log_prior, axis=0), Elbo(log_likelihood - kl, log_likelihood, kl)


OBJECTIVES: Registry[Any] = Registry(
    "objective",
    {
        "elbo": ELBO,
        "stl": StickingTheLanding,
        "iwae": ImportanceWeighted,
        "miwae": MissingImportanceWeighted,
        "dreg": DoublyReparameterized,
        "beta_tc": BetaTC,
        "mmd": MaximumMeanDiscrepancy,
        "m2": SemiSupervised,
        "prior": PriorFit,
    },
)


def parse_objective(value: Any) -> Any:
    """Return the objective of a name or specification.

    Args:
      value: a name, a name with options, an objective or a function.

    Returns:
      The objective; an object or a function is returned unchanged.

    Raises:
      InputError: an unknown name or option, or something that cannot be called.
    """
    if not isinstance(value, str) and not callable(value):
        raise InputError(f"objective is {shown(value)}: expected a name or a function")
    return OBJECTIVES.parse(value, protocol=("__call__",))


@dataclass(frozen=True)
class NoWarmup:
    """A constant beta."""

    def __call__(self, beta: Scalar, step: Int[Array, ""]) -> Scalar:
        """Return beta."""
        return beta


@dataclass(frozen=True)
class Linear:
    """A beta that grows linearly over the first W steps.

        beta min(1, step / W)

    Attributes:
      steps: W.

    References:
      Bowman et al. (2016), Generating Sentences from a Continuous Space, section 3.1.
    """

    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", whole_number("steps", self.steps))

    def __call__(self, beta: Scalar, step: Int[Array, ""]) -> Scalar:
        """Return beta at a step."""
        return beta * jnp.minimum(1, step / self.steps)


@dataclass(frozen=True)
class Cyclical(Linear):
    """A beta that grows linearly over W steps, is constant for W, and starts again from 0.

        beta min(1, (step mod 2 W) / W)

    Attributes:
      steps: W.

    References:
      Fu et al. (2019), Cyclical Annealing Schedule, equation 6, with half of every cycle for
      the growth.
    """

    def __call__(self, beta: Scalar, step: Int[Array, ""]) -> Scalar:
        """Return beta at a step."""
        return super().__call__(beta, step % (2 * self.steps))


WARMUPS: Registry[Any] = Registry(
    "warmup", {"none": NoWarmup, "linear": Linear, "cyclical": Cyclical}
)


def example_keys(key: AnyKey, batch: int, first: Int[Array, ""] | int = 0) -> Key[Array, " batch"]:
    """Derive a Threefry key for each example from its index.

    The noise of an example then does not depend on the device or the block that computes it, for
    keys of every implementation ("rbg" too), which are converted to Threefry.

    Args:
      key: one PRNG key; [batch] keys are returned as Threefry keys.
      batch: number of examples.
      first: index of the first example.

    Returns:
      The keys.

    Raises:
      InputError: another number of keys than one or `batch`.
    """
    key = as_key(key, several=True)
    if key.shape == (batch,):
        return key
    if key.shape:
        raise InputError(
            f"key has shape {key.shape}: expected one key, or {batch}, one for each image"
        )
    return jax.vmap(partial(jax.random.fold_in, key))(first + jnp.arange(batch))


def with_log_prob(posterior: Any) -> Any:
    """Return the posterior if it can evaluate its density at any z.

    Raises:
      InputError: the posterior has no `log_prob`, such as that of a flow.
    """
    if not hasattr(posterior, "log_prob"):
        raise InputError(
            "this objective needs the density q(z|x) at any z: expected the posterior 'gaussian'; "
            "train a flow by 'elbo', 'iwae' or 'mmd', and codes by 'elbo'"
        )
    return posterior


def _log_mean_exp(log_weights: Float[Array, "samples batch"]) -> Loss:
    return jax.nn.logsumexp(log_weights, axis=0) - math.log(len(log_weights))


def _resampled(
    keys: Key[Array, " batch"], log_weights: Float[Array, "samples batch"], m: int
) -> Int[Array, "m batch"]:
    """Draw m indices of samples in proportion to their weights, by systematic resampling."""
    offsets = jax.vmap(jax.random.uniform)(keys)
    positions = (jnp.arange(m)[:, None] + offsets) / m
    cumulative = jnp.cumsum(jax.nn.softmax(log_weights, axis=0), axis=0)
    index = jnp.sum(cumulative[:, None] <= positions, axis=0)
    return jnp.minimum(index, len(log_weights) - 1)  # the sum may round to less than 1


def _check_samples(objective: Any) -> None:
    number = whole_number("num_samples", objective.num_samples)
    object.__setattr__(objective, "num_samples", number)


def _check_number(objective: Any, name: str) -> None:
    value = getattr(objective, name)
    if not is_number(value) or not 0 <= value < 1e6:
        raise InputError(f"{name} is {shown(value)}: expected a number of at least 0, below 1e+06")
    object.__setattr__(objective, name, float(value))


def _mean(x: Float[Array, "batch latent"], axis_name: str | None) -> Float[Array, " latent"]:
    """Compute the mean over the whole batch."""
    mean = jnp.mean(x, axis=0)
    return lax.pmean(mean, axis_name) if axis_name else mean


def _gathered(tree: Any, axis_name: str | None) -> Any:
    """Gather the rows of all devices over which the batch is split, in order."""
    return lax.all_gather(tree, axis_name, tiled=True) if axis_name else tree


def _first(axis_name: str | None, batch: int) -> Int[Array, ""] | int:
    """Return the index, in the whole batch, of this device's first image."""
    return lax.axis_index(axis_name) * batch if axis_name else 0
