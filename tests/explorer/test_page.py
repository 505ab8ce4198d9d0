"""The page, in a real browser."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refused

import jaxvae
from jaxvae import explorer
from jaxvae.data import Dataset

pytestmark = pytest.mark.usefixtures("compile_quickly")

CLOSE = 2e-6  # of pixels in [0, 1], weights in float32
PHONE = {"viewport": {"width": 375, "height": 812}, "has_touch": True, "is_mobile": True}
IMAGE = "Array.from(document.getElementById('{}').getContext('2d').getImageData(0, 0, 8, 8).data)"

DRAWN = """(frames) => new Promise((done) => {
    const look = () => explorer.state().frames > frames ? done() : requestAnimationFrame(look);
    look();
})"""


def dataset(count=60, shape=(8, 8, 1), classes=3):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *shape), np.uint8)
    labels = np.arange(count) % classes if classes else None
    return Dataset(images, labels, images, labels)


def model(**fields):
    """Latents far enough apart, and pixels that change with them."""
    config = jaxvae.ModelConfig(**{"image_shape": (8, 8, 1), "network": "mlp:width=20"} | fields)
    return jax.tree.map(lambda x: 3 * x, jaxvae.init(jax.random.key(0), config))


class Opened:
    """A page that has been opened, and what a reader would do with it."""

    def __init__(self, browser, path, params, data, **how):
        explorer.write(path, params, data, 'a <run> & its "name"')
        self.context = browser.new_context(**how)
        self.page = self.context.new_page()
        self.complaints, self.requests = [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.address = path.as_uri()
        self.page.goto(self.address)
        self.page.evaluate(DRAWN, 0)

    def state(self):
        return self.page.evaluate("explorer.state()")

    def shown(self, canvas="image"):
        """The pixels of a canvas, [8, 8], of one channel."""
        pixels = self.page.evaluate(IMAGE.format(canvas))
        return np.reshape(pixels, (8, 8, 4))[..., 0]

    def at(self, x, y):
        """A place of the plane, given in shares of its sides, on the screen."""
        box = self.page.locator("#plane").bounding_box()
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def on_point(self, index):
        box = self.page.locator("#plane").bounding_box()
        x, y = self.state()["points"][index]
        return box["x"] + 1 + x, box["y"] + 1 + y

    def after_a_frame(self, act):
        frames = self.state()["frames"]
        act()
        self.page.evaluate(DRAWN, frames)


@pytest.fixture(scope="module")
def open_page(browser, tmp_path_factory):
    opened = []

    def open_one(params, data=None, **how):
        path = tmp_path_factory.mktemp("pages") / "explorer.html"
        opened.append(Opened(browser, path, params, data or dataset(), **how))
        return opened[-1]

    yield open_one
    for one in opened:
        one.context.close()


@pytest.fixture
def plane(open_page):
    return open_page(model())


def decoded(params, z, label=None):
    labels = None if label is None else jnp.array([label])
    return np.asarray(jaxvae.decode(params, jnp.array([z]), labels).mean[0, ..., 0])


def test_it_loads_without_complaints_and_without_any_request(plane):
    plane.page.mouse.move(*plane.at(0.5, 0.5))
    plane.page.mouse.click(*plane.on_point(0))
    plane.page.wait_for_timeout(200)
    assert plane.complaints == []
    assert [url for url in plane.requests if not url.startswith("data:")] == [plane.address]
    assert plane.page.locator("h1").inner_text() == 'a <run> & its "name"'


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_classes": 3, "latent_dim": 5, "likelihood": "discretized_logistic"},
    ],
    ids=["plain", "conditional"],
)
def test_the_page_decodes_what_the_library_decodes(open_page, fields):
    params = model(**fields)
    opened = open_page(params)
    rng = np.random.default_rng(1)
    for label in range(params.config.num_classes or 1):
        z = rng.normal(size=params.config.latent_dim).astype(np.float32)
        got = opened.page.evaluate("([z, label]) => explorer.decode(z, label)", [z.tolist(), label])
        expected = decoded(params, z, label if params.config.num_classes else None)
        np.testing.assert_allclose(np.reshape(got, (8, 8)), expected, atol=CLOSE)


def test_the_picture_follows_the_pointer(plane):
    params, seen = model(), []
    for x, y in [(0.3, 0.2), (0.31, 0.2), (0.7, 0.9)]:
        plane.after_a_frame(lambda x=x, y=y: plane.page.mouse.move(*plane.at(x, y)))
        seen.append((plane.state()["z"], plane.shown()))
        np.testing.assert_allclose(seen[-1][1], 255 * decoded(params, seen[-1][0]), atol=0.51)
    (first, picture), (near, _), (last, other) = seen
    assert 0 < near[0] - first[0] < 0.3  # the first latent grows to the right,
    assert last[1] < first[1]  # and the second upwards
    assert np.abs(picture - other).max() > 5


def test_the_arrow_keys_move_and_shift_moves_further(plane):
    plane.page.locator("#plane").focus()
    steps = []
    for key in ["ArrowRight", "ArrowLeft", "Shift+ArrowRight", "ArrowUp", "ArrowDown"]:
        before = np.array(plane.state()["z"])
        plane.after_a_frame(lambda key=key: plane.page.keyboard.press(key))
        steps.append(np.array(plane.state()["z"]) - before)
    right, left, far, up, down = steps
    assert right[0] > 0
    np.testing.assert_allclose(left, -right, atol=1e-6)
    np.testing.assert_allclose(far, 5 * right, rtol=1e-4)
    assert up[1] > 0
    np.testing.assert_allclose(down, -up, atol=1e-6)
    np.testing.assert_allclose(plane.shown(), 255 * decoded(model(), plane.state()["z"]), atol=0.51)


def test_what_has_the_focus_is_seen_to_have_it(plane):
    plane.page.keyboard.press("Tab")
    assert plane.page.evaluate("document.activeElement.id") == "smooth"
    style = "getComputedStyle(document.activeElement).outlineStyle"
    assert plane.page.evaluate(style) == "solid"


def test_every_control_has_a_name(open_page):
    opened = open_page(model(latent_dim=4, num_classes=3))
    assert opened.page.get_by_role("application", name="Latent plane").count() == 1
    tree = opened.page.locator("body").aria_snapshot()
    for kind in ("button", "slider", "checkbox", "combobox", "radio", "img"):
        found = re.findall(rf"^ *- {kind}(.*)$", tree, re.MULTILINE)
        assert found, kind
        assert all('"' in line for line in found), (kind, found)


def test_a_click_on_a_point_shows_its_image_and_its_reconstruction(plane):
    params, data = model(), dataset()
    plane.after_a_frame(lambda: plane.page.mouse.click(*plane.on_point(7)))
    chosen = plane.state()["chosen"]
    points = np.array(plane.state()["points"])
    assert np.hypot(*(points[chosen] - points[7])) < 1  # it, or one that hides it
    plane.page.wait_for_timeout(100)
    np.testing.assert_array_equal(plane.shown("original"), data.test_images[chosen, ..., 0])
    rebuilt = jaxvae.reconstruct(params, data.test_images[chosen : chosen + 1])[0, ..., 0]
    np.testing.assert_allclose(plane.shown("rebuilt"), 255 * rebuilt, atol=0.51)
    assert plane.page.locator("#which").inner_text() == f"Test image {chosen}, class {chosen % 3}"


def test_the_points_are_the_posterior_means(open_page):
    """Their places on the screen are a scale and a shift of them, the second axis upwards."""
    opened, data = open_page(model()), dataset()
    points = np.array(opened.state()["points"])
    means = np.asarray(jaxvae.encode(model(), data.test_images).mean)
    for axis, sign in ((0, 1), (1, -1)):
        slope, start = np.polyfit(means[:, axis], points[:, axis], 1)
        assert sign * slope > 0
        np.testing.assert_allclose(slope * means[:, axis] + start, points[:, axis], atol=0.01)


def test_enter_takes_the_nearest_point(plane):
    plane.page.mouse.move(*plane.on_point(11))
    plane.page.locator("#plane").focus()
    plane.after_a_frame(lambda: plane.page.keyboard.press("Enter"))
    points = np.array(plane.state()["points"])
    assert np.hypot(*(points[plane.state()["chosen"]] - points[11])) < 1


def test_a_finger_moves_the_point_and_a_tap_takes_one(open_page):
    phone = open_page(model(), **PHONE)
    phone.page.locator("#plane").scroll_into_view_if_needed()
    phone.after_a_frame(lambda: phone.page.touchscreen.tap(*phone.on_point(7)))
    assert phone.state()["chosen"] is not None
    touch = phone.context.new_cdp_session(phone.page)
    first = phone.state()["z"]

    def send(kind, fingers):
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})

    def drag():
        for kind, share in (("touchStart", 0.2), ("touchMove", 0.4), ("touchMove", 0.8)):
            x, y = phone.at(share, share)
            touch.send(
                "Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]}
            )
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    phone.after_a_frame(drag)
    last = phone.state()["z"]
    assert last[0] > first[0] or last[1] < first[1]
    x, y = phone.at(0.8, 0.8)
    phone.page.mouse.move(x, y)
    phone.page.wait_for_timeout(50)
    np.testing.assert_allclose(phone.state()["z"], last, atol=0.02)  # where the finger left it
    touch.detach()


@pytest.mark.parametrize("latent_dim", [2, 6])
def test_a_phone_scrolls_only_downwards(open_page, latent_dim):
    phone = open_page(model(latent_dim=latent_dim, num_classes=10), dataset(classes=10), **PHONE)
    phone.page.touchscreen.tap(*phone.on_point(0))
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 375
    # The picture is in sight while a finger is on the plane.
    image, plane = (phone.page.locator(name).bounding_box() for name in ("#image", "#plane"))
    assert image["y"] >= 0
    assert plane["y"] + plane["height"] <= 812


def test_a_drawn_path_is_played(plane):
    mouse = plane.page.mouse
    plane.page.locator("#draw").click()
    mouse.move(*plane.at(0.2, 0.5))
    mouse.down()
    mouse.move(*plane.at(0.8, 0.5), steps=8)
    plane.after_a_frame(mouse.up)  # which goes back to the start
    state = plane.state()
    assert state["playing"]
    assert state["stops"] >= 9
    places = []
    while plane.state()["playing"]:
        places.append(plane.state()["z"])
        plane.page.wait_for_timeout(50)
    places = np.array([*places, plane.state()["z"]])
    assert np.all(np.diff(places[:, 0]) >= -1e-6)  # from left to right, in small steps
    assert len(np.unique(places[:, 0])) > 5  # on a slow machine few of them are seen
    np.testing.assert_allclose(places[:, 1], places[0, 1], atol=1e-5)
    plane.page.locator("#clear").click()
    assert plane.state()["stops"] == 0
    assert plane.page.locator("#play").is_disabled()


def test_a_path_is_made_of_stops_by_the_keyboard(plane):
    plane.page.locator("#plane").focus()
    for key in ["p", "Shift+ArrowRight", "p", " "]:
        plane.page.keyboard.press(key)
    assert plane.state()["stops"] == 2
    assert plane.state()["playing"]
    plane.page.keyboard.press("Escape")
    assert not plane.state()["playing"]


def test_sliders_move_the_latents_that_are_not_on_the_axes(open_page):
    params = model(latent_dim=4)
    opened = open_page(params)
    sliders = opened.page.locator("#sliders input")
    assert sliders.count() == 2
    opened.after_a_frame(lambda: sliders.nth(1).fill("1.5"))
    assert opened.state()["z"] == [0, 0, 0, 1.5]
    np.testing.assert_allclose(opened.shown(), 255 * decoded(params, [0, 0, 0, 1.5]), atol=0.51)
    opened.after_a_frame(lambda: opened.page.locator("#across").select_option("z3"))
    opened.after_a_frame(lambda: opened.page.mouse.move(*opened.at(0.9, 0.1)))
    z = opened.state()["z"]
    assert z[0] == 0
    assert z[1] > 0.5
    assert z[2] > 0.5
    assert z[3] == 1.5
    opened.after_a_frame(lambda: opened.page.locator("#reset").click())
    assert opened.state()["z"][3] == 0


def test_a_click_brings_all_latents_of_an_image(open_page):
    params, data = model(latent_dim=4), dataset()
    opened = open_page(params)
    opened.after_a_frame(lambda: opened.page.mouse.click(*opened.on_point(5)))
    chosen = opened.state()["chosen"]
    mean = jaxvae.encode(params, data.test_images[chosen : chosen + 1]).mean[0]
    np.testing.assert_allclose(opened.state()["z"], mean, atol=1e-5)


def test_principal_components_are_axes_too(open_page):
    """The points' spread along each is that of the latents' covariance."""
    params, data = model(latent_dim=4), dataset()
    opened = open_page(params)
    opened.after_a_frame(
        lambda: opened.page.locator("#basis").select_option("principal components")
    )
    means = np.asarray(jaxvae.encode(params, data.test_images).mean, np.float64)
    widest, axes = np.linalg.eigh(np.cov(means.T))
    points = np.array(opened.state()["points"])
    for axis, of in ((0, -1), (1, -2)):
        along = (means - means.mean(0)) @ axes[:, of]
        assert abs(np.corrcoef(points[:, axis], along)[0, 1]) > 1 - 1e-6
    # Moving along the first changes the latents in its direction alone.
    opened.page.locator("#plane").focus()
    before = np.array(opened.state()["z"])
    opened.after_a_frame(lambda: opened.page.keyboard.press("Shift+ArrowRight"))
    moved = np.array(opened.state()["z"]) - before
    assert abs(moved @ axes[:, -1]) > 0.999 * np.linalg.norm(moved) > 0
    assert widest[-1] > widest[-2]


def test_groups_of_a_hierarchy_are_drawn_and_moved_to_their_means(open_page):
    opened = open_page(model(network="ladder:groups=4x1+2x1,width=4,latents=1"))
    buttons = {
        (name, g): opened.page.get_by_role("button", name=f"{name} group {g}", exact=True)
        for name in ("Draw", "Mean")
        for g in (1, 2)
    }
    opened.after_a_frame(buttons["Draw", 2].click)
    z = np.array(opened.state()["z"])
    assert np.all(z[:4] == 0)
    assert np.all(z[4:] != 0)
    opened.after_a_frame(buttons["Draw", 1].click)
    assert np.all(np.array(opened.state()["z"])[:4] != 0)
    opened.after_a_frame(buttons["Mean", 2].click)
    z = np.array(opened.state()["z"])
    assert np.all(z[:4] != 0)
    assert np.all(z[4:] == 0)


def test_a_conditional_model_is_asked_for_a_class(open_page):
    params = model(num_classes=3)
    opened = open_page(params)
    opened.after_a_frame(lambda: opened.page.get_by_label("2", exact=True).check(force=True))
    state = opened.state()
    assert state["label"] == 2
    np.testing.assert_allclose(opened.shown(), 255 * decoded(params, state["z"], 2), atol=0.51)
    assert "class 2" in opened.page.locator("#readout").inner_text()


@pytest.mark.parametrize(
    ("fields", "classes"),
    [({"latent_dim": 1}, 0), ({"image_shape": (5, 9, 3), "latent_dim": 3, "posterior": "iaf"}, 12)],
    ids=["one latent, no labels", "colour, a flow, many classes"],
)
def test_any_model_has_a_page(open_page, fields, classes):
    params = model(**fields)
    opened = open_page(params, dataset(20, params.config.image_shape, classes))
    opened.page.locator("#tiles").check()
    opened.after_a_frame(lambda: opened.page.mouse.click(*opened.on_point(3)))
    opened.page.wait_for_timeout(100)
    assert opened.complaints == []
    assert opened.page.locator("#legend button").count() == classes
    height, width, _ = params.config.image_shape
    size = "[document.getElementById('image').width, document.getElementById('image').height]"
    assert opened.page.evaluate(size) == [width, height]


def test_the_plane_decoded_lies_behind_the_points(plane):
    """Its first picture is of the upper left corner of the plane."""
    plane.page.locator("#tiles").check()
    while plane.state()["tiling"]:
        plane.page.wait_for_timeout(20)
    first = "Array.from(sheet.getContext('2d').getImageData(0, 0, 8, 8).data)"
    picture = np.reshape(plane.page.evaluate(first), (8, 8, 4))[..., 0]
    left, right, bottom, top = plane.page.evaluate("plane.box")
    corner = [left + (right - left) / 36, top - (top - bottom) / 36]
    np.testing.assert_allclose(picture, 255 * decoded(model(), corner), atol=0.51)


def test_dark_mode_is_followed(open_page):
    paper = "getComputedStyle(document.body).backgroundColor"
    shades = [
        sum(map(int, re.findall(r"\d+", open_page(model(), color_scheme=one).page.evaluate(paper))))
        for one in ("light", "dark")
    ]
    assert shades[0] > 3 * 200
    assert shades[1] < 3 * 50


def test_a_page_too_large_has_weights_in_half_the_bytes_and_fewer_images(browser, monkeypatch):
    """And decodes within half a grey level all the same."""
    params, data = model(network="mlp:width=100"), dataset(600)
    whole = len(explorer.page(params, data, "run"))
    monkeypatch.setattr(explorer, "_BYTES", whole - 30_000)
    text = explorer.page(params, data, "run")
    assert '[16,"' in text
    assert '"count":600' in text
    monkeypatch.setattr(explorer, "_BYTES", whole - 80_000)
    small = explorer.page(params, data, "run")
    assert '"count":300' in small or '"count":150' in small
    page = browser.new_page()
    page.set_content(text)
    got = page.evaluate("explorer.decode([0.3, -0.8])")
    page.close()
    error = np.abs(np.reshape(got, (8, 8)) - decoded(params, [0.3, -0.8])).max()
    assert 1e-7 < error < 0.5 / 255


def test_a_page_that_cannot_be_written_says_so(tmp_path):
    with refused("cannot be written: No such file or directory"):
        explorer.write(tmp_path / "nowhere" / "out.html", model(), dataset(), "run")


def test_missing_labels_are_the_classifiers_or_refused():
    fields = {"image_shape": (8, 8, 1), "network": "mlp:width=4", "num_classes": 3}
    data = dataset()
    data.test_labels[::2] = -1
    params = jaxvae.init(jax.random.key(0), jaxvae.ModelConfig(**fields, classifier=True))
    found = np.argmax(jaxvae.classify(params, data.test_images), axis=-1)
    labels = np.where(data.test_labels < 0, found, data.test_labels)
    written = json.dumps(labels.tolist(), separators=(",", ":"))
    assert f'"labels":{written}' in explorer.page(params, data, "title")
    params = jaxvae.init(jax.random.key(0), jaxvae.ModelConfig(**fields, conditions="decoder"))
    with refused("labels are missing"):
        explorer.page(params, data._replace(test_labels=None), "title")


def test_a_model_with_covariates_is_refused():
    config = jaxvae.ModelConfig((4, 4, 1), 2, "mlp:width=4", num_covariates=2)
    with refused("the explorer has no controls for the covariates", "use `jaxvae figures`"):
        explorer.page(jaxvae.init(jax.random.key(0), config), dataset(), "title")
