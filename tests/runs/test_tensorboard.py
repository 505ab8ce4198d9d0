"""TensorBoard's files hold what the run did, and are read back."""

import importlib.util
import io
import json
import shutil

import numpy as np
import pytest
from conftest import SignalAt, refused
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import jaxvae
from jaxvae.errors import Preempted
from jaxvae.runs import directory, loop, tensorboard
from jaxvae.runs.config import configured, read_config, resumed
from jaxvae.runs.data import load_run_data
from jaxvae.runs.files import read_metrics

pytestmark = pytest.mark.usefixtures("compile_quickly")

NETWORK = "mlp:width=8"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, npz):
    """A run of two epochs, with TensorBoard's files."""
    path = tmp_path_factory.mktemp("runs") / "run"
    watched(path, {"data": str(npz), "network": NETWORK, "batch_size": 64, "epochs": 2})
    return path


def watched(run_dir, flags, *, resume=False, more=()):
    config = resumed(run_dir, flags) if resume else configured(flags)
    data = load_run_data(config)
    config = directory.start(run_dir, config, data, resume=resume)
    return loop.train(run_dir, config, data, callbacks=[tensorboard.TensorBoard(), *more])


def read(run_dir):
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0})
    return events.Reload()


def assert_scalars_are_the_metrics(run_dir):
    events, lines = read(run_dir), read_metrics(run_dir)
    names = [f"{split}/{name}" for split in ("train", "test") for name in lines[0][split]]
    assert set(events.Tags()["scalars"]) == {*names, "seconds"}
    for name in names:
        split, metric = name.split("/")
        points = [(point.step, point.value) for point in events.Scalars(name)]
        expected = [(line["step"], np.float32(line[split][metric])) for line in lines]
        assert points == expected


def test_scalars_are_the_lines_of_metrics_jsonl(run_dir):
    assert_scalars_are_the_metrics(run_dir)


def test_pictures_are_of_every_epoch_and_of_the_start(run_dir):
    events = read(run_dir)
    assert set(events.Tags()["images"]) == {"manifold", "reconstructions"}
    assert [image.step for image in events.Images("manifold")] == [0, 8, 16]
    last = events.Images("reconstructions")[-1]
    picture = np.asarray(Image.open(io.BytesIO(last.encoded_image_string)))
    assert picture.shape == (2 * 8, 8 * 8, 3)
    data = load_run_data(read_config(run_dir))
    np.testing.assert_array_equal(picture[:8, :8, 0], data.test_images[0, ..., 0])
    rebuilt = jaxvae.reconstruct(jaxvae.load(run_dir), data.test_images[:1])[0, ..., 0] * 255
    np.testing.assert_allclose(picture[8:, :8, 0], rebuilt, atol=0.51)


def test_hyperparameters_are_those_of_the_run(run_dir):
    events = read(run_dir)
    (text,) = events.Tensors("config/text_summary")
    told = text.tensor_proto.string_val[0].decode()
    config = json.loads((run_dir / "config.json").read_text())
    del config["jaxvae"]  # the version that wrote it
    assert json.loads(told.removeprefix("```").removesuffix("```")) == config
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    assert found["batch_size"].number_value == 64
    assert found["network"].string_value == NETWORK
    assert found["data"].string_value == config["data"]


def test_the_projector_has_the_latents_the_labels_and_the_images(run_dir):
    folder = run_dir / "tensorboard"
    told = (folder / "projector_config.pbtxt").read_text()
    assert told.count("embeddings {") == 1
    assert "single_image_dim: 8" in told
    data = load_run_data(read_config(run_dir))
    mean = jaxvae.encode(jaxvae.load(run_dir), data.test_images).mean
    place = folder / "00000" / "latents"
    np.testing.assert_allclose(np.loadtxt(place / "tensors.tsv"), mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.loadtxt(place / "metadata.tsv"), data.test_labels)
    with Image.open(place / "sprite.png") as sprite:
        picture = np.asarray(sprite)
    np.testing.assert_allclose(picture[:8, 8:16, 0], data.test_images[1, ..., 0], atol=1)


def test_a_run_that_goes_on_writes_on_without_doubled_points(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    watched(copy, {"epochs": 3}, resume=True)
    assert_scalars_are_the_metrics(copy)
    assert [image.step for image in read(copy).Images("manifold")] == [0, 8, 16, 24]
    assert (copy / "tensorboard" / "projector_config.pbtxt").read_text().count("embeddings {") == 1


def test_steps_that_a_kill_took_back_are_shown_once(run_dir, tmp_path, npz):
    """What TensorBoard was told, and no checkpoint was made of."""
    flags = {"data": str(npz), "network": NETWORK, "batch_size": 64}
    watched(tmp_path / "short", {**flags, "epochs": 1})
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    for name in ("checkpoints", "metrics.jsonl"):
        gone = copy / name
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    shutil.copytree(tmp_path / "short" / "checkpoints", copy / "checkpoints")
    shutil.copy(tmp_path / "short" / "metrics.jsonl", copy)
    watched(copy, {"epochs": 3}, resume=True)
    assert_scalars_are_the_metrics(copy)


def test_images_of_any_shape_and_without_labels_are_projected(tmp_path):
    images = np.random.default_rng(0).random((40, 6, 8, 3))
    np.savez(tmp_path / "bare.npz", images=images)
    flags = {"data": str(tmp_path / "bare.npz"), "network": NETWORK, "latent_dim": 3}
    watched(tmp_path / "run", {**flags, "batch_size": 8, "epochs": 1})
    place = tmp_path / "run" / "tensorboard" / "00000" / "latents"
    assert {path.name for path in place.iterdir()} == {"tensors.tsv", "sprite.png"}
    assert np.loadtxt(place / "tensors.tsv").shape == (4, 3)
    with Image.open(place / "sprite.png") as sprite:
        assert np.asarray(sprite)[6:8, :8].max() == 0
    assert set(read(tmp_path / "run").Tags()["images"]) == {"samples", "reconstructions"}


def test_without_tensorboardx_there_is_one_line_and_no_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused("--tensorboard needs tensorboardX", "pip install tensorboardX"):
        tensorboard.require_tensorboard()


def test_steps_of_an_epoch_that_was_interrupted_are_no_start(tmp_path, npz, monkeypatch):
    """A run that is resumed in its first epoch has been told of its untrained model already."""
    monkeypatch.setattr("jaxvae.training.pipeline._IMAGES_PER_DISPATCH", 128)  # two steps
    flags = {"data": str(npz), "network": NETWORK, "batch_size": 64, "epochs": 1}
    with pytest.raises(Preempted):
        watched(tmp_path, flags, more=[SignalAt(2)])
    first = read(tmp_path).Images("manifold")
    assert not (tmp_path / "tensorboard" / "00000").exists()
    watched(tmp_path, {}, resume=True)
    again = read(tmp_path).Images("manifold")
    assert [image.step for image in again] == [0, 8]
    assert again[0].encoded_image_string == first[0].encoded_image_string
    assert (tmp_path / "tensorboard" / "00000" / "latents").exists()


def test_without_a_run_directory_it_is_refused(npz):
    config = configured({"data": str(npz), "network": NETWORK})
    data = load_run_data(config)
    with refused("TensorBoard files are written to the run directory: expected a run_dir"):
        loop.train(None, directory.with_shape(config, data), data,
                   callbacks=[tensorboard.TensorBoard()])  # fmt: skip
