"""Frozen configurations that check themselves."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from jaxvae.errors import InputError


class Config:
    """What the configurations share: the way to and from a JSON object."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Build from a JSON object. Raises InputError on a missing, unknown or wrong field."""
        if not isinstance(fields, Mapping):
            raise InputError(f"{cls.__name__} is {fields!r}: expected an object of named fields")
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(fields) - known):
            raise InputError(
                f"{cls.__name__} has no field {unknown[0]!r}: expected {', '.join(sorted(known))}"
            )
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class ModelConfig(Config):
    """The architecture of a VAE; the defaults are the notebook's.

    image_shape: (height, width, channels) of one image.
    latent_dim: number of latents.
    compute_dtype: "float32", or "bfloat16" for the layers' inputs, kernels and products;
      parameters, their gradients and the terms of the ELBO are float32 all the same.
    """

    image_shape: tuple[int, int, int] = (28, 28, 1)
    latent_dim: int = 2
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.image_shape, tuple | list) or len(self.image_shape) != 3:
            raise InputError(
                f"image_shape is {self.image_shape!r}: expected (height, width, channels)"
            )
        # JSON has no tuples; a jitted function needs the config hashable.
        shape = tuple(_whole(f"image_shape[{i}]", n) for i, n in enumerate(self.image_shape))
        object.__setattr__(self, "image_shape", shape)
        object.__setattr__(self, "latent_dim", _whole("latent_dim", self.latent_dim))
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise InputError(
                f"compute_dtype is {self.compute_dtype!r}: expected 'float32' or 'bfloat16'"
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig(Config):
    """How a model is trained.

    batch_size: images per step, over all devices.
    epochs: passes over the training images.
    learning_rate: of RMSprop.
    beta: weight of the KL term in the loss; at 1 the loss is the negative ELBO.
    """

    batch_size: int = 128
    epochs: int = 10
    learning_rate: float = 1e-3
    beta: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", _whole("batch_size", self.batch_size))
        object.__setattr__(self, "epochs", _whole("epochs", self.epochs))
        rate, beta = self.learning_rate, self.beta
        if not _is_number(rate) or not 0 < rate < 1e6:
            raise InputError(f"learning_rate is {rate!r}: expected a number above 0")
        if not _is_number(beta) or not 0 <= beta < 1e6:
            raise InputError(f"beta is {beta!r}: expected a number of at least 0")
        object.__setattr__(self, "learning_rate", float(rate))
        object.__setattr__(self, "beta", float(beta))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(name: str, value: Any) -> int:
    """`value` as an int of at least 1; anything that counts as an index will do."""
    try:
        if isinstance(value, bool):
            raise TypeError
        whole = value.__index__()
    except (AttributeError, TypeError):
        raise InputError(f"{name} is {value!r}: expected a whole number of at least 1") from None
    if whole < 1:
        raise InputError(f"{name} is {whole}: expected at least 1")
    return whole
