"""The VAE as pure functions of its parameters."""

from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvae.config import ModelConfig, whole_number
from jaxvae.devices.convolution import block_size, in_blocks
from jaxvae.errors import InputError
from jaxvae.models.flows import FlowPosterior, InverseAutoregressiveFlow
from jaxvae.models.likelihoods import (
    LIKELIHOODS,
    Gaussian,
    Likelihood,
    at_least_float32,
    scale_images,
)
from jaxvae.models.networks import NETWORKS
from jaxvae.models.priors import (
    Mixture,
    StandardNormal,
    init_mixture,
    init_pseudo_inputs,
    pseudo_images,
)
from jaxvae.validation import as_array, as_key, expect_config, expect_real, jit

Posterior = Gaussian | FlowPosterior
Prior = StandardNormal | Mixture


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Params:
    """A VAE: a pytree whose leaves are its weights and whose static part is its architecture.

    encoder, decoder: the Flax modules' "params" collections.
    config: the architecture they belong to.
    likelihood, prior, flow: what those parts of the model have learned, where they learn.
    """

    encoder: Any
    decoder: Any
    config: ModelConfig = field(metadata={"static": True})
    likelihood: Any = field(default_factory=dict)
    prior: Any = field(default_factory=dict)
    flow: Any = field(default_factory=dict)


@jit(static_argnames="config")
def init(key: jax.Array, config: ModelConfig) -> Params:
    """Fresh parameters: Glorot uniform kernels, zero biases, where a network says nothing else.

    Raises InputError if modules of one's own give other shapes than the model has.

    Glorot and Bengio (2010), equation 16, as Keras initialises.
    """
    expect_config("config", config, ModelConfig)
    key = as_key(key)
    encoder_key, decoder_key = jax.random.split(key)
    prior_key, flow_key = jax.random.split(jax.random.fold_in(key, 2))
    images = jnp.zeros((1, *config.image_shape))
    latents = jnp.zeros((1, config.latent_dim))
    classes = (jnp.zeros((1, config.num_classes)),) if config.num_classes else ()
    encoder, decoder = modules(config)
    encoded, encoder_params = _init("encoder", encoder, encoder_key, images, *classes)
    _expect_shapes("encoder", encoded, (latents.shape,) * 2)
    outputs, decoder_params = _init("decoder", decoder, decoder_key, latents, *classes)
    _expect_shapes("decoder", (outputs,), ((1, *_outputs_shape(config)),))
    learned: dict[str, Any] = {
        "likelihood": LIKELIHOODS[config.likelihood].init(config.image_shape[2])
    }
    if config.prior == "mixture":
        learned["prior"] = init_mixture(prior_key, config.prior_components, config.latent_dim)
    if config.prior == "vamp":
        shape = config.image_shape
        learned["prior"] = init_pseudo_inputs(prior_key, config.prior_components, shape)
    if config.posterior == "iaf":
        learned["flow"] = _flow(config).init(flow_key, latents, _context(encoded))["params"]
    return Params(encoder_params, decoder_params, config, **learned)


def modules(config: ModelConfig) -> tuple[nn.Module, nn.Module]:
    """The Flax modules of an architecture: encoder and decoder."""
    if not isinstance(config.network, str):
        return config.network
    # None, not float32: parameters made wider are computed with as they are.
    dtype = jnp.bfloat16 if config.compute_dtype == "bfloat16" else None
    encoder, decoder = NETWORKS[config.network]
    own = {} if config.width is None else {"width": config.width}
    return encoder(config.latent_dim, dtype, **own), decoder(_outputs_shape(config), dtype, **own)


@jit()
def encode(params: Params, images: jax.Array, labels: jax.Array | None = None) -> Posterior:
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
    encoded = _encoded(params, scale_images(images), *_one_hot(params, labels, images.shape[0]))
    mean, log_var = encoded[:2]
    if params.config.posterior == "gaussian":
        return Gaussian(mean, log_var)
    return FlowPosterior(mean, log_var, _context(encoded), params.flow, _flow(params.config))


@jit()
def decode(params: Params, z: jax.Array, labels: jax.Array | None = None) -> Likelihood:
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
    _, decoder = modules(params.config)
    inputs = (z, *_one_hot(params, labels, z.shape[0]))
    outputs = in_blocks(
        lambda block: decoder.apply({"params": params.decoder}, *block),
        inputs,
        block_size(z.shape[0], params.decoder),
    )
    # Networks may compute in bfloat16; distributions do not.
    return LIKELIHOODS[params.config.likelihood].from_outputs(
        *jax.tree.map(at_least_float32, (outputs, params.likelihood))
    )


def prior(params: Params) -> Prior:
    """The prior p(z): `.log_prob(z)` of [..., latent], in nats, and `.sample(key, n)`.

    "vamp" is the mixture of the posteriors of learned pseudo-inputs u_k, in equal parts; with a
    flow, of the Gaussians that it starts from:

        p(z) = 1/K sum_k q(z|u_k)

    Tomczak and Welling (2018), VAE with a VampPrior, equation 9.
    """
    config = params.config
    if config.prior == "standard_normal":
        return StandardNormal(config.latent_dim)
    if config.prior == "mixture":
        return Mixture(**jax.tree.map(at_least_float32, params.prior))
    mean, log_var = _encoded(params, pseudo_images(params.prior))[:2]
    return Mixture(jnp.zeros(len(mean), mean.dtype), mean, log_var)


@jit()
def reconstruct(params: Params, images: jax.Array, labels: jax.Array | None = None) -> jax.Array:
    """The decoder's mean at the posterior's centre: float32 [batch, height, width, channels].

    The centre of a Gaussian is its mean; of a flow, where it takes the mean.

    Args:
      images: [batch, height, width, channels], float32 in [0, 1] or uint8.
      labels: [batch], the images' classes, where the model is conditional.
    Raises:
      InputError: as of `encode`.
    """
    return decode(params, encode(params, images, labels).center, labels).mean


@jit(static_argnames="n")
def sample(params: Params, key: jax.Array, n: int, labels: jax.Array | None = None) -> jax.Array:
    """Decoder means of n draws from the prior: float32 [n, height, width, channels].

    Args:
      labels: [n], the classes to draw from a conditional model; by default all in turn.
    Raises:
      InputError: n below 1, or labels as of `encode`.
    """
    n = whole_number("n", n)
    if params.config.num_classes and labels is None:
        labels = jnp.arange(n) % params.config.num_classes
    return decode(params, prior(params).sample(as_key(key), n), labels).mean


def expected_images(params: Params, images: jax.Array) -> jax.Array:
    """Images as an array, or InputError where they are not those of the model."""
    images = as_array("images", images)
    if images.ndim != 4 or images.shape[1:] != params.config.image_shape or images.shape[0] < 1:
        expected = ", ".join(map(str, params.config.image_shape))
        raise InputError(
            f"images have shape {images.shape}: expected (batch, {expected}), batch at least 1"
        )
    return images


def _encoded(params: Params, *inputs: jax.Array) -> tuple[jax.Array, ...]:
    encoder, _ = modules(params.config)
    encoded = in_blocks(
        lambda block: tuple(encoder.apply({"params": params.encoder}, *block)),
        inputs,
        block_size(inputs[0].shape[0], params.encoder),
    )
    return jax.tree.map(at_least_float32, encoded)


def _context(encoded: tuple[jax.Array, ...]) -> jax.Array:
    """What the flow may look at: the encoder's third result, or else its first two."""
    return encoded[2] if len(encoded) > 2 else jnp.concatenate(encoded, axis=1)


def _flow(config: ModelConfig) -> InverseAutoregressiveFlow:
    return InverseAutoregressiveFlow(config.flow_steps)


def _outputs_shape(config: ModelConfig) -> tuple[int, int, int]:
    height, width, channels = config.image_shape
    return height, width, channels * LIKELIHOODS[config.likelihood].outputs_per_channel


def expected_labels(params: Params, labels: jax.Array | None, batch: int) -> jax.Array | None:
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


def _one_hot(params: Params, labels: jax.Array | None, batch: int) -> tuple[jax.Array, ...]:
    """The classes as the networks take them, [batch, classes]; nothing without classes."""
    labels = expected_labels(params, labels, batch)
    return () if labels is None else (jax.nn.one_hot(labels, params.config.num_classes),)


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
