"""Run directories of odd names: what is suggested for them works, or they are refused."""

import os
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import refused

from jaxvae.cli.commands import _COMMANDS, _print_next_steps, main
from jaxvae.cli.parser import make_parser
from jaxvae.models.config import PRIORS
from jaxvae.runs.config import configured
from jaxvae.runs.files import as_argument, cannot_write
from jaxvae.runs.loop import stop_message

pytestmark = pytest.mark.usefixtures("compile_quickly", "keep_no_programs")
NAME = "-it's $HOME [0.1]"


@pytest.fixture(scope="module")
def keep_no_programs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxvae.cli.commands._enable_compilation_cache", lambda: None)
        yield


@pytest.fixture
def train(npz):
    return ["train", "--data", str(npz), "--network", "mlp:width=8", "--epochs", "1"]


def test_what_a_training_says_to_try_next_works_in_a_shell(capsys):
    _print_next_steps(Path(NAME), "", [Path("a.png")])
    told = [line.split("  ")[1] for line in capsys.readouterr().err.splitlines()[1:]]
    for line, command in zip(told, ["explore", "evaluate", "sample", "train"], strict=True):
        program, *arguments = shlex.split(line.replace("epochs N", "epochs 2"))
        assert (program, arguments[0]) == ("jaxvae", command)
        options = make_parser(_COMMANDS).parse_args(arguments)
        run = options.run_dir if command == "train" else options.run
        assert Path(run) == Path(NAME)


def test_a_training_that_patience_may_have_ended_goes_on_without(tmp_path, capsys):
    _print_next_steps(tmp_path, "", [Path("a.png")], patience=3)
    command = capsys.readouterr().err.splitlines()[-1].split("  ")[1]
    assert command.endswith("--epochs N --patience 0")


def test_an_interrupted_training_says_how_to_go_on_in_a_shell(train, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxvae.runs.loop.train", interrupt)
    path = tmp_path / NAME
    assert main([*train, "--run-dir", str(path)]) == 1
    for told in (
        capsys.readouterr().err,
        stop_message(path, 3),
        cannot_write(path, "No space left"),
    ):
        command = told.splitlines()[-1].partition(" with: ")[2]
        assert shlex.split(command) == ["jaxvae", "train", "--resume", "--run-dir", str(path)]


@pytest.mark.parametrize(("path", "argument"), [("runs/1", "runs/1"), ("a b", "'a b'"),
                                                ("-x", "./-x"), ("-$x", "'./-$x'")])  # fmt: skip
def test_a_path_is_quoted_and_no_flag(path, argument):
    assert as_argument(Path(path)) == argument


def test_a_folder_with_the_name_of_a_data_set_is_not_the_data_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mnist", "mnist-5k", "tfds:cifar10", "photos"):
        (tmp_path / name).mkdir()
    recorded = [configured({"data": name}).data for name in ("mnist", "mnist-5k", "tfds:cifar10")]
    assert recorded == ["mnist", "mnist-5k", "tfds:cifar10"]
    for path in ("./mnist", "photos"):
        assert configured({"data": path}).data == str(tmp_path / path)


def test_a_component_that_a_file_names_is_quoted():
    with refused("on the command line with --prior 'my.Prior:x=$(reboot)'"):
        PRIORS.parse("my.Prior:x=$(reboot)")


def test_a_path_that_is_not_utf_8_is_refused_for_runs_alone(train, tmp_path, capsys, monkeypatch):
    """Data and output may have any name."""
    monkeypatch.setattr("jaxvae.runs.drawing.draw", lambda *_: [])
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        odd.mkdir()
    except OSError:
        pytest.skip("this file system has no such names")
    shutil.copy(train[2], odd / "data.npz")
    train[2] = str(odd / "data.npz")
    assert main([*train, "--run-dir", str(tmp_path / "run")]) == 0
    sample = ["sample", str(tmp_path / "run"), "--n", "1", "--out", str(odd / "a.png")]
    assert main(sample) == 0
    shutil.copytree(tmp_path / "run", odd / "moved")
    monkeypatch.chdir(odd)
    capsys.readouterr()
    for arguments in (
        [*train, "--run-dir", str(odd / "x")],
        [*train, "--run-dir", "x"],
        [*train, "--run-dir", "x", "--seeds", "2"],
        ["sample", "moved", "--n", "1", "--out", "a.png"],
    ):
        assert main(arguments) == 2
        told = capsys.readouterr()
        assert "caf\\udce9" in told.err
        assert "is not valid UTF-8: expected a UTF-8 path for a run directory; rename" in told.err
        assert told.err.count("\n") == 1
    assert not (odd / "x").exists()
