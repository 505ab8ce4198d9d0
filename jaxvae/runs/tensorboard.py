"""TensorBoard files in RUN_DIR/tensorboard: scalars, images and latents, without TensorFlow."""

import importlib.util
import json
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxvae.errors import InputError
from jaxvae.figures.animation import is_kept
from jaxvae.figures.grid import has_plane, in_turn, pixels, plane, tile
from jaxvae.models.vae import Params, encode_observed, known_classes, reconstruct_observed, sample
from jaxvae.runs.callbacks import Callback, Training
from jaxvae.runs.config import run_keys
from jaxvae.storage import make_folder, refuse_links
from jaxvae.validation import is_image, scale_images

_PICTURED = 8  # reconstructions, and samples per row and column
_PROJECTED = 2500  # test latents in the projector
_SPRITE = 8192  # pixels: TensorBoard's limit for the side of the projector's sprite image


def require_tensorboard() -> None:
    """Check that tensorboardX is installed.

    Raises:
      InputError: it is not.
    """
    if importlib.util.find_spec("tensorboardX") is None:
        raise InputError(
            "--tensorboard needs tensorboardX, which is not installed: pip install tensorboardX"
        )


class TensorBoard(Callback):
    """Write TensorBoard files to RUN_DIR/tensorboard.

    A resumed run writes to the same directory; TensorBoard ignores earlier entries of the steps
    that are repeated.
    """

    def start(self, training: Training) -> None:
        """Write the images of the untrained model."""
        if training.run_dir is None:
            raise InputError(
                "TensorBoard files are written to the run directory: expected a run_dir"
            )
        config, data = training.config, training.data
        self._folder, self._config = training.run_dir / "tensorboard", config
        self._images, self._labels = data.test_images, data.conditions(config.model, "test")
        self._classes = data.test_labels
        self._writer: Any = None
        if not training.step:
            self.epoch({"epoch": 0, "step": 0}, training.params)

    def epoch(self, record: dict[str, Any], params: Params) -> None:
        """Write the metrics and images of an epoch, and flush them to disk."""
        step = record["step"]
        if self._writer is None:
            self._open(step)
        for split in ("train", "test"):
            for name, value in record.get(split, {}).items():
                self._writer.add_scalar(f"{split}/{name}", value, step)
        if "seconds" in record:
            self._writer.add_scalar("seconds", record["seconds"], step)
        if is_kept(record["epoch"]):
            for name, picture in self._pictures(params).items():
                self._writer.add_image(name, picture, step, dataformats="HWC")
        self._writer.flush()

    def end(self, params: Params | None) -> None:
        """Write the latents of the test images for the embedding projector, with the images."""
        if params is not None:
            self._write_latents(params)
        if self._writer is not None:
            self._writer.close()

    def _write_latents(self, params: Params) -> None:
        if self._writer is None:
            self._open(None)
        image = is_image(self._images.shape[1:])
        side = max(self._images.shape[1:3]) if image else 1
        count = min(len(self._images), _PROJECTED, (_SPRITE // side) ** 2)
        rows = np.linspace(0, len(self._images) - 1, count).astype(int)
        images = jnp.asarray(self._images[rows])
        labels = None if self._labels is None else jnp.asarray(self._labels[rows])
        center = encode_observed(params, images, known_classes(params, images, labels)).center
        # Remove those of an earlier end of the run: tensorboardX would append to them.
        (self._folder / "projector_config.pbtxt").unlink(missing_ok=True)
        shutil.rmtree(self._folder / "00000", ignore_errors=True)
        self._writer.add_embedding(
            np.asarray(center),
            None if self._classes is None else [str(label) for label in self._classes[rows]],
            _squares(self._images[rows]) if image else None,
            tag="latents",
        )

    def _open(self, step: int | None) -> None:
        from tensorboardX import SummaryWriter
        from tensorboardX.summary import hparams

        make_folder(self._folder.parent, self._folder.name)
        refuse_links(*self._folder.rglob("*"))
        # File names have a resolution of one second: the suffix keeps two of them distinct.
        self._writer = SummaryWriter(
            str(self._folder), purge_step=step, filename_suffix=f".{step or 0:010}"
        )
        config = self._config.to_dict()
        written = f"```\n{json.dumps(config, indent=2)}\n```"
        self._writer.add_text("config", written, step)
        flat = {**config.pop("model"), **config.pop("train"), **config}
        numbers = (bool, int, float, str)
        flat = {k: v if isinstance(v, numbers) else str(v) for k, v in flat.items()}
        for summary in hparams(flat, {"test/elbo": 0.0})[:2]:
            self._writer.file_writer.add_summary(summary)

    def _pictures(self, params: Params) -> dict[str, np.ndarray]:
        """Return reconstructions, and a grid over two latents or samples: uint8 [H, W, 3].

        A model of other examples than images has no pictures.
        """
        if not is_image(params.config.image_shape):
            return {}
        rows = np.linspace(0, len(self._images) - 1, _PICTURED).astype(int)
        images = jnp.asarray(self._images[rows])
        labels = None if self._labels is None else jnp.asarray(self._labels[rows])
        labels = known_classes(params, images, labels)
        pairs = jnp.concatenate(
            [scale_images(images), reconstruct_observed(params, images, labels)]
        )
        pictures = {"reconstructions": _rgb(tile(pairs, 2))}
        if params.config.latent_dim == 2 and has_plane(params):
            means, _, down = plane(params, 15)
            return pictures | {"manifold": _rgb(tile(means, len(down)))}
        _, key = run_keys(self._config)
        count = _PICTURED**2
        drawn = sample(params, key, count, in_turn(params, self._labels, count))
        return pictures | {"samples": _rgb(tile(drawn, _PICTURED))}


def _rgb(image: np.ndarray) -> np.ndarray:
    grey_or_colour = pixels(image)
    if grey_or_colour.ndim == 3:
        return grey_or_colour
    return np.repeat(grey_or_colour[..., None], 3, axis=2)


def _squares(images: np.ndarray) -> np.ndarray:
    """Return images as squares padded with black: floats [N, 3, side, side]."""
    coloured = np.asarray(scale_images(jnp.asarray(images)))
    if coloured.shape[3] != 3:
        coloured = np.repeat(coloured.mean(axis=3, keepdims=True), 3, axis=3)
    height, width = coloured.shape[1:3]
    side = max(height, width)
    padded = np.pad(coloured, ((0, 0), (0, side - height), (0, side - width), (0, 0)))
    return padded.transpose(0, 3, 1, 2)
