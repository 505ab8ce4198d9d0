"""The layer table of a model."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxvae.config import ModelConfig
from jaxvae.model import init, modules

Row = tuple[str, str, str, int]


def summary(config: ModelConfig) -> str:
    """A line for every layer: its name, output shape, kernel shape and number of parameters."""
    params = jax.eval_shape(init, jax.random.key(0), config)
    encoder, decoder = modules(config)
    images = jnp.zeros((1, *config.image_shape))
    latents = jnp.zeros((1, config.latent_dim))
    tables = {
        "encoder, q(z|x)": _rows(encoder, params.encoder, "images", images),
        "decoder, p(x|z)": _rows(decoder, params.decoder, "latents", latents),
    }
    lines = []
    for title, rows in tables.items():
        total = sum(row[-1] for row in rows)
        lines += [*_table(title, rows), f"{'':48}{total:>12,}", ""]
    both = sum(row[-1] for rows in tables.values() for row in rows)
    return "\n".join([*lines, f"{both:,} parameters"])


def _rows(module: Any, params: Any, input_name: str, example: jax.Array) -> list[Row]:
    names: list[str] = []  # in the order of the calls, which tracing sorts away

    def outputs(params: Any) -> list[jax.Array]:
        _, state = module.apply({"params": params}, example, capture_intermediates=True)
        layers = {k: v for k, v in state["intermediates"].items() if k != "__call__"}
        names[:] = layers
        return [layer["__call__"][0] for layer in layers.values()]

    shapes = jax.eval_shape(outputs, params)
    rows: list[Row] = [(input_name, _shape(example.shape[1:]), "", 0)]
    for name, output in zip(names, shapes, strict=True):
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params[name]))
        rows.append((name, _shape(output.shape[1:]), _shape(params[name]["kernel"].shape), count))
    return rows


def _table(title: str, rows: list[Row]) -> list[str]:
    head = f"{title:20}{'output':14}{'kernel':14}{'parameters':>12}"
    return [head, "-" * len(head), *(f"{n:20}{o:14}{k:14}{c:>12,}" for n, o, k, c in rows)]


def _shape(sides: tuple[int, ...]) -> str:
    return " x ".join(map(str, sides))
