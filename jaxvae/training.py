"""State and step."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxvae.config import ModelConfig, TrainConfig
from jaxvae.convolution import block_size
from jaxvae.errors import InputError
from jaxvae.model import Params, init
from jaxvae.objectives import Elbo, example_keys, negative_elbo
from jaxvae.parallel import own_part

# (params, keys [batch], images [batch, ...]) -> (loss [batch], the terms it is made of)
Objective = Callable[[Params, jax.Array, jax.Array], tuple[jax.Array, Elbo]]
Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that the next step depends on, as a pytree.

    step: steps taken, int32.
    key: the run's PRNG key; it never changes, each step folds its number into it.
    config: how to train (static).
    """

    params: Params
    opt_state: optax.OptState
    step: jax.Array
    key: jax.Array
    config: TrainConfig = field(metadata={"static": True})


def optimizer(
    config: TrainConfig, learning_rate: jax.Array | float | None = None
) -> optax.GradientTransformation:
    """RMSprop with Keras's defaults: decay 0.9, epsilon 1e-7 inside the root, no momentum.

    learning_rate: instead of the configuration's; may be traced.
    """
    rate = config.learning_rate if learning_rate is None else learning_rate
    return optax.rmsprop(rate, decay=0.9, eps=1e-7, eps_in_sqrt=True)


def create_train_state(
    key: jax.Array, config: ModelConfig, train_config: TrainConfig
) -> TrainState:
    """Fresh parameters and optimiser state, at step 0."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    init_key, run_key = jax.random.split(key)
    params = init(init_key, config)
    opt_state = optimizer(train_config).init(params)  # type: ignore[arg-type]
    return TrainState(params, opt_state, jnp.int32(0), run_key, train_config)


@partial(jax.jit, static_argnames=("axis_name", "objective"))
def train_step(
    state: TrainState,
    images: jax.Array,
    *,
    axis_name: str | None = None,
    objective: Objective | None = None,
    learning_rate: jax.Array | float | None = None,
    beta: jax.Array | float | None = None,
) -> tuple[TrainState, Metrics]:
    """One step of RMSprop on the mean loss of a batch.

    The state handed in stays usable; `jax.jit(train_step, donate_argnums=0)` gives it up.

    Args:
      images: [batch, height, width, channels], float32 in [0, 1] or uint8.
      axis_name: of the `pmap` whose devices share the batch, each holding its equal part in
        order; gradients and metrics are then averaged over it.
      objective: what to minimise; by default the negative ELBO, its KL term weighted by beta.
      learning_rate, beta: instead of the configuration's. They are traced, so that under `vmap`
        each model can have its own; an objective of one's own takes no beta.
    Returns:
      The next state, and `loss`, `elbo`, `log_likelihood`, `kl`: means over the whole batch,
      nats per image.
    Raises:
      InputError: images of another shape than the model's.
    """
    images = jnp.asarray(images)
    batch = images.shape[0]
    first = lax.axis_index(axis_name) * batch if axis_name else 0
    keys = example_keys(_noise_key(state), batch, first)
    if objective is None:
        objective = partial(negative_elbo, beta=state.config.beta if beta is None else beta)
    grads, metrics = _mean_gradient(objective, state.params, keys, images)
    if axis_name:
        grads, metrics = lax.pmean((grads, metrics), axis_name)
    rms_prop = optimizer(state.config, learning_rate)
    updates, opt_state = rms_prop.update(grads, state.opt_state)
    params = optax.apply_updates(state.params, updates)  # type: ignore[arg-type]
    return replace(state, params=params, opt_state=opt_state, step=state.step + 1), metrics


@partial(jax.jit, static_argnames=("axis_name", "objective"), donate_argnames="state")
def train_epoch(
    state: TrainState,
    images: jax.Array,
    *,
    axis_name: str | None = None,
    objective: Objective | None = None,
    learning_rate: jax.Array | float | None = None,
    beta: jax.Array | float | None = None,
) -> tuple[TrainState, Metrics]:
    """Shuffle the images and take every step of an epoch, in one dispatch.

    The images that do not fill a last batch are left out; which ones differs every epoch.

    The state is donated: the next one takes over its memory, and the arrays of the one handed in
    are deleted. Go on with the one returned; `jax.tree.map(jnp.copy, state)` keeps an old one.

    Args:
      state: where the epoch begins; donated.
      images: [N, height, width, channels], float32 in [0, 1] or uint8.
      axis_name: of the `pmap` whose devices share every batch; each is handed all the images
        and takes its own part.
      objective, learning_rate, beta: as in `train_step`.
    Returns:
      The state after the epoch, and the metrics of `train_step` averaged over its steps.
    Raises:
      InputError: fewer images than one batch, or images of another shape than the model's.
    """
    batches = shuffle(state, len(images))
    state, totals = train_steps(
        state,
        images,
        batches,
        0,
        len(batches),
        axis_name=axis_name,
        objective=objective,
        learning_rate=learning_rate,
        beta=beta,
    )
    return state, jax.tree.map(lambda total: total / len(batches), totals)


@partial(jax.jit, static_argnames="num_images")
def shuffle(state: TrainState, num_images: int) -> jax.Array:
    """The batches of the epoch that begins at this state: indices, [steps, batch_size]."""
    batch_size = state.config.batch_size
    if batch_size > num_images:
        raise InputError(
            f"batch_size is {batch_size}: expected at most the {num_images} training images"
        )
    steps = num_images // batch_size
    order = jax.random.permutation(_shuffle_key(state), num_images)
    return order[: steps * batch_size].reshape(steps, batch_size)


@partial(jax.jit, static_argnames=("axis_name", "objective"), donate_argnames="state")
def train_steps(
    state: TrainState,
    images: jax.Array,
    batches: jax.Array,
    first: jax.Array | int,
    last: jax.Array | int,
    *,
    axis_name: str | None = None,
    objective: Objective | None = None,
    learning_rate: jax.Array | float | None = None,
    beta: jax.Array | float | None = None,
) -> tuple[TrainState, Metrics]:
    """The steps on batches[first:last], in one dispatch; the metrics are summed over them.

    `first` and `last` are traced, so that one compiled program serves every part of an epoch.
    The state is donated, as in `train_epoch`.
    """
    one = partial(
        train_step,
        axis_name=axis_name,
        objective=objective,
        learning_rate=learning_rate,
        beta=beta,
    )
    batches = own_part(batches, axis_name, axis=1)

    def step(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, totals = carry
        state, metrics = one(state, images[batches[i]])
        return state, jax.tree.map(jnp.add, totals, metrics)

    _, metrics = jax.eval_shape(one, state, images[batches[0]])
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)
    return lax.fori_loop(first, last, step, (state, nothing))


def _mean_gradient(
    objective: Objective, params: Params, keys: jax.Array, images: jax.Array
) -> tuple[Params, Metrics]:
    """The gradient of the mean loss over a batch, and the mean of its metrics.

    Summed over blocks of the batch, each taken forward and backward before the next, so that
    what the backward pass needs is still in cache.
    """

    def total(params: Params, keys: jax.Array, images: jax.Array) -> tuple[jax.Array, Metrics]:
        loss, terms = objective(params, keys, images)
        metrics = {
            "loss": loss,
            "elbo": terms.value,
            "log_likelihood": terms.log_likelihood,
            "kl": terms.kl,
        }
        return jnp.sum(loss), jax.tree.map(jnp.sum, metrics)

    gradient = jax.grad(total, has_aux=True)
    batch = images.shape[0]
    size = block_size(batch)
    whole = batch // size * size
    if size == batch:
        return jax.tree.map(lambda x: x / batch, gradient(params, keys, images))

    def add(sums: Any, block: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, gradient(params, *block)), None

    nothing = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(gradient, params, keys[:size], images[:size]),
    )
    blocks = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), (keys, images))
    sums, _ = lax.scan(add, nothing, blocks)
    if whole < batch:
        sums, _ = add(sums, (keys[whole:], images[whole:]))
    return jax.tree.map(lambda x: x / batch, sums)


def _noise_key(state: TrainState) -> jax.Array:
    return jax.random.split(jax.random.fold_in(state.key, state.step))[0]


def _shuffle_key(state: TrainState) -> jax.Array:
    return jax.random.split(jax.random.fold_in(state.key, state.step))[1]
