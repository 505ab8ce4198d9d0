"""How a training goes: a bar on a terminal and in Jupyter, a line per epoch everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


def _can_move(console: Console) -> bool:
    """Whether a bar can be drawn over: on a terminal, and in Jupyter where it has widgets."""
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


class Progress:
    """Shows a training on a console, by default standard error, or in a Jupyter notebook."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)

    @contextmanager
    def training(self, epochs: int, images: int, done: int) -> Iterator[Shown]:
        """A training of `epochs` epochs of `images` images, of which `done` are over."""
        bar = Bar(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("to go, {task.fields[told]}"),
            console=self._console,
            transient=True,
            disable=not _can_move(self._console),
        )
        task = bar.add_task(
            "",
            total=epochs * images,
            completed=done * images,
            epoch=done + 1,
            epochs=epochs,
            told="compiling",
        )
        with bar:
            yield Shown(self._console, bar, task, epochs, images)


class Shown:
    """A training that is shown."""

    def __init__(self, console: Console, bar: Bar, task: Any, epochs: int, images: int) -> None:
        self._console, self._bar, self._task = console, bar, task
        self._epochs, self._images = epochs, images

    def advance(self, images: int, elbo: float) -> None:
        """`images` more are done; `elbo` is their mean, in nats per image."""
        self._bar.advance(self._task, images)
        rate = self._bar.tasks[0].speed
        told = f"ELBO {elbo:.1f}" + (f", {rate:.0f} images/s" if rate else "")
        self._bar.update(self._task, told=told)

    def finish_epoch(self, record: dict[str, Any]) -> None:
        """An epoch is over: `record` is its line in metrics.jsonl."""
        epoch, test = record["epoch"], record["test"]
        # Images that fill no batch are left out of an epoch, not of the bar.
        self._bar.update(
            self._task, completed=epoch * self._images, epoch=min(epoch + 1, self._epochs)
        )
        spread = f" ± {record['test_sd']['elbo']:.2f}" if "test_sd" in record else ""
        line = (
            f"epoch {epoch:{len(str(self._epochs))}}/{self._epochs}  "
            f"ELBO {record['train']['elbo']:.2f} train, {test['elbo']:.2f}{spread} test "
            f"(log-likelihood {test['log_likelihood']:.2f}, KL {test['kl']:.2f})  "
            f"{record['seconds']:.1f} s, {self._images / record['seconds']:.0f} images/s"
        )
        self._console.print(line, highlight=False, soft_wrap=True)
