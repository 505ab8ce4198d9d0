"""The training state, and the optimizer that its configuration describes."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Int, Key, Num, UInt32

from jaxvae.errors import InputError
from jaxvae.models import layers
from jaxvae.models.config import ModelConfig
from jaxvae.models.vae import Params, init
from jaxvae.training.config import PARTS, TrainConfig
from jaxvae.validation import as_key, expect_config, is_deleted


@no_type_check  # not at run time: JAX also builds this tree with shapes or specs as leaves
@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class TrainState:
    """Everything that the next step depends on, as a pytree.

    Attributes:
      params: the model's parameters.
      opt_state: the optimizer's state.
      step: number of steps taken, int32.
      key: PRNG key of the run. It stays the same: every step folds its number into it.
      config: the training configuration (static).
      ema: exponential moving average of the parameters, or None if `TrainConfig.ema` is 0.
    """

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]
    key: Key[Array, ""]
    config: TrainConfig = field(metadata={"static": True})
    ema: Params | None = None

    def __repr__(self) -> str:
        """Return the step, the parameters in short and the configuration."""
        step = "deleted" if is_deleted(self.step) else self.step
        return f"TrainState(step={step}, params={self.params!r}, config={self.config!r})"

    def _repr_html_(self) -> str:
        """Return the layer table and the text of `repr`, for notebooks."""
        shapes = jax.eval_shape(init, jax.random.key(0), self.params.config)
        return layers.as_html(layers.tables(shapes), repr(self))

    @property
    def eval_params(self) -> Params:
        """The parameters for evaluation and sampling: `ema`, or `params` if there is no average."""
        return self.params if self.ema is None else self.ema


def optimizer(
    config: TrainConfig, learning_rate: Num[Array, ""] | float | None = None
) -> optax.GradientTransformation:
    """Build the optimizer of a configuration: by default RMSprop with Keras's defaults.

    Args:
      config: training configuration; `optimizer`, `trainable` and `accumulate` are used.
      learning_rate: overrides the configuration's; may be traced.

    Returns:
      The gradient transformation.

    Raises:
      InputError: `learning_rate` was given, but the optimizer has its own.

    References:
      Tieleman and Hinton (2012), Lecture 6.5, RMSprop.
    """
    if not isinstance(config.optimizer, optax.GradientTransformation):
        made = config.optimizer(config.learning_rate if learning_rate is None else learning_rate)
    elif learning_rate is None:
        made = config.optimizer
    else:
        raise InputError(
            "learning_rate was given, but the optimizer is an optax.GradientTransformation with "
            "its own learning rate: build it with that rate, or pass a function of the rate"
        )
    if config.trainable:
        parts = {True: made, False: optax.set_to_zero()}
        made = optax.partition(parts, lambda params: _trained(params, config.trainable))
    if config.accumulate > 1:
        made = optax.MultiSteps(made, config.accumulate).gradient_transformation()
    return made


def _trained(params: Params, parts: tuple[str, ...]) -> Params:
    """Return a tree of booleans: whether each parameter belongs to one of these parts."""
    trees = {
        part: jax.tree.map(lambda _, p=part: p in parts, getattr(params, part)) for part in PARTS
    }
    return replace(params, **trees)


def create_train_state(
    key: Key[Array, "..."] | UInt32[ArrayLike, "..."],
    config: ModelConfig,
    train_config: TrainConfig,
) -> TrainState:
    """Initialise parameters and optimizer state, at step 0.

    Args:
      key: PRNG key.
      config: model configuration.
      train_config: training configuration.

    Returns:
      The training state.

    Raises:
      InputError: a configuration of another type, or an invalid key.
    """
    expect_config("config", config, ModelConfig)
    expect_config("train_config", train_config, TrainConfig)
    init_key, run_key = jax.random.split(as_key(key))
    return state_of(init(init_key, config), run_key, train_config)


def state_of(params: Params, key: Key[Array, ""], config: TrainConfig) -> TrainState:
    """Build the state at step 0 of a training that starts from these parameters."""
    opt_state = _opt_state(params, config)
    # A copy, because the next step donates the memory of both.
    ema = jax.tree.map(jnp.copy, params) if config.ema else None
    return TrainState(params, opt_state, jnp.int32(0), key, config, ema)


@partial(jax.jit, static_argnames="config")
def _opt_state(params: Params, config: TrainConfig) -> optax.OptState:
    """Initialise the optimizer in one program, instead of one for each shape of a parameter."""
    return optimizer(config).init(params)  # type: ignore[arg-type]


def noise_key(state: TrainState) -> Key[Array, ""]:
    """Return the key of this step's latent samples."""
    return jax.random.split(jax.random.fold_in(state.key, state.step))[0]


def shuffle_key(state: TrainState) -> Key[Array, ""]:
    """Return the key of the order of the images in the epoch that starts at this step."""
    return jax.random.split(jax.random.fold_in(state.key, state.step))[1]


def binarization_key(state: TrainState) -> Key[Array, ""]:
    """Return the key of this step's binarization."""
    # Not derived from `noise_key`, whose fold-ins are the keys of the images.
    return jax.random.fold_in(jax.random.fold_in(state.key, state.step), 2)
