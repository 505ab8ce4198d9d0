"""A film of the manifold, kept frame by frame while a model trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

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


@pytest.fixture
def run_dir(tmp_path):
    """A run of three epochs, each with parameters of its own."""
    for epoch in range(4):
        animation.keep_frame(tmp_path, {"epoch": epoch}, params(seed=epoch))
    return tmp_path


def test_the_film_shows_frame_after_frame_below_its_epoch(run_dir):
    assert animation.draw_film(run_dir) == [run_dir / "figures" / "manifold.gif"]
    with Image.open(run_dir / "figures" / "manifold.gif") as gif:
        assert gif.n_frames == 4
        for epoch in range(4):
            gif.seek(epoch)
            picture = np.asarray(gif.convert("L"))
            with Image.open(run_dir / "manifolds" / f"{epoch:04}.png") as frame:
                np.testing.assert_allclose(picture[-120:], np.asarray(frame), atol=1)
            assert picture[:-120].min() < 100  # the epoch's number, on white
            assert np.mean(picture[:-120] == 255) > 0.5


def test_frames_that_are_missing_or_cut_off_are_missing_in_the_film(run_dir):
    folder = run_dir / "manifolds"
    (folder / "0001.png").unlink()
    whole = (folder / "0002.png").read_bytes()
    (folder / "0002.png").write_bytes(whole[: len(whole) // 2])
    (folder / "0004.png").write_bytes(b"")
    (path,) = animation.draw_film(run_dir)
    with Image.open(path) as gif:
        assert gif.n_frames == 2


def test_a_run_without_frames_has_no_film(tmp_path):
    assert animation.draw_film(tmp_path) == []
    animation.keep_frame(tmp_path, {"epoch": 1}, params())
    assert animation.draw_film(tmp_path) == []
