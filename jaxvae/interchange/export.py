"""Export of models to StableHLO, ONNX and safetensors.

    encoder   images [b, height, width, channels], float32 in [0, 1]
              -> mean, log_var [b, latent]; with a flow also the center [b, latent];
                 of discrete latents codes [b, n], int32, and center [b, latent]
    decoder   latents [b, latent], float32 -> mean [b, height, width, channels], float32 in [0, 1]
    sampler   keys [b, 2], 64 random bits for each image, uint32
              -> the decoder's mean at a sample from the prior, [b, height, width, channels]

The batch size b is at least 1. Conditional models take labels [b], int32,
or covariates [b, c], float32, as the last argument.
The parameters are constants of the functions.

docs/export.md describes the contents of each file and how other programs read it.
"""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvae.errors import ComponentNeeded, InputError
from jaxvae.models.codebooks import codebook_of, is_discrete
from jaxvae.models.config import ModelConfig
from jaxvae.models.flows import FlowPosterior
from jaxvae.models.vae import Params, decode, encode, init, prior
from jaxvae.storage import open_regular, write_atomic
from jaxvae.validation import whole_number

FORMATS = ("stablehlo", "onnx", "safetensors")
PLATFORMS = ("cpu", "cuda", "tpu")

WEIGHTS = "model.safetensors"
_CONFIG = "jaxvae.ModelConfig"  # key of the model's configuration in a safetensors file


def export(params: Params, folder: str | Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write a model to a folder in one or several formats.

    stablehlo: encoder.stablehlo, decoder.stablehlo and sampler.stablehlo; onnx: encoder.onnx and
    decoder.onnx; safetensors: model.safetensors. Files of an earlier export are replaced after
    all formats have been converted. If a format cannot be written, the others are.

    Args:
      params: the model.
      folder: created if it does not exist.
      formats: any of FORMATS.

    Returns:
      The paths of the files.

    Raises:
      InputError: the format is unknown; its package is missing or cannot convert this model; the
        folder cannot be written.
    """
    return write_files(folder, *converted(params, formats))


def converted(params: Params, formats: Sequence[str]) -> tuple[dict[str, bytes], list[str]]:
    """Convert a model to one or several formats.

    Args:
      params: the model.
      formats: any of FORMATS.

    Returns:
      The contents of the files that `export` writes, by name; and for each format that cannot be
      written, why not.

    Raises:
      InputError: the format is unknown.
    """
    contents: dict[str, bytes] = {}
    problems = []
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"the format is {name!r}: expected {', '.join(FORMATS)}")
    for name in formats:
        try:
            contents |= _WRITERS[name](params)
        except InputError as error:
            problems.append(f"{name} cannot be written: {error}")
    return contents, problems


def write_files(
    folder: str | Path, contents: Mapping[str, bytes], problems: Sequence[str] = ()
) -> list[Path]:
    """Write files to a folder, each atomically.

    Args:
      folder: created if it does not exist.
      contents: the contents by file name.
      problems: what could not be converted, and why.

    Returns:
      The paths of the files.

    Raises:
      InputError: the folder cannot be written; or there are problems, after the files were written.
    """
    if problems and not contents:
        raise InputError("; ".join(problems))
    paths = [Path(folder) / name for name in contents]
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for path, content in zip(paths, contents.values(), strict=True):
            write_atomic(path, lambda file, content=content: file.write(content))  # type: ignore[misc]
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from None
    if problems:
        raise InputError("; ".join([*problems, f"written to {folder}: {', '.join(contents)}"]))
    return paths


def load_safetensors(path: str | Path, network: Any = None, **own: Any) -> Params:
    """Load a model from a safetensors file that `export` has written.

    Args:
      path: path of the file.
      network: the modules (encoder, decoder), if the model has a network of the user's own.
      **own: other components of the user's own, by their field of ModelConfig.

    Returns:
      The model.

    Raises:
      InputError: the file does not exist or is damaged, or its parameters do not match its
        configuration.
    """
    return load_safetensors_with_step(path, network, **own)[0]


def load_safetensors_with_step(
    path: str | Path, network: Any = None, **own: Any
) -> tuple[Params, int]:
    """Return the model as `load_safetensors` does, and the number of steps it was trained for.

    A file without that number gives 0.
    """
    _require("safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb", opener=open_regular):
            pass  # safe_open would block on a pipe
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    if _CONFIG not in about:
        raise InputError(
            f"{path} has no {_CONFIG} in its metadata: expected a file written by `jaxvae export`"
        )
    try:
        own |= {} if network is None else {"network": network}
        fields = json.loads(about[_CONFIG])
        step = whole_number("step", fields.pop("step", 0), 0) if isinstance(fields, dict) else 0
        config = ModelConfig.from_dict(fields, **own)
    except ComponentNeeded as error:
        raise ComponentNeeded(f"{path}: {error}") from None
    except (RecursionError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    # The name in version 0.1.
    arrays = {re.sub(r"^flow\.", "posterior.", name): x for name, x in arrays.items()}
    like = jax.eval_shape(init, jax.random.key(0), config)
    expected, found = _shapes(_named(like)), _shapes(arrays)
    if expected != found:
        name = min(set(expected.items()) ^ set(found.items()))[0]
        raise InputError(
            f"{path} has {_shape_text(found, name)}: expected {_shape_text(expected, name)}, "
            "as its configuration says"
        )
    leaves = [jnp.asarray(arrays[name]) for name in _named(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), step


class _Function(NamedTuple):
    """A function to export, with the names of its inputs and outputs."""

    call: Callable[..., Any]
    inputs: Mapping[str, jax.ShapeDtypeStruct]  # of one row of the batch
    outputs: tuple[str, ...]


def _functions(params: Params) -> dict[str, _Function]:
    config = params.config
    shape = jax.ShapeDtypeStruct
    images = {"images": shape(config.image_shape, jnp.float32)}
    latents = {"latents": shape((config.latent_dim,), jnp.float32)}
    keys = {"keys": shape((2,), jnp.uint32)}
    condition = shape((), jnp.int32)
    if config.num_covariates:
        condition = shape((config.num_covariates,), jnp.float32)
    of_encoder, of_decoder = (
        {"labels": condition} if config.conditional(part) else {} for part in ("encoder", "decoder")
    )

    # Only the parameters that each function needs, as all of them are exported. The posterior of a
    # hierarchy shares the decoder's path.
    shared = params.decoder if hasattr(params.model, "groups") else {}
    encoder_params = replace(params, decoder=shared, likelihood={}, prior={})
    decoder_params = replace(params, encoder={}, prior={}, posterior={})

    def encoder(images: jax.Array, *labels: jax.Array) -> tuple[jax.Array, ...]:
        posterior = encode(encoder_params, images, *labels)
        if is_discrete(config):
            return codebook_of(encoder_params).codes(posterior.center), posterior.center
        center = (posterior.center,) if isinstance(posterior, FlowPosterior) else ()
        return posterior.mean, posterior.log_var, *center

    def decoder(z: jax.Array, *labels: jax.Array) -> jax.Array:
        return decode(decoder_params, z, *labels).mean

    def sampler(keys: jax.Array, *labels: jax.Array) -> jax.Array:
        # A key per image: `prior.sample` cannot take a symbolic batch size.
        own = jax.random.wrap_key_data(keys, impl="threefry2x32")
        z = jax.vmap(lambda key: prior(params).sample(key, 1)[0])(own)
        return decoder(z, *labels)

    like = jax.eval_shape(encode, params, *_of_batch(1, _Function(encode, images | of_encoder, ())))
    encoded = ("mean", "log_var", *(("center",) if isinstance(like, FlowPosterior) else ()))
    if is_discrete(config):
        encoded = "codes", "center"
    return {
        "encoder": _Function(encoder, images | of_encoder, encoded),
        "decoder": _Function(decoder, latents | of_decoder, ("mean",)),
        "sampler": _Function(sampler, keys | of_decoder, ("mean",)),
    }


def _of_batch(size: Any, function: _Function) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((size, *x.shape), x.dtype) for x in function.inputs.values()]


def _stablehlo(params: Params) -> dict[str, bytes]:
    from jax import export as jax_export

    _require("flatbuffers")
    (batch,) = jax_export.symbolic_shape("b")
    files = {}
    for name, function in _functions(params).items():
        inputs = _of_batch(batch, function)
        with _explain_len(name):
            exported = jax_export.export(jax.jit(function.call), platforms=PLATFORMS)(*inputs)
        files[f"{name}.stablehlo"] = bytes(exported.serialize())
    return files


def _onnx(params: Params) -> dict[str, bytes]:
    _require("onnx")
    _require("onnxruntime")
    from jaxvae.interchange.onnx import to_onnx

    files = {}
    # In float32 only: few programs read bfloat16.
    config = replace(params.config, compute_dtype="float32")
    functions = _functions(replace(params, config=config))
    for name in ("encoder", "decoder"):
        function = functions[name]
        with _explain_len(name):
            content = to_onnx(name, *function)
        try:
            problem = _difference(function, content, config)
        except Exception as error:  # of ONNX Runtime
            problem = " ".join(str(error).split())[:200] or type(error).__name__
        if problem:
            raise InputError(
                f"ONNX Runtime does not compute this {name} as JAX does: {problem}; expected "
                "equal results; choose the format stablehlo, which supports every model"
            )
        files[f"{name}.onnx"] = content
    return files


def _difference(function: _Function, content: bytes, config: ModelConfig) -> str:
    """Compare with ONNX Runtime: describe the first output that differs, or return ""."""
    import onnxruntime

    rng = np.random.default_rng(0)
    draw: dict[str, Callable[[Any], np.ndarray]] = {
        "images": lambda shape: rng.random(shape).astype(np.float32),
        "latents": lambda shape: rng.normal(size=shape).astype(np.float32),
        "labels": lambda shape: np.arange(*shape, dtype=np.int32) % config.num_classes,
    }
    if config.num_covariates:
        draw["labels"] = draw["latents"]
    given = {name: draw[name]((3, *x.shape)) for name, x in function.inputs.items()}
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    theirs = session.run(None, given)
    with jax.default_matmul_precision("highest"):  # the precision of ONNX Runtime on a CPU
        # As one program, in which the values of the images are not validated.
        ours = jax.tree.leaves(jax.jit(function.call)(*given.values()))
    for name, a, b in zip(function.outputs, ours, theirs, strict=True):
        off = np.abs(a - b).max()
        if not off <= 1e-4 * max(1, np.abs(a).max()):
            return f"its {name} is off by {off:.2g}"
    return ""


def to_safetensors(params: Params, step: int | None = None) -> dict[str, bytes]:
    """Return the content of model.safetensors, by its name.

    Args:
      params: the model.
      step: the number of steps it was trained for, if known.

    Returns:
      The content.

    Raises:
      InputError: safetensors is not installed.
    """
    _require("safetensors")
    from safetensors.numpy import save

    arrays = {name: np.asarray(x, order="C") for name, x in _named(params).items()}
    # Under one key: safetensors writes several in any order, and the file would change.
    about = params.config.to_dict() | ({} if step is None else {"step": step})
    return {WEIGHTS: save(arrays, {_CONFIG: json.dumps(about)})}


_WRITERS: dict[str, Callable[[Params], dict[str, bytes]]] = {
    "stablehlo": _stablehlo,
    "onnx": _onnx,
    "safetensors": to_safetensors,
}


def _named(params: Params) -> dict[str, Any]:
    """Return the arrays by their paths, such as encoder.conv_1.kernel."""
    leaves, _ = jax.tree.flatten_with_path(params)
    return {jax.tree_util.keystr(k, simple=True, separator="."): x for k, x in leaves}


def _shapes(arrays: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(x.shape), str(x.dtype)) for name, x in arrays.items()}


def _shape_text(shapes: dict[str, tuple[tuple[int, ...], str]], name: str) -> str:
    if name not in shapes:
        return f"no {name!r}"
    shape, dtype = shapes[name]
    return f"{name!r} of shape {shape} and type {dtype}"


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{package} is not installed: pip install {package}")


@contextmanager
def _explain_len(name: str) -> Iterator[None]:
    """Convert the TypeError of `len(x)` on a symbolic batch size to an InputError."""
    try:
        yield
    except TypeError as error:
        if "_DimExpr" not in str(error):
            raise
        raise InputError(
            f"the {name} calls len(x), but an export has a symbolic batch size: expected "
            "x.shape[0] in modules of your own"
        ) from None
