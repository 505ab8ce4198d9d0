"""jaxvae.data.tfds: any image data set of TensorFlow Datasets, by name, without TensorFlow."""

import gzip
import hashlib
import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from jaxvae.data import tfds as tfds_source
from jaxvae.data.dataset import Dataset, split_every_tenth
from jaxvae.data.tfds import load
from jaxvae.errors import InputError

MNIST = Path(__file__).parents[2].parent / "shared/data/mnist"


def write_data_set(
    folder, splits, *, shape=(4, 5, 1), label=True, image="image", kind="png", more=None
):
    """Writes the data set "tiny" as TFDS does, from PNG images of the example's own number.

    splits maps the name of a split to its example numbers; an example's label is number % 10.
    """
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "tiny"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {image: tfds.features.Image(shape=shape)}
            features |= more or {}
            if label:
                features["label"] = tfds.features.ClassLabel(num_classes=10)
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(numbers) for name, numbers in splits.items()}

        def _generate_examples(self, numbers):
            for number in numbers:
                height = shape[0] or 4 + number
                pixels = np.full((height, 5), number, np.uint8)
                png = io.BytesIO()
                Image.fromarray(pixels).save(png, kind)
                example = {name: io.BytesIO(png.getvalue()) for name in (image, *(more or {}))}
                yield number, example | ({"label": number % 10} if label else {})

    Tiny(data_dir=folder).download_and_prepare(file_format="array_record")


@pytest.fixture
def tiny(tmp_path):
    write_data_set(tmp_path, {"train": range(20), "test": range(100, 105)})
    return tmp_path


def numbers(images):
    """The example numbers that images were written from, in ascending order."""
    return sorted(images[:, 0, 0, 0].tolist())


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args):
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(urllib.request, "getproxies", dict)


def complaint(*args, **kwargs):
    """What load says is wrong: always in one line."""
    with pytest.raises(InputError) as caught:
        load(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestAPreparedDataSet:
    def test_gives_its_images_and_labels_as_stored(self, tiny):
        dataset = load("tiny", data_dir=tiny)
        assert isinstance(dataset, Dataset)
        assert dataset.train_images.shape == (20, 4, 5, 1)
        assert dataset.test_images.shape == (5, 4, 5, 1)
        assert dataset.train_images.dtype == np.uint8
        assert dataset.train_labels.dtype == np.int64
        assert numbers(dataset.train_images) == list(range(20))
        assert numbers(dataset.test_images) == list(range(100, 105))
        np.testing.assert_array_equal(dataset.train_labels, dataset.train_images[:, 0, 0, 0] % 10)

    def test_may_be_named_with_its_version(self, tiny):
        assert len(load("tiny:1.0.0", data_dir=str(tiny)).train_images) == 20

    def test_is_read_without_tensorflow_and_in_silence(self, tiny):
        code = (
            "import sys; from jaxvae.data.tfds import load;"
            f"load('tiny', data_dir={str(tiny)!r}); assert 'tensorflow' not in sys.modules"
        )
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", code]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

    def test_is_decoded_once_and_kept_beside_its_records(self, tiny):
        first = load("tiny", data_dir=tiny)
        for records in (tiny / "tiny/1.0.0").glob("*.array_record*"):
            records.unlink()
        second = load("tiny", data_dir=tiny)
        for once, again in zip(first, second, strict=True):
            np.testing.assert_array_equal(once, again)

    @pytest.mark.parametrize("damage", [b"", b"not a zip file", None])
    def test_is_decoded_again_when_what_was_kept_is_damaged(self, tiny, damage):
        first = load("tiny", data_dir=tiny)
        kept = tiny / "tiny/1.0.0/jaxvae.npz"
        whole = kept.read_bytes()
        kept.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
        second = load("tiny", data_dir=tiny)
        np.testing.assert_array_equal(first.train_images, second.train_images)
        assert kept.read_bytes() == whole

    def test_needs_no_permission_to_keep_what_was_decoded(self, tiny):
        (tiny / "tiny/1.0.0/jaxvae.npz").mkdir()  # cannot be written, even by root
        files = sorted((tiny / "tiny/1.0.0").iterdir())
        assert len(load("tiny", data_dir=tiny).train_images) == 20
        assert sorted((tiny / "tiny/1.0.0").iterdir()) == files

    def test_without_labels_gives_none(self, tmp_path):
        write_data_set(tmp_path, {"train": range(20), "test": range(5)}, label=False)
        for _ in range(2):  # decoded, then kept
            dataset = load("tiny", data_dir=tmp_path)
            assert dataset.train_labels is None
            assert dataset.test_labels is None

    def test_without_a_test_split_holds_out_the_validation_split(self, tmp_path):
        write_data_set(tmp_path, {"train": range(20), "validation": range(50, 53)})
        assert numbers(load("tiny", data_dir=tmp_path).test_images) == [50, 51, 52]

    def test_of_one_split_holds_out_every_tenth_image(self, tmp_path):
        write_data_set(tmp_path, {"train": range(25)})
        for _ in range(2):  # decoded, then kept
            dataset = load("tiny", data_dir=tmp_path)
            assert (len(dataset.train_images), len(dataset.test_images)) == (22, 3)
            both = np.concatenate([dataset.train_images, dataset.test_images])
            assert numbers(both) == [*range(25)]
            assert len(dataset.test_labels) == 3
            assert np.flatnonzero(dataset.split_rows("test")).tolist() == [0, 10, 20]


def test_every_tenth_image_is_held_out_from_the_first_on():
    images = np.arange(25, dtype=np.uint8).reshape(25, 1, 1, 1)
    dataset = split_every_tenth(images, np.arange(25))
    assert dataset.test_images.ravel().tolist() == [0, 10, 20]
    assert dataset.test_labels.tolist() == [0, 10, 20]
    assert dataset.train_labels.tolist() == [n for n in range(25) if n % 10]
    assert split_every_tenth(images, None).test_labels is None


class TestADataSetThatCannotBeUsed:
    def test_for_its_unknown_name(self, tmp_path):
        assert "no data set 'nonesuch'" in complaint("nonesuch", data_dir=tmp_path)

    @pytest.mark.parametrize("name", ["", "two words", "../up", "huggingface:mnist", "mnist:3"])
    def test_for_a_name_that_is_none(self, tmp_path, name):
        assert "is not a data set name" in complaint(name, data_dir=tmp_path)

    def test_for_its_unknown_version(self, tmp_path):
        assert "only: 3.0.1" in complaint("mnist:9.9.9", data_dir=tmp_path)

    def test_for_having_no_train_split(self, tmp_path):
        write_data_set(tmp_path, {"test": range(3)})
        assert "has no split train, only test" in complaint("tiny", data_dir=tmp_path)

    def test_for_having_no_images(self, tmp_path):
        write_data_set(tmp_path, {"train": range(3)}, image="picture")
        assert 'as its feature "image", but' in complaint("tiny", data_dir=tmp_path)

    def test_for_images_of_different_sizes(self, tmp_path):
        write_data_set(tmp_path, {"train": range(3)}, shape=(None, 5, 1))
        assert "different sizes" in complaint("tiny", data_dir=tmp_path)

    def test_for_its_damaged_records(self, tiny):
        for records in (tiny / "tiny/1.0.0").glob("*train*"):
            records.unlink()
        assert "cannot read tiny" in complaint("tiny", data_dir=tiny)

    @pytest.mark.parametrize("more", [False, True])
    def test_for_pictures_of_another_format(self, tmp_path, monkeypatch, more):
        """Of which one would have a program of the system draw the picture."""
        import tensorflow_datasets as tfds

        drawn = []
        monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: drawn.append(1))
        features = {"other": tfds.features.Image(shape=(4, 5, 1))} if more else {}
        write_data_set(tmp_path, {"train": range(3)}, kind="eps", more=features)
        assert "not a picture: expected PNG, JPEG" in complaint("tiny", data_dir=tmp_path)
        assert not drawn

    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.parametrize("folder", ["stranger", "tensorflow_datasets/core/features/stranger"])
    def test_for_features_that_are_not_of_tfds(self, tiny, monkeypatch, folder, legacy):
        """Whose module TFDS would import."""
        module = folder.replace("/", ".")
        package = folder.rpartition("/")[0].replace("/", ".")
        (tiny / "stranger.py").write_text(f"open({str(tiny / 'imported')!r}, 'w')")
        if package:
            import_path = importlib.import_module(package).__path__
            monkeypatch.setattr(sys.modules[package], "__path__", [*import_path, str(tiny)])
        else:
            monkeypatch.syspath_prepend(tiny)
        path = tiny / "tiny/1.0.0/features.json"
        other = {"type": f"{module}.Feature", "content": {}}
        if legacy:
            path.write_text(json.dumps(other))
        else:
            features = json.loads(path.read_text())
            features["featuresDict"]["features"]["label"] = {
                "pythonClassName": f"{module}.Feature",
                "jsonFeature": {"json": "{}"},
            }
            path.write_text(json.dumps(features))
        said = complaint("tiny", data_dir=tiny)
        assert f"its features.json names the class '{module}.Feature': expected only" in said
        with pytest.raises(InputError, match="names the class"):  # as where images stay on disk
            tfds_source._source(str(path.parent), "train")
        assert not (tiny / "imported").exists()

    def test_what_others_do_with_tfds_stays_as_it_is(self, tiny, monkeypatch):
        from tensorflow_datasets.core.features import FeatureConnector

        load("tiny", data_dir=tiny)
        (tiny / "feature_of_ones_own.py").write_text(
            "from tensorflow_datasets.core.features import Text\nclass Own(Text): pass\n"
        )
        monkeypatch.syspath_prepend(tiny)
        assert FeatureConnector.cls_from_name("feature_of_ones_own.Own").__name__ == "Own"


class TestADataSetNotYetPrepared:
    @pytest.fixture
    def no_tensorflow(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorflow", None)

    @pytest.fixture
    def pretended_tensorflow(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(urllib.request, "getproxies", dict)

    def test_says_how_to_install_tensorflow(self, tmp_path, no_tensorflow, capfd):
        said = complaint("cifar10", data_dir=tmp_path)
        assert f"cifar10 is not prepared in {tmp_path}" in said
        assert said.endswith("pip install tensorflow")
        assert capfd.readouterr() == ("", "")

    def test_must_have_its_files_in_a_folder(self, tmp_path):
        said = complaint("cifar10", data_dir=tmp_path, manual_dir=tmp_path / "none")
        assert "expected a folder of manually downloaded files" in said

    def test_is_not_what_another_program_left_half_made(self, tmp_path):
        (tmp_path / "cifar10/3.0.2").mkdir(parents=True)
        assert "is not a prepared data set" in complaint("cifar10", data_dir=tmp_path)

    def test_says_what_to_fetch_when_no_server_answers(
        self, tmp_path, no_network, pretended_tensorflow, capfd
    ):
        said = complaint("cifar10", data_dir=tmp_path)
        assert "cannot be downloaded, as no server answers" in said
        assert "download cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/ on" in said
        (tmp_path / "cifar-10-binary.tar.gz").touch()
        said = complaint("cifar10", data_dir=tmp_path, manual_dir=tmp_path)
        assert "cannot prepare cifar10" in said  # the file is there, though damaged
        assert capfd.readouterr() == ("", "preparing cifar10 (once) ...\n")

    def test_says_in_one_line_why_preparing_it_failed(
        self, tmp_path, monkeypatch, pretended_tensorflow, capfd
    ):
        failing = executable(tmp_path, "echo noise; echo more >&2; echo OSError: disk full; exit 3")
        monkeypatch.setattr(sys, "executable", failing)
        monkeypatch.setattr(tfds_source, "_any_host_answers", lambda urls: True)
        assert "OSError: disk full" in complaint("cifar10", data_dir=tmp_path)
        assert capfd.readouterr() == ("", "preparing cifar10 (once) ...\n")

    def test_stops_being_prepared_on_an_interrupt(self, tmp_path):
        child = executable(tmp_path, f"touch {tmp_path}/started; exec sleep 600")
        code = (
            "import signal, sys, importlib.util; from jaxvae.data import tfds;"
            # A shell that runs the tests in the background has it ignored.
            "signal.signal(signal.SIGINT, signal.default_int_handler);"
            "importlib.util.find_spec = lambda name: object();"
            f"sys.executable = {child!r}; tfds._any_host_answers = lambda urls: True;"
            f"tfds.load('cifar10', data_dir={str(tmp_path)!r})"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        until(lambda: (tmp_path / "started").exists())
        os.kill(parent.pid, signal.SIGINT)
        assert parent.wait(timeout=60) != 0
        with pytest.raises(ProcessLookupError):  # nothing is left of its process group
            os.killpg(parent.pid, 0)


class TestTheLookForAServer:
    def test_finds_one_that_answers_beside_one_that_does_not(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            urls = [f"http://127.0.0.1:{unused_port()}/a", f"http://127.0.0.1:{port}/b"]
            assert tfds_source._any_host_answers(urls)

    def test_finds_none_where_connections_are_refused(self):
        assert not tfds_source._any_host_answers([f"http://127.0.0.1:{unused_port()}/a"])

    def test_gives_up_on_a_silent_network(self, monkeypatch):
        def hang(*args):
            time.sleep(2)
            raise OSError("timed out")

        monkeypatch.setattr(socket, "create_connection", hang)
        start = time.monotonic()
        assert not tfds_source._any_host_answers(["http://a/", "https://b/"], timeout=0.1)
        assert time.monotonic() - start < 1


def write_mnist_like(folder, *, zipped=True):
    """The four files of MNIST, with images of the numbers 0 to 19, and 100 to 104 for the test."""
    folder.mkdir()
    for part, digits in (("train", range(20)), ("t10k", range(100, 105))):
        images = np.repeat(np.uint8(digits), 20).tobytes()
        files = {
            "images-idx3": struct.pack(">4B3I", 0, 0, 8, 3, len(digits), 4, 5) + images,
            "labels-idx1": struct.pack(">4BI", 0, 0, 8, 1, len(digits))
            + bytes(digit % 10 for digit in digits),
        }
        for kind, content in files.items():
            path = folder / f"{part}-{kind}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)
    return folder


class TestMnist:
    @pytest.mark.parametrize("name", ["mnist", "mnist:3.0.1", "fashion_mnist", "kmnist"])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_is_read_from_its_four_files_in_the_order_of_tfds(self, tmp_path, name, zipped):
        files = write_mnist_like(tmp_path / "files", zipped=zipped)
        # Keys are the indices in the files, as those of MNIST are.
        write_data_set(tmp_path, {"train": range(20), "test": range(5)})
        prepared = load("tiny", data_dir=tmp_path)
        read = load(name, data_dir=tmp_path, manual_dir=files)
        np.testing.assert_array_equal(read.train_images, prepared.train_images)
        np.testing.assert_array_equal(read.train_labels, prepared.train_labels)
        np.testing.assert_array_equal(read.test_images, prepared.test_images + 100)
        np.testing.assert_array_equal(read.test_labels, prepared.test_labels)
        assert numbers(read.train_images) != read.train_images[:, 0, 0, 0].tolist()  # shuffled

    @pytest.mark.skipif(not MNIST.is_dir(), reason="the MNIST files are not there")
    def test_gives_exactly_the_images_and_labels_of_its_files(self, tmp_path, capfd):
        dataset = load("mnist", data_dir=tmp_path, manual_dir=MNIST)
        for part, images, labels in [("train", *dataset[:2]), ("t10k", *dataset[2:4])]:
            pixels = gzip.decompress((MNIST / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:]
            digits = gzip.decompress((MNIST / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
            expected = [(pixels[784 * i : 784 * (i + 1)], d) for i, d in enumerate(digits)]
            given = [(image.tobytes(), label) for image, label in zip(images, labels, strict=True)]
            assert sorted(given) == sorted(expected)
        assert "tensorflow" not in sys.modules
        assert capfd.readouterr() == ("", "")

    def test_says_where_its_files_are_when_no_server_answers(self, tmp_path, no_network, capfd):
        assert complaint("mnist", data_dir=tmp_path) == (
            f"mnist is not in {tmp_path} and cannot be downloaded, as no server answers: connect "
            "to the network, or download t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz, "
            "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz from "
            "https://storage.googleapis.com/cvdf-datasets/mnist/ on another machine and give "
            "their folder as manual_dir (--manual-dir)"
        )
        assert capfd.readouterr() == ("", "")

    def test_says_which_file_is_missing_or_damaged(self, tmp_path):
        where = "(the files of mnist are at https://storage.googleapis.com/cvdf-datasets/mnist/)"
        said = complaint("mnist", data_dir=tmp_path, manual_dir=tmp_path)
        assert said.startswith(f"{tmp_path} has no train images: expected a file train-images-idx3")
        assert said.endswith(where)
        files = write_mnist_like(tmp_path / "files")
        (files / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"other"))
        said = complaint("mnist", data_dir=tmp_path, manual_dir=files)
        assert said.startswith(f"{files}/t10k-labels-idx1-ubyte.gz cannot be read: not an IDX file")
        assert said.endswith(where)

    def test_is_downloaded_once_and_its_files_are_checked(self, tmp_path, monkeypatch, capfd):
        files = write_mnist_like(tmp_path / "server")
        infos = {
            path.as_uri(): SimpleNamespace(
                size=path.stat().st_size, checksum=hashlib.sha256(path.read_bytes()).hexdigest()
            )
            for path in files.iterdir()
        }
        builder = SimpleNamespace(
            name="mnist", data_dir_root=tmp_path, url_infos=infos, is_prepared=lambda: False
        )
        monkeypatch.setattr(tfds_source, "_builder", lambda name, data_dir: builder)
        monkeypatch.setattr(tfds_source, "_any_host_answers", lambda urls: True)
        labels = files / "train-labels-idx1-ubyte.gz"
        right = labels.read_bytes()
        labels.write_bytes(right + b"more")
        said = complaint("mnist")
        assert f"{labels.as_uri()} cannot be downloaded" in said
        assert "it has changed: expected the SHA-256" in said
        labels.write_bytes(right)
        assert numbers(load("mnist").train_images) == list(range(20))
        assert capfd.readouterr().err.count(f"downloading {labels.as_uri()} (once)") == 2
        shutil.rmtree(files)
        assert numbers(load("mnist").test_images) == list(range(100, 105))
        assert capfd.readouterr() == ("", "")


def executable(folder, script):
    """A program that stands in for Python where the child process is started."""
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def unused_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
