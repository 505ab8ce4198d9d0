"""The training configuration."""

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar, no_type_check

import optax

from jaxvae.components import Config, Registry
from jaxvae.errors import InputError, either, shown
from jaxvae.objectives import OBJECTIVES, WARMUPS, parse_objective
from jaxvae.training.optimizer import OPTIMIZERS, SCHEDULES, parse_optimizer, parse_schedule
from jaxvae.validation import is_number, whole_number

BINARIZATIONS = ("none", "dynamic", "fixed")
PARTS = ("encoder", "decoder", "likelihood", "prior", "posterior")


@no_type_check  # not at run time: it converts and checks its fields itself
@dataclasses.dataclass(frozen=True, repr=False)
class TrainConfig(Config):
    """The training of a model; the defaults are the notebook's, except for its batch size of 16.

    `objective`, `warmup`, `optimizer` and `schedule` take a name, a name with options
    ("iwae:num_samples=50", "adamw:weight_decay=1e-4") or an object. The optimizer may be an
    `optax.GradientTransformation`, with its own learning rate, or a function from the learning
    rate to one; the schedule an optax schedule; the objective a function as for `train_step`.

    Attributes:
      batch_size: images per step, over all devices.
      epochs: passes over the training images.
      learning_rate: learning rate of the optimizer, before the schedule.
      optimizer: name of an optax optimizer; an `optax.GradientTransformation`, which has its own
        learning rate; or a function of the learning rate that returns one.
      schedule: learning-rate schedule: "constant", "cosine" or "burda"; name of an optax schedule;
        or an optax schedule, a function of the step.
      objective: name of the objective, or a function as in `train_step`.
      beta: weight of the KL term in the loss; at 1 the objective "elbo" is the ELBO.
      warmup: warm-up of beta over the first steps: "none", "linear:steps=N" or
        "cyclical:steps=N".
      binarization: "none": grey levels are probabilities; "dynamic": 0/1 pixels are drawn with
        these probabilities at every step; "fixed": they are drawn once, before training.
      clip_norm: gradients with a larger norm (over all parameters) are scaled down to it; 0: off.
      skip_norm: steps whose gradient has a larger norm (over all parameters) are skipped; 0: off.
      accumulate: number of batches whose gradients are averaged before each update.
      ema: decay of an exponential moving average of the parameters, which is used for evaluation,
        sampling and export; 0: off.
      trainable: the parts that are trained: "encoder", "decoder", "likelihood", "prior",
        "posterior"; empty: all.
      patience: a run stops early after this many epochs without a better test ELBO; 0: never.
    """

    batch_size: int = 128
    epochs: int = 10
    learning_rate: float = 1e-3
    optimizer: Any = "rmsprop"
    schedule: Any = "constant"
    objective: Any = "elbo"
    beta: float = 1.0
    warmup: Any = "none"
    binarization: str = "none"
    clip_norm: float = 0.0
    skip_norm: float = 0.0
    accumulate: int = 1
    ema: float = 0.0
    trainable: tuple[str, ...] = ()
    patience: int = 0

    _registries: ClassVar[Mapping[str, Registry[Any]]] = {
        "optimizer": OPTIMIZERS,
        "schedule": SCHEDULES,
        "objective": OBJECTIVES,
        "warmup": WARMUPS,
    }

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        for name, least in (("batch_size", 1), ("epochs", 1), ("accumulate", 1), ("patience", 0)):
            set_field(self, name, whole_number(name, getattr(self, name), least))
        if not is_number(self.learning_rate) or not 0 < self.learning_rate < 1e6:
            raise InputError(
                f"learning_rate is {shown(self.learning_rate)}: expected a number above 0, "
                "below 1e+06"
            )
        for name, most in (("beta", 1e6), ("clip_norm", 1e12), ("skip_norm", 1e12), ("ema", 1)):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < most:
                raise InputError(
                    f"{name} is {shown(value)}: expected a number of at least 0, below {most:g}"
                )
        for name in ("learning_rate", "beta", "clip_norm", "skip_norm", "ema"):
            set_field(self, name, float(getattr(self, name)))
        if self.binarization not in BINARIZATIONS:
            raise InputError(
                f"binarization is {shown(self.binarization)}: expected {either(BINARIZATIONS)}"
            )
        parts = (self.trainable,) if isinstance(self.trainable, str) else self.trainable
        if not isinstance(parts, tuple | list) or not all(part in PARTS for part in parts):
            raise InputError(
                f"trainable is {shown(self.trainable)}: expected parts among {either(PARTS)}"
            )
        set_field(self, "trainable", tuple(part for part in PARTS if part in parts))
        set_field(self, "optimizer", parse_optimizer(self.optimizer))
        set_field(self, "schedule", parse_schedule(self.schedule))
        set_field(self, "objective", parse_objective(self.objective))
        set_field(self, "warmup", WARMUPS.parse(self.warmup, protocol=("__call__",)))
        own_rate = isinstance(self.optimizer, optax.GradientTransformation)
        if own_rate and SCHEDULES.spec(self.schedule) != "constant":
            raise InputError(
                "optimizer is an optax.GradientTransformation, which has its own learning rate: "
                "expected the schedule 'constant'; build the transformation with the schedule"
            )

    @classmethod
    def _updated(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Convert the fields of version 0.1, which had separate fields for options."""
        options: dict[str, list[str]] = {"objective": [], "optimizer": [], "warmup": []}
        objective = fields.get("objective", "elbo")
        samples = fields.pop("num_samples", 1)
        if samples != 1:
            options["objective"].append(f"num_samples={samples}")
        if free_bits := fields.pop("free_bits", 0):
            options["objective"].append(f"free_bits={free_bits}")
        if (weight := fields.pop("mmd_weight", 100)) != 100 and objective == "mmd":
            options["objective"].append(f"weight={weight}")
        epsilon = fields.pop("epsilon", None)
        if epsilon is not None and (epsilon != 1e-7 or fields.get("optimizer") == "adam"):
            options["optimizer"].append(f"eps={epsilon}")
        steps = fields.pop("warmup_steps", 0)
        if steps and fields.get("warmup", "none") != "none":
            options["warmup"].append(f"steps={steps}")
        defaults = {"objective": "elbo", "optimizer": "rmsprop", "warmup": "none"}
        for name, written in options.items():
            if written:
                fields[name] = f"{fields.get(name, defaults[name])}:{','.join(written)}"
        return fields


def labelled_slots(config: TrainConfig, objective: Any = None) -> int:
    """Return the least number of images with a label in a batch.

    Args:
      config: configuration of the training.
      objective: as in `train_step`.

    Returns:
      The number, 0 unless the objective has a `labelled_share`.
    """
    chosen = config.objective if objective is None else objective
    share = Fraction(str(getattr(chosen, "labelled_share", 0)))  # 0.07 * 100 is above 7 in floats
    return math.ceil(share * config.batch_size)
