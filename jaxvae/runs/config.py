"""The configuration of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax

from jaxvae.config import Config, ModelConfig, TrainConfig, shown, whole_number
from jaxvae.errors import InputError
from jaxvae.runs.files import (
    read_json,
)


@dataclass(frozen=True)
class RunConfig(Config):
    """What a run is told: its data, its seed, its model and how it is trained.

    start_from: the run directory whose last parameters it starts from; by default fresh ones.
    divide: whether every device keeps only its part of the parameters and of the optimizer's
      state, for models that are too large for one.
    workers: processes that read images on disk; 0: threads of the training process.
    """

    data: str = "mnist-5k"
    data_dir: str | None = None
    manual_dir: str | None = None
    seed: int = 0
    start_from: str | None = None
    divide: bool = False
    workers: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for name in ("data", "data_dir", "manual_dir", "start_from"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "data"):
                raise InputError(f"{name} is {shown(value)}: expected a string")
        if not isinstance(self.divide, bool):
            raise InputError(f"divide is {shown(self.divide)}: expected true or false")
        object.__setattr__(self, "seed", whole_number("seed", self.seed, 0, 2**32 - 1))
        object.__setattr__(self, "workers", whole_number("workers", self.workers, 0))
        for name, kind in (("model", ModelConfig), ("train", TrainConfig)):
            if not isinstance(getattr(self, name), kind):
                object.__setattr__(self, name, kind.from_dict(getattr(self, name)))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], network: Any = None) -> Self:
        """Build from a JSON object, as of `ModelConfig.from_dict`."""
        if isinstance(fields, Mapping) and isinstance(fields.get("model"), Mapping):
            fields = {**fields, "model": ModelConfig.from_dict(fields["model"], network)}
        return super().from_dict(fields)


def configured(flags: Mapping[str, Any]) -> RunConfig:
    """The configuration of a new run; `flags` are fields of it, or of its model or training."""
    return _with_flags(RunConfig(), flags)


def resumed(run_dir: Path, flags: Mapping[str, Any]) -> RunConfig:
    """The configuration of a run that goes on.

    Raises InputError if the flags ask for another run than the recorded one; where the data lie
    and for how many epochs to train may change. A network of one's own is handed over again, as
    the flag `network`.
    """
    return going_on(read_config(run_dir, flags.get("network")), flags, run_dir)


def going_on(recorded: RunConfig, flags: Mapping[str, Any], run_dir: Path) -> RunConfig:
    """A recorded configuration with flags, or InputError where they ask for another run."""
    asked = _with_flags(recorded, flags)
    may_change = ("data_dir", "manual_dir", "epochs", "divide", "workers")
    for name in flags:
        was, now = _flag(recorded, name), _flag(asked, name)
        if was != now and name not in may_change:
            raise InputError(
                f"{as_flag(name)} is {now}, but {run_dir} was started with {was}: leave it out"
            )
    return asked


def run_keys(config: RunConfig) -> tuple[jax.Array, jax.Array]:
    """The PRNG keys of a run: for training, and for measuring and drawing."""
    train_key, test_key = jax.random.split(jax.random.key(config.seed))
    return train_key, test_key


def read_config(run_dir: Path, network: Any = None) -> RunConfig:
    """What a run was told. Raises InputError if the directory is not a run.

    network: the modules (encoder, decoder), where the model was given some of its own.
    """
    if not (run_dir / "config.json").exists() and (run_dir / "sweep.json").exists():
        raise InputError(f"{run_dir} holds many models: name the run directory of one, in it")
    return read_json(run_dir / "config.json", partial(RunConfig.from_dict, network=network))


def _with_flags(config: RunConfig, flags: Mapping[str, Any]) -> RunConfig:
    def names(*kinds: type) -> set[str]:
        return {item.name for kind in kinds for item in fields(kind)} - {"model", "train"}

    def own(kind: type) -> dict[str, Any]:
        return {name: value for name, value in flags.items() if name in names(kind)}

    known = names(RunConfig, ModelConfig, TrainConfig)
    if unknown := sorted(map(shown, flags.keys() - known)):
        raise InputError(f"a run has no setting {unknown[0]}: expected {', '.join(sorted(known))}")
    top = own(RunConfig)
    for name in ("data", "data_dir", "manual_dir", "start_from"):
        # A run may go on from another working directory.
        if name in top and Path(top[name]).exists():
            top[name] = str(Path(top[name]).resolve())
    model = replace(config.model, **own(ModelConfig))
    return replace(config, model=model, train=replace(config.train, **own(TrainConfig)), **top)


def as_flag(name: str) -> str:
    """A field of a configuration as the command line spells it."""
    return "--" + name.replace("_", "-")


def _flag(config: RunConfig, name: str) -> Any:
    # As they are written, where modules of one's own are "own".
    return {**config.model.to_dict(), **config.train.to_dict(), **vars(config)}[name]
