"""The configuration of a model's architecture, and the registries of its components."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxvae.components import Config, Registry
from jaxvae.errors import ComponentNeeded, InputError, either, shown
from jaxvae.models.autoregressive import Autoregressive
from jaxvae.models.categorical import CategoricalFamily
from jaxvae.models.codebooks import Uniform
from jaxvae.models.counts import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from jaxvae.models.coupling import RealNVP
from jaxvae.models.flows import InverseAutoregressive
from jaxvae.models.ladder import Ladder
from jaxvae.models.likelihoods import (
    Bernoulli,
    ContinuousBernoulli,
    DiscretizedLogistic,
    GaussianFamily,
)
from jaxvae.models.logistic_mixture import LogisticMixture
from jaxvae.models.networks import MLP, Conv, Modules, Residual, Spatial
from jaxvae.models.posteriors import DiagonalGaussian
from jaxvae.models.priors import Mixture, StandardNormal, Vamp
from jaxvae.models.quantization import FiniteScalarQuantization, VectorQuantization
from jaxvae.models.tables import Categorical, MixedColumns, StudentT
from jaxvae.validation import at_least_float32, expect_bool, expect_one_of, is_image, whole_number

CONDITIONS = ("both", "encoder", "decoder")
DTYPES = ("float32", "bfloat16")

NETWORKS: Registry[Any] = Registry(
    "network",
    {"conv": Conv, "mlp": MLP, "residual": Residual, "spatial": Spatial, "ladder": Ladder},
)


class Columns(MixedColumns):
    """Columns of the kinds that `MixedColumns` names; counts have no library size."""

    kinds: ClassVar[Mapping[str, Any]] = {
        "gaussian": GaussianFamily("feature"),
        "student_t": StudentT(),
        "bernoulli": Bernoulli,
        "poisson": Poisson(size=0),
        "negative_binomial": NegativeBinomial(size=0),
        "zero_inflated_negative_binomial": ZeroInflatedNegativeBinomial(size=0),
    }


LIKELIHOODS: Registry[Any] = Registry(
    "likelihood",
    {
        "bernoulli": Bernoulli,
        "continuous_bernoulli": ContinuousBernoulli,
        "gaussian": GaussianFamily,
        "discretized_logistic": DiscretizedLogistic,
        "logistic_mixture": LogisticMixture,
        "student_t": StudentT,
        "poisson": Poisson,
        "negative_binomial": NegativeBinomial,
        "zero_inflated_negative_binomial": ZeroInflatedNegativeBinomial,
        "categorical": Categorical,
        "columns": Columns,
    },
)
PRIORS: Registry[Any] = Registry(
    "prior",
    {
        "standard_normal": StandardNormal,
        "mixture": Mixture,
        "vamp": Vamp,
        "realnvp": RealNVP,
        "uniform_codes": Uniform,
        "autoregressive": Autoregressive,
    },
)
POSTERIORS: Registry[Any] = Registry(
    "posterior",
    {
        "gaussian": DiagonalGaussian,
        "iaf": InverseAutoregressive,
        "categorical": CategoricalFamily,
        "fsq": FiniteScalarQuantization,
        "vq": VectorQuantization,
    },
)


@dataclasses.dataclass(frozen=True, repr=False)
class ModelConfig(Config):
    """The architecture of a VAE; the defaults are the notebook's.

    `network`, `likelihood`, `prior` and `posterior` take a name, a name with options
    ("mixture:components=100") or an object (`priors.Mixture(components=100)`). An object may be of
    a user's class: see `jaxvae.models.protocols`. A network may also be a pair of Flax modules
    (encoder, decoder).

    Attributes:
      image_shape: shape of one example: (height, width, channels) of an image, (features,) of a
        vector. Any shape but that of an image needs a network that takes it, such as "mlp".
      latent_dim: dimension of the latent space.
      network: encoder and decoder.
      likelihood: the likelihood p(x|z).
      prior: the prior p(z).
      posterior: the approximate posterior q(z|x).
      num_classes: number of classes of a class-conditional model; 0: unconditional.
      compute_dtype: "float32", or "bfloat16" for mixed precision: layers compute in bfloat16;
        parameters, gradients and the terms of the ELBO stay float32.
      num_covariates: number of covariates, numbers on which the model is conditional in place of a
        class; a category is one-hot columns.
      conditions: the networks that take class or covariates: "both", "encoder" or "decoder".
      classifier: whether a class-conditional model also has a classifier q(y|x), for the objective
        "m2": another encoder of the network, whose means are the logits.
    """

    image_shape: tuple[int, ...] = (28, 28, 1)
    latent_dim: int = 2
    network: Any = "conv"
    likelihood: Any = "bernoulli"
    prior: Any = "standard_normal"
    posterior: Any = "gaussian"
    num_classes: int = 0
    compute_dtype: str = "float32"
    num_covariates: int = 0
    conditions: str = "both"
    classifier: bool = False

    _registries: ClassVar[Mapping[str, Registry[Any]]] = {
        "network": NETWORKS,
        "likelihood": LIKELIHOODS,
        "prior": PRIORS,
        "posterior": POSTERIORS,
    }

    def __post_init__(self) -> None:
        if not isinstance(self.image_shape, tuple | list) or not self.image_shape:
            raise InputError(
                f"image_shape is {shown(self.image_shape)}: expected (height, width, channels), or "
                "the shape of other examples, such as (features,)"
            )
        # JSON has no tuples; a jitted function needs the config hashable.
        shape = tuple(whole_number(f"image_shape[{i}]", n) for i, n in enumerate(self.image_shape))
        set_field = object.__setattr__
        set_field(self, "image_shape", shape)
        set_field(self, "latent_dim", whole_number("latent_dim", self.latent_dim))
        for name in ("num_classes", "num_covariates"):
            set_field(self, name, whole_number(name, getattr(self, name), least=0))
        if self.num_classes and self.num_covariates:
            raise InputError(
                f"num_classes is {self.num_classes} and num_covariates {self.num_covariates}: "
                "expected one of them to be 0; a class can be one-hot columns of the covariates"
            )
        expect_one_of("conditions", self.conditions, CONDITIONS)
        if self.compute_dtype not in DTYPES:
            raise InputError(
                f"compute_dtype is {shown(self.compute_dtype)}: expected {either(DTYPES)}"
            )
        set_field(self, "network", _network(self.network))
        if not is_image(shape) and getattr(self.network, "images_only", False):
            raise InputError(
                f"image_shape is {shape}: expected (height, width, channels), as the network "
                f"{NETWORKS.spec(self.network)!r} is for images; for other examples choose 'mlp'"
            )
        if self._latents_of_network:
            latent_dim = self.network.latent_dim(shape)
            if self.latent_dim not in (type(self).latent_dim, latent_dim):
                raise InputError(
                    f"latent_dim is {self.latent_dim}, but the network has {latent_dim} latents: "
                    "leave latent_dim out"
                )
            set_field(self, "latent_dim", latent_dim)
        by_pixel = hasattr(self.likelihood, "outputs_per_pixel")
        outputs = "outputs_per_pixel" if by_pixel else "outputs_per_channel"
        needed = {
            "likelihood": (outputs, "init", "from_outputs"),
            "prior": ("init", "bind"),
            "posterior": ("init", "bind"),
        }
        for name, protocol in needed.items():
            registry = self._registries[name]
            set_field(self, name, registry.parse(getattr(self, name), protocol=protocol))
        for part in (self.network, self.posterior, self.prior):
            if hasattr(part, "validate"):
                part.validate(self)
        expect_bool("classifier", self.classifier)
        if self.classifier:
            self._expect_classifier()

    def _expect_classifier(self) -> None:
        if self.num_classes < 2:
            raise InputError(
                f"classifier is true, but num_classes is {self.num_classes}: expected at least 2"
            )
        if not isinstance(self.network, MLP | Conv | Residual):
            raise InputError(
                f"classifier is true, but the network is {NETWORKS.spec(self.network)!r}, whose "
                "encoder is no classifier: expected 'mlp', 'conv' or 'residual'"
            )
        if hasattr(self.posterior, "codebook"):
            raise InputError(
                "classifier is true, but the latents are codes: expected the posterior 'gaussian' "
                "or 'iaf'"
            )

    def with_image_shape(self, image_shape: tuple[int, ...]) -> Self:
        """Return the configuration for images of another shape, on which a ladder's latents depend.

        Args:
          image_shape: shape of one image or other example.

        Returns:
          The configuration.

        Raises:
          InputError: a shape that the components do not go with.
        """
        latent_dim = type(self).latent_dim if self._latents_of_network else self.latent_dim
        return dataclasses.replace(self, image_shape=image_shape, latent_dim=latent_dim)

    @property
    def _latents_of_network(self) -> bool:
        """Whether the network sets the number of latents, by a method `latent_dim`."""
        return callable(getattr(self.network, "latent_dim", None))

    @property
    def outputs_shape(self) -> tuple[int, ...]:
        """(height, width, outputs) of what the decoder returns for one image.

        In general only the last axis of an example becomes larger: a vector is a single pixel.
        """
        *places, channels = self.image_shape
        if hasattr(self.likelihood, "outputs_per_pixel"):
            return *places, self.likelihood.outputs_per_pixel(channels)
        return *places, channels * self.likelihood.outputs_per_channel

    @property
    def condition_dim(self) -> int:
        """Width of what the networks take of a class or of covariates; 0: unconditional."""
        return self.num_classes or self.num_covariates

    def conditional(self, part: str) -> bool:
        """Whether a network, "encoder" or "decoder", takes the class or the covariates."""
        return self.condition_dim > 0 and self.conditions in ("both", part)

    def condition(
        self, part: str, labels: Num[Array, " batch *covariates"] | None
    ) -> tuple[Float[Array, "batch condition"], ...]:
        """Return the further arguments of a network: one-hot classes, or covariates, or none.

        Args:
          part: "encoder" or "decoder".
          labels: classes [batch], or covariates [batch, covariates].
        """
        if labels is None or not self.conditional(part):
            return ()
        if self.num_covariates:
            return (at_least_float32(labels),)
        return (jax.nn.one_hot(labels, self.num_classes, dtype=jnp.float32),)

    @property
    def noun(self) -> str:
        """What messages and figures call an example: "image" or "example"."""
        return "image" if is_image(self.image_shape) else "example"

    @classmethod
    def _updated(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Convert the fields of version 0.1, which had a field for each option."""
        if fields.get("network") == "notebook":
            fields["network"] = "conv"
        width = fields.pop("width", None)
        if width is not None:
            fields["network"] = f"{fields.get('network', 'conv')}:width={width}"
        for option, (name, key) in {
            "prior_components": ("prior", "components"),
            "flow_steps": ("posterior", "steps"),
        }.items():
            value = fields.pop(option, None)
            if value is not None and fields.get(name) in ("mixture", "vamp", "iaf"):
                fields[name] = f"{fields[name]}:{key}={value}"
        return fields


def _network(network: Any) -> Any:
    """Return the network of a name, a specification, an object or a pair of modules."""
    if isinstance(network, list | tuple):
        if len(network) == 2 and all(isinstance(module, nn.Module) for module in network):
            return Modules(*network)
        network = tuple(network)
    if network == Modules.spec:
        raise ComponentNeeded(
            "the network is a pair of Flax modules, which are not saved: pass "
            "network=(encoder, decoder)"
        )
    needed = "model" if hasattr(network, "model") else "modules"
    return NETWORKS.parse(network, ", or a pair of Flax modules, (Encoder(), Decoder())", (needed,))
