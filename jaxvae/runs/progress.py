"""Progress: a bar on a terminal and in Jupyter, a line per minute elsewhere, a line per epoch."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from jaxvae.devices.processes import is_first
from jaxvae.models.vae import Params
from jaxvae.runs.callbacks import Callback, Training

# Under the line of a first epoch whose training ELBO is far below that of the test images.
_FIRST_EPOCH = (
    "  (train is the mean over all steps of the epoch, and the first steps were far below it; test "
    "is after the last step)"
)


def _can_move(console: Console) -> bool:
    """Return whether a bar can be redrawn: on a terminal, or in Jupyter with ipywidgets."""
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


class _Console(Console):
    """A console that goes quiet when its output is closed; rich's would exit."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with suppress(OSError):  # for what is still buffered
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, self.file.fileno())
            os.close(devnull)


class _Compilations(logging.Handler):
    """Report the name of each function that JAX compiles, and "" when it is compiled.

    JAX says so in its log alone.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        super().__init__()
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if match := re.match(r"Compiling (?:jit\()?(\w+)", message):
            self._report(f"compiling {match[1]}")
        elif message.startswith("Finished XLA compilation"):
            self._report("")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen, without the messages going anywhere else."""
        loggers = [
            logging.getLogger(f"jax._src.{name}") for name in ("interpreters.pxla", "dispatch")
        ]
        before = [(logger.level, logger.propagate) for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.DEBUG)
            logger.propagate = False
            logger.addHandler(self)
        try:
            yield
        finally:
            for logger, (level, propagate) in zip(loggers, before, strict=True):
                logger.removeHandler(self)
                logger.setLevel(level)
                logger.propagate = propagate


@contextmanager
def _shown(
    what: str, *columns: ProgressColumn, console: Console | None
) -> Iterator[tuple[Bar, TaskID]]:
    """Show a line on standard error, or in Jupyter: a text, columns, and what is compiled."""
    console = console or _Console(stderr=True)
    status = TextColumn("{task.fields[status]}", markup=False)
    bar = Bar(
        SpinnerColumn(),
        TextColumn(what, markup=False),
        *columns,
        status,
        console=console,
        transient=True,
        disable=not _can_move(console),
        redirect_stdout=False,  # which may be a file
    )
    task = bar.add_task("", total=None, status="")
    compilations = _Compilations(lambda status: bar.update(task, status=status))
    with bar, nullcontext() if bar.disable else compilations.listening():
        yield bar, task


@contextmanager
def working(what: str, console: Console | None = None) -> Iterator[None]:
    """Show what is done, for how long, and what JAX compiles for it, on a terminal or in Jupyter.

    Args:
      what: text of the line.
      console: by default standard error.
    """
    with _shown(what, TimeElapsedColumn(), console=console):
        yield


@contextmanager
def counting(
    what: str, noun: str = "image", console: Console | None = None, *, interval: float = 60.0
) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal or in Jupyter while images are processed; elsewhere print lines.

    Args:
      what: text before the bar, and at the start of each line.
      noun: what an image is called.
      console: by default standard error.
      interval: shortest time between two lines, and before the first, in seconds.

    Yields:
      A function to call with the number of images that are done, and that of all.
    """
    with _shown(what, BarColumn(), TimeRemainingColumn(), console=console) as (bar, task):
        last = time.monotonic()

        def count(done: int, total: int) -> None:
            nonlocal last
            status = f"{done}/{total} {noun}s"
            bar.update(task, completed=done, total=total, status=f"left, {status}")
            now = time.monotonic()
            if bar.disable and now >= last + interval:
                last = now
                bar.console.print(f"{what}: {status}", highlight=False, soft_wrap=True)

        yield count


class Progress(Callback):
    """Show the progress of training on a console, by default standard error, or in Jupyter."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or _Console(stderr=True)
        self._preparation = ExitStack()

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Show that data and model are prepared, until the training starts."""
        with self._preparation:
            if is_first():
                self._preparation.enter_context(working("preparing", self._console))
            yield

    def start(self, training: Training) -> None:
        """Show the bar."""
        self._preparation.close()
        self._epochs, self._images = training.epochs, training.images
        self._noun = training.config.model.noun
        self._bar = Bar(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left, {task.fields[status]}"),
            console=self._console,
            transient=True,
            disable=not _can_move(self._console),
        )
        self._task = self._bar.add_task(
            "",
            total=self._epochs * self._images,
            completed=training.done * self._images,
            epoch=min(training.done + 1, self._epochs),
            epochs=self._epochs,
            status="compiling",
        )
        self._bar.start()

    def dispatch(self, images: int, metrics: Mapping[str, float]) -> None:
        """Advance the bar."""
        self._bar.advance(self._task, images)
        rate = self._bar.tasks[0].speed
        status = f"ELBO {metrics['elbo']:.1f}" + (f", {rate:.0f} {self._noun}s/s" if rate else "")
        self._bar.update(self._task, status=status)

    def epoch(self, record: dict[str, Any], params: Params) -> None:
        """Print the metrics of the epoch as a line."""
        epoch, test = record["epoch"], record["test"]
        # The last, incomplete batch is dropped from the epoch but counted by the bar.
        self._bar.update(
            self._task, completed=epoch * self._images, epoch=min(epoch + 1, self._epochs)
        )
        spread = f" ± {record['test_sd']['elbo']:.2f}" if "test_sd" in record else ""
        line = (
            f"epoch {epoch:{len(str(self._epochs))}}/{self._epochs}  "
            f"ELBO {record['train']['elbo']:.2f} train, {test['elbo']:.2f}{spread} test "
            f"(log-likelihood {test['log_likelihood']:.2f}, KL {test['kl']:.2f})  "
            f"{record['seconds']:.1f} s, {self._images / record['seconds']:.0f} "
            f"{self._noun}s/s"
        )
        self._console.print(line, highlight=False, soft_wrap=True)
        if epoch == 1 and record["train"]["elbo"] < test["elbo"] - abs(test["elbo"]):
            self._console.print(_FIRST_EPOCH, highlight=False, soft_wrap=True)

    def end(self, params: Params | None) -> None:
        """Remove the bar."""
        self._bar.stop()
