"""An animation of the manifold, kept frame by frame while a model trains."""

import os
import shutil
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import at_once
from PIL import EpsImagePlugin, Image, PngImagePlugin

import jaxvae
from jaxvae.figures import animation

pytestmark = pytest.mark.usefixtures("compile_quickly")


def params(image_shape=(8, 8, 1), seed=0):
    config = jaxvae.ModelConfig(image_shape, network="mlp")
    return jaxvae.init(jax.random.key(seed), config)


def kept(run_dir):
    return sorted(int(path.stem) for path in (run_dir / "manifolds").iterdir())


def test_a_frame_is_the_decoded_plane(tmp_path):
    model = params()
    animation.keep_frame(tmp_path, {"epoch": 3}, model)
    with Image.open(tmp_path / "manifolds" / "0003.png") as picture:
        frame = np.asarray(picture)
    assert frame.shape == (15 * 8, 15 * 8)
    corner = jaxvae.decode(model, jnp.array([[1.644854, 1.644854]])).mean[0, ..., 0] * 255
    np.testing.assert_allclose(frame[:8, -8:], corner, atol=0.51)


def test_a_frame_of_large_images_has_fewer_of_them(tmp_path):
    animation.keep_frame(tmp_path, {"epoch": 1}, params((96, 64, 3)))
    with Image.open(tmp_path / "manifolds" / "0001.png") as picture:
        assert (picture.size, picture.mode) == ((5 * 64, 5 * 96), "RGB")


def test_a_long_run_keeps_a_bounded_number_at_even_distances(tmp_path, monkeypatch):
    """Whether it was killed on the way and went on, or not."""
    monkeypatch.setattr(animation, "_FRAMES", 8)
    model = params()
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    for epoch in range(34):
        animation.keep_frame(tmp_path / "whole", {"epoch": epoch}, model)
        assert len(kept(tmp_path / "whole")) <= 8
    assert kept(tmp_path / "whole") == [0, 8, 16, 24, 32]
    for epoch in [*range(17), *range(15, 34)]:
        animation.keep_frame(tmp_path / "killed", {"epoch": epoch}, model)
    for epoch in kept(tmp_path / "whole"):
        name = f"manifolds/{epoch:04}.png"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """The frames of three epochs, each of parameters of its own."""
    folder = tmp_path_factory.mktemp("frames")
    for epoch in range(4):
        animation.keep_frame(folder, {"epoch": epoch}, params(seed=epoch))
    return folder


@pytest.fixture
def run_dir(tmp_path, frames):
    """A run of three epochs."""
    return shutil.copytree(frames, tmp_path / "run")


def test_the_animation_shows_frame_after_frame_below_its_epoch(run_dir):
    assert animation.draw_animation(run_dir) == [run_dir / "figures" / "manifold.gif"]
    with Image.open(run_dir / "figures" / "manifold.gif") as gif:
        assert gif.n_frames == 4
        for epoch in range(4):
            gif.seek(epoch)
            picture = np.asarray(gif.convert("L"))
            with Image.open(run_dir / "manifolds" / f"{epoch:04}.png") as frame:
                np.testing.assert_allclose(picture[-120:], np.asarray(frame), atol=1)
            assert picture[:-120].min() < 100  # the epoch's number, on white
            assert np.mean(picture[:-120] == 255) > 0.5


def test_frames_that_are_missing_or_cut_off_are_missing_in_the_animation(run_dir):
    folder = run_dir / "manifolds"
    (folder / "0001.png").unlink()
    whole = (folder / "0002.png").read_bytes()
    (folder / "0002.png").write_bytes(whole[: len(whole) // 2])
    (folder / "0004.png").write_bytes(b"")
    (path,) = animation.draw_animation(run_dir)
    with Image.open(path) as gif:
        assert gif.n_frames == 2


def save(path, picture, kind="png"):
    picture.save(path, kind)


def bomb(path):
    """A picture that says that it is far larger than what it holds."""
    save(path, Image.new("L", (4, 4)))
    content = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", 20_000, 20_000) + content[24:29]
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])


def text_bomb(path):
    text = PngImagePlugin.PngInfo()
    text.add_text("x", "x" * 2**21, zip=True)
    Image.new("L", (120, 120)).save(path, pnginfo=text)


ODD = {
    "nothing": lambda path: path.write_bytes(b""),
    "no picture": lambda path: path.write_bytes(b"<svg/>" * 100),
    "a broken chunk": lambda path: path.write_bytes(path.read_bytes().replace(b"IDAT", bytes(4))),
    "a header alone": lambda path: path.write_bytes(path.read_bytes()[:30]),
    "a bomb": bomb,
    "a bomb of text": text_bomb,
    "a large one": lambda path: save(path, Image.new("L", (5000, 5000))),
    "another size": lambda path: save(path, Image.new("L", (7, 9))),
    "another mode": lambda path: save(path, Image.new("RGB", (120, 120))),
    "another mode and depth": lambda path: save(path, Image.new("I;16", (7, 120))),
    "a palette": lambda path: save(path, Image.new("P", (120, 120))),
    "alpha": lambda path: save(path, Image.new("RGBA", (120, 120))),
    "another format": lambda path: save(path, Image.new("L", (120, 120)), "ppm"),
    "PostScript": lambda path: save(path, Image.new("L", (120, 120)), "eps"),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("case", ODD)
def test_a_damaged_huge_or_odd_frame_is_missing_in_the_animation(run_dir, monkeypatch, case, first):
    drawn = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: drawn.append(1))
    ODD[case](run_dir / "manifolds" / ("0000.png" if first else "0003.png"))
    (path,) = animation.draw_animation(run_dir)
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.size) == (3, (120, 120 + 26))
    assert not drawn


def test_an_animation_is_of_the_frames_that_a_run_keeps(tmp_path):
    """However many a stranger's folder holds."""
    (tmp_path / "manifolds").mkdir()
    for epoch in range(301):
        picture = np.full((4, 4), epoch % 256, np.uint8)
        Image.fromarray(picture).save(tmp_path / "manifolds" / f"{epoch:04}.png")
    (path,) = animation.draw_animation(tmp_path)
    with Image.open(path) as gif:
        assert gif.n_frames == 38  # every eighth


def test_a_run_without_frames_has_no_animation(tmp_path):
    assert animation.draw_animation(tmp_path) == []
    animation.keep_frame(tmp_path, {"epoch": 1}, params())
    assert animation.draw_animation(tmp_path) == []


def test_pictures_that_are_no_frames_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(animation, "_FRAMES", 2)
    folder = tmp_path / "manifolds"
    folder.mkdir()
    others = ["1.png", "00001.png", "sketch.png"]
    for name in others:
        (folder / name).write_text("of somebody")
    for epoch in range(3):
        animation.keep_frame(tmp_path, {"epoch": epoch}, params())
    assert {path.name for path in folder.iterdir()} == {"0000.png", "0002.png", *others}


def test_a_pipe_among_the_frames_is_passed_over(run_dir):
    os.mkfifo(run_dir / "manifolds" / "0004.png")
    with at_once():
        (path,) = animation.draw_animation(run_dir)
    with Image.open(path) as gif:
        assert gif.n_frames == 4
