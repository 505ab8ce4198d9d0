"""How a training goes, as a bar on a terminal and as plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Shows epochs on standard error; `quiet` shows nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(file=sys.stderr, quiet=quiet)

    @contextmanager
    def epoch(self, epoch: int, epochs: int, images: int) -> Iterator[Shown]:
        """The progress of one epoch; leaving the context leaves its one line behind."""
        bar = Bar(
            TextColumn(f"epoch {epoch:{len(str(epochs))}}/{epochs}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} images"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[told]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        shown = Shown(bar, images)
        with bar:
            yield shown
        if shown.record:
            self._console.print(
                _sentence(shown.record, epochs, images), highlight=False, soft_wrap=True
            )


class Shown:
    """The bar of one epoch."""

    def __init__(self, bar: Bar, images: int) -> None:
        self.record: dict[str, Any] | None = None
        self._bar = bar
        self._task = bar.add_task("", total=images, told="compiling")

    def advance(self, images: int, elbo: float) -> None:
        """`images` more are done; `elbo` is their mean, in nats per image."""
        self._bar.advance(self._task, images)
        rate = self._bar.tasks[self._task].speed
        told = f"ELBO {elbo:.1f}" + (f", {rate:.0f} images/s" if rate else "")
        self._bar.update(self._task, told=told)

    def finish(self, record: dict[str, Any]) -> None:
        """The epoch is over: `record` is its line in metrics.jsonl."""
        self.record = record


def _sentence(record: dict[str, Any], epochs: int, images: int) -> str:
    return (
        f"epoch {record['epoch']:{len(str(epochs))}}/{epochs}  "
        f"ELBO {record['train']['elbo']:.2f} train, {record['test']['elbo']:.2f} test "
        f"(log-likelihood {record['test']['log_likelihood']:.2f}, KL {record['test']['kl']:.2f})  "
        f"{record['seconds']:.1f} s, {images / record['seconds']:.0f} images/s"
    )
