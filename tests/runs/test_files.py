"""The files of a run directory: whole or not there, and of one training at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import at_once, refused

import jaxvae
from jaxvae.errors import Damaged
from jaxvae.runs import files

OWN = """
import sys
from pathlib import Path
from jaxvae.runs.files import locked

with locked(Path(sys.argv[1])):
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


@pytest.mark.parametrize("sweep", [False, True])
def test_the_command_that_resumes_has_what_is_to_be_typed_again(tmp_path, sweep):
    def command(**fields):
        written = {"jaxvae": "0.2.0"} | ({"seed-0": fields, "seed-1": fields} if sweep else fields)
        (tmp_path / ("sweep.json" if sweep else "config.json")).write_text(json.dumps(written))
        return files.resume_command(tmp_path)

    plain = f"jaxvae train --resume --run-dir {tmp_path}"
    assert files.resume_command(tmp_path) == plain
    model, train = {"prior": "mixture", "latent_dim": 2}, {"optimizer": "adam:b1=0.5"}
    assert command(data="/data/a.npz", model=model, train=train) == plain
    own = command(
        data="my.data", model={"prior": "my.Prior:scale=2"}, train={"optimizer": "my.sgd"}
    )
    assert own == f"{plain} --data my.data --prior my.Prior:scale=2 --optimizer my.sgd"
    of_fit = command(data="python", model=model, train=train)
    assert of_fit == f"{plain} --data DATA (or by the same call of jaxvae.fit)"
    for damaged in ("[]", "{", '{"model": 3, "seed-0": 3}'):
        (tmp_path / ("sweep.json" if sweep else "config.json")).write_text(damaged)
        assert files.resume_command(tmp_path) == plain


def test_a_directory_has_one_training_at_a_time(tmp_path, other):
    says = f"{tmp_path} is being trained by process {other.pid} on"
    with refused(says), files.locked(tmp_path):
        pytest.fail("it has two")


def test_a_killed_training_gives_its_directory_back(tmp_path, other):
    other.kill()
    other.wait()
    with files.locked(tmp_path):
        pass


def test_what_a_killed_training_left_half_written_is_taken_away(tmp_path):
    """And nothing else: downloads and animations are written under such names, too."""
    others = [
        "digits.mp4.part", "metrics.jsonl.part", "figures/samples.png.part", "checkpoints/x.part",
        "checkpoints/8/sha256.json.part", "downloads/deep/data.tar.part", ".jaxvae-1.part",
    ]  # fmt: skip
    part = ".jaxvae-0123456789abcdef.part"
    ours = [part, f"figures/{part}", f"manifolds/{part}", f"checkpoints/8/{part}"]
    kept_elsewhere = f"downloads/{part}"
    for name in (*others, *ours, kept_elsewhere):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("half")
    with files.locked(tmp_path):
        left = {str(one.relative_to(tmp_path)) for one in tmp_path.rglob("*") if one.is_file()}
    assert left == {".lock", *others, kept_elsewhere}


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def test_a_lock_that_is_a_link_is_refused_and_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    link(tmp_path / "run" / ".lock", victim)
    with refused(".lock is a symbolic link"), files.locked(tmp_path / "run"):
        pass
    (tmp_path / "run" / ".lock").unlink()
    os.link(victim, tmp_path / "run" / ".lock")
    with files.locked(tmp_path / "run"):
        pass
    assert victim.read_text() == "precious"


def test_what_kills_left_behind_a_link_is_not_touched(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ".jaxvae-0123456789abcdef.part").write_text("of another run")
    for name in ("figures", "manifolds", "checkpoints"):
        link(tmp_path / "run" / name, outside)
    link(tmp_path / "other" / "checkpoints" / "8", outside)
    for run in ("run", "other"):
        with files.locked(tmp_path / run):
            pass
    assert [path.name for path in outside.iterdir()] == [".jaxvae-0123456789abcdef.part"]


@pytest.mark.parametrize("name", ["evaluation.json", "evaluation.json.part"])
def test_a_file_is_not_written_through_a_link(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    link(tmp_path / "run" / name, victim)
    files.write_json(tmp_path / "run" / "evaluation.json", {"elbo": 1})
    assert victim.read_text() == "precious"
    assert not (tmp_path / "run" / "evaluation.json").is_symlink()


def test_a_line_is_not_appended_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    link(tmp_path / "run" / "metrics.jsonl", victim)
    with pytest.raises(OSError, match="symbolic link"):
        files.append_metrics(tmp_path / "run", line(1))
    assert victim.read_text() == "precious"


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    with refused("cannot be written: No such file"), files.locked(tmp_path / "nowhere"):
        pass


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


def line(epoch):
    terms = {"loss": 3.0, "elbo": -3.0, "log_likelihood": -2.0, "kl": 1.0}
    return {"epoch": epoch, "step": 8 * epoch, "train": terms, "test": terms, "seconds": 0.1}


def text(*lines):
    return "".join(one if isinstance(one, str) else json.dumps(one) + "\n" for one in lines)


def test_a_line_that_a_kill_cut_off_is_no_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(text(line(1), '{"epoch": 2, "st'))
    assert files.read_metrics(tmp_path) == [line(1)]


def test_blank_lines_are_no_damage(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(text("\n", line(1), " \n", line(2), "\n\n"))
    assert files.read_metrics(tmp_path) == [line(1), line(2)]


@pytest.mark.parametrize(
    "odd",
    [
        '{"epo', "[]", "7", "\0\0", "[" * 100_000, "\udcff", "{}", '{"epoch": 2}',
        json.dumps({**line(2), "epoch": 1}), json.dumps({**line(2), "epoch": True}),
        json.dumps({**line(2), "epoch": 2.0}), json.dumps({**line(2), "epoch": 10**30}),
        json.dumps({**line(2), "train": 5}), json.dumps({**line(2), "step": "x"}),
        json.dumps({**line(2), "test": {"elbo": -3.0}}),
        json.dumps({**line(2), "test": {**line(2)["test"], "kl": None}}),
        json.dumps({**line(2), "test": {**line(2)["test"], "kl": float("nan")}}),
        json.dumps({**line(2), "test": {**line(2)["test"], "kl": 10**400}}),
    ],
)  # fmt: skip
def test_odd_lines_are_passed_over_and_kept_in_a_copy(tmp_path, odd):
    content = text(line(1), odd + "\n", line(3)).encode(errors="surrogateescape")
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.warns(Damaged, match=r"metrics.jsonl is damaged in line 2, skipped: restore it"):
        assert files.read_metrics(tmp_path) == [line(1), line(3)]
    with pytest.warns(Damaged, match="lacks the lines of 1 of 3 epochs, from epoch 2 on"):
        files.truncate_history(tmp_path, 3)
    assert files.read_metrics(tmp_path) == [line(1), line(3)]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == content


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", ".lock"])
def test_a_pipe_is_refused_at_once(tmp_path, name):
    """Of a pipe that nobody writes to, reading would never end."""
    os.mkfifo(tmp_path / name)
    with at_once(), refused("not a regular file"), files.locked(tmp_path):
        files.read_metrics(tmp_path)
        files.read_json(tmp_path / "config.json", dict)
