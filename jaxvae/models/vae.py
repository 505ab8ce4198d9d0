"""The VAE as pure functions of its parameters."""

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike

from jaxvae.devices.convolution import block_size, in_blocks
from jaxvae.errors import InputError, shown
from jaxvae.models.config import ModelConfig
from jaxvae.models.likelihoods import at_least_float32, scale_images
from jaxvae.models.protocols import Likelihood, Model, Posterior, Prior
from jaxvae.validation import (
    as_array,
    as_key,
    expect_config,
    expect_real,
    is_number,
    jit,
    whole_number,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Params:
    """A VAE: a pytree whose leaves are its weights and whose static part is its architecture.

    Attributes:
      encoder: the encoder's "params" collection.
      decoder: the decoder's "params" collection.
      config: the architecture they belong to (static).
      likelihood: what the likelihood has learned, where it learns.
      prior: what the prior has learned, where it learns.
      posterior: what the posterior has learned besides the encoder, where it learns.
    """

    encoder: Any
    decoder: Any
    config: ModelConfig = field(metadata={"static": True})
    likelihood: Any = field(default_factory=dict)
    prior: Any = field(default_factory=dict)
    posterior: Any = field(default_factory=dict)

    @property
    def model(self) -> Model:
        """The model that these are the parameters of."""
        return model_of(self.config)


@dataclass(frozen=True)
class VAE:
    """A VAE with one vector of latents, put together from the components of its configuration.

    Attributes:
      config: the components.

    References:
      Kingma and Welling (2014), Auto-Encoding Variational Bayes.
    """

    config: ModelConfig

    def modules(self) -> tuple[nn.Module, nn.Module]:
        """Return the Flax modules: encoder and decoder."""
        config = self.config
        # None, not float32: parameters made wider are computed with as they are.
        dtype = jnp.bfloat16 if config.compute_dtype == "bfloat16" else None
        return config.network.modules(config.latent_dim, self._outputs_shape(), dtype)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Return fresh parameters: the fields of `Params`."""
        config = self.config
        encoder_key, decoder_key = jax.random.split(key)
        prior_key, posterior_key = jax.random.split(jax.random.fold_in(key, 2))
        # float32, as modules may take their parameters' type from their inputs'.
        images, latents, one_hot = (
            jnp.zeros((1, *shape), jnp.float32)
            for shape in (config.image_shape, (config.latent_dim,), (config.num_classes,))
        )
        classes = (one_hot,) if config.num_classes else ()
        encoder, decoder = self.modules()
        encoded, encoder_params = _init("encoder", encoder, encoder_key, images, *classes)
        _expect_shapes("encoder", encoded, (latents.shape,) * 2)
        outputs, decoder_params = _init("decoder", decoder, decoder_key, latents, *classes)
        _expect_shapes("decoder", (outputs,), ((1, *self._outputs_shape()),))
        return {
            "encoder": encoder_params,
            "decoder": decoder_params,
            "likelihood": config.likelihood.init(config.image_shape[2]),
            "prior": config.prior.init(prior_key, config),
            "posterior": config.posterior.init(posterior_key, encoded),
        }

    def prior(self, params: Params) -> Prior:
        """Return p(z)."""
        return self.config.prior.bind(params.prior, params)

    def posterior(
        self, params: Params, images: jax.Array, labels: jax.Array | None = None
    ) -> Posterior:
        """Return q(z|x) of images, floats in [0, 1], and of their classes [batch]."""
        return self.config.posterior.bind(params.posterior, self.encoded(params, images, labels))

    def likelihood(
        self, params: Params, z: jax.Array, labels: jax.Array | None = None
    ) -> Likelihood:
        """Return p(x|z) of latents [batch, latent], and of their classes [batch]."""
        _, decoder = self.modules()
        outputs = in_blocks(
            lambda block: decoder.apply({"params": params.decoder}, *block),
            (z, *self._one_hot(labels)),
            block_size(z.shape[0], params.decoder),
        )
        # Networks may compute in bfloat16; distributions do not.
        return self.config.likelihood.from_outputs(
            *jax.tree.map(at_least_float32, (outputs, params.likelihood))
        )

    def encoded(
        self, params: Params, images: jax.Array, labels: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        """Return what the encoder makes of images, floats in [0, 1]: mean, log_var and more."""
        encoder, _ = self.modules()
        encoded = in_blocks(
            lambda block: tuple(encoder.apply({"params": params.encoder}, *block)),
            (images, *self._one_hot(labels)),
            block_size(images.shape[0], params.encoder),
        )
        return jax.tree.map(at_least_float32, encoded)

    def _outputs_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.config.image_shape
        return height, width, channels * self.config.likelihood.outputs_per_channel

    def _one_hot(self, labels: jax.Array | None) -> tuple[jax.Array, ...]:
        """Return the classes as the networks take them, [batch, classes]; nothing without any."""
        if labels is None:
            return ()
        return (jax.nn.one_hot(labels, self.config.num_classes, dtype=jnp.float32),)


def model_of(config: ModelConfig) -> Model:
    """Return the model that a configuration describes: a `VAE`, unless its network says another."""
    return getattr(config.network, "model", VAE)(config)


@jit(static_argnames="config")
def init(key: jax.Array, config: ModelConfig) -> Params:
    """Draw fresh parameters: Glorot uniform kernels, zero biases, unless a network says otherwise.

    They are float32, whether 64-bit types are enabled or not, unless modules of one's own ask for
    others by their `param_dtype`.

    Args:
      key: PRNG key.
      config: the architecture.

    Returns:
      The parameters, with `.encoder`, `.decoder` and `.config`.

    Raises:
      InputError: modules of one's own return other shapes than the model has.

    References:
      Glorot and Bengio (2010), equation 16, as Keras initialises.
    """
    expect_config("config", config, ModelConfig)
    return Params(config=config, **model_of(config).init(as_key(key)))


@jit()
def encode(params: Params, images: ArrayLike, labels: ArrayLike | None = None) -> Posterior:
    """The posterior q(z|x), whose `.mean` and `.log_var` are [batch, latent].

    Args:
      images: [batch, height, width, channels], float32 in [0, 1] or uint8.
      labels: [batch], the images' classes, where the model is conditional.
    Returns:
      A Gaussian, or for an inverse autoregressive flow a FlowPosterior, whose mean and log_var are
      those of the Gaussian that the flow starts from.
    Raises:
      InputError: images of another shape than the model's; labels where the model knows none, or
        none where it needs them.
    """
    images = expected_images(params, images)
    labels = expected_labels(params, labels, images.shape[0])
    return params.model.posterior(params, scale_images(images), labels)


@jit()
def decode(params: Params, z: ArrayLike, labels: ArrayLike | None = None) -> Likelihood:
    """The likelihood p(x|z), of pixels [batch, height, width, channels]: by default Bernoulli.

    Args:
      z: latents, [batch, latent].
      labels: [batch], the images' classes, where the model is conditional.
    Raises:
      InputError: latents of another shape than the model's; labels as of `encode`.
    """
    z = as_array("latents", z)
    expect_real("latents", z)
    if z.ndim != 2 or z.shape[1] != params.config.latent_dim or z.shape[0] < 1:
        raise InputError(
            f"latents have shape {z.shape}: expected (batch, {params.config.latent_dim}), "
            "batch at least 1"
        )
    return params.model.likelihood(params, z, expected_labels(params, labels, z.shape[0]))


def prior(params: Params) -> Prior:
    """Return the prior p(z): `.log_prob(z)` of [..., latent], in nats, and `.sample(key, n)`."""
    return params.model.prior(params)


@jit()
def reconstruct(params: Params, images: ArrayLike, labels: ArrayLike | None = None) -> jax.Array:
    """The decoder's mean at the posterior's centre: float32 [batch, height, width, channels].

    The centre of a Gaussian is its mean; of a flow, where it takes the mean.

    Args:
      images: [batch, height, width, channels], float32 in [0, 1] or uint8.
      labels: [batch], the images' classes, where the model is conditional.
    Raises:
      InputError: as of `encode`.
    """
    return decode(params, encode(params, images, labels).center, labels).mean


@jit(static_argnames=("n", "temperature"))
def sample(
    params: Params,
    key: jax.Array,
    n: int,
    labels: ArrayLike | None = None,
    *,
    temperature: float | tuple[float, ...] = 1.0,
) -> jax.Array:
    """Compute the decoder's means of n samples from the prior.

    Args:
      params: the model.
      key: PRNG key.
      n: number of samples.
      labels: [n], classes of a conditional model; by default all classes in turn.
      temperature: factor of the standard deviations of the prior's Gaussians. A ladder also takes
        one number for each group, from the top down: with 0 a group is at its mean.

    Returns:
      Images, float32 [n, height, width, channels] in [0, 1].

    Raises:
      InputError: n below 1; a temperature below 0, or one that the prior has no use for; labels as
        of `encode`.
    """
    n = whole_number("n", n)
    each = temperature if isinstance(temperature, tuple) else (temperature,)
    if not all(is_number(t) and 0 <= t < math.inf for t in each):
        raise InputError(f"temperature is {shown(temperature)}: expected a number of at least 0")
    if params.config.num_classes and labels is None:
        labels = jnp.arange(n) % params.config.num_classes
    p_z: Any = prior(params)
    key = as_key(key)
    if temperature == 1:
        return decode(params, p_z.sample(key, n), labels).mean
    if "temperature" not in inspect.signature(p_z.sample).parameters:
        raise InputError(
            f"temperature is {shown(temperature)}, but the prior has none: leave it at 1"
        )
    return decode(params, p_z.sample(key, n, temperature=temperature), labels).mean


def expected_images(params: Params, images: ArrayLike) -> jax.Array:
    """Images as an array, or InputError where they are not those of the model."""
    images = as_array("images", images)
    if images.ndim != 4 or images.shape[1:] != params.config.image_shape or images.shape[0] < 1:
        expected = ", ".join(map(str, params.config.image_shape))
        raise InputError(
            f"images have shape {images.shape}: expected (batch, {expected}), batch at least 1"
        )
    return images


def expected_labels(params: Params, labels: ArrayLike | None, batch: int) -> jax.Array | None:
    """Labels as an array, or InputError where they are not what the model takes."""
    classes = params.config.num_classes
    if labels is None and not classes:
        return None
    if labels is None:
        raise InputError(
            f"there are no labels: expected ({batch},) of them, classes from 0 to {classes - 1}, "
            f"as num_classes is {classes}"
        )
    if not classes:
        raise InputError("there are labels: expected none, as num_classes is 0")
    labels = as_array("labels", labels)
    if labels.shape != (batch,):
        raise InputError(
            f"labels have shape {labels.shape}: expected ({batch},), "
            f"classes from 0 to {classes - 1}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(f"labels are of type {labels.dtype}: expected whole numbers")
    return labels


def _init(which: str, module: nn.Module, key: jax.Array, *inputs: jax.Array) -> tuple[Any, Any]:
    """What a module gives for `inputs`, and its parameters."""
    given, variables = module.init_with_output(key, *inputs)
    if others := sorted(set(variables) - {"params"}):
        raise InputError(
            f"the {which} has variables {others[0]!r}: expected parameters alone, as its results "
            "for an image depend on nothing else (so layer or group norm, not batch norm)"
        )
    return given, variables.get("params", {})


def _expect_shapes(which: str, given: Any, expected: tuple[tuple[int, ...], ...]) -> None:
    """Raises InputError unless the first results have these shapes."""
    results = given if isinstance(given, tuple | list) else (given,)
    shapes = tuple(getattr(x, "shape", type(x).__name__) for x in results)
    if shapes[: len(expected)] != expected:
        raise InputError(
            f"the {which} gives {', '.join(map(str, shapes))} for one image: "
            f"expected {', '.join(map(str, expected))}"
        )
