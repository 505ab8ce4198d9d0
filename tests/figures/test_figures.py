"""The figures show what they say."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refused
from PIL import Image

import jaxvae
from jaxvae import figures
from jaxvae.data import Dataset
from jaxvae.errors import NotDrawn
from jaxvae.evaluation.metrics import active_units, variance_of_means
from jaxvae.figures import charts, grid, pictures
from jaxvae.models.distributions import Gaussian

pytestmark = pytest.mark.usefixtures("compile_quickly")


ALWAYS = ["manifold_15", "manifold_20", "reconstructions", "samples", "traversals"]
ALWAYS += ["interpolations", "latents", "aggregate", "units"]
KEY = jax.random.key(5)


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


def test_the_manifold_decodes_the_grid_with_z1_to_the_right_and_z2_upwards():
    model = params()
    picture = shown(figures.manifold(model, 3))
    assert picture.shape == (24, 24)
    low, high = -1.644854, 1.644854
    corners = jaxvae.decode(model, jnp.array([[low, high], [high, low]])).mean[..., 0] * 255
    np.testing.assert_allclose(picture[:8, :8], corners[0], atol=0.51)
    np.testing.assert_allclose(picture[-8:, -8:], corners[1], atol=0.51)


def vectors(latent_dim=2, **fields):
    config = jaxvae.ModelConfig(
        (5,), latent_dim, network="mlp:width=8", likelihood="gaussian", **fields
    )
    x = np.random.default_rng(0).normal(size=(40, 5)).astype("f")
    return jaxvae.init(jax.random.key(0), config), Dataset(x, None, x, None)


def test_a_traversal_of_vectors_draws_the_decoders_means_as_lines():
    model, data = vectors()
    figure = figures.traversal_lines(model, data, columns=3)
    panels = [axes for axes in figure.axes if axes.get_lines()]
    z = np.tile(jaxvae.encode(model, data.test_images[:1]).mean, (2, 3, 1))
    for row, axes in enumerate(panels):
        latent = int(axes.get_title(loc="left").removeprefix("z")) - 1
        z[row, :, latent] = [-2.326348, 0, 2.326348]  # quantiles 0.01, 0.5 and 0.99 of N(0, 1)
    lines = [line.get_ydata() for axes in panels for line in axes.get_lines()]
    means = jaxvae.decode(model, z.reshape(6, 2)).mean
    np.testing.assert_allclose(lines, means, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("latent_dim", [1, 3])
def test_figures_of_vectors_leave_out_grids_of_images(tmp_path, latent_dim):
    paths = figures.draw_all(tmp_path, *vectors(latent_dim), [], jax.random.key(0))
    assert {path.stem for path in paths} == {"latents", "aggregate", "units", "traversals"}


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


def test_the_most_unusual_images_are_above_the_least_unusual_ones():
    images = dataset().test_images
    picture = shown(pictures.unusual(params(), images[:3], images[3:6]))
    assert picture.shape == (16, 24)
    np.testing.assert_array_equal(picture[:8, 16:], images[2, ..., 0])
    np.testing.assert_array_equal(picture[8:, :8], images[3, ..., 0])


def test_samples_of_a_conditional_model_are_of_all_classes_in_turn():
    model, key = conditional(), jax.random.key(1)
    picture = shown(figures.samples(model, key, of(CONSTANT), rows=2))
    images = jaxvae.sample(model, key, 4, jnp.arange(4))[..., 0] * 255
    np.testing.assert_allclose(picture[:8, 8:], images[1], atol=0.51)
    np.testing.assert_allclose(picture[8:, :8], images[2], atol=0.51)


@pytest.mark.parametrize(
    ("latent_dim", "fields"),
    [
        (1, {"posterior": "iaf", "prior": "mixture:components=5"}),
        (3, {"likelihood": "discretized_logistic"}),
    ],
    ids=["a flow and a mixture", "grey levels"],
)
def test_every_figure_of_a_conditional_model_is_drawn(tmp_path, latent_dim, fields):
    paths = figures.draw_all(
        tmp_path, conditional(latent_dim, **fields), dataset(), records([-3.0]), jax.random.key(0)
    )
    assert [path.stem for path in paths] == [*ALWAYS, "classes", "training"]


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


def test_a_run_of_one_epoch_has_nothing_off_the_scale():
    for axes in figures.training(records([-3.0])).axes:
        assert [len(line.get_xdata()) for line in axes.get_lines()] == [1, 1]
        assert axes.get_xlabel() == "epoch"


def records(elbos):
    return [
        {
            "epoch": epoch,
            "train": {"elbo": elbo, "log_likelihood": elbo + 5, "kl": 5.0},
            "test": {"elbo": elbo - 1, "log_likelihood": elbo + 4, "kl": 5.0},
        }
        for epoch, elbo in enumerate(elbos, 1)
    ]


@pytest.mark.parametrize(
    ("shape", "latent_dim", "kind"),
    [((8, 8, 1), 1, "png"), ((7, 5, 3), 2, "png"), ((6, 6, 2), 3, "svg")],
)
def test_every_figure_is_drawn_for_any_model(tmp_path, shape, latent_dim, kind):
    data = dataset(shape, labels=latent_dim != 3)
    model = params(shape, latent_dim)
    paths = figures.draw_all(tmp_path, model, data, records([-3.0]), jax.random.key(0), kind)
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in (*ALWAYS, "training")]
    assert set(paths) == set(tmp_path.iterdir())
    for path in paths if kind == "png" else ():
        with Image.open(path) as picture:
            assert min(picture.size) > 100


def odd(mean=0.0, log_var=0.0, kernel=0.0, decoder=1.0, latent_dim=2, **fields):
    """A model whose posteriors have this mean and log variance, plus `kernel` of a fresh one's."""
    config = jaxvae.ModelConfig((8, 8, 1), latent_dim, network="mlp:width=8", **fields)
    model = jaxvae.init(jax.random.key(0), config)
    heads = {"mean": (mean, kernel), "log_var": (log_var, 0.0)}
    encoder = dict(model.encoder)
    for name, (bias, scale) in heads.items():
        head = encoder[name]
        bias = jnp.full_like(head["bias"], bias)
        encoder[name] = {"kernel": scale * head["kernel"], "bias": bias}
    decoder = jax.tree.map(lambda x: decoder * x, model.decoder)
    return replace(model, encoder=encoder, decoder=decoder)


def of(images):
    labels = np.arange(len(images)) % 5
    return Dataset(images, labels, images, labels)


ONE = np.full((1, 8, 8, 1), 200, np.uint8)
CONSTANT = ONE.repeat(40, axis=0)
POINT = {"mean": 0.3, "log_var": -60.0}
ODD = {
    "collapsed to the prior": lambda: odd(),
    "collapsed to a point": lambda: odd(**POINT),
    "collapsed, one latent": lambda: odd(**POINT, latent_dim=1),
    "collapsed, three latents": lambda: odd(**POINT, latent_dim=3),
    "collapsed flow": lambda: odd(**POINT, posterior="iaf:steps=1"),
    "collapsed prior": lambda: replace(
        odd(**POINT, prior="mixture:components=2"),
        prior={"logits": jnp.zeros(2), "mean": jnp.full((2, 2), 0.3),
               "log_var": jnp.full((2, 2), -60.0)},
    ),
    "narrow posteriors": lambda: odd(log_var=-30.0, kernel=1.0),
    "narrow posteriors far away": lambda: odd(log_var=-60.0, kernel=100.0),
    "huge": lambda: odd(1e30, 150.0, kernel=1e30, decoder=1e10),
    "some draws infinite": lambda: odd(log_var=177.0, kernel=1.0),
    "infinite": lambda: odd(1e38, 300.0, kernel=1e38, decoder=1e38, prior="vamp:components=2"),
    "NaN": lambda: odd(np.nan, np.nan, decoder=np.nan, prior="vamp:components=2"),
    "NaN, one latent": lambda: odd(np.nan, np.nan, decoder=np.nan, latent_dim=1),
}  # fmt: skip


@pytest.mark.parametrize("which", ODD)
def test_what_is_measured_is_drawn_of_collapsed_and_of_diverging_models(tmp_path, which):
    model, data, key = ODD[which](), dataset(), jax.random.key(0)
    for number, figure in enumerate(
        (
            figures.latents(model, data),
            figures.units(model, data, key=key),
            figures.aggregate(model, data, key),
        )
    ):
        figure.savefig(tmp_path / f"{number}.png", dpi=20)


@pytest.mark.parametrize(
    ("model", "data", "history"),
    [
        (lambda: odd(**POINT), dataset, [-3.0]),
        (lambda: odd(np.nan, 150.0, decoder=np.nan), dataset, [np.nan, -3e30, -3.0]),
        (lambda: odd(kernel=1.0, num_classes=5), lambda: of(CONSTANT), [-3.0, -3.0]),
        (lambda: odd(kernel=1.0, num_classes=5), lambda: of(ONE), [-3.0]),
    ],
    ids=["collapsed", "diverging", "constant images", "one image"],
)
def test_every_figure_is_drawn_of_odd_models_and_data(tmp_path, monkeypatch, model, data, history):
    monkeypatch.setattr("jaxvae.figures.style._DPI", 40)
    arguments = (model(), data(), records(history), jax.random.key(0))
    names = [path.stem for path in figures.draw_all(tmp_path, *arguments)]
    assert [name for name in names if name != "classes"] == [*ALWAYS, "training"]


def test_a_figure_that_fails_is_told_in_one_line_and_the_others_are_drawn(tmp_path, monkeypatch):
    def fails(*arguments):
        raise ValueError("Contour levels\nmust be increasing")

    monkeypatch.setattr(figures, "aggregate", fails)
    (tmp_path / "samples.png").mkdir()
    history = [{"epoch": 1}]  # a line of metrics.jsonl that says too little
    arguments = (tmp_path, odd(), dataset(), history, jax.random.key(0))
    monkeypatch.setattr("jaxvae.figures.style._DPI", 40)
    with pytest.warns(NotDrawn) as told:
        names = [path.stem for path in figures.draw_all(*arguments)]
    lost = ["samples", "aggregate", "training"]
    assert names == [name for name in ALWAYS if name not in lost]
    messages = [str(one.message) for one in told]
    for message, name in zip(messages, lost, strict=True):
        assert message.startswith(f"{tmp_path / name}.png was not drawn, but the other figures are")
        assert "\n" not in message
    assert messages[1].endswith(": ValueError: Contour levels must be increasing")


def test_collapsed_posteriors_are_a_spot_in_the_plane_and_those_infinite_are_counted():
    *_, both = figures.aggregate(odd(**POINT), dataset(), jax.random.key(0)).axes
    spot, prior = both.collections
    (outer, inner) = [path.get_extents() for path in spot.get_paths()]
    assert outer.contains(0.3, 0.3)
    assert inner.contains(0.3, 0.3)
    assert 0 < inner.width < outer.width < 0.5 < prior.get_paths()[0].get_extents().width
    figure = figures.aggregate(odd(log_var=177.0, kernel=1.0), dataset(), jax.random.key(0))
    lost = int(figure.get_suptitle().split("(")[1].split()[0])
    assert 0 < lost < 40
    bars = figure.axes[0].patches
    assert sum(bar.get_height() * bar.get_width() for bar in bars) == pytest.approx(1)


def test_the_coordinates_of_a_prior_that_diverges_are_short():
    figure = figures.manifold(odd(1e37, prior="vamp:components=2"), 3)
    (axes,) = figure.axes
    ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()]
    assert {len(tick.get_text()) for tick in ticks} == {len("1.0e+37")}


def test_pixels_that_are_no_numbers_are_black():
    image = np.array([[[np.nan], [1.0]]])
    np.testing.assert_array_equal(grid.pixels(image), [[0, 255]])


@pytest.mark.parametrize(("kind", "begins"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_figures_are_vectors_where_asked_for(tmp_path, kind, begins):
    """And the same bytes whenever they are drawn."""
    written = []
    for folder in (tmp_path / "once", tmp_path / "again"):
        folder.mkdir()
        path = folder / f"training.{kind}"
        figures.save(figures.training(records([-300.0, -200.0])), path)
        written.append(path.read_bytes())
    assert written[0].startswith(begins)
    assert written[0] == written[1]


def test_on_a_circle_the_spherical_way_is_the_arc_at_a_steady_rate():
    t = np.linspace(0, 1, 7)
    way = pictures.slerp(jnp.array([2.0, 0.0]), jnp.array([0.0, 2.0]), jnp.array(t))
    arc = 2 * np.stack([np.cos(t * np.pi / 2), np.sin(t * np.pi / 2)], axis=1)
    np.testing.assert_allclose(way, arc, atol=1e-6)


def test_the_spherical_way_keeps_to_the_sphere_in_any_dimension():
    """Its ends, its length, and equal angles between its steps."""
    ends = np.random.default_rng(0).normal(size=(2, 30))
    ends *= 5 / np.linalg.norm(ends, axis=1, keepdims=True)
    way = np.float64(pictures.slerp(*jnp.float32(ends), jnp.linspace(0, 1, 9)))
    np.testing.assert_allclose(way[[0, -1]], ends, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(way, axis=1), 5, rtol=1e-5)
    cosines = np.sum(way[1:] * way[:-1], axis=1) / 25
    whole = np.arccos(np.dot(*ends) / 25)
    np.testing.assert_allclose(np.arccos(cosines), whole / 8, rtol=1e-3)


@pytest.mark.parametrize("end", [[3.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
def test_where_no_angle_says_the_way_it_is_straight(end):
    t = jnp.linspace(0, 1, 5)
    way = pictures.slerp(jnp.array([1.0, 0.0]), jnp.array(end), t)
    straight = 1 + t * (end[0] - 1)
    np.testing.assert_allclose(way, np.stack([straight, 0 * t], axis=1), atol=1e-6)


def test_interpolations_go_from_image_to_image_straight_and_on_the_sphere():
    model, data = params(latent_dim=3), dataset()
    figure = figures.interpolations(model, data, pairs=2, columns=5)
    picture = shown(figure)
    assert picture.shape == (4 * 8, 5 * 8)
    rows = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert rows == ["straight", "spherical"] * 2
    ends = data.test_images[[0, 1]]  # the first of classes 0 and 1
    for row in (0, 8):
        np.testing.assert_allclose(picture[row : row + 8, :8], ends[0, ..., 0])
        np.testing.assert_allclose(picture[row : row + 8, -8:], ends[1, ..., 0])
    center = jaxvae.encode(model, ends).mean
    half = jnp.array([0.5])
    for row, way in ((0, pictures.lerp), (8, pictures.slerp)):
        middle = jaxvae.decode(model, way(*center, half)).mean[0, ..., 0] * 255
        np.testing.assert_allclose(picture[row : row + 8, 16:24], middle, atol=0.51)


def test_interpolations_of_a_conditional_model_stay_in_a_class():
    """And under a learned prior, which has no sphere, they are straight."""
    model, data = conditional(prior="mixture:components=2"), dataset()
    figure = figures.interpolations(model, data, pairs=3, columns=4)
    picture = shown(figure)
    assert picture.shape == (3 * 8, 4 * 8)
    np.testing.assert_allclose(picture[16:, :8], data.test_images[2, ..., 0])
    np.testing.assert_allclose(picture[16:, -8:], data.test_images[37, ..., 0])
    between = jaxvae.reconstruct(model, data.test_images[2:3], np.array([2]))[0, ..., 0] * 255
    np.testing.assert_allclose(picture[16:, 8:16], between, atol=0.51)


def test_traversals_change_one_latent_and_show_the_one_that_varies_most_first():
    model, data = params(latent_dim=3), dataset()
    figure = figures.traversals(model, data, columns=3)
    mean = np.asarray(jaxvae.encode(model, data.test_images).mean)
    order = np.argsort(-mean.var(axis=0))
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [f"z{i + 1}" for i in order]
    z = mean[:1].repeat(3, axis=0)
    z[:, order[1]] = [-2.326348, 0, 2.326348]  # the normal's quantiles 0.01, 0.5 and 0.99
    images = jaxvae.decode(model, jnp.array(z)).mean[..., 0] * 255
    picture = shown(figure)[8:16]
    np.testing.assert_allclose(picture, np.concatenate(images, axis=1), atol=0.51)


def ladder():
    config = jaxvae.ModelConfig((8, 8, 1), network="ladder:groups=4x1z1+2x1z1,width=4")
    model, keys = jaxvae.init(jax.random.key(0), config), iter(jax.random.split(KEY, 99))
    return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), model)


def test_a_hierarchy_has_no_latent_plane_but_its_levels(tmp_path):
    paths = figures.draw_all(tmp_path, ladder(), dataset(), [], KEY)
    assert [path.stem for path in paths] == [*ALWAYS[2:], "levels"]


def test_in_each_column_of_the_levels_another_group_is_drawn():
    model = ladder()
    noise = jax.random.normal(KEY, (2, 1, 20))
    rows = shown(figures.levels(model, KEY, rows=2)).reshape(2, 8, 2, 8).swapaxes(1, 2)
    for column, drawn in enumerate([4, 20]):  # of 2x2 and 4x4 latents
        z = noise[:, 0] * (jnp.arange(20) < drawn)
        images = model.model.likelihood_of_noise(model, z).mean[..., 0] * 255
        np.testing.assert_allclose(rows[:, column], images, atol=0.51)


def test_traversals_of_a_hierarchy_change_the_noise_of_one_latent():
    model, data = ladder(), dataset()
    figure = figures.traversals(model, data, columns=3)
    mean = jaxvae.encode(model, data.test_images).mean
    latent = int(np.argmax(np.var(mean, axis=0)))
    assert figure.axes[0].get_yticklabels()[0].get_text() == f"z{latent + 1}"
    noise = np.tile(model.model.noise_of(model, mean[:1]), (3, 1))
    noise[:, latent] = [-2.326348, 0, 2.326348]  # the normal's quantiles 0.01, 0.5 and 0.99
    images = model.model.likelihood_of_noise(model, jnp.array(noise)).mean[..., 0] * 255
    picture = shown(figure)[:8]
    np.testing.assert_allclose(picture, np.concatenate(images, axis=1), atol=0.51)


def test_classes_are_rows_that_share_their_draws():
    model, key = conditional(), jax.random.key(1)
    picture = shown(figures.classes(model, key, columns=2))
    assert picture.shape == (5 * 8, 2 * 8)
    z = jaxvae.models.vae.prior(model).sample(key, 2)
    for label in (0, 4):
        images = jaxvae.decode(model, z, jnp.full(2, label)).mean[..., 0] * 255
        row = picture[8 * label : 8 * label + 8]
        np.testing.assert_allclose(row, np.concatenate(images, axis=1), atol=0.51)


def test_bars_are_the_variances_of_the_posterior_means():
    """The heads' kernel scaled down latent by latent, so that some fall asleep."""
    model, data = params(latent_dim=4), dataset()
    head = model.encoder["mean"]
    head["kernel"] = head["kernel"] * jnp.array([1e-3, 100, 1e-3, 300])
    (axes,) = figures.units(model, data).axes
    mean = jaxvae.encode(model, data.test_images).mean
    variance = np.var(mean, axis=0)
    heights = [bar.get_height() for bar in axes.patches]
    np.testing.assert_allclose(heights, np.sort(variance)[::-1], rtol=1e-5)
    active = int(active_units(mean))
    assert 0 < active < 4
    assert f"{active} of 4 latents" in axes.get_title(loc="left")
    assert len({bar.get_facecolor() for bar in axes.patches[:active]}) == 1
    assert axes.patches[0].get_facecolor() != axes.patches[-1].get_facecolor()
    assert axes.get_xticklabels()[0].get_text() == f"z{np.argmax(variance) + 1}"


def test_bars_of_a_flow_are_of_the_means_of_its_samples():
    config = jaxvae.ModelConfig((8, 8, 1), 2, network="mlp", posterior="iaf:steps=1")
    model, data, key = jaxvae.init(jax.random.key(0), config), dataset(), jax.random.key(2)
    (axes,) = figures.units(model, data, key=key).axes
    posterior = jaxvae.encode(model, data.test_images)
    variance = np.asarray(variance_of_means(posterior, key))
    heights = [bar.get_height() for bar in axes.patches]
    np.testing.assert_allclose(heights, np.sort(variance)[::-1], rtol=1e-4)
    assert f"{np.sum(variance > 0.01)} of 2 latents" in axes.get_title(loc="left")
    with refused("key is None", "expected a PRNG key", "not Gaussian"):
        figures.units(model, data)


def test_the_aggregate_posterior_is_a_histogram_of_its_draws_beside_the_prior():
    model, data, key = params(), dataset(), jax.random.key(2)
    first, second, both = figures.aggregate(model, data, key).axes
    posterior = jaxvae.encode(model, data.test_images)
    z, _ = posterior.sample_and_log_prob(jax.random.split(key, 40))
    for j, axes in enumerate((first, second)):
        edges = [*(bar.get_x() for bar in axes.patches), axes.get_xlim()[1]]
        expected, _ = np.histogram(z[:, j], edges, density=True)
        np.testing.assert_allclose([b.get_height() for b in axes.patches], expected, rtol=1e-4)
        x, density = axes.get_lines()[0].get_data()
        np.testing.assert_allclose(density, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), rtol=1e-5)
    assert both.get_xlabel() == "z1"
    assert len(both.collections) == 2


def test_the_aggregate_posterior_of_a_flow_shows_its_draws():
    config = jaxvae.ModelConfig((8, 8, 1), 2, network="mlp", posterior="iaf")
    model, data, key = jaxvae.init(jax.random.key(0), config), dataset(), jax.random.key(2)
    *_, both = figures.aggregate(model, data, key).axes
    posterior = jaxvae.encode(model, data.test_images)
    z, _ = posterior.sample_and_log_prob(jax.random.split(key, 40))
    np.testing.assert_allclose(both.collections[0].get_offsets(), z, rtol=1e-5)


def test_of_many_latents_the_aggregate_shows_those_that_vary_most():
    model, data = params(latent_dim=12), dataset()
    panels = figures.aggregate(model, data, jax.random.key(2)).axes
    variance = np.var(jaxvae.encode(model, data.test_images).mean, axis=0)
    expected = np.sort(np.argsort(-variance)[:8])
    assert [axes.get_xlabel() for axes in panels] == [f"z{i + 1}" for i in expected]


def test_half_of_a_normal_in_the_plane_lies_within_its_known_circle():
    """The radius that holds a share m of N(0, I) in two dimensions: sqrt(-2 log(1 - m))."""
    x = np.linspace(-6, 6, 801)
    normal = Gaussian(jnp.zeros(2), jnp.zeros(2))
    density = np.exp(normal.log_prob(jnp.stack(jnp.meshgrid(x, x), axis=-1)))
    for mass in (0.5, 0.9):
        radius = np.sqrt(-2 * np.log(1 - mass))
        expected = np.exp(-(radius**2) / 2) / (2 * np.pi)
        assert charts.level_of(density, mass) == pytest.approx(expected, rel=2e-3)


def test_figures_of_a_model_with_covariates_take_those_of_the_test_images(tmp_path):
    config = jaxvae.ModelConfig((4, 4, 1), 2, "mlp:width=4", num_covariates=2)
    model = jaxvae.init(jax.random.key(0), config)
    x = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 1), np.uint8)
    c = np.random.default_rng(1).normal(size=(20, 2)).astype("f")
    data = Dataset(x, None, x, None, train_covariates=c, test_covariates=c)
    key = jax.random.key(1)
    paths = figures.draw_all(tmp_path, model, data, [], key)
    assert {path.stem for path in paths} == {
        "reconstructions", "samples", "traversals", "interpolations", "latents", "aggregate",
        "units",
    }  # fmt: skip
    picture = shown(figures.samples(model, key, data, rows=2))
    images = jaxvae.sample(model, key, 4, c[:4])[..., 0] * 255
    np.testing.assert_allclose(picture[4:, :4], images[2], atol=0.51)
