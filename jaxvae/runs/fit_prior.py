"""Fitting a new prior to a trained model."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvae.components import parse_spec
from jaxvae.data import Dataset, as_dataset
from jaxvae.errors import InputError
from jaxvae.models.config import ModelConfig
from jaxvae.models.likelihoods import binarize
from jaxvae.models.vae import Params, known_classes
from jaxvae.objectives import PriorFit, elbo
from jaxvae.runs import directory, loop
from jaxvae.runs.callbacks import Callback, expect_callbacks
from jaxvae.runs.checkpoints import load
from jaxvae.runs.config import RunConfig, configured, read_config, run_keys
from jaxvae.runs.data import load_run_data, prepared, train_conditions
from jaxvae.runs.files import IN_PYTHON, as_argument, read_metrics, typed_again
from jaxvae.runs.progress import Progress
from jaxvae.training.config import TrainConfig
from jaxvae.training.state import TrainState

_IMAGES = 2000  # training images over which the log-likelihood is averaged


class FitPriorResult(NamedTuple):
    """The result of `fit_prior`.

    Attributes:
      run_dir: the run directory with the new prior.
      params: the parameters of the model with the new prior.
      state: the training state after the last epoch.
      history: a dict for each epoch, as in metrics.jsonl.
      before: test metrics with the trained prior: `elbo`, `log_likelihood` and `kl`, in nats per
        image.
      after: test metrics with the new prior.
    """

    run_dir: Path
    params: Params
    state: TrainState
    history: list[dict[str, Any]]
    before: dict[str, float]
    after: dict[str, float]


def fit_prior(
    run_dir: str | Path,
    prior: Any,
    *,
    out: str | Path | None = None,
    epochs: int = 20,
    learning_rate: float = 3e-3,
    batch_size: int | None = None,
    data: str | Dataset | tuple[Any, ...] | np.ndarray | None = None,
    callbacks: Iterable[Callback] = (),
    progress: bool = True,
    **own: Any,
) -> FitPriorResult:
    """Fit a new prior to the aggregate posterior of a trained model, as a run of its own.

        maximise E[log p(z)],    z ~ q(z|x), x a training image

    Encoder, decoder and likelihood stay as they are.

    Args:
      run_dir: the run directory of the trained model, whose latest parameters are used.
      prior: the new prior, by name ("mixture:components=100") or as an object.
      out: directory of the new run; by default the name of `run_dir` with a hyphen and the name of
        the prior, such as runs/digits-mixture.
      epochs: passes over the training images.
      learning_rate: learning rate of Adam.
      batch_size: images per step; by default that of the trained model.
      data: another data set than the recorded one, as for `jaxvae.fit`.
      callbacks: callbacks of the training loop.
      progress: whether to show a progress bar and a line for each epoch.
      own: custom components that the model was trained with, by field.

    Returns:
      The new run and its test metrics before and after the fit.

    Raises:
      InputError: `run_dir` is no run; `out` exists; the prior is of the same kind as the trained
        one, has nothing to fit or does not go with the model.
      TrainingFailed: as for `jaxvae.fit`.
      Preempted: as for `jaxvae.fit`; `jaxvae train --resume` continues the new run.

    References:
      Dai and Wipf (2019), Diagnosing and Enhancing VAE Models, section 4.
    """
    run_dir, callbacks = Path(run_dir), expect_callbacks(callbacks)
    trained = read_config(run_dir, **own)
    model = _with_prior(run_dir, trained.model, prior)
    folder = _default_out(run_dir, model) if out is None else Path(out)
    if folder.exists():
        raise InputError(
            f"{folder} exists already: choose another directory with --out, or continue a run "
            f"there with: jaxvae train --resume --run-dir {as_argument(folder)}"
            f"{typed_again(folder)} --epochs N"
        )
    train = TrainConfig(
        batch_size=trained.train.batch_size if batch_size is None else batch_size,
        epochs=epochs,
        learning_rate=learning_rate,
        optimizer="adam",
        objective="prior",
        binarization=trained.train.binarization,
        trainable=("prior",),
    )
    config = replace(
        trained,
        model=model,
        train=train,
        start_from=str(run_dir.resolve()),
        data_seen=(),
        changes=(),
    )
    shown = [Progress()] if progress else []
    with shown[0].preparing() if progress else nullcontext():
        config, dataset = _load_data(config, data)
        params = load(run_dir, **own)
        _, test_key = run_keys(config)
        before = loop.evaluator(trained, dataset, test_key)(params)
        log_likelihood = round(_log_likelihood(params, config, dataset), 2)
        train = replace(train, objective=PriorFit(log_likelihood=log_likelihood))
        config = directory.start(folder, replace(config, train=train), dataset, resume=False)
        state = loop.train(folder, config, dataset, callbacks=[*shown, *callbacks])
    history = read_metrics(folder)
    return FitPriorResult(folder, state.eval_params, state, history, before, history[-1]["test"])


def _with_prior(run_dir: Path, trained: ModelConfig, prior: Any) -> ModelConfig:
    """Return the model with the new prior."""
    model = replace(trained, prior=prior)
    name, was = model.specs()["prior"], trained.specs()["prior"]
    if type(model.prior) is type(trained.prior):
        raise InputError(
            f"prior is {name!r}, but {run_dir} has the prior {was!r} already: expected another "
            "kind of prior"
        )
    learned = jax.eval_shape(lambda: model.prior.init(jax.random.key(0), model))
    if not jax.tree.leaves(learned):
        raise InputError(
            f"prior is {name!r}, which has no parameters to fit: expected a prior that is "
            "learned, such as 'mixture'"
        )
    return model


def _default_out(run_dir: Path, model: ModelConfig) -> Path:
    name, _ = parse_spec("prior", model.specs()["prior"])
    resolved = run_dir if run_dir.name not in ("", "..") else run_dir.resolve()
    return resolved.with_name(f"{resolved.name}-{name.rpartition('.')[2].lower()}")


def _load_data(config: RunConfig, data: Any) -> tuple[RunConfig, Dataset]:
    if data is None or isinstance(data, str):
        dataset = load_run_data(config, data)
        return config if data is None else configured({"data": data}, config), dataset
    return replace(config, data=IN_PYTHON), prepared(as_dataset(data), config)


def _log_likelihood(params: Params, config: RunConfig, data: Dataset) -> float:
    """Return the mean log-likelihood of training images, which a new prior does not change."""
    pixels_key, key = jax.random.split(run_keys(config)[0])
    images, labels = data.train_images, train_conditions(data, config)
    rows = np.linspace(0, len(images) - 1, min(len(images), _IMAGES)).astype(int)
    x = jnp.asarray(images[rows])
    if config.train.binarization == "dynamic":
        x = binarize(pixels_key, x)
    known = None if labels is None else known_classes(params, x, labels[rows])
    return float(elbo(params, key, x, known).log_likelihood.mean())
