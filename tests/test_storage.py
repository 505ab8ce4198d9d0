"""Files that are written whole or not at all."""

import os
from pathlib import Path

import jax
import pytest

import jaxvae
from jaxvae import storage
from jaxvae.explorer import write as write_page
from jaxvae.interchange.export import export


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_whose_writing_fails_is_the_old_one(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")

    def write(file):
        file.write(b"new, but")
        file.flush()
        assert [storage.is_temporary(one.name) for one in tmp_path.iterdir()].count(True) == 1
        raise error

    with pytest.raises(error):
        storage.write_atomic(path, write)
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("a.json", "old")]


def test_a_device_is_not_replaced(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(Path, "open", lambda path, mode: made.append(path))
    with pytest.raises(OSError, match="it is a device, not a file"):
        storage.write_atomic(Path(os.devnull), lambda file: file.write(b"new"))
    assert not made


def test_a_name_that_is_taken_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda n: "0" * 2 * n)
    (tmp_path / f".jaxvae-{'0' * 16}.part").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        storage.write_atomic(tmp_path / "a.json", lambda file: file.write(b"new"))
    assert not (tmp_path / "victim").exists()


def test_pages_and_exports_are_not_written_through_links(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxvae.explorer.page", lambda *_: "a page")
    names = ("explorer.html", "model.safetensors")
    for name in names:
        (tmp_path / name).symlink_to(tmp_path / "victim")
        (tmp_path / f"{name}.part").symlink_to(tmp_path / "victim")
    write_page(tmp_path / "explorer.html", None, None, "")
    config = jaxvae.ModelConfig((4, 3, 1), 2, network="mlp:width=4")
    export(jaxvae.init(jax.random.key(0), config), tmp_path, ["safetensors"])
    assert not (tmp_path / "victim").exists()
    assert not any((tmp_path / name).is_symlink() for name in names)


def test_a_folder_of_ones_own_is_no_link(tmp_path):
    (tmp_path / "figures").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="figures is a symbolic link: expected a regular file or"):
        storage.make_folder(tmp_path, "figures")
    assert storage.make_folder(tmp_path, "a").is_dir()
