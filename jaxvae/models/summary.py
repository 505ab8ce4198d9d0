"""The layer table of a model."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxvae.models.config import ModelConfig
from jaxvae.models.vae import VAE, init

Row = tuple[str, str, str, int]


def summary(config: ModelConfig) -> str:
    """Format the layer table of a model.

    Args:
      config: the architecture.

    Returns:
      Lines with the name, output shape, kernel shape and number of parameters of each layer.
    """
    params = jax.eval_shape(init, jax.random.key(0), config)
    model = params.model
    if isinstance(model, VAE):
        encoder, decoder = model.modules()
        condition = jnp.zeros((1, config.condition_dim))
        images, latents = (
            [jnp.zeros((1, *shape)), *([condition] if config.conditional(part) else [])]
            for part, shape in (
                ("encoder", config.image_shape),
                ("decoder", (config.latent_dim,)),
            )
        )
        tables = {
            "encoder, q(z|x)": _rows(encoder, params.encoder, "images", images),
            "decoder, p(x|z)": _rows(decoder, params.decoder, "latents", latents),
        }
    else:  # a model whose modules are not called in the same way
        tables = {
            "encoder": _parts(params.encoder),
            "decoder": _parts(params.decoder),
        }
    learned = {
        "posterior": params.posterior,
        "prior": params.prior,
        "likelihood": params.likelihood,
    }
    for part, weights in learned.items():
        if weights:
            kind = config.specs()[part]
            tables[f"{part}, {kind}"] = [(kind, "", "", _count(weights))]
    names = [*tables, *(row[0] for rows in tables.values() for row in rows)]
    width = max(22, 2 + max(map(len, names)))
    lines = []
    for title, rows in tables.items():
        total = sum(row[-1] for row in rows)
        lines += [*_table(title, rows, width), f"{'':{width + 36}}{total:>12,}", ""]
    return "\n".join([*lines, f"{_count(params):,} parameters"])


def _rows(module: Any, params: Any, input_name: str, examples: list[Array]) -> list[Row]:
    names: list[str] = []  # in the order of the calls; tracing sorts the outputs

    def outputs(params: Any) -> list[Any]:
        _, state = module.apply({"params": params}, *examples, capture_intermediates=True)
        layers = {k: v for k, v in state["intermediates"].items() if k != "__call__"}
        names[:] = layers
        return [layer["__call__"][0] for layer in layers.values()]

    shapes = jax.eval_shape(outputs, params)
    rows: list[Row] = [(input_name, _shape(examples[0].shape[1:]), "", 0)]
    for name, output in zip(names, shapes, strict=True):
        weights = params.get(name, {})
        # A block of several layers has no kernel, and may have several outputs.
        kernel = _shape(weights["kernel"].shape) if "kernel" in weights else ""
        shape = _shape(output.shape[1:]) if hasattr(output, "shape") else ""
        rows.append((name, shape, kernel, _count(weights)))
    # Parameters of layers that were not called.
    rows += [(name, "", "", _count(params[name])) for name in params if name not in names]
    return rows


def _parts(params: Any) -> list[Row]:
    def numbers(name: str) -> list[Any]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    return [(name, "", "", _count(params[name])) for name in sorted(params, key=numbers)]


def _count(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _table(title: str, rows: list[Row], width: int) -> list[str]:
    head = f"{title:{width}}{'output':16}{'kernel':20}{'parameters':>12}"
    lines = (f"{name:{width}}{out:16}{kernel:20}{n:>12,}" for name, out, kernel, n in rows)
    return [head, "-" * len(head), *lines]


def _shape(sides: tuple[int, ...]) -> str:
    return " x ".join(map(str, sides))
