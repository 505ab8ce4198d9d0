"""The configuration of a run."""

import json
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

import jax

from jaxvae.components import Config, expect_known, is_dotted_path
from jaxvae.data.covariates import Covariate, column_names
from jaxvae.data.dataset import is_named
from jaxvae.data.pictures import Resize
from jaxvae.errors import InputError, either, shown
from jaxvae.models.config import ModelConfig
from jaxvae.runs.files import NewerVersion, as_argument, read_json, without_version
from jaxvae.training.config import TrainConfig
from jaxvae.training.optimizer import ELEMENTWISE
from jaxvae.validation import expect_bool, whole_number


@dataclass(frozen=True)
class DataRecord(Config):
    """A data set that a run was trained on, as returned by `jaxvae.runs.data.describe`.

    Attributes:
      train_images: number of training images.
      test_images: number of test images.
      sha256: digest of images and labels.
      step: number of steps the run had taken before it used this data set.
    """

    train_images: int = 1
    test_images: int = 1
    sha256: str = ""
    step: int = 0

    def __post_init__(self) -> None:
        for name, least in (("train_images", 1), ("test_images", 1), ("step", 0)):
            number = whole_number(name, getattr(self, name), least, 2**63 - 1)
            object.__setattr__(self, name, number)
        if not isinstance(self.sha256, str):
            raise InputError(f"sha256 is {shown(self.sha256)}: expected a string")


@dataclass(frozen=True)
class Change(Config):
    """A field of the training that a resumed run changed.

    Attributes:
      step: number of steps the run had taken.
      field: name of the field.
      before: the value up to this step.
      after: the value from this step on.
    """

    step: int = 0
    field: str = ""
    before: Any = None
    after: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", whole_number("step", self.step, 0, 2**63 - 1))


@dataclass(frozen=True, repr=False)
class RunConfig(Config):
    """The configuration of a run: data, seed, model and training.

    Attributes:
      data: mnist-5k, mnist, tfds:NAME, a folder of images or of IDX files, an .npz, .npy, IDX,
        .csv, .tsv, .parquet or .h5ad file, or the dotted path of a function that returns a
        `jaxvae.data.Dataset`.
      label_column: column of classes of a table, or of `obs` of an .h5ad file.
      covariate_columns: columns of a table or of `obs`, or arrays of an .npz file, on which the
        model is conditional: names, separated by commas. Numbers are standardised, and text is
        one-hot; NAME:categorical makes numbers one-hot too.
      labelled: number of training labels that are kept, equally many of each class, drawn by the
        seed; the others are hidden, for the objective m2, which repeats the labelled examples. 0:
        all.
      data_dir: folder in which TensorFlow Datasets stores prepared data.
      manual_dir: folder of data files that you downloaded by hand.
      resize: size to which the pictures of a folder are scaled, such as 64x64.
      crop: with resize: keep the proportions of pictures, and cut off what is left over at the
        sides, instead of stretching them.
      seed: seed of all random numbers.
      start_from: run directory whose latest parameters are the initial parameters, and whose model
        is that of the new run.
      fsdp: shard parameters and optimizer state over the devices, for models too large for one
        device; needs an elementwise optimizer, such as rmsprop, adam or adamw.
      workers: number of processes that read images from disk; 0: threads of the training process.
      model: the architecture.
      train: the training.
      covariates: how the covariate columns become numbers, from the training examples.
      data_seen: the data sets that the run was trained on, the latest one last.
      changes: the fields of the training that were changed by resuming, the latest one last.
    """

    data: str = "mnist-5k"
    label_column: str | None = None
    covariate_columns: str | None = None
    labelled: int = 0
    data_dir: str | None = None
    manual_dir: str | None = None
    resize: str | None = None
    crop: bool = False
    seed: int = 0
    start_from: str | None = None
    fsdp: bool = False
    workers: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    covariates: tuple[Covariate, ...] = ()
    data_seen: tuple[DataRecord, ...] = ()
    changes: tuple[Change, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "data", "label_column", "covariate_columns", "data_dir", "manual_dir", "resize",
            "start_from",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "data"):
                raise InputError(f"{name} is {shown(value)}: expected a string")
        expect_bool("fsdp", self.fsdp)
        expect_bool("crop", self.crop)
        Resize.parse(self.resize, self.crop)
        object.__setattr__(self, "seed", whole_number("seed", self.seed, 0, 2**32 - 1))
        for name in ("workers", "labelled"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 0))
        for name, kind in (("model", ModelConfig), ("train", TrainConfig)):
            if not isinstance(getattr(self, name), kind):
                object.__setattr__(self, name, kind.from_dict(getattr(self, name)))
        column_names(self.covariate_columns)
        records: tuple[tuple[str, Any], ...] = (
            ("data_seen", DataRecord), ("covariates", Covariate), ("changes", Change)
        )  # fmt: skip
        for name, kind in records:
            value = getattr(self, name)
            if not isinstance(value, tuple | list):
                raise InputError(f"{name} is {shown(value)}: expected a list of records")
            parts = tuple(x if isinstance(x, kind) else kind.from_dict(x) for x in value)
            object.__setattr__(self, name, parts)
        if self.fsdp and getattr(self.train.optimizer, "name", None) not in ELEMENTWISE:
            raise InputError(
                f"optimizer is {self.train.specs()['optimizer']!r}, but fsdp needs an elementwise "
                f"optimizer: expected {either(ELEMENTWISE)}"
            )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], **own: Any) -> Self:
        """Build a configuration from a JSON object.

        Args:
          fields: as returned by `to_dict`, or a part of them.
          own: custom components, by their field of `ModelConfig` or `TrainConfig`.

        Returns:
          The configuration.

        Raises:
          InputError: as for `Config.from_dict`.
        """
        if isinstance(fields, Mapping) and own:
            expect_components(own)
            fields = dict(fields)
            for name, kind in (("model", ModelConfig), ("train", TrainConfig)):
                mine = {n: own[n] for n in own if n in kind._registries}
                fields[name] = kind.from_dict(fields.get(name, {}), **mine)
        return super().from_dict(fields)

    @classmethod
    def _updated(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Convert the fields of version 0.1."""
        if "divide" in fields:
            fields["fsdp"] = fields.pop("divide")
        return fields


# Fields that may change when a run is resumed.
MAY_CHANGE: tuple[str, ...] = (
    "data",
    "label_column",
    "data_dir",
    "manual_dir",
    "epochs",
    "patience",
    "fsdp",
    "workers",
)
# Fields that may also change in the run of a single model. Each change is recorded, with the step.
RECORDED = ("learning_rate", "schedule", "clip_norm", "skip_norm")


def configured(flags: Mapping[str, Any], base: RunConfig | None = None) -> RunConfig:
    """Return the configuration of a new run.

    Args:
      flags: fields of the run, its model or its training, by name.
      base: the configuration of the other fields; by default the defaults.

    Returns:
      The configuration.

    Raises:
      InputError: an unknown field or a wrong value.
    """
    return _with_flags(base or RunConfig(), flags)


def resumed(run_dir: Path, flags: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of a resumed run.

    Whether the data are the recorded ones is checked by `directory.start`.

    Args:
      run_dir: the run directory.
      flags: fields that were given, by name.

    Returns:
      The configuration.

    Raises:
      InputError: a field that is in neither `MAY_CHANGE` nor `RECORDED` differs from the recorded
        one.
    """
    recorded = read_config(run_dir, to_train=True, **own_components(flags))
    return updated(recorded, flags, run_dir, caller="train")


def updated(
    recorded: RunConfig,
    flags: Mapping[str, Any],
    run_dir: Path,
    *,
    caller: Literal["train", "fit", "sweep"],
) -> RunConfig:
    """Return a recorded configuration with the flags of a resumed run.

    Args:
      recorded: the recorded configuration.
      flags: fields that were given, by name.
      run_dir: the run directory, for messages.
      caller: what resumes: the command, `jaxvae.fit` or a sweep. The first two may also change
        `RECORDED`.

    Returns:
      The configuration.

    Raises:
      InputError: a field that may not change differs from the recorded one.
    """
    may_change = MAY_CHANGE if caller == "sweep" else MAY_CHANGE + RECORDED
    asked = _with_flags(recorded, flags)
    for name in flags:
        was, now = (_field(config, name) for config in (recorded, asked))
        if was == now or name in may_change:
            continue
        remedy = "leave it out"
        if caller == "fit":
            remedy = "pass that, or another run_dir"
        elif caller == "train":
            remedy += ", or start a new run without --resume"
            if name not in {item.name for item in fields(ModelConfig)}:
                remedy += f" (with --start-from {as_argument(run_dir)} it starts from this model)"
        given = name if caller == "fit" else as_flag(name)
        raise InputError(f"{given} is {now}, but {run_dir} was started with {was}: {remedy}")
    return asked


def as_flag(name: str) -> str:
    """Return the flag of a field."""
    return "--" + name.replace("_", "-")


def own_components(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that are custom components, which are objects."""
    registries = {**ModelConfig._registries, **TrainConfig._registries}
    return {n: x for n, x in flags.items() if n in registries and not isinstance(x, str)}


def expect_components(own: Collection[str]) -> None:
    """Raise InputError unless these are names of fields that hold components."""
    expect_known(
        "a run has no component", own, {**ModelConfig._registries, **TrainConfig._registries}
    )


def components(config: RunConfig) -> dict[str, Any]:
    """Return the custom components of a configuration, which config.json cannot restore."""
    own = {}
    for part in (config.model, config.train):
        for name, spec in part.specs().items():
            if is_dotted_path(spec) or spec == "own":
                own[name] = getattr(part, name)
    return own


def run_keys(config: RunConfig) -> tuple[jax.Array, jax.Array]:
    """Return the PRNG keys of a run: one for training, one for evaluation and figures."""
    train_key, test_key = jax.random.split(jax.random.key(config.seed))
    return train_key, test_key


def read_config(run_dir: Path, *, to_train: bool = False, **own: Any) -> RunConfig:
    """Return the configuration of a run directory.

    Args:
      run_dir: the run directory.
      to_train: whether the run is resumed; if not, custom components of the training may be
        missing and are replaced by the defaults.
      own: custom components that the run was trained with, by field.

    Returns:
      The configuration.

    Raises:
      InputError: the directory is not a run, or custom components are missing.
    """
    if not (run_dir / "config.json").exists() and (run_dir / "sweep.json").exists():
        raise InputError(
            f"{run_dir} is a sweep: expected the run directory of one of its models, such as "
            f"{run_dir}/seed-0"
        )

    def parse(content: dict[str, Any]) -> RunConfig:
        train = content.get("train")
        if not to_train and isinstance(train, dict):
            content["train"] = {n: x for n, x in train.items() if not is_dotted_path(x)}
        return RunConfig.from_dict(content, **own)

    return read_json(run_dir / "config.json", parse)


def read_config_file(path: Path, flags: Collection[str] = ()) -> RunConfig:
    """Return the configuration in a TOML or JSON file, such as the config.json of a run.

    Fields of model and training may be in the tables `model` and `train` or at the top level.

    Args:
      path: the file.
      flags: fields that are given as flags, which override the file.

    Returns:
      The configuration.

    Raises:
      InputError: the file cannot be read, or a field is unknown, wrong or given twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        language = "JSON" if path.suffix == ".json" else "TOML"
        raise InputError(
            f"{path} is not valid {language}: {reason}; expected TOML, or JSON in a .json file"
        ) from None
    try:
        content = without_version(content, path)
        # These belong to the run that wrote the file.
        for name in ("data_seen", "covariates", "changes"):
            content.pop(name, None)
        parts: dict[str, Any] = {}
        for name, kind in (("model", ModelConfig), ("train", TrainConfig)):
            table = content.pop(name, {})
            if not isinstance(table, dict):
                raise InputError(f"{name} is {shown(table)}: expected a table of named fields")
            parts[name] = kind._updated(table)
        parts["model"].pop("num_covariates", None)  # taken from the data, as image_shape
        top = RunConfig._updated(content)
        for name, table in parts.items():
            if twice := sorted(set(top) & set(table)):
                raise InputError(
                    f"{twice[0]} is given at the top level and in table {name}: expected it once"
                )
            parts[name] = _without(table, flags)
        return _with_flags(RunConfig.from_dict(parts), _without(top, flags))
    except NewerVersion:  # its message names the file
        raise
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _without(fields: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def _with_flags(config: RunConfig, flags: Mapping[str, Any]) -> RunConfig:
    parts = {"model", "train"}
    names: dict[type, set[str]] = {
        kind: {item.name for item in fields(kind)} - parts for kind in _KINDS
    }
    expect_known("a run has no field", flags, set().union(*names.values()))

    def own(kind: type) -> dict[str, Any]:
        return {name: value for name, value in flags.items() if name in names[kind]}

    top = own(RunConfig)
    for name in ("data", "data_dir", "manual_dir", "start_from"):
        # A run may be resumed from another working directory.
        path = top.get(name)
        if (
            isinstance(path, str)
            and Path(path).exists()
            and not (name == "data" and is_named(path))
        ):
            top[name] = str(Path(path).resolve())
    model = replace(config.model, **own(ModelConfig))
    return replace(config, model=model, train=replace(config.train, **own(TrainConfig)), **top)


_KINDS = (RunConfig, ModelConfig, TrainConfig)


def _field(config: RunConfig, name: str) -> Any:
    """Return the value of a field as messages show it."""
    return {**config.model.to_dict(), **config.train.to_dict(), **config.to_dict()}[name]
