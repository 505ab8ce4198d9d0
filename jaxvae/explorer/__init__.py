"""Interactive latent-space explorer: an HTML page that runs the decoder."""

import base64
import html
import io
import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxvae.data import Dataset
from jaxvae.errors import InputError
from jaxvae.explorer.program import Program, decoder_program
from jaxvae.figures.grid import coordinates, decode_coordinates, pixels, tile
from jaxvae.figures.style import COLOURS
from jaxvae.models.vae import Params, encode, expected_labels, known_classes
from jaxvae.storage import write_atomic
from jaxvae.validation import is_image

_BYTES = 5_000_000  # size of a page, at most
_IMAGES = 10_000  # test images, at most; more points would only hide each other
_COMPONENTS = 16  # principal components, at most
_LARGE = 1024  # size from which a constant may be stored in float16
_HALF_A_LEVEL = 0.5 / 255


def write(path: Path, params: Params, data: Dataset, title: str) -> None:
    """Write the page of a model and its test images to a file.

    The file is replaced atomically.

    Args:
      path: path of the file.
      params: the model.
      data: its test images are shown.
      title: heading of the page.

    Raises:
      InputError: the decoder cannot be translated, or the file cannot be written.
    """
    text = page(params, data, title)
    try:
        write_atomic(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None


def page(params: Params, data: Dataset, title: str) -> str:
    """Return an HTML page with the decoder and the test images and their latents.

    The page loads no other files. To keep it below 5 MB, large weights are stored in float16 if
    this changes no pixel of the test images by half a grey level or more, and then fewer images
    are shown. A larger decoder makes a larger page.

    Args:
      params: the model.
      data: its test images are shown.
      title: heading of the page.

    Returns:
      The text of the page.

    Raises:
      InputError: the decoder has an operation that `program` cannot translate; the model is not of
        images, or has covariates; or it has classes, and the data have no labels.
    """
    if not is_image(params.config.image_shape):
        raise InputError(
            "the explorer shows images, but the examples of this model have shape "
            f"{params.config.image_shape}: use `jaxvae figures` instead"
        )
    if params.config.num_covariates:
        raise InputError(
            "the explorer has no controls for the covariates of this model: use `jaxvae figures` "
            "instead"
        )
    program = decoder_program(params)
    count = min(len(data.test_images), _IMAGES)
    images = np.asarray(data.test_images[:count])
    labels = None if data.test_labels is None else np.asarray(data.test_labels[:count])
    if params.config.num_classes:
        labels = np.asarray(known_classes(params, images, expected_labels(params, labels, count)))
    center = encode(params, images, _classes(params, labels)).center
    latents = np.asarray(coordinates(params, center), np.float32)
    half = False
    while True:
        of_images = images[:count], None if labels is None else labels[:count], latents[:count]
        text = _filled(title, _content(params, program, *of_images, half))
        if len(text) <= _BYTES or (half and count <= 100):
            return text
        if not half and _half_is_enough(params, latents[:500], labels):
            half = True
        elif count > 100:
            count = max(100, count // 2)
        else:
            return text


def _content(
    params: Params,
    program: Program,
    images: np.ndarray,
    labels: np.ndarray | None,
    latents: np.ndarray,
    half: bool,
) -> dict[str, Any]:
    """Collect the data of the page's script."""
    config = params.config
    columns = math.ceil(math.sqrt(len(images)))
    return {
        "title": title_of(params),
        "latents": config.latent_dim,
        "groups": [group._asdict() | {"size": group.size} for group in _groups(params)],
        "classes": config.num_classes,
        "shape": config.image_shape,
        "colours": COLOURS,
        "program": program._replace(constants=[])._asdict(),
        "constants": _packed(program.constants, half),
        "count": len(images),
        "points": _base64(latents),
        "labels": None if labels is None else labels.tolist(),
        "components": [_base64(row) for row in _components(latents)],
        "sheet": _sheet(images, columns),
        "columns": columns,
    }


def _groups(params: Params) -> tuple[Any, ...]:
    """Return the groups of a hierarchy's latents, from the top down; none of other models."""
    groups: tuple[Any, ...] = getattr(params.model, "groups", ())
    return groups


def title_of(params: Params) -> str:
    """Describe a model in a few words.

    Args:
      params: the model.

    Returns:
      Its network, its number of latents, its likelihood and its number of classes.
    """
    config = params.config
    names = {name: text.partition(":")[0] for name, text in config.specs().items()}
    words = [f"{names['network']} network", f"{config.latent_dim} latents", names["likelihood"]]
    words += [f"{config.num_classes} classes"] if config.num_classes else []
    return ", ".join(words).replace("1 latents", "1 latent").replace("_", " ")


def _classes(params: Params, labels: np.ndarray | None) -> jax.Array | None:
    """Return the labels as int32, or None if the model is unconditional."""
    if not params.config.num_classes or labels is None:
        return None
    return jnp.asarray(labels, jnp.int32)


def _components(latents: np.ndarray) -> np.ndarray:
    """Compute at most 16 principal components, as unit vectors by decreasing variance."""
    if latents.shape[1] < 3:
        return np.zeros((0, latents.shape[1]), np.float32)
    # Imported here because it takes a second.
    from sklearn.decomposition import PCA

    # It approximates those of thousands of latents, which would take minutes.
    pca = PCA(min(_COMPONENTS, *latents.shape), random_state=0)
    with np.errstate(invalid="ignore"):  # if the latents of all images are equal
        components: np.ndarray = pca.fit(latents).components_
    return components.astype(np.float32)


def _half_is_enough(params: Params, latents: np.ndarray, labels: np.ndarray | None) -> bool:
    """Return whether float16 weights change every pixel by less than half a grey level."""
    classes = _classes(params, labels if labels is None else labels[: len(latents)])
    z = jnp.asarray(latents)

    def rounded(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float16).astype(x.dtype) if x.size >= _LARGE else x

    moved = decode_coordinates(jax.tree.map(rounded, params), z, classes).mean
    exact = decode_coordinates(params, z, classes).mean
    return bool(jnp.max(jnp.abs(moved - exact)) < _HALF_A_LEVEL)


def _packed(constants: list[np.ndarray], half: bool) -> list[list[Any]]:
    """Encode each constant as its number of bits and its values in base64."""
    bits = [16 if half and len(x) >= _LARGE else 32 for x in constants]
    return [[n, _base64(x.astype(f"<f{n // 8}"))] for n, x in zip(bits, constants, strict=True)]


def _base64(numbers: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(numbers).tobytes()).decode()


def _sheet(images: np.ndarray, columns: int) -> str:
    """Encode a grid of images as the data URL of a PNG file."""
    rows = math.ceil(len(images) / columns)
    empty = np.zeros((rows * columns - len(images), *images.shape[1:]), images.dtype)
    file = io.BytesIO()
    sheet = tile(np.concatenate([images, empty]), rows) / 255
    Image.fromarray(pixels(sheet)).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _filled(title: str, content: dict[str, Any]) -> str:
    """Fill the page's template with its style, its scripts and its data."""
    folder = resources.files(__package__)
    parts = {
        "title": html.escape(title),
        "style": (folder / "page.css").read_text(encoding="utf-8"),
        "runtime": (folder / "runtime.js").read_text(encoding="utf-8"),
        "script": (folder / "page.js").read_text(encoding="utf-8"),
        # "</script>" in a string would end the element.
        "data": json.dumps(content, separators=(",", ":")).replace("<", "\\u003c"),
    }
    text = (folder / "page.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace("{{" + name + "}}", part)
    return text
