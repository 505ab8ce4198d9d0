"""Output and messages that nobody reads, or that cannot be written."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from jaxvae.cli.commands import main
from jaxvae.runs.files import read_metrics
from jaxvae.runs.progress import Progress, _Console

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(autouse=True)
def keep_no_programs(monkeypatch):
    monkeypatch.setattr("jaxvae.cli.commands._enable_compilation_cache", lambda: None)


@contextmanager
def unread():
    """A pipe whose reader has closed it, as standard output and standard error are opened."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as stream:
        yield stream


@pytest.mark.parametrize("closed", [("stderr",), ("stdout", "stderr")])
def test_a_training_whose_messages_nobody_reads_goes_on(tmp_path, npz, monkeypatch, closed):
    run_dir = tmp_path / "run"
    monkeypatch.setattr("jaxvae.runs.drawing.draw", lambda *_: [run_dir / "figures" / "a.png"])
    train = ["train", "--data", str(npz), "--run-dir", str(run_dir), "--network", "mlp:width=8"]
    with unread() as stream:
        for name in closed:
            monkeypatch.setattr(sys, name, stream)
        assert main([*train, "--epochs", "2"]) == 0
        stream.write("the next one")  # what is written afterwards is dropped as well
    assert len(read_metrics(run_dir)) == 2


def test_output_that_nobody_reads_is_dropped(monkeypatch, capsys):
    with unread() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["summary"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_that_cannot_be_written_is_an_error_and_messages_are_not(monkeypatch, capsys):
    for name, arguments, said in (
        ("stdout", ["summary"], "jaxvae: No space left on device\n"),
        ("stderr", ["summary", "nowhere"], ""),
    ):
        with Path("/dev/full").open("w", buffering=1) as full, monkeypatch.context() as patch:
            patch.setattr(sys, name, full)
            assert main(arguments) == 2
        assert capsys.readouterr().err == said


def test_a_stream_that_is_closed_is_done_without(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["summary"]) == 0


def test_progress_that_nobody_reads_ends_no_program(monkeypatch):
    """Where rich would exit."""
    console = Progress()._console
    assert isinstance(console, _Console)
    with unread() as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        for _ in range(3):
            console.print("epoch 1/2")
