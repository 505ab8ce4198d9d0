"""The VAE, as pure functions of its parameters."""

import inspect
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Integer, Key, Num

from jaxvae.devices.convolution import block_size, in_blocks
from jaxvae.errors import InputError, shown
from jaxvae.models import layers
from jaxvae.models.protocols import Likelihood, Model, Posterior, Prior
from jaxvae.validation import (
    AnyKey,
    as_array,
    as_floats,
    as_key,
    at_least_float32,
    expect_real,
    is_complete,
    is_number,
    jit,
    support_of,
    whole_number,
)

if TYPE_CHECKING:
    from jaxvae.models.config import ModelConfig

Images = Num[ArrayLike, " batch *shape"]
# Classes, or covariates.
Labels = Integer[ArrayLike, " batch"] | Num[ArrayLike, "batch covariates"] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Params:
    """The parameters of a VAE: a pytree that carries its architecture as static metadata.

    Attributes:
      encoder: the encoder's "params" collection; that of the classifier q(y|x), if the model has
        one, is in it under "classifier".
      decoder: the decoder's "params" collection.
      config: the architecture (static).
      likelihood: parameters of the likelihood, such as a learned scale; may be empty.
      prior: parameters of the prior; may be empty.
      posterior: parameters of the posterior other than the encoder's; may be empty.
    """

    encoder: Any
    decoder: Any
    config: "ModelConfig" = field(metadata={"static": True})
    likelihood: Any = field(default_factory=dict)
    prior: Any = field(default_factory=dict)
    posterior: Any = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return the number of parameters and the configuration; the arrays would fill pages."""
        count = sum(math.prod(getattr(leaf, "shape", ())) for leaf in jax.tree.leaves(self))
        return f"Params({count:,} parameters, config={self.config!r})"

    def _repr_html_(self) -> str:
        """Return the layer table and the text of `repr`, for notebooks."""
        # The shapes are those of the configuration: the arrays may be stacked or deleted.
        shapes = jax.eval_shape(init, jax.random.key(0), self.config)
        return layers.as_html(layers.tables(shapes), repr(self))

    @property
    def model(self) -> Model:
        """The model to which the parameters belong."""
        return model_of(self.config)


@dataclass(frozen=True)
class VAE:
    """A VAE with one vector of latents, composed of the components of its configuration.

    Attributes:
      config: the components.

    References:
      Kingma and Welling (2014), Auto-Encoding Variational Bayes.
    """

    config: "ModelConfig"

    def modules(self) -> tuple[nn.Module, nn.Module]:
        """Return the Flax modules: encoder and decoder."""
        config = self.config
        # None instead of float32: float64 parameters are then computed with in float64.
        dtype = jnp.bfloat16 if config.compute_dtype == "bfloat16" else None
        return config.network.modules(config.latent_dim, config.outputs_shape, dtype)

    def classifier(self) -> nn.Module:
        """Return the Flax module of q(y|x), whose first result is the logits."""
        config = self.config
        module: nn.Module = config.network.modules(config.num_classes, config.outputs_shape, None)[
            0
        ]
        return module

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Return the initial parameters: the fields of `Params` except `config`."""
        config = self.config
        encoder_key, decoder_key = jax.random.split(key)
        prior_key, posterior_key = jax.random.split(jax.random.fold_in(key, 2))
        # float32, as a module's parameters may take the dtype of its inputs.
        images, latents, condition = (
            jnp.zeros((1, *shape), jnp.float32)
            for shape in (config.image_shape, (config.latent_dim,), (config.condition_dim,))
        )
        of_encoder, of_decoder = (
            (condition,) if config.conditional(part) else () for part in ("encoder", "decoder")
        )
        encoder, decoder = self.modules()
        encoded, encoder_params = _init("encoder", encoder, encoder_key, images, *of_encoder)
        _expect_shapes("encoder", encoded, (latents.shape,) * 2)
        outputs, decoder_params = _init("decoder", decoder, decoder_key, latents, *of_decoder)
        _expect_shapes("decoder", (outputs,), ((1, *config.outputs_shape),))
        if config.classifier:
            classifier_key = jax.random.fold_in(key, 3)
            _, learned = _init("classifier", self.classifier(), classifier_key, images)
            encoder_params = {**encoder_params, "classifier": learned}
        return {
            "encoder": encoder_params,
            "decoder": decoder_params,
            "likelihood": config.likelihood.init(config.image_shape[-1]),
            "prior": config.prior.init(prior_key, config),
            "posterior": config.posterior.init(posterior_key, encoded),
        }

    def prior(self, params: Params) -> Prior:
        """Return p(z)."""
        return self.config.prior.bind(params.prior, params)

    def posterior(
        self,
        params: Params,
        images: Float[Array, " batch *shape"],
        labels: Num[Array, " batch *covariates"] | None = None,
    ) -> Posterior:
        """Return q(z|x) of images in [0, 1] and, if the model is conditional, their labels.

        Other examples than images are taken as they are.
        """
        return self.config.posterior.bind(params.posterior, self.encoded(params, images, labels))

    def likelihood(
        self,
        params: Params,
        z: Num[Array, "batch latent"],
        labels: Num[Array, " batch *covariates"] | None = None,
    ) -> Likelihood:
        """Return p(x|z) of latents and, if the model is conditional, their labels."""
        _, decoder = self.modules()
        outputs = in_blocks(
            lambda block: decoder.apply({"params": params.decoder}, *block),
            (z, *self.config.condition("decoder", labels)),
            block_size(z.shape[0], params.decoder),
        )
        # Networks may compute in bfloat16; distributions never do.
        return self.config.likelihood.from_outputs(
            *jax.tree.map(at_least_float32, (outputs, params.likelihood))
        )

    def log_classes(
        self, params: Params, images: Float[Array, " batch *shape"]
    ) -> Float[Array, "batch classes"]:
        """Return log q(y|x) of images in [0, 1], in nats."""
        weights = params.encoder["classifier"]
        logits, *_ = in_blocks(
            lambda block: tuple(self.classifier().apply({"params": weights}, *block)),
            (images,),
            block_size(images.shape[0], weights),
        )
        return jax.nn.log_softmax(at_least_float32(logits))

    def encoded(
        self,
        params: Params,
        images: Float[Array, " batch *shape"],
        labels: Num[Array, " batch *covariates"] | None = None,
    ) -> tuple[Array, ...]:
        """Apply the encoder to images in [0, 1]: mean, log_var and, if it has them, features."""
        encoder, _ = self.modules()
        encoded = in_blocks(
            lambda block: tuple(encoder.apply({"params": params.encoder}, *block)),
            (images, *self.config.condition("encoder", labels)),
            block_size(images.shape[0], params.encoder),
        )
        return jax.tree.map(at_least_float32, encoded)


def model_of(config: "ModelConfig") -> Model:
    """Return the model of a configuration: a `VAE`, unless its network has its own `model`."""
    return getattr(config.network, "model", VAE)(config)


@jit(static_argnames="config")
def init(key: AnyKey, config: "ModelConfig") -> Params:
    """Initialise the parameters of a model.

    By default kernels are Glorot uniform, as in Keras, and biases zero. Parameters are float32,
    whether 64-bit types are enabled or not, except in a user's modules with another `param_dtype`.

    Args:
      key: PRNG key.
      config: the architecture.

    Returns:
      The parameters.

    Raises:
      InputError: a user's modules return other shapes than the model's.

    References:
      Glorot and Bengio (2010), Understanding the difficulty of training deep feedforward neural
      networks, equation 16.
    """
    return Params(config=config, **model_of(config).init(as_key(key)))


@jit()
def encode(params: Params, images: Images, labels: Labels = None) -> Posterior:
    """Compute the posterior q(z|x).

    Args:
      params: the model.
      images: float32 in [0, 1], or uint8.
      labels: classes or covariates of the images, if the model is conditional.

    Returns:
      The posterior, with `.mean` and `.log_var` of shape [batch, latent]: by default a `Gaussian`.
      For an inverse autoregressive flow it is a `FlowPosterior`, whose mean and log_var are those
      of the Gaussian to which the flow is applied.

    Raises:
      InputError: images of another shape than the model's; labels for an unconditional model, or
        none for a conditional one.
    """
    return encode_observed(params, images, labels)


@jit(missing=True)
def encode_observed(params: Params, images: Images, labels: Labels = None) -> Posterior:
    """Compute q(z|x) as `encode`; the encoder sees zeros in place of missing entries, NaN."""
    x = _observed(params, images)
    labels = expected_labels(params, labels, x.shape[0], "encoder")
    return params.model.posterior(params, x, labels)


def _observed(params: Params, images: Images) -> Float[Array, " batch *shape"]:
    """Return images as the encoder sees them: floats, with zeros in place of NaN."""
    images = expected_images(params, images)
    x = as_floats(support_of(params), images)
    return x if is_complete(images) else jnp.where(jnp.isnan(x), 0, x)


@jit()
def classify(params: Params, images: Images) -> Float[Array, "batch classes"]:
    """Compute the probabilities q(y|x) of the classes.

    Args:
      params: a model with a classifier, `ModelConfig(num_classes=..., classifier=True)`.
      images: float32 in [0, 1], or uint8.

    Returns:
      The probabilities, which sum to 1.

    Raises:
      InputError: a model without a classifier; images of another shape than the model's.

    References:
      Kingma, Rezende, Mohamed and Welling (2014), Semi-supervised Learning with Deep Generative
      Models, equation 4.
    """
    return jnp.exp(log_classes(params, images))


def log_classes(params: Params, images: Images) -> Float[Array, "batch classes"]:
    """Compute log q(y|x), in nats: see `classify`."""
    if not params.config.classifier:
        raise InputError(
            "the model has no classifier: expected ModelConfig(num_classes=..., classifier=True)"
        )
    return params.model.log_classes(  # type: ignore[attr-defined]
        params, _observed(params, images)
    )


def known_classes(params: Params, images: Images, labels: Labels) -> Any:
    """Return labels with the most probable class under q(y|x) in the place of -1, no label."""
    if labels is None or not params.config.classifier:
        return labels
    found = jnp.argmax(log_classes(params, images), axis=-1)
    return jnp.where(jnp.asarray(labels) < 0, found, labels)


def labels_of_bound(params: Params, labels: Labels, batch: int) -> Any:
    """Return the labels given which log p(x) is bounded: None if the classes are summed over."""
    return None if params.config.classifier else expected_labels(params, labels, batch)


@jit()
def decode(params: Params, z: Num[ArrayLike, "batch latent"], labels: Labels = None) -> Likelihood:
    """Compute the likelihood p(x|z).

    Args:
      params: the model.
      z: latents.
      labels: classes or covariates of the images, if the model is conditional.

    Returns:
      The likelihood of pixels [batch, height, width, channels]: by default `Bernoulli`.

    Raises:
      InputError: latents of another shape than the model's; labels as in `encode`.
    """
    z = as_array("latents", z)
    expect_real("latents", z)
    if z.ndim != 2 or z.shape[1] != params.config.latent_dim or z.shape[0] < 1:
        raise InputError(
            f"latents have shape {z.shape}: expected (batch, {params.config.latent_dim}), "
            "batch at least 1"
        )
    labels = expected_labels(params, labels, z.shape[0], "decoder")
    return params.model.likelihood(params, z, labels)


def prior(params: Params) -> Prior:
    """Return the prior p(z), with `.log_prob(z)`, in nats, and `.sample(key, n)`."""
    return params.model.prior(params)


@jit()
def reconstruct(
    params: Params, images: Images, labels: Labels = None
) -> Float[Array, " batch *shape"]:
    """Decode the center of the posterior of each image.

    The center of a Gaussian is its mean; that of a flow posterior is the flow's output for the
    mean.

    Args:
      params: the model.
      images: float32 in [0, 1], or uint8.
      labels: classes or covariates of the images, if the model is conditional.

    Returns:
      Means of p(x|z), float32.

    Raises:
      InputError: as in `encode`.
    """
    return reconstruct_observed(params, images, labels)


@jit(missing=True)
def reconstruct_observed(
    params: Params, images: Images, labels: Labels = None
) -> Float[Array, " batch *shape"]:
    """Reconstruct images as `reconstruct`; the encoder sees zeros in place of missing entries."""
    p_x = decode(params, encode_observed(params, images, labels).center, labels)
    return with_size_of(images, p_x).mean


def with_size_of(images: Images, likelihood: Any) -> Likelihood:
    """Return a likelihood of counts at the library size of examples; any other unchanged."""
    sized = hasattr(likelihood, "with_size_of")
    return likelihood.with_size_of(images) if sized else likelihood


@jit(static_argnames=("n", "temperature"))
def sample(
    params: Params,
    key: AnyKey,
    n: int,
    labels: Labels = None,
    *,
    temperature: float | tuple[float, ...] = 1.0,
) -> Float[Array, " n *shape"]:
    """Draw n latents from the prior and decode them.

    Args:
      params: the model.
      key: PRNG key.
      n: number of images.
      labels: their classes or covariates, if the decoder takes them; None: all classes in turn.
      temperature: factor of the standard deviations of the prior's Gaussians. A ladder also takes
        one number for each group, from the top down: with 0 a group is at its mean.

    Returns:
      Means of p(x|z), float32.

    Raises:
      InputError: n below 1; a temperature below 0, or one that the prior has no use for; labels as
        in `encode`.
    """
    n = whole_number("n", n)
    each = temperature if isinstance(temperature, tuple) else (temperature,)
    if not all(is_number(t) and 0 <= t < math.inf for t in each):
        raise InputError(f"temperature is {shown(temperature)}: expected a number of at least 0")
    if isinstance(temperature, tuple) and not hasattr(params.model, "groups"):
        raise InputError(
            f"temperature has {len(temperature)} numbers, but the model has no groups of latents: "
            "expected one number, or the network 'ladder'"
        )
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


def expected_images(params: Params, images: Images) -> Num[Array, " batch *shape"]:
    """Convert images to an array, or raise InputError if their shape is not the model's."""
    images = as_array("images", images)
    shape = params.config.image_shape
    if images.ndim != 1 + len(shape) or images.shape[1:] != shape or images.shape[0] < 1:
        expected = ", ".join(map(str, shape))
        raise InputError(
            f"images have shape {images.shape}: expected (batch, {expected}), batch at least 1"
        )
    return images


def expected_labels(
    params: Params, labels: Labels, batch: Any, part: str | None = None
) -> Num[Array, " batch *covariates"] | None:
    """Convert labels to an array, or raise InputError if the model does not take them.

    Args:
      params: the model.
      labels: classes, or covariates, or None.
      batch: expected number of labels; symbolic while a model is exported.
      part: "encoder" or "decoder", which needs no labels if it does not take them; None: both.

    Returns:
      The labels; None for an unconditional model.

    Raises:
      InputError: labels for an unconditional model, none for a conditional one, or labels of
        another shape or type.
    """
    config = params.config
    classes, covariates = config.num_classes, config.num_covariates
    needed = config.condition_dim > 0 if part is None else config.conditional(part)
    if labels is None and not needed:
        return None
    shape: tuple[Any, ...] = (batch,)
    of = f"classes from 0 to {classes - 1}"
    if covariates:
        shape, of = (batch, covariates), "the covariates of each example"
    if labels is None:
        field = "num_covariates" if covariates else "num_classes"
        raise InputError(
            f"labels are missing: expected shape {shape}, {of} ({field}={config.condition_dim})"
        )
    if not config.condition_dim:
        raise InputError(
            "labels were given, but the model is unconditional (num_classes=0): leave them out"
        )
    labels = as_array("labels", labels)
    if labels.shape != shape:
        raise InputError(f"labels have shape {labels.shape}: expected {shape}, {of}")
    if covariates:
        expect_real("labels", labels)
        return labels if jnp.issubdtype(labels.dtype, jnp.floating) else labels.astype(jnp.float32)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(f"labels are of type {labels.dtype}: expected whole numbers")
    return labels


def _init(which: str, module: nn.Module, key: Key[Array, ""], *inputs: Array) -> tuple[Any, Any]:
    """Initialise a module; return its results for the inputs, and its parameters."""
    results, variables = module.init_with_output(key, *inputs)
    if others := sorted(set(variables) - {"params"}):
        raise InputError(
            f"the {which} has variables {others[0]!r}: expected 'params' only, so use layer or "
            "group norm instead of batch norm"
        )
    return results, variables.get("params", {})


def _expect_shapes(which: str, results: Any, expected: tuple[tuple[int, ...], ...]) -> None:
    """Raise InputError unless the first results have these shapes."""
    results = results if isinstance(results, tuple | list) else (results,)
    shapes = tuple(getattr(x, "shape", type(x).__name__) for x in results)
    if shapes[: len(expected)] != expected:
        raise InputError(
            f"the {which} returns {', '.join(map(str, shapes))} for one image: "
            f"expected {', '.join(map(str, expected))}"
        )
