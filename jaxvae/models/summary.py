"""The layer table of a model."""

import jax

from jaxvae.models import layers
from jaxvae.models.config import ModelConfig
from jaxvae.models.vae import init


def summary(config: ModelConfig) -> str:
    """Format the layer table of a model.

    Args:
      config: the architecture.

    Returns:
      Lines with the name, output shape, kernel shape and number of parameters of each layer.
    """
    return layers.as_text(layers.tables(jax.eval_shape(init, jax.random.key(0), config)))
