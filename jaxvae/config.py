"""Frozen configurations that check themselves."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import flax.linen as nn

from jaxvae.errors import InputError


class NetworkNeeded(InputError):
    """A recorded model has modules of the user's own, which no file holds."""


class Config:
    """What the configurations share: the way to and from a JSON object."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON object, a configuration among them as one of its own."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {n: v.to_dict() if isinstance(v, Config) else v for n, v in values.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Build from a JSON object. Raises InputError on a missing, unknown or wrong field."""
        if not isinstance(fields, Mapping):
            raise InputError(
                f"{cls.__name__} is {shown(fields)}: expected an object of named fields"
            )
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(map(shown, set(fields) - known)):
            raise InputError(
                f"{cls.__name__} has no field {unknown[0]}: expected {', '.join(sorted(known))}"
            )
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class ModelConfig(Config):
    """The architecture of a VAE; the defaults are the notebook's.

    image_shape: (height, width, channels) of one image.
    latent_dim: number of latents.
    compute_dtype: "float32", or "bfloat16" for the layers' inputs, kernels and products;
      parameters, their gradients and the terms of the ELBO are float32 all the same.
    network: "notebook"; "mlp", the IWAE paper's; "residual", for colour; "spatial", the same with
      a grid of latents; or a pair of Flax modules (encoder, decoder) of your own, as described in
      `jaxvae.models.networks`.
    width: units of a layer of "mlp", 200 by default, or channels of "residual" and "spatial" at the
      images' own resolution, 32 by default; the notebook's network has no such choice.
    likelihood: p(x|z): "bernoulli", "continuous_bernoulli", "gaussian" or "discretized_logistic".
    prior: p(z): "standard_normal", "mixture" of Gaussians, or "vamp".
    prior_components: how many Gaussians a mixture has, or pseudo-inputs a VampPrior.
    posterior: q(z|x): "gaussian", or "iaf": an inverse autoregressive flow on top of one.
    flow_steps: how many steps a flow has.
    num_classes: of a class-conditional model; 0: the model knows of no classes.
    """

    image_shape: tuple[int, int, int] = (28, 28, 1)
    latent_dim: int = 2
    compute_dtype: str = "float32"
    network: Any = "notebook"
    width: int | None = None
    likelihood: str = "bernoulli"
    prior: str = "standard_normal"
    prior_components: int = 500
    posterior: str = "gaussian"
    flow_steps: int = 2
    num_classes: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.image_shape, tuple | list) or len(self.image_shape) != 3:
            raise InputError(
                f"image_shape is {shown(self.image_shape)}: expected (height, width, channels)"
            )
        # JSON has no tuples; a jitted function needs the config hashable.
        shape = tuple(whole_number(f"image_shape[{i}]", n) for i, n in enumerate(self.image_shape))
        object.__setattr__(self, "image_shape", shape)
        for name in ("latent_dim", "prior_components", "flow_steps"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        object.__setattr__(
            self, "num_classes", whole_number("num_classes", self.num_classes, least=0)
        )
        if self.width is not None:
            object.__setattr__(self, "width", whole_number("width", self.width))
        _check_choices(self, CHOICES["model"])
        if isinstance(self.network, list):
            object.__setattr__(self, "network", tuple(self.network))
        named = isinstance(self.network, str)
        if named and self.network == OWN_NETWORK:
            raise NetworkNeeded(
                "the model has a network of its own: hand its modules over, "
                "network=(encoder, decoder)"
            )
        if not (self.network in NETWORKS if named else _are_two_modules(self.network)):
            given = " ".join(shown(self.network).split())  # a module's fields stand on lines
            raise InputError(
                f"network is {given}: expected {_either(NETWORKS)}, "
                "or a pair of Flax modules, (Encoder(), Decoder())"
            )
        if self.width is not None and not (
            named and self.network in ("mlp", "residual", "spatial")
        ):
            raise InputError(
                f"width is {self.width}, but this network has a width of its own: expected none, "
                "or the network 'mlp', 'residual' or 'spatial'"
            )
        if self.prior == "vamp" and self.num_classes:
            raise InputError(
                "prior is 'vamp', but its pseudo-inputs have no classes: "
                "expected 'standard_normal' or 'mixture' with num_classes"
            )

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object; of modules of one's own it says only that there are some."""
        named = isinstance(self.network, str)
        return super().to_dict() | ({} if named else {"network": OWN_NETWORK})

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], network: Any = None) -> Self:
        """Build from a JSON object, as of `Config.from_dict`.

        Args:
          fields: the object.
          network: the modules (encoder, decoder) of a model that has some of its own.
        """
        recorded = fields.get("network") if isinstance(fields, Mapping) else None
        if network is not None and recorded == OWN_NETWORK:
            fields = {**fields, "network": network}
        return super().from_dict(fields)

    @property
    def own_network(self) -> Any:
        """The modules (encoder, decoder), where they are the user's own; else None."""
        return None if isinstance(self.network, str) else self.network


@dataclasses.dataclass(frozen=True)
class TrainConfig(Config):
    """How a model is trained.

    batch_size: images per step, over all devices.
    epochs: passes over the training images.
    learning_rate: of the optimizer, at the start.
    beta: weight of the KL term in the loss; at 1 the objective "elbo" is the ELBO.
    objective: what to maximise: "elbo", "stl", "iwae", "dreg", "beta_tc" or "mmd"; the functions
      are in `jaxvae.objectives`.
    num_samples: latent samples per image and step.
    warmup: of beta: "none"; "linear": it grows from 0 over `warmup_steps` steps; "cyclical": it
      grows over so many steps, stays for as many, and begins again.
    warmup_steps: as `warmup` says.
    free_bits: nats per latent that the KL costs nothing to take; of "elbo".
    mmd_weight: nats per unit of squared MMD; of "mmd".
    optimizer: "rmsprop" or "adam".
    epsilon: of the optimizer.
    clip_norm: the norm over all parameters that a gradient is cut down to where it is longer;
      0: it is left as it is.
    schedule: of the learning rate over the run: "constant"; "cosine": down to 0; "burda": in eight
      stages of 3^i parts each, times 10^(-i/7).
    binarization: "none": grey levels are probabilities; "dynamic": 0/1 pixels are drawn with these
      probabilities, anew at every step; "fixed": once, before training, by whoever loads the data.
    """

    batch_size: int = 128
    epochs: int = 10
    learning_rate: float = 1e-3
    beta: float = 1.0
    objective: str = "elbo"
    num_samples: int = 1
    warmup: str = "none"
    warmup_steps: int = 0
    free_bits: float = 0.0
    mmd_weight: float = 100.0
    optimizer: str = "rmsprop"
    epsilon: float = 1e-7
    clip_norm: float = 0.0
    schedule: str = "constant"
    binarization: str = "none"

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "num_samples"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        for name in ("learning_rate", "epsilon"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < 1e6:
                raise InputError(f"{name} is {shown(value)}: expected a number above 0")
            object.__setattr__(self, name, float(value))
        for name in ("beta", "free_bits", "mmd_weight", "clip_norm"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1e6:
                raise InputError(f"{name} is {shown(value)}: expected a number of at least 0")
            object.__setattr__(self, name, float(value))
        _check_choices(self, CHOICES["train"])
        least = 0 if self.warmup == "none" else 1
        steps = whole_number("warmup_steps", self.warmup_steps, least)
        object.__setattr__(self, "warmup_steps", steps)
        if self.num_samples > 1 and self.objective in ("beta_tc", "mmd"):
            raise InputError(
                f"num_samples is {self.num_samples}: expected 1 with the objective "
                f"{self.objective!r}, which takes one sample of every image"
            )
        if self.free_bits and self.objective != "elbo":
            raise InputError(
                f"free_bits is {self.free_bits}: expected 0 with the objective "
                f"{self.objective!r}; free bits belong to 'elbo'"
            )


NETWORKS = ("notebook", "mlp", "residual", "spatial")
OWN_NETWORK = "own"

# What the fields that name something may be.
CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "model": {
        "compute_dtype": ("float32", "bfloat16"),
        "likelihood": ("bernoulli", "continuous_bernoulli", "gaussian", "discretized_logistic"),
        "prior": ("standard_normal", "mixture", "vamp"),
        "posterior": ("gaussian", "iaf"),
    },
    "train": {
        "objective": ("elbo", "stl", "iwae", "dreg", "beta_tc", "mmd"),
        "warmup": ("none", "linear", "cyclical"),
        "optimizer": ("rmsprop", "adam"),
        "schedule": ("constant", "cosine", "burda"),
        "binarization": ("none", "dynamic", "fixed"),
    },
}


def _check_choices(config: Any, choices: Mapping[str, tuple[str, ...]]) -> None:
    for name, allowed in choices.items():
        value = getattr(config, name)
        if not isinstance(value, str) or value not in allowed:
            raise InputError(f"{name} is {shown(value)}: expected {_either(allowed)}")


def _are_two_modules(network: Any) -> bool:
    return (
        isinstance(network, tuple)
        and len(network) == 2
        and all(isinstance(module, nn.Module) for module in network)
    )


def _either(names: tuple[str, ...]) -> str:
    *most, last = map(repr, names)
    return f"{', '.join(most)} or {last}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A value as a message quotes it."""
    try:
        return repr(value)
    except Exception:  # too many digits, too deep, or of its own making
        return f"of type {type(value).__name__}"


def whole_number(name: str, value: Any, least: int = 1, most: int = 2**31 - 1) -> int:
    """`value` as an int from `least` to `most`; anything that counts as an index will do."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = value.__index__()
    except (AttributeError, TypeError):
        raise InputError(
            f"{name} is {shown(value)}: expected a whole number of at least {least}"
        ) from None
    if number < least:
        raise InputError(f"{name} is {shown(number)}: expected at least {least}")
    if number > most:
        raise InputError(f"{name} is {shown(number)}: expected at most {most}")
    return number
