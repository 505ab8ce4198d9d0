"""The notebook's model as Keras saves it, read here, beside Keras itself."""

import io
import os
import shutil
import sys
import zipfile

import h5py
import jax
import numpy as np
import pytest
from conftest import at_once, refused

import jaxvae
from jaxvae.cli.commands import main
from jaxvae.interchange.keras import load_keras
from jaxvae.runs import directory
from jaxvae.runs.config import configured, read_config
from jaxvae.runs.data import describe, load_run_data
from jaxvae.runs.keras import import_keras

pytestmark = [
    pytest.mark.usefixtures("compile_quickly"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Keras's
]


def notebooks_models(keras, shape=(8, 8, 1), latents=3, names=("z_mean", "z_log_var"), **changed):
    """Encoder and decoder, with random weights and biases; `changed`: of the second convolution."""
    layers = keras.layers
    conv_2 = {"strides": 2, "padding": "same", "activation": "relu"} | changed
    x = images = keras.Input(shape)
    x = layers.Conv2D(32, 3, padding="same", activation="relu")(x)
    x = layers.Conv2D(64, 3, **conv_2)(x)
    x = layers.Conv2D(64, 3, padding="same", activation="relu")(x)
    x = layers.Conv2D(64, 3, padding="same", activation="relu")(x)
    rows, columns = x.shape[1:3]
    x = layers.Dense(32, activation="relu")(layers.Flatten()(x))
    heads = [layers.Dense(latents, name=name)(x) for name in names]
    encoder = keras.Model(images, heads, name="encoder")
    z = keras.Input((latents,))
    x = layers.Dense(rows * columns * 64, activation="relu")(z)
    x = layers.Reshape((rows, columns, 64))(x)
    x = layers.Conv2DTranspose(32, 3, strides=2, padding="same", activation="relu")(x)
    x = layers.Conv2D(shape[2], 3, padding="same", activation="sigmoid")(x)
    decoder = keras.Model(z, x, name="decoder")
    rng = np.random.default_rng(0)
    for model in (encoder, decoder):
        model.set_weights([rng.normal(0, 0.1, w.shape) for w in model.get_weights()])
    return encoder, decoder


def subclassed(keras, encoder, decoder):
    """As in Keras's own example of a VAE."""

    class VAE(keras.Model):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = encoder, decoder
            self.seeds = keras.random.SeedGenerator(1)
            self.loss_tracker = keras.metrics.Mean(name="loss")

        def get_config(self):
            return {}

        def call(self, images):
            return self.decoder(self.encoder(images)[0])

    model = VAE()
    model(np.zeros((1, *encoder.inputs[0].shape[1:])))
    return model


def flat(keras, encoder, decoder):
    """One model of all layers, side by side."""
    x = encoder.outputs[0]
    for layer in decoder.layers[1:]:
        x = layer(x)
    return keras.Model(encoder.inputs, [x, encoder.outputs[1]])


@pytest.fixture(scope="module")
def notebook(keras, tmp_path_factory):
    """(encoder, decoder, folder): the same weights in many files."""
    folder = tmp_path_factory.mktemp("keras")
    encoder, decoder = notebooks_models(keras)
    nested = keras.Model(encoder.inputs, decoder(encoder(encoder.inputs)[0]))
    nested.compile("adam", "mse")
    nested.optimizer.build(nested.trainable_variables)
    models = {
        "nested": nested,
        "flat": flat(keras, encoder, decoder),
        "subclass": subclassed(keras, encoder, decoder),
        "encoder": encoder,
        "decoder": decoder,
    }
    for name, model in models.items():
        model.save(folder / f"{name}.keras")
        model.save_weights(folder / f"{name}.weights.h5")
        if name != "subclass":
            model.save(folder / f"{name}.h5")
    return encoder, decoder, folder


@pytest.fixture(scope="module")
def outputs(notebook):
    """(images, latents, Keras's outputs for them)."""
    encoder, decoder, _ = notebook
    rng = np.random.default_rng(1)
    images, z = rng.random((4, 8, 8, 1), np.float32), rng.normal(size=(4, 3)).astype("f")
    return images, z, [np.asarray(x) for x in (*encoder(images), decoder(z))]


def assert_equals_keras(params, outputs):
    images, z, theirs = outputs
    posterior = jaxvae.encode(params, images)
    ours = posterior.mean, posterior.log_var, jaxvae.decode(params, z).mean
    for a, b in zip(ours, theirs, strict=True):
        assert np.std(b) > 0.01  # more than constants
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


FILES = [f"{name}{kind}" for name in ("nested", "flat", "subclass")
         for kind in (".keras", ".weights.h5", ".h5") if name + kind != "subclass.h5"]  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_a_model_in_one_file_computes_what_keras_computes(notebook, outputs, file):
    params = load_keras(notebook[2] / file)
    assert params.config == jaxvae.ModelConfig((8, 8, 1), 3)
    like = jax.eval_shape(jaxvae.init, jax.random.key(0), params.config)
    assert jax.tree.structure(params) == jax.tree.structure(like)
    assert_equals_keras(params, outputs)


@pytest.mark.parametrize("kind", [".keras", ".weights.h5", ".h5"])
def test_a_model_in_two_files_computes_what_keras_computes(notebook, outputs, kind):
    folder = notebook[2]
    params = load_keras(folder / f"encoder{kind}", folder / f"decoder{kind}")
    assert_equals_keras(params, outputs)


def test_keras_is_not_needed(notebook, monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", None)
    load_keras(notebook[2] / "nested.keras")


def test_the_notebooks_own_size(keras, tmp_path):
    encoder, decoder = notebooks_models(keras, (28, 28, 1), 2)
    encoder.save_weights(tmp_path / "encoder.weights.h5")
    decoder.save_weights(tmp_path / "decoder.weights.h5")
    params = load_keras(tmp_path / "encoder.weights.h5", tmp_path / "decoder.weights.h5")
    assert params.config == jaxvae.ModelConfig()
    assert sum(x.size for x in jax.tree.leaves(params)) == 550_629
    images = np.random.default_rng(0).random((2, 28, 28, 1), np.float32)
    mean, log_var = encoder(images)
    posterior = jaxvae.encode(params, images)
    np.testing.assert_allclose(posterior.mean, mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(posterior.log_var, log_var, rtol=1e-5, atol=1e-5)


def keras_2(path, weights, names):
    """A file of weights alone as Keras 2 lays it out: layers of models, in models' groups."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"encoder", b"decoder"]
        for model, layers in names.items():
            group = file.create_group(model)
            variables = [f"{name}/{kind}:0" for name in layers for kind in ("kernel", "bias")]
            group.attrs["weight_names"] = [name.encode() for name in variables]
            for name, value in zip(variables, weights[model], strict=True):
                group[name] = value


def test_the_layout_of_keras_2_with_names_that_tell_nothing(notebook, outputs, tmp_path):
    encoder, decoder, _ = notebook
    names = {
        "encoder": ["bed", "can", "ace", "dog", "fox", "hen", "gnu"],
        "decoder": ["owl", "pig", "rat"],
    }
    weights = {"encoder": encoder.get_weights(), "decoder": decoder.get_weights()}
    keras_2(tmp_path / "old.h5", weights, names)
    assert_equals_keras(load_keras(tmp_path / "old.h5"), outputs)


@pytest.mark.parametrize(
    ("names", "mean"),
    [
        (("z_mean", "z_log_var"), 0),
        (("z_log_var", "z_mean"), 1),
        (("z_var", "z"), 1),
        (("mu", "log_sigma"), 0),
        (("dense_9", "dense_10"), 0),
        (("dense_10", "dense_9"), 1),
    ],
)
def test_names_tell_the_heads_apart_or_else_which_was_made_first(names, mean, keras, tmp_path):
    encoder, decoder = notebooks_models(keras, names=names)
    encoder.save(tmp_path / "encoder.keras")
    decoder.save(tmp_path / "decoder.keras")
    params = load_keras(tmp_path / "encoder.keras", tmp_path / "decoder.keras")
    for ours, index in (("mean", mean), ("log_var", 1 - mean)):
        kernel = np.asarray(encoder.get_layer(names[index]).kernel)
        np.testing.assert_array_equal(params.encoder[ours]["kernel"], kernel)


def test_images_that_are_not_square_need_a_configuration(keras, tmp_path):
    models = notebooks_models(keras, (4, 12, 3), 1)
    for kind in (".keras", ".h5", ".weights.h5"):
        paths = [tmp_path / f"{model.name}{kind}" for model in models]
        for model, path in zip(models, paths, strict=True):
            model.save_weights(path) if "weights" in kind else model.save(path)
        if "weights" not in kind:
            assert load_keras(*paths).config == jaxvae.ModelConfig((4, 12, 3), 1)
            continue
        with refused("768 units between", "expected a square, or a file with the shape"):
            load_keras(*paths)


OTHERS = {
    "activation": ({"activation": "tanh"}, "with activation 'tanh': expected 'relu', as the note"),
    "strides": ({"strides": 1}, "with strides [1, 1]: expected (2, 2), as the notebook's conv_2"),
    "padding": ({"padding": "valid"}, "with padding 'valid': expected 'same'"),
    "bias": ({"use_bias": False}, "with weights of shape (3, 3, 32, 64): expected the notebook's"),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("kind", [".keras", ".h5"])
def test_a_model_of_other_settings_is_refused(case, kind, keras, tmp_path):
    changed, says = OTHERS[case]
    models = notebooks_models(keras, (6, 6, 1), **changed)
    paths = [tmp_path / f"{model.name}{kind}" for model in models]
    for model, path in zip(models, paths, strict=True):
        model.save(path)
    with refused(f"{tmp_path}/encoder{kind}", says):
        load_keras(*paths)


def test_other_models_are_refused_with_what_was_found_and_expected(notebook, keras, tmp_path):
    _, _, folder = notebook
    with refused("encoder.keras holds conv2d", "z_mean 32x3", "expected the notebook's: conv 3x3",
                 "of two files, name the decoder's with --decoder"):  # fmt: skip
        load_keras(folder / "encoder.keras")
    with refused("and 2 more: expected the notebook's"):
        load_keras(folder / "encoder.keras", folder / "encoder.h5")
    layers = keras.layers
    other = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="a"), layers.Dense(2)])
    other.save(tmp_path / "other.keras")
    with refused("other.keras holds a 4x3, ", " 3x2: expected the notebook's"):
        load_keras(tmp_path / "other.keras")
    normed = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(name="norm")])
    normed.save(tmp_path / "normed.h5")
    with refused("a layer norm with weights of shape (4,), (4,), (4,), (4,): expected"):
        load_keras(tmp_path / "normed.h5")


def test_the_command_makes_a_run_to_sample_and_to_start_from(notebook, npz, tmp_path, capsys):
    _, _, folder = notebook
    old = tmp_path / "old"
    args = ["import", str(folder / "nested.keras"), "--run-dir", str(old), "--data", str(npz)]
    assert main(args) == 0
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "images of 8 x 8 x 1, 3 latents; conv2d" in told
    assert "z_mean as mean, z_log_var as log_var" in told
    assert "assumed" not in told
    assert main(["sample", str(old), "--n", "4", "--out", str(tmp_path / "a.png")]) == 0
    config = configured({"data": str(npz), "latent_dim": 3, "start_from": str(old)})
    data = load_run_data(config)
    config = directory.with_data(tmp_path / "new", config, data, describe(data), resume=False)
    begun = directory.first_state(jax.random.key(0), config)
    saved = load_keras(folder / "nested.keras")
    assert jax.tree.all(jax.tree.map(np.array_equal, begun.params, saved))
    assert read_config(old).data == str(npz)
    assert main(args) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_what_the_file_does_not_tell_is_told(notebook, tmp_path):
    told = import_keras(notebook[2] / "flat.weights.h5", tmp_path / "run")
    assert told.endswith(
        "strides and activations are not in the file: assumed to be the notebook's"
    )


def changed_h5(notebook, path, change):
    shutil.copy(notebook[2] / "flat.weights.h5", path)
    with h5py.File(path, "r+") as file:
        change(file)


def to_nan(file):
    file["layers/dense/vars/1"][3] = np.nan


def to_link(link):
    def change(file):
        del file["layers/dense/vars/0"]
        file["layers/dense/vars/0"] = link

    return change


def to_elsewhere(file):
    del file["layers/dense/vars/0"]
    with_files = [("/etc/hostname", 0, h5py.h5f.UNLIMITED)]
    file["layers/dense/vars"].create_dataset("0", (1024, 32), "f4", external=with_files)


def to_huge(file):
    del file["layers/dense/vars/0"]
    file["layers/dense/vars"].create_dataset("0", (2**40, 32), "f4", chunks=(64, 32))


def to_a_circle(file):
    file["layers/dense/again"] = file["layers"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (to_nan, "has NaN or infinity in "),
        (to_link(h5py.ExternalLink("/etc/passwd", "/x")), "has a link at '0': expected the weigh"),
        (to_link(h5py.SoftLink("/layers/conv2d")), "has a link at '0': expected the weights"),
        (to_elsewhere, "has weights in other files: expected all weights in one file"),
        (to_huge, "has weights of more than 1,073,741,824 bytes: expected fewer"),
        (to_a_circle, "has too many nested groups: expected a Keras file"),
    ],
)
def test_a_file_that_lies_is_refused(change, says, notebook, tmp_path):
    changed_h5(notebook, tmp_path / "a.h5", change)
    with refused(str(tmp_path / "a.h5"), says):
        load_keras(tmp_path / "a.h5")


def archive(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)


def test_an_archive_is_read_in_memory_within_limits(notebook, tmp_path, monkeypatch):
    path = tmp_path / "in" / "a.keras"
    path.parent.mkdir()
    with zipfile.ZipFile(notebook[2] / "flat.keras") as file:
        members = {name: file.read(name) for name in file.namelist()}
    archive(path, members | {"../escaped": b"x", "/tmp-escaped": b"x"})
    load_keras(path)
    assert [one.name for one in tmp_path.rglob("*")] == ["in", "a.keras"]
    archive(path, members | {"config.json": b" " * (2**24 + 1)})
    with refused("has a config.json of more than 16,777,216 bytes: expected fewer"):
        load_keras(path)
    monkeypatch.setattr("jaxvae.interchange.keras._BYTES", 10_000)
    with refused("has a model.weights.h5 of more than 10,000 bytes"):
        load_keras(notebook[2] / "flat.keras")


def test_an_archive_that_is_not_of_keras_is_refused(tmp_path):
    path = tmp_path / "a.keras"
    archive(path, {"config.json": "{}"})
    with refused("has no model.weights.h5: expected a .keras file"):
        load_keras(path)
    empty = io.BytesIO()
    h5py.File(empty, "w").close()
    for config in ("{", "[" * 100_000, "\xff"):
        archive(
            path, {"config.json": config.encode("latin-1"), "model.weights.h5": empty.getvalue()}
        )
        with refused(f"{path} is damaged: "):
            load_keras(path)
    for config in ("3", '{"config": {"name": "x", "layers": {}}}', "null"):
        archive(path, {"config.json": config, "model.weights.h5": empty.getvalue()})
        with refused("holds no layers with a kernel and a bias: expected the notebook's"):
            load_keras(path)


def test_files_that_are_not_there_or_not_of_keras_are_refused(tmp_path):
    with refused("none.h5 does not exist: expected a Keras file"):
        load_keras(tmp_path / "none.h5")
    with refused(f"{tmp_path} cannot be read: Is a directory"):
        load_keras(tmp_path)
    (tmp_path / "text.h5").write_text("weights")
    with refused("text.h5 is not a Keras file: expected .keras, .weights.h5 or .h5"):
        load_keras(tmp_path / "text.h5")
    os.mkfifo(tmp_path / "pipe.h5")
    with at_once(), refused("pipe.h5 cannot be read: not a regular file"):
        load_keras(tmp_path / "pipe.h5")


@pytest.mark.parametrize("file", ["flat.keras", "flat.h5"])
def test_a_damaged_file_gives_one_line_or_the_model(file, notebook, tmp_path):
    """Cut off, and with bytes changed."""
    written = (notebook[2] / file).read_bytes()
    rng, path, refusals = np.random.default_rng(0), tmp_path / file, []
    for part in range(20):
        damaged = bytearray(written)
        if part % 2:
            damaged = damaged[: rng.integers(len(written))]
        else:
            # Most of a file is numbers; what describes them is at the front.
            for place in rng.integers(8, 6000, 8):
                damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            load_keras(path)
        except jaxvae.InputError as error:
            refusals.append(str(error))
    assert len(refusals) >= 10
    assert all("\n" not in line and file in line for line in refusals)


def test_without_h5py_it_is_said_how_to_install_it(notebook, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with refused("h5py is not installed: pip install h5py"):
        load_keras(notebook[2] / "flat.h5")
