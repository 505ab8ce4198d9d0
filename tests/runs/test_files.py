"""The files of a run directory: whole or not there, and of one training at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import refused

import jaxvae
from jaxvae.runs import files

OWN = """
import sys
from pathlib import Path
from jaxvae.runs.files import owned

with owned(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that has the directory."""
    environment = os.environ | {"PYTHONPATH": str(Path(jaxvae.__file__).parents[1])}
    command = [sys.executable, "-c", OWN, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        assert process.stdout.readline() == "mine\n"
        yield process
        process.kill()


def test_a_directory_has_one_training_at_a_time(tmp_path, other):
    says = f"{tmp_path} is being trained by process {other.pid} on"
    with refused(says), files.owned(tmp_path):
        pytest.fail("it has two")


def test_a_killed_training_gives_its_directory_back(tmp_path, other):
    other.kill()
    other.wait()
    with files.owned(tmp_path):
        pass


def test_what_a_killed_training_left_half_written_is_taken_away(tmp_path):
    (tmp_path / "figures").mkdir()
    for name in ("metrics.jsonl.part", "figures/samples.png.part"):
        (tmp_path / name).write_text("half")
    (tmp_path / "metrics.jsonl").write_text("")
    with files.owned(tmp_path):
        assert {path.name for path in tmp_path.rglob("*")} == {".lock", "figures", "metrics.jsonl"}


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    with refused("cannot be written: No such file"), files.owned(tmp_path / "nowhere"):
        pass


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_whose_writing_fails_is_the_old_one(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")

    def write(part):
        part.write_text("new, but")
        raise error

    with pytest.raises(error):
        files.write_whole(path, write)
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("a.json", "old")]


def test_a_file_of_a_newer_version_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"jaxvae": "99.1", "unheard_of": 1}))
    with refused(f"{path} was made by jaxvae 99.1, and this is {jaxvae.__version__}: use jaxvae 9"):
        files.read_json(path, dict)


@pytest.mark.parametrize("made_by", [jaxvae.__version__, "0.0.9"])
def test_a_file_of_this_version_or_an_older_one_is_read(tmp_path, made_by):
    files.write_json(tmp_path / "config.json", {"jaxvae": made_by, "seed": 1})
    assert files.read_json(tmp_path / "config.json", dict) == {"seed": 1}


@pytest.mark.parametrize(
    "content",
    ["", "{", "7", "[]", '{"jaxvae": 3}', '{"jaxvae": "new"}', "[" * 100_000, "\0", "\udcff"],
)
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with refused("config.json is damaged: "):
        files.read_json(tmp_path / "config.json", dict)


def test_a_line_that_a_kill_cut_off_is_no_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2, "st')
    assert files.read_metrics(tmp_path) == [{"epoch": 1}]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"epoch": 1}\n{"epo\n', "is damaged"),
        ('{"epoch": 1}\n{"epoch": 3}\n', "line 2 is not that of epoch 2"),
        ("[]\n", "line 1 is not that of epoch 1"),
    ],
)
def test_damaged_metrics_are_refused(tmp_path, content, says):
    (tmp_path / "metrics.jsonl").write_text(content)
    with refused("metrics.jsonl is damaged: ", says):
        files.read_metrics(tmp_path)
