"""Several processes train one model: as one would, and whatever happens to any of them."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import KEPT_BY_COMMANDS, SignalAt, refused

import jaxvae
from jaxvae.devices import processes
from jaxvae.errors import Preempted
from jaxvae.runs import directory, loop
from jaxvae.runs.config import configured
from jaxvae.runs.data import load_run_data
from jaxvae.runs.files import read_metrics

pytestmark = pytest.mark.usefixtures("compile_quickly")

FLAGS = ["--network", "mlp:width=16", "--latent-dim", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """4,096 training images and 101 test images, which no number of processes shares equally."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "data.npz"
    train, test = (rng.integers(0, 256, (n, 6, 6), np.uint8) for n in (4096, 101))
    np.savez(path, x_train=train, x_test=test)
    return path


class Together:
    """So many processes of `jaxvae train`, on as many devices each.

    places: where each is, as words before its command; the first can be reached at `host`.
    """

    def __init__(self, count, run_dir, *flags, devices=1, host="localhost", places=()):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            coordinator = f"{host}:{free.getsockname()[1]}"
        environment = os.environ | {
            **KEPT_BY_COMMANDS,
            "PYTHONPATH": str(Path(jaxvae.__file__).parents[1]),
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
            f"--xla_force_host_platform_device_count={devices}",
        }
        self.run_dir = run_dir
        self.logs = [run_dir.parent / f"{run_dir.name}-{count}-{i}.log" for i in range(count)]
        self.processes = []
        for i, log in enumerate(self.logs):
            own = f"--coordinator {coordinator} --num-processes {count} --process-id {i}".split()
            words = [*(places[i] if places else []), sys.executable, "-m", "jaxvae", "train"]
            words += ["--run-dir", str(run_dir)]
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [*words, *(own if count > 1 else []), *map(str, flags)],
                        stdout=file,
                        stderr=file,
                        env=environment,
                    )
                )

    def said(self):
        return "".join(log.read_text() for log in self.logs)

    def ended(self, within=120):
        """The exit codes; processes that do not end within so many seconds are a failure."""
        end = time.monotonic() + within
        try:
            return [p.wait(max(0, end - time.monotonic())) for p in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"not ended in {within} seconds: {self.said()}")
        finally:
            for process in self.processes:
                process.kill()

    def hit(self, which, number, after_epoch):
        """Send a signal to one of them in the midst of the epoch after that."""
        while len(read_metrics(self.run_dir)) < after_epoch:
            assert all(p.poll() is None for p in self.processes), self.said()
            time.sleep(0.05)
        time.sleep(0.3)
        self.processes[which].send_signal(number)


def undisturbed(run_dir, flags):
    config = configured(flags | {"network": "mlp:width=16", "latent_dim": 4})
    config = directory.start(run_dir, config, load_run_data(config), resume=False)
    return loop.train(run_dir, config, load_run_data(config))


def apart(run_dir, state):
    """The norm of the difference of all parameters, in parts of their own."""
    ours, theirs = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])
        for params in (state.params, jaxvae.load(run_dir))
    )
    return np.linalg.norm(ours - theirs) / np.linalg.norm(ours)


def test_two_and_four_processes_train_the_run_of_one(tmp_path, data):
    """20 steps and an epoch, with parameters everywhere and in parts."""
    flags = {"data": str(data), "batch_size": 192, "epochs": 1}
    words = ["--data", data, "--batch-size", 192, "--epochs", 1, *FLAGS]
    two = Together(2, tmp_path / "two", *words, "--fsdp", devices=2)
    four = Together(4, tmp_path / "four", *words)
    state = undisturbed(tmp_path / "one", flags)
    (alone,) = read_metrics(tmp_path / "one")
    for together in two, four:
        assert set(together.ended()) == {0}, together.said()
        (line,) = read_metrics(together.run_dir)
        assert line["step"] == alone["step"] == 21
        assert apart(together.run_dir, state) < 1e-3
        for split in "train", "test":
            assert abs(line[split]["elbo"] - alone[split]["elbo"]) < 0.2
        assert together.said().count("epoch 1/1") == 1, "only one tells"
    assert list((tmp_path / "four" / "figures").iterdir())


@pytest.fixture
def two_networks():
    """Two network namespaces with nothing in common but a cable, as if they were two hosts."""
    names = [f"jaxvae-{os.getpid()}-{i}" for i in range(2)]
    ends = [f"jv{os.getpid()}-{i}" for i in range(2)]
    commands = [
        *(f"netns add {name}" for name in names),
        f"link add {ends[0]} type veth peer name {ends[1]}",
        *(f"link set {end} netns {name}" for name, end in zip(names, ends, strict=True)),
        *(
            f"-n {name} addr add 10.77.0.{i}/24 dev {ends[i - 1]}"
            for i, name in enumerate(names, 1)
        ),
        *(
            f"-n {name} link set {end} up"
            for name, own in zip(names, ends, strict=True)
            for end in ("lo", own)
        ),
    ]
    try:
        for command in commands:
            try:
                done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            except FileNotFoundError:
                pytest.skip("this machine has no `ip`")
            if done.returncode:
                pytest.skip(f"this machine lets nobody make networks: {done.stderr.strip()}")
        for i, name in enumerate(names, 1):  # `ip netns exec` shows this as /etc/hosts
            Path("/etc/netns", name).mkdir(parents=True)
            hosts_file = Path("/etc/netns", name, "hosts")
            hosts_file.write_text(f"127.0.0.1 localhost\n10.77.0.{i} {socket.gethostname()}\n")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names if shutil.which("ip") else ():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)


def test_processes_meet_over_a_network(tmp_path, data, two_networks):
    words = ["--data", data, "--batch-size", 512, "--epochs", 1, *FLAGS]
    together = Together(2, tmp_path / "two", *words, host="10.77.0.1", places=two_networks)
    assert together.ended() == [0, 0], together.said()
    state = undisturbed(tmp_path / "one", {"data": str(data), "batch_size": 512, "epochs": 1})
    assert apart(tmp_path / "two", state) < 1e-3


def test_whatever_happens_to_a_process_the_run_goes_on_as_if_it_had_not(tmp_path, data):
    """SIGTERM; a worker killed; the coordinator killed; at last half as many processes go on."""
    words = ["--data", data, "--batch-size", 16, "--epochs", 4, *FLAGS]
    run_dir = tmp_path / "run"

    together = Together(2, run_dir, *words)
    together.hit(1, signal.SIGTERM, after_epoch=1)
    assert together.ended(60) == [75, 75], together.said()
    assert together.said().count("resume with: jaxvae train --resume --run-dir") == 2
    stopped_at = int(jaxvae.restore(run_dir).step)
    assert stopped_at > 256

    together = Together(2, run_dir, "--resume")
    together.hit(1, signal.SIGKILL, after_epoch=2)
    codes = together.ended(60)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0
    assert "failed" in together.said() or "died" in together.said()

    together = Together(2, run_dir, "--resume")
    together.hit(0, signal.SIGKILL, after_epoch=3)
    codes = together.ended(60)
    assert codes[0] == -signal.SIGKILL
    assert codes[1] != 0

    assert Together(1, run_dir, "--resume").ended() == [0]
    state = undisturbed(tmp_path / "whole", {"data": str(data), "batch_size": 16, "epochs": 4})
    assert apart(run_dir, state) < 1e-3
    lines, whole = read_metrics(run_dir), read_metrics(tmp_path / "whole")
    assert [line["step"] for line in lines] == [line["step"] for line in whole]
    for line, other in zip(lines, whole, strict=True):
        assert abs(line["train"]["elbo"] - other["train"]["elbo"]) < 0.2


@pytest.mark.parametrize("advance", [1, 2, 4], ids=["mid-epoch", "second epoch", "its end"])
def test_sigterm_saves_in_mid_epoch_and_loses_nothing(tmp_path, data, advance):
    flags = {"data": str(data), "batch_size": 512, "epochs": 2, "network": "mlp:width=16"}
    handler = signal.getsignal(signal.SIGTERM)
    config = configured(flags)
    images = load_run_data(config)
    ends = []
    for name in "stopped", "whole":
        run_dir = tmp_path / name
        config = directory.start(run_dir, configured(flags), images, resume=False)
        if name == "stopped":
            with pytest.raises(Preempted, match=f"saved after step {2 * advance}"):
                loop.train(run_dir, config, images, callbacks=[SignalAt(advance)])
            assert signal.getsignal(signal.SIGTERM) is handler
            assert int(jaxvae.restore(run_dir).step) == 2 * advance
        ends.append(loop.train(run_dir, config, images))
    for a, b in zip(*(jax.tree.leaves(end.params) for end in ends), strict=True):
        np.testing.assert_array_equal(a, b)
    stopped, whole = (
        [{**line, "seconds": 0} for line in read_metrics(tmp_path / name)]
        for name in ("stopped", "whole")
    )
    assert stopped == whole


def test_what_is_missing_or_wrong_of_the_processes_is_said():
    with refused("--num-processes and --process-id are missing, and no launcher was found"):
        processes.join(coordinator="localhost:1234")
    with refused("--coordinator is localhost: expected HOST:PORT"):
        processes.join("localhost", 2, 0)
    with refused("--process-id is 2: expected a number from 0 to 1"):
        processes.join("localhost:1234", 2, 2)


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({}, None),
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM"),
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "h"}, None),
    ],
)
def test_a_launcher_of_several_processes_is_known_by_what_it_says(monkeypatch, variables, launcher):
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "KUBERNETES", "JOB_COMPLETION")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes._launcher() == launcher


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        (
            {"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "two"},
            "SLURM_STEP_NUM_TASKS is 'two': expected a whole number",
        ),
        (
            {"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7",
             "SLURM_NTASKS": "2", "SLURM_PROCID": "", "SLURM_LOCALID": "0"},
            "SLURM_PROCID is '': expected a whole number",
        ),
        (
            {"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "2"},
            "SLURM_JOB_ID is not set: expected a whole number",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "4.5"}, "OMPI_COMM_WORLD_SIZE is '4.5': expected a whole"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_RANK is not set: expected a whole"),
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "4"},
            "OMPI_COMM_WORLD_RANK is 4: expected a number from 0 to 3",
        ),
    ],
)  # fmt: skip
def test_what_a_launcher_says_wrongly_is_refused(monkeypatch, variables, says):
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "KUBERNETES", "JOB_COMPLETION")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with refused(says):
        processes.join()


def test_where_all_is_given_the_launcher_is_not_asked(monkeypatch):
    given = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *all_of_it, **_: given.append(all_of_it)
    )
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "x")
    processes.join("localhost:1234", 2, 1)
    assert given == [("localhost:1234", 2, 1)]


@pytest.mark.parametrize(("chips", "told"), [([], True), ([Path("/dev/accel0")], False)])
def test_libtpu_is_kept_from_looking_only_where_there_is_no_tpu(monkeypatch, chips, told):
    for name in processes._NO_TPU:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes, "_has_libtpu", lambda: True)
    monkeypatch.setattr(processes, "_tpu_chips", lambda: chips)
    processes.pass_over_missing_tpu()
    assert all((name in os.environ) == told for name in processes._NO_TPU)
