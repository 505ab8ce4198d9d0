"""Import of the notebook's model from files of Keras, without Keras.

    .keras        a zip archive of config.json and model.weights.h5
    .weights.h5   weights alone
    .h5           a whole model, or weights alone, in the format of Keras 2

The encoder and the decoder may be one model, nested models, or two files. Layers are identified by
the shapes of their weights; the two heads by their names, or else by their order of creation. If
the file has the model's configuration, strides and activations are checked too.

Untrusted files are parsed safely: nothing is executed or unpickled, sizes are limited, and links
to other files are refused.
"""

import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvae.errors import InputError
from jaxvae.models.config import ModelConfig
from jaxvae.models.vae import Params
from jaxvae.storage import open_regular

_BYTES = 2**30  # of weights, at most; the notebook's model has 2.2 million
_CONFIG_BYTES = 2**24
_GROUPS = 10_000
_DEPTH = 16

# What Keras's configuration of each layer must say.
_SAME = {"padding": "same", "data_format": "channels_last", "dilation_rate": (1, 1)}
_SETTINGS: dict[str, dict[str, Any]] = {
    "conv_1": _SAME | {"strides": (1, 1), "activation": "relu"},
    "conv_2": _SAME | {"strides": (2, 2), "activation": "relu"},
    "conv_3": _SAME | {"strides": (1, 1), "activation": "relu"},
    "conv_4": _SAME | {"strides": (1, 1), "activation": "relu"},
    "dense": {"activation": "relu"},
    "mean": {"activation": "linear"},
    "log_var": {"activation": "linear"},
    "decoder dense": {"activation": "relu"},
    "conv_transpose": _SAME | {"strides": (2, 2), "activation": "relu"},
    "conv": _SAME | {"strides": (1, 1), "activation": "sigmoid"},
}
_ENCODER = ("conv_1", "conv_2", "conv_3", "conv_4", "dense", "mean", "log_var")
_DECODER = {"dense": "decoder dense", "conv_transpose": "conv_transpose", "conv": "conv"}
_EXPECTED = (
    "the notebook's: conv 3x3xCx32, 3x3x32x64, 3x3x64x64, 3x3x64x64, dense Nx32, heads 32xL twice; "
    "dense LxN, transposed conv 3x3x32x64, conv 3x3x32xC, each with a bias"
)


def load_keras(path: str | Path, decoder: str | Path | None = None) -> Params:
    """Load the notebook's model with weights that Keras has saved.

    The model's configuration has the shape of the images. For a file that has only weights, the
    images are assumed to be square.

    Args:
      path: a .keras, .weights.h5 or .h5 file.
      decoder: the same, if the decoder is in another file.

    Returns:
      The model.

    Raises:
      InputError: a file does not exist, is damaged or larger than 1 GiB, or holds another model;
        h5py is missing.
    """
    return load_keras_layers(path, decoder)[0]


def load_keras_layers(path: str | Path, decoder: str | Path | None = None) -> tuple[Params, str]:
    """Load a model as `load_keras` does, and describe the assignment of its layers.

    Args:
      path: as in `load_keras`.
      decoder: as in `load_keras`.

    Returns:
      The model, and a line with the role of each layer.

    Raises:
      InputError: as in `load_keras`.
    """
    return _read(path, decoder)


class _Layer(NamedTuple):
    name: str
    kernel: np.ndarray
    bias: np.ndarray

    def __str__(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.kernel.shape))}"


class _Config(NamedTuple):
    """A layer in the model's configuration."""

    kind: str
    fields: dict[str, Any]


def _read(path: str | Path, decoder: str | Path | None) -> tuple[Params, str]:
    """Load the model and describe the role of each layer."""
    paths = [Path(path)] if decoder is None else [Path(path), Path(decoder)]
    layers: list[_Layer] = []
    configs: list[_Config] = []
    for one in paths:
        found, about = _from_file(one)
        layers += found
        configs += about
    where = " and ".join(map(str, paths))
    roles = _roles(where, layers)
    checked = [_check_settings(where, *item, configs) for item in roles.items()]
    rows, columns = _grid(where, len(roles["decoder dense"].bias) // 64, configs)
    channels, latent_dim = len(roles["conv"].bias), len(roles["mean"].bias)
    weights = {role: _weights(layer, role) for role, layer in roles.items()}
    params = Params(
        {name: weights[name] for name in _ENCODER},
        {name: weights[role] for name, role in _DECODER.items()},
        ModelConfig((2 * rows, 2 * columns, channels), latent_dim),
    )
    assigned = ", ".join(f"{layer.name} as {role}" for role, layer in roles.items())
    if not all(checked):
        assigned += "; strides and activations are not in the file: assumed to be the notebook's"
    return params, (
        f"{where}: images of {2 * rows} x {2 * columns} x {channels}, {latent_dim} latents; "
        f"{assigned}"
    )


def _weights(layer: _Layer, role: str) -> dict[str, jax.Array]:
    kernel = layer.kernel
    if role == "conv_transpose":
        # Keras has [height, width, out, in] and adds the kernel to the output as it is stored;
        # `jax.lax.conv_transpose` takes [height, width, in, out] and flips it.
        kernel = kernel[::-1, ::-1].swapaxes(2, 3)
    return {"bias": jnp.asarray(layer.bias), "kernel": jnp.asarray(kernel)}


def _roles(where: str, layers: list[_Layer]) -> dict[str, _Layer]:
    """Assign each layer its role; layers of equal shape are in the model's order."""

    def shaped(*shape: int | None, bias: int | None = None) -> list[_Layer]:
        """Return the layers with this kernel shape, where None is any size, and bias size."""
        return [
            layer
            for layer in layers
            if layer.kernel.ndim == len(shape)
            and all(n in (None, m) for n, m in zip(shape, layer.kernel.shape, strict=True))
            and (bias is None or len(layer.bias) == bias)
        ]

    convs = {
        "conv_1": shaped(3, 3, None, 32, bias=32),
        "conv_2": shaped(3, 3, 32, 64, bias=64),
        "conv_3, conv_4": shaped(3, 3, 64, 64, bias=64),
        "conv_transpose": shaped(3, 3, 32, 64, bias=32),
    }
    found: dict[str, _Layer] = {}
    for names, candidates in convs.items():
        found |= dict(zip(names.split(", "), candidates, strict=False))
    channels = found["conv_1"].kernel.shape[2] if "conv_1" in found else None
    for dense in shaped(None, 32, bias=32):
        units = dense.kernel.shape[0]
        for behind in shaped(None, units, bias=units):
            latent = behind.kernel.shape[0]
            both = [one for one in shaped(32, latent, bias=latent) if one is not behind]
            if units % 64 == 0 and len(both) == 2:
                mean, log_var = _heads(both)
                found |= {"dense": dense, "mean": mean, "log_var": log_var, "decoder dense": behind}
    if last := shaped(3, 3, 32, channels, bias=channels):
        found["conv"] = last[0]
    if set(found) != set(_SETTINGS) or len(layers) != len(_SETTINGS):
        held = ", ".join(map(str, layers[:12])) or "no layers with a kernel and a bias"
        more = f" and {len(layers) - 12} more" if len(layers) > 12 else ""
        raise InputError(
            f"{where} holds {held}{more}: expected {_EXPECTED}; of two files, name the decoder's "
            "with --decoder"
        )
    return {role: found[role] for role in _SETTINGS}


def _heads(both: list[_Layer]) -> list[_Layer]:
    """Order the two heads, mean first, by their names or else by their order of creation."""
    first, second = (layer.name.lower() for layer in both)

    def variance(name: str) -> bool:
        return re.search("var|sigma|std", name) is not None

    if variance(first) != variance(second):
        return both[::-1] if variance(first) else both
    if re.sub(r"\d", "", first).strip("_") == re.sub(r"\d", "", second).strip("_"):
        return sorted(both, key=lambda layer: _natural(layer.name))  # dense_9, dense_10
    return both


def _check_settings(where: str, role: str, layer: _Layer, configs: list[_Config]) -> bool:
    """Return whether the configuration has this layer; InputError if its settings differ."""
    kinds = [config for config in configs if _may_be(config, role, layer)]
    named = [config for config in kinds if config.fields["name"] == layer.name]
    wrong = [
        (config, name, expected)
        for config in named or kinds
        for name, expected in _SETTINGS[role].items()
        if not _is(config.fields.get(name, expected), expected)
    ]
    # An error only if every candidate differs.
    if wrong and len({id(config) for config, *_ in wrong}) == len(named or kinds):
        config, name, expected = wrong[0]
        raise InputError(
            f"{where} has a layer {layer.name} with {name} {repr(config.fields[name])[:100]}: "
            f"expected {expected!r}, as the notebook's {role}"
        )
    return bool(kinds)


def _may_be(config: _Config, role: str, layer: _Layer) -> bool:
    """Return whether a configuration has the kind and size of this layer."""
    kind = "Dense" if layer.kernel.ndim == 2 else "Conv2D"
    kind = "Conv2DTranspose" if role == "conv_transpose" else kind
    units = config.fields.get("units" if kind == "Dense" else "filters")
    return config.kind == kind and units == len(layer.bias)


def _is(value: Any, expected: Any) -> bool:
    if isinstance(value, dict):  # an activation may be an object
        value = value.get("config")
    if isinstance(expected, tuple):
        return value in (list(expected), expected[0] if len({*expected}) == 1 else None)
    return value == expected


def _grid(where: str, places: int, configs: list[_Config]) -> tuple[int, int]:
    """Return the rows and columns between encoder and decoder: half those of the images."""
    grids = set()
    for config in configs:
        shapes = [config.fields.get(name) for name in ("batch_shape", "batch_input_shape")]
        if config.kind == "InputLayer":
            images = [shape[1:] for shape in shapes if isinstance(shape, list) and len(shape) == 4]
            grids |= {tuple(n / 2 for n in shape[:2]) for shape in images if _whole(shape)}
        shape = config.fields.get("target_shape") or []
        if config.kind == "Reshape" and len(shape) == 3 and _whole(shape):
            grids.add(tuple(shape[:2]))
    side = math.isqrt(places)
    rows, columns = min(grids, default=(side, side))
    if len(grids) > 1 or rows * columns != places:
        sizes = " and ".join(f"{2 * down:g} x {2 * right:g}" for down, right in sorted(grids))
        raise InputError(
            f"{where} has {64 * places} units between encoder and decoder, "
            f"and images of {sizes or 'an unknown shape'}: expected "
            + ("64 for every 2 x 2 pixels" if sizes else "a square, or a file with the shape")
        )
    return int(rows), int(columns)


def _whole(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)


def _from_file(path: Path) -> tuple[list[_Layer], list[_Config]]:
    """Read the layers that have weights, in the file's order, and all configurations."""
    try:
        import h5py
    except ImportError:
        raise InputError("h5py is not installed: pip install h5py") from None
    try:
        with open(path, "rb", opener=open_regular) as file:
            begin = file.read(8)
            file.seek(0)
            config, weights = None, file
            if begin[:4] == b"PK\3\4":
                config, weights = _unpacked(path, file)
            elif begin != b"\x89HDF\r\n\x1a\n":
                raise InputError(f"{path} is not a Keras file: expected .keras, .weights.h5 or .h5")
            with h5py.File(weights, "r") as h5:
                content = config if config is not None else h5.attrs.get("model_config", "null")
                return _layers(path, h5), list(_configs(json.loads(content)))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: expected a Keras file") from None
    except _DAMAGES as error:
        if isinstance(error, OSError) and error.filename:  # it cannot be opened
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is damaged: {reason or type(error).__name__}") from None


# What h5py, zipfile and json raise on a damaged file.
_DAMAGES = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError,
    OverflowError, NotImplementedError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def _unpacked(path: Path, file: Any) -> tuple[bytes, Any]:
    """Read config.json and the weights from an archive."""

    def member(name: str, limit: int) -> bytes:
        if name not in archive.namelist():
            raise InputError(f"{path} has no {name}: expected a .keras file")
        with archive.open(name) as stream:
            content = stream.read(limit + 1)  # the size in the archive may be wrong
        if len(content) > limit:
            raise InputError(f"{path} has a {name} of more than {limit:,} bytes: expected fewer")
        return content

    with zipfile.ZipFile(file) as archive:
        config = member("config.json", _CONFIG_BYTES)
        return config, io.BytesIO(member("model.weights.h5", _BYTES))


def _layers(path: Path, h5: Any) -> list[_Layer]:
    """Read every group of arrays, except the optimizer's, as a layer."""
    layers = []
    left = _BYTES
    for name, arrays in _groups(path, h5, "", 0, [_GROUPS]):
        sizes = [array.size * array.dtype.itemsize for array in arrays]
        left -= sum(sizes)
        if left < 0:
            raise InputError(f"{path} has weights of more than {_BYTES:,} bytes: expected fewer")
        if any(array.external or array.is_virtual for array in arrays):
            raise InputError(f"{path} has weights in other files: expected all weights in one file")
        kernel, *others = sorted(arrays, key=lambda array: -array.ndim)
        if kernel.ndim < 2 or len(others) != 1 or others[0].ndim != 1:
            shapes = ", ".join(str(array.shape) for array in arrays)
            raise InputError(
                f"{path} has a layer {name} with weights of shape {shapes}: expected {_EXPECTED}"
            )
        layer = _Layer(name, *(np.asarray(one[()], np.float32) for one in (kernel, *others)))
        if not all(np.isfinite(one).all() for one in layer[1:]):
            raise InputError(f"{path} has NaN or infinity in {name}: expected finite weights")
        layers.append(layer)
    return layers


def _groups(
    path: Path, group: Any, name: str, depth: int, left: list[int]
) -> Iterator[tuple[str, list[Any]]]:
    """Yield the names of layers and their arrays, in the model's order."""
    import h5py

    left[0] -= 1
    if left[0] < 0 or depth > _DEPTH:
        raise InputError(f"{path} has too many nested groups: expected a Keras file")
    arrays = []
    for child in _in_order(group):
        if child in ("optimizer", "optimizer_weights"):
            continue
        if not isinstance(group.get(child, getlink=True), h5py.HardLink):
            raise InputError(f"{path} has a link at {child!r}: expected the weights themselves")
        node = group[child]
        if isinstance(node, h5py.Group):
            # Keras 3 stores a layer's arrays in a group "vars" with the layer's name.
            own = str(node.attrs.get("name", name) if child == "vars" else child)
            own = own if own.isprintable() else repr(own)
            yield from _groups(path, node, own[:100], depth + 1, left)
        elif node.ndim and node.dtype.kind == "f":  # not counters and seeds
            arrays.append(node)
    if arrays:
        yield name, arrays


def _in_order(group: Any) -> list[str]:
    """List the members of a group in the model's order.

    Keras 2 stores the order; Keras 3 numbers layers of a kind: conv2d, conv2d_1, ..., conv2d_10.
    """
    listed = [
        (name.decode() if isinstance(name, bytes) else str(name)).split("/")[0]
        for names in ("layer_names", "weight_names")
        for name in np.ravel(group.attrs.get(names, [])).tolist()
    ]
    place = {name: i for i, name in reversed(list(enumerate(listed)))}
    return sorted(group, key=lambda name: (place.get(name, len(listed)), _natural(name)))


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that compares numbers in names by value."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def _configs(config: Any) -> Iterator[_Config]:
    """Yield the layers in a model's configuration, at any depth."""
    if isinstance(config, dict):
        fields = config.get("config")
        if isinstance(fields, dict) and isinstance(fields.get("name"), str):
            yield _Config(str(config.get("class_name")), fields)
        for value in config.values():
            yield from _configs(value)
    elif isinstance(config, list):
        for value in config:
            yield from _configs(value)
