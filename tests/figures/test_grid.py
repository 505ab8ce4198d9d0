"""Images side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxvae
from jaxvae.figures import grid
from jaxvae.models.distributions import GaussianMixture, UnitGaussian


def test_the_grid_holds_the_standard_normals_quantiles():
    """Phi^-1 of 0.05, 0.275, 0.5, 0.725 and 0.95, from a table of the normal distribution."""
    expected = [-1.644854, -0.597760, 0.0, 0.597760, 1.644854]
    np.testing.assert_allclose(grid.latent_grid(UnitGaussian(2), 1, 5), expected, atol=2e-6)


def test_the_grid_of_a_mixture_holds_its_own_quantiles():
    """Against draws of it; and of one Gaussian, that one's."""
    rng = np.random.default_rng(3)
    fields = rng.normal(size=8), 3 * rng.normal(size=(8, 3)), rng.normal(size=(8, 3))
    mixture = GaussianMixture(*map(jnp.float32, fields))
    draws = mixture.sample(jax.random.key(4), 100_000)[:, 2]
    points = grid.latent_grid(mixture, 2, 7)
    np.testing.assert_allclose(
        np.mean(draws[:, None] < points, axis=0), np.linspace(0.05, 0.95, 7), atol=0.005
    )
    one = GaussianMixture(jnp.zeros(1), jnp.array([[3.0]]), jnp.log(jnp.array([[4.0]])))
    expected = 3 + 2 * np.array([-1.644854, -0.597760, 0.0, 0.597760, 1.644854])
    np.testing.assert_allclose(grid.latent_grid(one, 0, 5), expected, atol=1e-3)


@pytest.mark.parametrize(("n", "size"), [(1, (8, 8)), (7, (24, 24)), (9, (24, 24)), (10, (32, 24))])
def test_saved_images_lie_side_by_side_without_a_frame(tmp_path, n, size):
    images = jnp.linspace(0, 1, n * 64).reshape(n, 8, 8, 1)
    grid.save_images(images, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == size
        first = np.asarray(picture)[:8, :8]
    np.testing.assert_allclose(first, images[0, ..., 0] * 255, atol=0.51)


def test_images_that_cannot_be_saved_say_so(tmp_path):
    with pytest.raises(jaxvae.InputError, match="cannot be written: No such file or directory"):
        grid.save_images(jnp.zeros((1, 8, 8, 1)), tmp_path / "nowhere" / "out.png")
