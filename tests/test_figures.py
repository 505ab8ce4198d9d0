"""The figures show what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxvae
from jaxvae import figures
from jaxvae.data import Dataset
from jaxvae.priors import Mixture, StandardNormal

pytestmark = pytest.mark.usefixtures("compile_quickly")


def params(image_shape=(8, 8, 1), latent_dim=2):
    return jaxvae.init(jax.random.key(0), jaxvae.ModelConfig(image_shape, latent_dim))


def dataset(image_shape=(8, 8, 1), labels=True):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, *image_shape), np.uint8)
    classes = np.arange(40) % 5 if labels else None
    return Dataset(images, classes, images, classes)


def shown(figure):
    """The picture in a figure's only axes."""
    (axes,) = figure.axes
    (image,) = axes.get_images()
    return image.get_array()


def test_the_grid_holds_the_standard_normals_quantiles():
    """Phi^-1 of 0.05, 0.275, 0.5, 0.725 and 0.95, from a table of the normal distribution."""
    expected = [-1.644854, -0.597760, 0.0, 0.597760, 1.644854]
    np.testing.assert_allclose(figures.latent_grid(StandardNormal(2), 1, 5), expected, atol=2e-6)


def test_the_grid_of_a_mixture_holds_its_own_quantiles():
    """Against draws of it; and of one Gaussian, that one's."""
    rng = np.random.default_rng(3)
    fields = rng.normal(size=8), 3 * rng.normal(size=(8, 3)), rng.normal(size=(8, 3))
    mixture = Mixture(*map(jnp.float32, fields))
    draws = mixture.sample(jax.random.key(4), 100_000)[:, 2]
    grid = figures.latent_grid(mixture, 2, 7)
    np.testing.assert_allclose(
        np.mean(draws[:, None] < grid, axis=0), np.linspace(0.05, 0.95, 7), atol=0.005
    )
    one = Mixture(jnp.zeros(1), jnp.array([[3.0]]), jnp.log(jnp.array([[4.0]])))
    expected = 3 + 2 * np.array([-1.644854, -0.597760, 0.0, 0.597760, 1.644854])
    np.testing.assert_allclose(figures.latent_grid(one, 0, 5), expected, atol=1e-3)


def test_the_manifold_decodes_the_grid_with_z1_to_the_right_and_z2_upwards():
    model = params()
    picture = shown(figures.manifold(model, 3))
    assert picture.shape == (24, 24)
    low, high = -1.644854, 1.644854
    corners = jaxvae.decode(model, jnp.array([[low, high], [high, low]])).mean[..., 0] * 255
    np.testing.assert_allclose(picture[:8, :8], corners[0], atol=0.51)
    np.testing.assert_allclose(picture[-8:, -8:], corners[1], atol=0.51)


def test_more_latents_stay_at_zero_in_the_manifold():
    model = params(latent_dim=4)
    picture = shown(figures.manifold(model, 3))
    middle = jaxvae.decode(model, jnp.zeros((1, 4))).mean[0, ..., 0] * 255
    np.testing.assert_allclose(picture[8:16, 8:16], middle, atol=0.51)


def conditional(latent_dim=2, **fields):
    config = jaxvae.ModelConfig((8, 8, 1), latent_dim, network="mlp", num_classes=5, **fields)
    return jaxvae.init(jax.random.key(0), config)


def test_the_manifold_of_a_conditional_model_is_that_of_class_0():
    model = conditional()
    figure = figures.manifold(model, 3)
    middle = jaxvae.decode(model, jnp.zeros((1, 2)), jnp.zeros(1, int)).mean[0, ..., 0] * 255
    np.testing.assert_allclose(shown(figure)[8:16, 8:16], middle, atol=0.51)
    assert "of class 0" in figure.axes[0].get_title(loc="left")


def test_a_conditional_models_images_are_taken_with_their_labels():
    model, data = conditional(), dataset()
    picture = shown(figures.reconstructions(model, data))
    rebuilt = jaxvae.reconstruct(model, data.test_images[3:4], np.array([3]))[0, ..., 0] * 255
    np.testing.assert_allclose(picture[8:, 24:32], rebuilt, atol=0.51)
    (axes,) = figures.latents(model, data).axes
    mean = jaxvae.encode(model, data.test_images, data.test_labels).mean
    np.testing.assert_allclose(axes.collections[0].get_offsets(), mean, rtol=1e-4)


def test_samples_of_a_conditional_model_are_of_all_classes_in_turn():
    model, key = conditional(), jax.random.key(1)
    picture = shown(figures.samples(model, key, rows=2))
    images = jaxvae.sample(model, key, 4, jnp.arange(4))[..., 0] * 255
    np.testing.assert_allclose(picture[:8, 8:], images[1], atol=0.51)
    np.testing.assert_allclose(picture[8:, :8], images[2], atol=0.51)


@pytest.mark.parametrize(
    ("latent_dim", "fields"),
    [
        (1, {"posterior": "iaf", "prior": "mixture", "prior_components": 5}),
        (3, {"likelihood": "discretized_logistic"}),
    ],
    ids=["a flow and a mixture", "grey levels"],
)
def test_every_figure_of_a_conditional_model_is_drawn(tmp_path, latent_dim, fields):
    paths = figures.draw_all(
        tmp_path, conditional(latent_dim, **fields), dataset(), records([-3.0]), jax.random.key(0)
    )
    assert len(paths) == 6


def test_reconstructions_stand_below_one_image_of_each_class():
    model, data = params(), dataset()
    picture = shown(figures.reconstructions(model, data))
    assert picture.shape == (16, 40)
    np.testing.assert_allclose(picture[:8, 8:16], data.test_images[1, ..., 0])
    rebuilt = jaxvae.reconstruct(model, data.test_images[1:2])[0, ..., 0] * 255
    np.testing.assert_allclose(picture[8:, 8:16], rebuilt, atol=0.51)


def test_the_scatter_shows_posterior_means_with_each_class_named():
    model, data = params(), dataset()
    (axes,) = figures.latents(model, data).axes
    points = axes.collections[0].get_offsets()
    np.testing.assert_allclose(points, jaxvae.encode(model, data.test_images).mean, rtol=1e-4)
    assert [text.get_text() for text in axes.texts] == ["0", "1", "2", "3", "4"]
    assert len(np.unique(axes.collections[0].get_facecolors(), axis=0)) == 5


def test_the_scatter_of_a_flow_shows_where_it_takes_the_means():
    config = jaxvae.ModelConfig((8, 8, 1), 2, network="mlp", posterior="iaf")
    model, data = jaxvae.init(jax.random.key(0), config), dataset()
    (axes,) = figures.latents(model, data).axes
    posterior = jaxvae.encode(model, data.test_images)
    points = axes.collections[0].get_offsets()
    np.testing.assert_allclose(points, posterior.center, rtol=1e-4, atol=1e-6)
    assert np.abs(posterior.center - posterior.mean).max() > 1e-3
    assert axes.get_xlabel() == "posterior center of z1"


def test_the_curves_are_the_recorded_metrics():
    history = records([-300.0, -200.0, -180.0])
    elbo, _, _ = figures.training(history).axes
    train, test = elbo.get_lines()
    assert list(train.get_ydata()) == [-300.0, -200.0, -180.0]
    assert list(test.get_ydata()) == [-301.0, -201.0, -181.0]


def test_a_first_epoch_thrown_off_is_named_instead_of_drawn():
    history = records([-300.0, -200.0, -180.0])
    history[0]["train"]["elbo"] = -6e8
    elbo, log_likelihood, _ = figures.training(history).axes
    assert list(elbo.get_lines()[0].get_ydata()) == [-200.0, -180.0]
    assert elbo.get_xlabel() == "epoch\noff the scale: train, epoch 1, -6e+08"
    assert log_likelihood.get_xlabel() == "epoch"


def records(elbos):
    return [
        {
            "epoch": epoch,
            "train": {"elbo": elbo, "log_likelihood": elbo + 5, "kl": 5.0},
            "test": {"elbo": elbo - 1, "log_likelihood": elbo + 4, "kl": 5.0},
        }
        for epoch, elbo in enumerate(elbos, 1)
    ]


@pytest.mark.parametrize(("shape", "latent_dim"), [((8, 8, 1), 1), ((7, 5, 3), 2), ((6, 6, 2), 3)])
def test_every_figure_is_drawn_for_any_model(tmp_path, shape, latent_dim):
    data = dataset(shape, labels=latent_dim != 3)
    model = params(shape, latent_dim)
    paths = figures.draw_all(tmp_path, model, data, records([-3.0]), jax.random.key(0))
    names = "manifold_15 manifold_20 reconstructions samples latents training"
    assert [path.stem for path in paths] == names.split()
    for path in paths:
        with Image.open(path) as picture:
            assert min(picture.size) > 100


@pytest.mark.parametrize(("n", "size"), [(1, (8, 8)), (7, (24, 24)), (9, (24, 24)), (10, (32, 24))])
def test_saved_images_lie_side_by_side_without_a_frame(tmp_path, n, size):
    images = jnp.linspace(0, 1, n * 64).reshape(n, 8, 8, 1)
    figures.save_images(images, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == size
        first = np.asarray(picture)[:8, :8]
    np.testing.assert_allclose(first, images[0, ..., 0] * 255, atol=0.51)


def test_images_that_cannot_be_saved_say_so(tmp_path):
    with pytest.raises(jaxvae.InputError, match="cannot be written: No such file or directory"):
        figures.save_images(jnp.zeros((1, 8, 8, 1)), tmp_path / "nowhere" / "out.png")
