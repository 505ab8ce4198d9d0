"""The layers of a model, as tables."""

import html
import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

if TYPE_CHECKING:
    from jaxvae.models.vae import Params


class Row(NamedTuple):
    """A layer.

    Attributes:
      name: its name.
      output: shape of its output; empty if it has several.
      kernel: shape of its kernel; empty if it has none.
      parameters: number of its parameters.
    """

    name: str
    output: str
    kernel: str
    parameters: int


def tables(params: "Params") -> dict[str, list[Row]]:
    """Return the layers of each part of a model, by the part's title.

    Args:
      params: the parameters, or their shapes.

    Returns:
      The layers, in the order in which they are called.
    """
    config, model = params.config, params.model
    if hasattr(config.network, "model"):  # whose modules are not called in the same way
        found = {"encoder": _parts(params.encoder), "decoder": _parts(params.decoder)}
    else:
        encoder, decoder = model.modules()  # type: ignore[attr-defined]
        condition = jnp.zeros((1, config.condition_dim))
        images, latents = (
            [jnp.zeros((1, *shape)), *([condition] if config.conditional(part) else [])]
            for part, shape in (
                ("encoder", config.image_shape),
                ("decoder", (config.latent_dim,)),
            )
        )
        found = {
            "encoder, q(z|x)": _rows(encoder, params.encoder, "images", images),
            "decoder, p(x|z)": _rows(decoder, params.decoder, "latents", latents),
        }
    for part in ("posterior", "prior", "likelihood"):
        if weights := getattr(params, part):
            kind = config.specs()[part]
            found[f"{part}, {kind}"] = [Row(kind, "", "", _count(weights))]
    return found


def as_text(tables: dict[str, list[Row]]) -> str:
    """Format tables for a terminal.

    Args:
      tables: from `tables`.

    Returns:
      Lines with the layers of each part, its number of parameters, and the number of all.
    """
    names = [*tables, *(row.name for rows in tables.values() for row in rows)]
    width = max(22, 2 + max(map(len, names)))
    lines = []
    for title, rows in tables.items():
        head = f"{title:{width}}{'output':16}{'kernel':20}{'parameters':>12}"
        lines += [head, "-" * len(head)]
        lines += [f"{name:{width}}{out:16}{kernel:20}{n:>12,}" for name, out, kernel, n in rows]
        lines += [f"{'':{width + 36}}{_total(rows):>12,}", ""]
    return "\n".join([*lines, f"{sum(map(_total, tables.values())):,} parameters"])


def as_html(tables: dict[str, list[Row]], text: str) -> str:
    """Format tables for a notebook, as one table of HTML.

    Args:
      tables: from `tables`.
      text: a line below the table.

    Returns:
      The table, with what `as_text` has, and the line.
    """
    rows = []
    for title, layers in tables.items():
        rows.append(_html_row("th", title, "output", "kernel", "parameters"))
        rows += [_html_row("td", *row[:3], f"{row.parameters:,}") for row in layers]
        rows.append(_html_row("th", "", "", "", f"{_total(layers):,}"))
    return f"<table>{''.join(rows)}</table><code>{html.escape(text)}</code>"


def _html_row(tag: str, *cells: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _total(rows: list[Row]) -> int:
    return sum(row.parameters for row in rows)


def _rows(module: Any, params: Any, input_name: str, examples: list[Array]) -> list[Row]:
    names: list[str] = []  # in the order of the calls; tracing sorts the outputs

    def outputs(params: Any) -> list[Any]:
        _, state = module.apply({"params": params}, *examples, capture_intermediates=True)
        layers = {k: v for k, v in state["intermediates"].items() if k != "__call__"}
        names[:] = layers
        return [layer["__call__"][0] for layer in layers.values()]

    shapes = jax.eval_shape(outputs, params)
    rows = [Row(input_name, _shape(examples[0].shape[1:]), "", 0)]
    for name, output in zip(names, shapes, strict=True):
        weights = params.get(name, {})
        # A block of several layers has no kernel, and may have several outputs.
        kernel = _shape(weights["kernel"].shape) if "kernel" in weights else ""
        shape = _shape(output.shape[1:]) if hasattr(output, "shape") else ""
        rows.append(Row(name, shape, kernel, _count(weights)))
    # Parameters of layers that were not called.
    rows += [Row(name, "", "", _count(params[name])) for name in params if name not in names]
    return rows


def _parts(params: Any) -> list[Row]:
    def numbers(name: str) -> list[Any]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    return [Row(name, "", "", _count(params[name])) for name in sorted(params, key=numbers)]


def _count(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _shape(sides: tuple[int, ...]) -> str:
    return " x ".join(map(str, sides))
