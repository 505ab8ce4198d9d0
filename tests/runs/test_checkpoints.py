"""Checkpoints: what is saved comes back, and the latest and the best are kept."""

import json
import os
import shutil
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import OwnDecoder, OwnEncoder, at_once, moved, refused

import jaxvae
from jaxvae.errors import Damaged, TrainingFailed
from jaxvae.runs import checkpoints
from jaxvae.runs.checkpoints import metadata, newest_intact, open_checkpoints, steps_of, write
from jaxvae.runs.config import read_config
from jaxvae.runs.data import load_run_data
from jaxvae.training.step import optimizer

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def state():
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), np.uint8)
    model = jaxvae.ModelConfig((8, 8, 1), 2, network="mlp:width=8")
    config = jaxvae.TrainConfig(batch_size=16, learning_rate=3e-4)
    state = jaxvae.create_train_state(jax.random.key(5), model, config)
    return jaxvae.train_epoch(state, images)[0]


def assert_states_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.array_equal(*map(numbers, (x, y)))


def numbers(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def test_a_state_comes_back_bit_for_bit(tmp_path, state):
    jaxvae.save(tmp_path, state)
    assert_states_equal(jaxvae.restore(tmp_path), state)


def test_a_directory_is_enough_to_use_a_model(tmp_path, state, images):
    jaxvae.save(tmp_path, state)
    params = jaxvae.load(str(tmp_path))
    assert params.config == state.params.config
    np.testing.assert_array_equal(
        jaxvae.reconstruct(params, images), jaxvae.reconstruct(state.params, images)
    )


def test_a_directory_is_a_run_whose_data_are_to_be_named(tmp_path, state, images):
    jaxvae.save(tmp_path, state)
    config = read_config(tmp_path)
    assert (config.model, config.train) == (state.params.config, state.config)
    with refused("the data of this run were passed as arrays in Python: name a data set with --da"):
        load_run_data(config)
    (tmp_path / "config.json").write_text("mine")
    jaxvae.save(tmp_path, replace(state, step=state.step + 1))
    assert (tmp_path / "config.json").read_text() == "mine"


def test_training_goes_on_as_if_nothing_had_happened(tmp_path, state, images):
    jaxvae.save(tmp_path, state)
    again = jaxvae.train_epoch(jaxvae.restore(tmp_path), images)[0]
    on = jaxvae.train_epoch(jax.tree.map(jnp.copy, state), images)[0]  # takes its memory
    assert_states_equal(again, on)


def test_the_latest_and_the_best_are_kept(tmp_path, state):
    with open_checkpoints(tmp_path) as checkpoints:
        for step, elbo in enumerate([-30.0, -10.0, -20.0, -25.0]):
            write(checkpoints, replace(state, step=jnp.int32(step)), {"elbo": elbo})
    assert int(jaxvae.restore(tmp_path).step) == 3
    assert int(jaxvae.restore(tmp_path, "best").step) == 1
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {"1", "2", "3"}


@pytest.mark.parametrize("which", ["latest", "best"])
@pytest.mark.parametrize("where", ["_find_fault", "_read"])
def test_a_checkpoint_that_a_training_deletes_meanwhile_is_passed_over_for_the_next(
    tmp_path, state, monkeypatch, which, where
):
    with open_checkpoints(tmp_path) as manager:
        for step in (1, 2):
            write(manager, replace(state, step=jnp.int32(step)), {"elbo": float(step)})
    theirs, rest = getattr(checkpoints, where), [3, 4]

    def trained_meanwhile(folder, *more):
        while rest:
            step = rest.pop(0)
            with monkeypatch.context() as undisturbed:
                undisturbed.setattr(checkpoints, where, theirs)
                with open_checkpoints(tmp_path) as manager:
                    write(manager, replace(state, step=jnp.int32(step)), {"elbo": float(step)})
        return theirs(folder, *more)

    monkeypatch.setattr(checkpoints, where, trained_meanwhile)
    assert int(jaxvae.restore(tmp_path, which).step) == 4


def test_a_state_saved_without_a_measurement_does_not_push_out_the_best(tmp_path, state, caplog):
    with open_checkpoints(tmp_path) as checkpoints:
        for step, elbo in enumerate([-10.0, -30.0]):
            write(checkpoints, replace(state, step=jnp.int32(step)), {"elbo": elbo})
    jaxvae.save(tmp_path, state)
    assert int(jaxvae.restore(tmp_path).step) == 4
    assert int(jaxvae.restore(tmp_path, "best").step) == 0
    assert not caplog.records


def test_a_checkpoint_is_not_overwritten(tmp_path, state):
    jaxvae.save(tmp_path, state)
    with pytest.raises(jaxvae.InputError, match="already holds a checkpoint of step 4"):
        jaxvae.save(tmp_path, state)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: (path / "checkpoints").mkdir()])
def test_a_directory_without_checkpoints_is_refused(tmp_path, make):
    make(tmp_path)
    with pytest.raises(jaxvae.InputError, match="holds no checkpoint: expected the run directory"):
        jaxvae.load(tmp_path)
    with pytest.raises(jaxvae.InputError, match="holds no checkpoint"):
        jaxvae.load(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_what_every_part_has_learned_comes_back(tmp_path):
    config = jaxvae.ModelConfig(
        (8, 8, 1),
        3,
        network="mlp:width=8",
        likelihood="gaussian",
        prior="mixture:components=5",
        posterior="iaf:steps=1",
        num_classes=4,
    )
    train_config = jaxvae.TrainConfig(optimizer="adam", objective="iwae:num_samples=3", ema=0.9)
    state = jaxvae.create_train_state(jax.random.key(0), config, train_config)
    params = moved(state.params, 1.0)
    state = replace(state, params=params, ema=jax.tree.map(lambda x: 2 * x, params))
    for part in (state.params.likelihood, state.params.prior, state.params.posterior):
        assert jax.tree.leaves(part)
    jaxvae.save(tmp_path, state)
    restored = jaxvae.restore(tmp_path)
    assert_states_equal(restored, state)
    assert restored.config == train_config
    assert restored.params.config == config


def test_a_checkpoint_from_before_there_were_choices_is_the_default_model(tmp_path, model_config):
    """As the files of an older version: no seal, only fields that it knew, and networks alone."""
    config = jaxvae.TrainConfig(batch_size=16, learning_rate=3e-4)
    state = jaxvae.create_train_state(jax.random.key(5), model_config, config)
    jaxvae.save(tmp_path, state)
    (seal,) = (tmp_path / "checkpoints").glob("*/sha256.json")
    seal.unlink()
    (written,) = (tmp_path / "checkpoints").glob("*/config/metadata")
    config = json.loads(written.read_text())
    del config["jaxvae"]
    config["model"] = {name: config["model"][name] for name in ("image_shape", "latent_dim")}
    config["train"] = {n: config["train"][n] for n in ("batch_size", "epochs", "learning_rate")}
    written.write_text(json.dumps(config))
    stored = (tmp_path / "checkpoints").glob("*/state/_METADATA")
    names = {key.split("'")[1] for path in stored
             for key in json.loads(path.read_text())["tree_metadata"]}  # fmt: skip
    assert names == {"encoder", "decoder", "opt_state", "step", "key"}
    assert_states_equal(jaxvae.restore(tmp_path), state)


def test_modules_of_ones_own_are_handed_over(tmp_path, images):
    network = OwnEncoder(2), OwnDecoder((8, 8, 1))
    config = jaxvae.ModelConfig((8, 8, 1), 2, network=network)
    state = jaxvae.create_train_state(jax.random.key(0), config, jaxvae.TrainConfig(batch_size=16))
    jaxvae.save(tmp_path, state)
    assert_states_equal(jaxvae.restore(tmp_path, network=network), state)
    with refused("the network is a pair of Flax modules, which are not saved: pass network="):
        jaxvae.restore(tmp_path)
    for other in ((OwnEncoder(2), OwnEncoder(2)), (OwnEncoder(3), network[1])):
        with refused("for one image: expected"):
            jaxvae.load(tmp_path, network=other)
    with refused("network is mlp, but the recorded one is own: pass that one"):
        jaxvae.load(tmp_path, network="mlp")
    for other in ((Other((16, 16)), network[1]), (Other((17,)), network[1])):
        with refused(f"{tmp_path} holds other parameters than those of `network`: expected the"):
            jaxvae.load(tmp_path, network=other)


def small_state(**options):
    config = jaxvae.ModelConfig((8, 8, 1), 2, network="mlp:width=4", **options)
    return jaxvae.create_train_state(jax.random.key(0), config, jaxvae.TrainConfig(batch_size=16))


def test_types_come_back_as_they_were_saved(tmp_path):
    def cast(tree, dtype):
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    state = small_state()
    half = replace(state, params=cast(state.params, jnp.bfloat16))
    jaxvae.save(tmp_path / "half", half)
    assert_states_equal(jaxvae.restore(tmp_path / "half"), half)
    with jax.enable_x64(True):
        thirds = jax.tree.map(lambda x: x / np.float64(3), state.params)
        wide = replace(state, params=thirds, opt_state=cast(state.opt_state, jnp.float64))
        assert {x.dtype.name for x in jax.tree.leaves((wide.params, wide.opt_state))} == {"float64"}
        jaxvae.save(tmp_path / "wide", wide)
        assert_states_equal(jaxvae.restore(tmp_path / "wide"), wide)
    with refused(
        "holds arrays of float64, and JAX has 64-bit types disabled: enable them with JAX"
    ):
        jaxvae.load(tmp_path / "wide")


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_keys_come_back_as_of_their_implementation(tmp_path, implementation):
    state = replace(small_state(), key=jax.random.key(3, impl=implementation))
    jaxvae.save(tmp_path, state)
    assert_states_equal(jaxvae.restore(tmp_path), state)


def test_a_key_of_no_implementation_is_refused(tmp_path):
    jaxvae.save(tmp_path, small_state())
    (written,) = (tmp_path / "checkpoints").glob("*/config/metadata")
    config = json.loads(written.read_text())
    (written.parents[1] / "sha256.json").unlink()
    for key in ("dice", 3, ["rbg"], "rbg"):
        written.write_text(json.dumps(config | {"key": key}))
        with refused("cannot be read: "):
            jaxvae.restore(tmp_path)


def test_a_state_that_could_not_be_read_again_is_not_saved(tmp_path):
    state = small_state()
    sgd = optax.sgd(0.1, momentum=0.9).init(state.params)  # as many arrays as RMSprop's
    adam = optimizer(jaxvae.TrainConfig(optimizer="adam")).init(state.params)
    more = replace(state.params, prior={"logits": jnp.zeros(3)})
    wider = small_state(num_classes=3).params
    wider = replace(state.params, encoder=wider.encoder)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    for bad, says in (
        (replace(state, opt_state=sgd), "(optimizer rmsprop)"),
        (replace(state, opt_state=adam), "(optimizer rmsprop)"),
        (replace(state, params=more), "has .params.prior['logits'] of shape (3,): expected no .pa"),
        (replace(state, params=wider), "of shape (67, 4): expected .params.encoder['dense_1']['ke"),
        (stacked, ""),
        (replace(state, key=jax.random.split(state.key)), "key has shape (2,): expected one key"),
        (state.params, "state is a Params: expected a TrainState"),
    ):
        with refused(says):
            jaxvae.save(tmp_path, bad)
    assert list(tmp_path.iterdir()) == []
    raw = replace(state, key=jax.random.key_data(state.key))
    jaxvae.save(tmp_path, raw)
    assert_states_equal(jaxvae.restore(tmp_path), state)


class Other(nn.Module):
    """An encoder of other layers."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, images):
        x = images.reshape(len(images), -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(2)(x), nn.Dense(2)(x)


@pytest.fixture(scope="module")
def of_two_steps(tmp_path_factory):
    """A run directory with checkpoints of the steps 1 and 2, and their states."""
    run_dir = tmp_path_factory.mktemp("two")
    config = jaxvae.ModelConfig((8, 8, 1), 2, network="mlp:width=4")
    state = jaxvae.create_train_state(jax.random.key(5), config, jaxvae.TrainConfig())
    states = [replace(state, step=jnp.int32(1))]
    states += [replace(states[0], params=moved(state.params, 1.0), step=jnp.int32(2))]
    with open_checkpoints(run_dir) as checkpoints:
        for one, elbo in zip(states, (-30.0, -20.0), strict=True):
            write(checkpoints, one, {"elbo": elbo})
    return run_dir, states


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def unreadable(path):
    """As root reads all that has a name, a folder stands in the file's place."""
    path.unlink()
    path.mkdir()


def add(path):
    path.with_name(path.name + "~").write_bytes(b"a stranger's")


def files_of(run_dir, step):
    folder = run_dir / "checkpoints" / str(step)
    return sorted(path.relative_to(run_dir) for path in folder.rglob("*") if path.is_file())


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", [cut, empty, flip, unreadable, add, type(None)],
                         ids=["cut", "empty", "flip", "unreadable", "add", "delete"])  # fmt: skip
def test_of_a_damaged_checkpoint_no_file_is_believed(of_two_steps, tmp_path, damage):
    """Every file in turn: the older checkpoint takes its place, and a warning says so."""
    run_dir, (older, newer) = of_two_steps
    names = files_of(run_dir, 2)
    assert len(names) > 10
    for name in names:
        copy = shutil.copytree(run_dir, tmp_path / "copy", dirs_exist_ok=False)
        if damage is type(None):
            (copy / name).unlink()
        else:
            damage(copy / name)
        if name.name == "sha256.json" and damage is type(None):
            # An older version wrote none: Orbax had finished, so all of it is there.
            assert_states_equal(jaxvae.restore(copy), newer)
        else:
            for which in ("latest", "best"):
                with pytest.warns(Damaged, match="step 2 is damaged .*; using that of step 1"):
                    assert newest_intact(copy, which) == 1
            with refused("the checkpoint of step 2 is damaged: "):
                jaxvae.restore(copy, 2)
        shutil.rmtree(copy)
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    flip(copy / names[-1])
    with pytest.warns(Damaged):
        assert_states_equal(jaxvae.restore(copy), older)


def test_with_no_whole_checkpoint_all_is_left_as_it_is(of_two_steps, tmp_path):
    run_dir, _ = of_two_steps
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    for step in (1, 2):
        flip(copy / files_of(copy, step)[4])
    before = contents(copy)
    with refused(f"{copy} holds no intact checkpoint (step 2: "):
        jaxvae.load(copy)
    assert contents(copy) == before


def test_a_damaged_checkpoint_is_put_aside_when_others_are_written(of_two_steps, tmp_path):
    run_dir, (_, newer) = of_two_steps
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    flip(copy / files_of(copy, 2)[4])
    damaged = contents(copy / "checkpoints" / "2")
    with pytest.warns(Damaged), open_checkpoints(copy) as checkpoints:
        write(checkpoints, newer, {})
    assert_states_equal(jaxvae.restore(copy), newer)
    aside = contents(copy / "checkpoints" / "2.damaged")
    assert list(aside.values()) == list(damaged.values())


def test_what_kills_left_in_the_midst_of_writing_or_deleting_is_taken_away(of_two_steps, tmp_path):
    run_dir, (_, newer) = of_two_steps
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    folder = copy / "checkpoints"
    shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp")
    (folder / "1" / "metrics" / "metrics").unlink()
    with open_checkpoints(copy):
        pass
    assert [path.name for path in folder.iterdir()] == ["2"]
    assert_states_equal(jaxvae.restore(copy), newer)


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path, state, monkeypatch):
    monkeypatch.setattr("jaxvae.runs.checkpoints.version", lambda: "99.0")
    jaxvae.save(tmp_path, state)
    with refused("was made by jaxvae 99.0, and this is", "use jaxvae 99.0 or newer"):
        jaxvae.restore(tmp_path)


def test_a_clock_that_jumps_back_does_not_change_which_is_the_latest(tmp_path, state, monkeypatch):
    now = iter(range(2_000_000_000, 0, -1_000_000))
    monkeypatch.setattr("time.time", lambda: float(next(now)))
    monkeypatch.setattr("time.time_ns", lambda: next(now) * 10**9)
    with open_checkpoints(tmp_path) as checkpoints:
        for step in range(4):
            write(checkpoints, replace(state, step=jnp.int32(step)), {"elbo": -1.0 * step})
    assert int(jaxvae.restore(tmp_path).step) == 3
    assert steps_of(tmp_path) == [0, 2, 3]


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, state):
    (tmp_path / "file").write_text("")
    with refused("file cannot be written: Not a directory"):
        jaxvae.save(tmp_path / "file", state)


@pytest.fixture(scope="module")
def small():
    """A state that is quick to write."""
    config = jaxvae.ModelConfig((4, 3, 1), 2, network="mlp:width=4")
    return jaxvae.create_train_state(jax.random.key(0), config, jaxvae.TrainConfig())


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    """The directory of a run with checkpoints of its steps 1 and 2."""
    run_dir = tmp_path_factory.mktemp("run")
    with open_checkpoints(run_dir) as checkpoints:
        for step in (1, 2):
            write(checkpoints, replace(small, step=jnp.int32(step)), {"elbo": -1.0 * step})
    return run_dir


@pytest.mark.parametrize("name", ["lr[0.1]", "a*b?", "x[!y]", "[[]"])
def test_a_path_is_no_pattern(saved, small, tmp_path, name):
    """In a new directory, and in one that was copied there and is written to again."""
    jaxvae.save(tmp_path / "new" / name, small)
    assert_states_equal(jaxvae.restore(tmp_path / "new" / name), small)
    copy = shutil.copytree(saved, tmp_path / "copy" / name)
    third = replace(small, step=jnp.int32(3))
    with open_checkpoints(copy) as checkpoints:
        write(checkpoints, third, {"elbo": -3.0})
    assert steps_of(copy) == [1, 2, 3]
    for step in (1, 2, 3):
        assert_states_equal(jaxvae.restore(copy, step), replace(small, step=jnp.int32(step)))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda state: (state / "manifest.ocdbt").unlink(), r".+"),
        (lambda state: None, "the values differ"),
    ],
    ids=["cannot be read", "differs"],
)
# Orbax's threads may end after the event loop of a read that failed.
@pytest.mark.filterwarnings(
    r"ignore:[\s\S]*Event loop is closed:pytest.PytestUnraisableExceptionWarning"
)
def test_what_is_not_read_back_as_it_was_written_is_not_sealed(
    saved, small, tmp_path, monkeypatch, spoil, says
):
    import orbax.checkpoint as ocp

    copy = shutil.copytree(saved, tmp_path / "copy")
    wait, to_tree = ocp.CheckpointManager.wait_until_finished, checkpoints._to_tree

    def spoiled(self):
        wait(self)
        for state in (copy / "checkpoints").glob("3/state"):
            spoil(state)
        other = replace(small, step=jnp.int32(4))
        monkeypatch.setattr(checkpoints, "_to_tree", lambda _: to_tree(other))

    monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", spoiled)
    says = f"step 3 is not read back as it was written .{says}"
    with open_checkpoints(copy) as manager, pytest.raises(TrainingFailed, match=says):
        write(manager, replace(small, step=jnp.int32(3)), {"elbo": -1.0})
    monkeypatch.undo()
    assert (copy / "checkpoints" / "3.damaged").is_dir()
    assert int(jaxvae.restore(copy).step) == 2


def unseal(run_dir, step):
    (run_dir / "checkpoints" / str(step) / "sha256.json").unlink()


ODD = [
    "{", "", "7", "[]", "{}", "[" * 100_000, '{"model": 3, "train": {}}', '{"model": {}}',
    '{"model": {}, "train": {}, "begun": 7}', '{"model": {}, "train": {}, "begun": [{}]}',
    '{"model": {}, "train": {}, "begun": [{"elbo": "x"}, 0]}', '{"jaxvae": 3}',
    '{"model": {}, "train": {}, "begun": [[], 0]}',
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_odd_metadata_of_an_unsealed_checkpoint_are_damage(saved, tmp_path, odd):
    copy = shutil.copytree(saved, tmp_path / "copy")
    unseal(copy, 2)
    assert int(jaxvae.restore(copy).step) == 2
    (copy / "checkpoints" / "2" / "config" / "metadata").write_text(odd)
    with pytest.warns(Damaged, match=r"of step 2 is damaged .*; using that of step 1 instead"):
        assert int(jaxvae.restore(copy).step) == 1
    with refused("metadata is damaged ("):
        metadata(copy, 2)
    checkpoints._write_digests(copy / "checkpoints" / "2")  # by a stranger
    with refused("metadata is damaged ("):
        jaxvae.restore(copy)


FILES = ["state/_METADATA", "state/manifest.ocdbt", "state/_sharding", "_CHECKPOINT_METADATA",
         "metrics/metrics"]  # fmt: skip


@pytest.mark.filterwarnings("ignore::jaxvae.errors.Damaged")
@pytest.mark.parametrize("content", ["{", "[]", "{}", "7", '{"tree_metadata": {"a": 1}}'])
@pytest.mark.parametrize("name", FILES)
def test_odd_files_of_an_unsealed_checkpoint_end_in_a_line(saved, small, tmp_path, name, content):
    copy = shutil.copytree(saved, tmp_path / "copy")
    unseal(copy, 2)
    (copy / "checkpoints" / "2" / name).write_text(content)
    for network in (None, (OwnEncoder(2), OwnDecoder((4, 3, 1)))):
        try:
            jaxvae.load(copy, network=network)
        except jaxvae.InputError as error:
            assert "\n" not in str(error)  # noqa: PT017
    try:
        with open_checkpoints(copy) as checkpoints:
            write(checkpoints, replace(small, step=jnp.int32(3)), {"elbo": -1.0})
    except (jaxvae.InputError, TrainingFailed) as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert int(jaxvae.restore(copy).step) == 3


@pytest.mark.parametrize("sealed", [True, False])
def test_a_pipe_among_the_files_of_a_checkpoint_is_damage(saved, tmp_path, sealed):
    for name in files_of(saved, 2):
        copy = shutil.copytree(saved, tmp_path / "copy")
        if not sealed:
            unseal(copy, 2)
        (copy / name).unlink(missing_ok=True)
        os.mkfifo(copy / name)
        with (
            at_once(),
            pytest.warns(Damaged, match="of step 2 is damaged .*; using that of step 1"),
        ):
            assert newest_intact(copy) == 1
        shutil.rmtree(copy)


def test_files_that_are_links_are_read(saved, small, tmp_path):
    """As in a cache that keeps files by their sums."""
    copy = shutil.copytree(saved, tmp_path / "copy")
    for name in files_of(saved, 2):
        (copy / name).unlink()
        (copy / name).symlink_to(saved / name)
    assert_states_equal(jaxvae.restore(copy), replace(small, step=jnp.int32(2)))
