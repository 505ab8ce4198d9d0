"""Tracking of runs by MLflow and by Weights & Biases.

Both receive the configuration, the metrics of every epoch and, at the end, the files of a run
directory: config.json, metrics.jsonl, the last checkpoint and the figures. The models of a sweep
are tracked as runs of one group. The run directory keeps the identifier of the tracked run, which a
resumed run continues.
"""

import importlib.util
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxvae.errors import InputError, NotTracked
from jaxvae.models.vae import Params
from jaxvae.runs.callbacks import Callback, Training
from jaxvae.runs.checkpoints import newest_intact
from jaxvae.runs.config import RunConfig
from jaxvae.runs.divergence import DIVERGED
from jaxvae.runs.files import read_json, write_json

_SECONDS = 30  # that a server has to answer, at the start
_SPLITS = ("train", "test", "train_sd", "test_sd")
_IDENTIFIER = re.compile(r"[\w-]{1,128}", re.ASCII)


class _Tracker(Callback):
    """What both trackers do.

    Attributes:
      title: name of the tracker in messages.
      package: the package, which is also the name of the extra and of the file in run directories.
      remedy: what to do if it does not start.
    """

    title: str
    package: str
    remedy: str

    def __init__(self) -> None:
        if importlib.util.find_spec(self.package) is None:
            raise InputError(
                f"tracking with {self.title} needs {self.package}, which is not installed: "
                f'pip install "jaxvae[{self.package}]"'
            )

    def start(self, training: Training) -> None:
        """Open the tracked runs, and send the epochs that they lack."""
        self._run_dir = training.run_dir
        self._name = training.run_dir.resolve().name if training.run_dir else "run"
        self._runs: dict[str, Any] = {}
        self._last: dict[str, int] = {}
        self._pending = list(training.history)
        identifiers = {name: self._identifier(name) for name in ("", *training.configs)}
        try:
            self._open(training.configs, identifiers)
        except InputError:
            raise
        except Exception as error:  # of any kind: of the network, of a database
            raise InputError(
                f"{self.title} cannot be used: {_one_line(error)}; {self.remedy}"
            ) from None
        for name, run in self._runs.items():
            if self._run_dir is not None:
                identifier = {"run": self._identifier_of(run)}
                write_json(self._run_dir / name / f"{self.package}.json", identifier)
        self._send()

    def epoch(self, record: dict[str, Any], params: Params) -> None:
        """Send the metrics of an epoch."""
        self._pending.append(record)
        self._send()

    def end(self, params: Params | None) -> None:
        """Send the files of the run directory, and close the tracked runs."""
        self._send()
        for name, run in self._runs.items():
            folder = self._run_dir / name if self._run_dir else None
            finished = params is not None and not (
                folder and name and (folder / DIVERGED).is_file()
            )
            try:
                if finished and folder:
                    self._send_files(run, folder, max(0, self._last[name]))
                self._close(run, finished=finished)
            except Exception as error:
                self._warn("files", error)

    def _send(self) -> None:
        """Send all epochs that were not sent yet."""
        try:
            while self._pending:
                record = self._pending[0]
                for name, run in self._runs.items():
                    line = record.get("models", {}).get(name) if name else {}
                    if line is not None and record["step"] > self._last[name]:
                        self._log(run, record["step"], _metrics(record, line or record))
                        self._last[name] = record["step"]
                self._pending.pop(0)
        except Exception as error:
            self._warn("metrics", error)

    def _warn(self, what: str, error: Exception) -> None:
        again = "; they are sent again after the next epoch" if what == "metrics" else ""
        warnings.warn(
            f"{self.title} did not take the {what} of {self._name}: {_one_line(error)}{again}",
            NotTracked,
            stacklevel=2,
        )

    def _identifier(self, name: str) -> str | None:
        """Return the identifier of the run that was tracked before, or None."""
        path = self._run_dir / name / f"{self.package}.json" if self._run_dir else None
        return read_json(path, _identifier_in) if path is not None and path.exists() else None

    def _open(
        self, configs: Mapping[str, RunConfig], identifiers: Mapping[str, str | None]
    ) -> None:
        """Fill `_runs`, and `_last` with the last step that each has."""
        raise NotImplementedError

    def _identifier_of(self, run: Any) -> str:
        raise NotImplementedError

    def _log(self, run: Any, step: int, metrics: dict[str, float]) -> None:
        raise NotImplementedError

    def _send_files(self, run: Any, folder: Path, step: int) -> None:
        raise NotImplementedError

    def _close(self, run: Any, *, finished: bool) -> None:
        raise NotImplementedError


class MLflow(_Tracker):
    """Track a run with MLflow.

    A sweep is a parent run with means and standard deviations, and a child run for each model.
    """

    title, package = "MLflow", "mlflow"
    remedy = "expected a tracking URI, such as sqlite:///mlflow.db or http://HOST:PORT"

    def __init__(self, uri: str | None = None, experiment: str | None = None) -> None:
        """Check that MLflow is installed.

        Args:
          uri: the tracking URI, such as "sqlite:///mlflow.db" or the address of a server; by
            default MLFLOW_TRACKING_URI, or MLflow's own.
          experiment: name of the experiment; by default MLFLOW_EXPERIMENT_NAME, or "jaxvae".

        Raises:
          InputError: it is not.
        """
        super().__init__()
        self._uri = uri
        self._experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "jaxvae"

    def _open(
        self, configs: Mapping[str, RunConfig], identifiers: Mapping[str, str | None]
    ) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(self._uri)
        parent: dict[str, str] = {}
        for name in dict.fromkeys(("", *configs)):
            saved = identifiers[name]
            if saved is None:
                self._runs[name] = self._create(name or self._name, configs.get(name), parent)
                self._last[name] = -1
            else:
                self._client.update_run(saved, status="RUNNING")
                self._runs[name] = saved
                sent = self._client.get_metric_history(saved, "epoch")
                self._last[name] = max((one.step for one in sent), default=-1)
            parent = {"mlflow.parentRunId": self._runs[""]}

    def _create(self, name: str, config: RunConfig | None, tags: dict[str, str]) -> str:
        from mlflow.entities import Param

        found = self._client.get_experiment_by_name(self._experiment)
        experiment = (
            self._client.create_experiment(self._experiment)
            if found is None
            else found.experiment_id
        )
        run = self._client.create_run(experiment, tags=tags, run_name=name).info.run_id
        if config is not None:
            flat = _flat(config)
            self._client.log_batch(run, params=[Param(k, str(x)[:500]) for k, x in flat.items()])
        return run

    def _identifier_of(self, run: Any) -> str:
        return run

    def _log(self, run: Any, step: int, metrics: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        sent = [Metric(name, value, now, step) for name, value in metrics.items()]
        self._client.log_batch(run, metrics=sent)

    def _send_files(self, run: Any, folder: Path, step: int) -> None:
        for path, place in _files(folder):
            inside = None if place.parent == Path() else str(place.parent)
            self._client.log_artifact(run, str(path), inside)

    def _close(self, run: Any, *, finished: bool) -> None:
        self._client.set_terminated(run, "FINISHED" if finished else "KILLED")


class WandB(_Tracker):
    """Track a run with Weights & Biases. The models of a sweep are runs of one group."""

    title, package = "Weights & Biases", "wandb"
    remedy = "to track without a server, set WANDB_MODE=offline"

    def __init__(self, project: str | None = None) -> None:
        """Check that wandb is installed.

        Args:
          project: name of the project; by default WANDB_PROJECT, or "jaxvae".

        Raises:
          InputError: it is not.
        """
        super().__init__()
        self._project = project or os.environ.get("WANDB_PROJECT") or "jaxvae"

    def _open(
        self, configs: Mapping[str, RunConfig], identifiers: Mapping[str, str | None]
    ) -> None:
        import wandb

        for name, config in configs.items():
            run = wandb.init(
                project=self._project,
                id=identifiers[name],
                resume="allow",
                name=f"{self._name}/{name}" if name else self._name,
                group=self._name if name else None,
                config=_flat(config),
                dir=self._run_dir,
                reinit="create_new",
                settings=wandb.Settings(console="off", init_timeout=_SECONDS),
            )
            self._runs[name], self._last[name] = run, -1
            if run.resumed:
                self._last[name] = run.step - 1

    def _identifier_of(self, run: Any) -> str:
        return run.id

    def _log(self, run: Any, step: int, metrics: dict[str, float]) -> None:
        run.log(metrics, step=step)

    def _send_files(self, run: Any, folder: Path, step: int) -> None:
        import wandb

        artifact = wandb.Artifact(f"run-{run.id}", type="model")
        for path, place in _files(folder):
            artifact.add_file(str(path), str(place))
            if path.suffix == ".png":
                run.log({f"figures/{path.stem}": wandb.Image(str(path))}, step=step)
        run.log_artifact(artifact)

    def _close(self, run: Any, *, finished: bool) -> None:
        run.finish(exit_code=0 if finished else 1)


def _flat(config: RunConfig) -> dict[str, Any]:
    """Return the fields of model, training and run in one dict."""
    fields = config.to_dict()
    del fields["data_seen"]
    return {**fields.pop("model"), **fields.pop("train"), **fields}


def _metrics(record: Mapping[str, Any], line: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of an epoch, or of a model in it, by their names, such as test/elbo."""
    metrics = {name: record[name] for name in ("epoch", "seconds") if name in record}
    for split in _SPLITS:
        metrics |= {f"{split}/{name}": value for name, value in line.get(split, {}).items()}
    return metrics


def _files(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Return the files of a run directory to send, with their places in it.

    They are a run directory themselves.
    """
    names = ("config.json", "sweep.json", "metrics.jsonl")
    found = [*(folder / name for name in names), *folder.glob("figures/*.*")]
    step = newest_intact(folder)
    if step is not None:
        found += (folder / "checkpoints" / str(step)).rglob("*")
    for path in sorted(found):
        if path.is_file() and not path.is_symlink():
            yield path, path.relative_to(folder)


def _identifier_in(content: Mapping[str, Any]) -> str:
    """Return the identifier in the file of a run directory; raise ValueError if there is none."""
    found = content.get("run")
    if not isinstance(found, str) or not _IDENTIFIER.fullmatch(found):
        raise ValueError("expected the identifier of a tracked run")
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
