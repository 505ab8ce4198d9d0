"""The training step, and an epoch of steps."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxvae.devices.convolution import block_size
from jaxvae.devices.sharding import mean_over, on_parts, own_part, sum_over
from jaxvae.errors import InputError
from jaxvae.models.likelihoods import binarize
from jaxvae.models.vae import Params, expected_images, expected_labels, init
from jaxvae.objectives import Objective, example_keys
from jaxvae.training.optimizer import rate_at
from jaxvae.training.state import (
    TrainState,
    binarization_key,
    noise_key,
    optimizer,
    shuffle_key,
)
from jaxvae.validation import expect_number, jit

Metrics = dict[str, jax.Array]


# A loop of steps runs ahead of an accelerator: nothing in it is to wait for one.
@jit(static_argnames=("axis_name", "objective"), wait=False)
def train_step(
    state: TrainState,
    images: jax.Array,
    labels: jax.Array | None = None,
    *,
    axis_name: str | None = None,
    objective: Objective | None = None,
    learning_rate: jax.Array | float | None = None,
    beta: jax.Array | float | None = None,
) -> tuple[TrainState, Metrics]:
    """One step of the optimizer on the mean loss of a batch.

    The state handed in stays usable; `jax.jit(train_step, donate_argnums=0)` gives it up.

    Args:
      images: [batch, height, width, channels], float32 in [0, 1] or uint8.
      labels: [batch], their classes, where the model is conditional.
      axis_name: of the `pmap` whose devices share the batch, each holding its equal part in
        order; gradients and metrics are then averaged over it. The state's arrays may be parts
        too, as `jaxvae.devices.sharding.fsdp_specs` deals them out.
      objective: what to minimise instead of the configuration's objective: a function of params,
        [batch] keys and images, and of labels where there are any, to a loss [batch] and the terms
        of an `Elbo`. It treats every image on its own.
      learning_rate, beta: instead of the configuration's. They are traced, so that under `vmap`
        each model can have its own; an objective of one's own takes no beta. The learning rate's
        schedule is for `train_epoch` to follow, which knows how long a run is.
    Returns:
      The next state, and `loss`, `elbo`, `log_likelihood`, `kl`: means over the whole batch,
      nats per image.
    Raises:
      InputError: images or labels of another shape or type than the model's; float images beyond
        0 and 1 or labels that are no classes, where the host knows their values (not inside `jit`,
        nor on an accelerator, for which the step does not wait); a beta with an objective that is
        a plain function.
    """
    images = expected_images(state.params, images)
    batch = images.shape[0]
    labels = expected_labels(state.params, labels, batch)
    _expect_numbers(learning_rate, beta)
    first = lax.axis_index(axis_name) * batch if axis_name else 0
    keys = example_keys(noise_key(state), batch, first)
    if state.config.binarization == "dynamic":
        images = binarize(example_keys(binarization_key(state), batch, first), images)
    chosen = state.config.objective if objective is None else objective
    own = not hasattr(chosen, "across_batch")  # a function, which takes no beta
    if own and beta is not None:
        raise InputError(
            "beta was given, but the objective is a function of your own, which beta does not "
            "reach: leave it out, and weight the KL in the function"
        )
    across_batch, num_samples = (False, 1) if own else (chosen.across_batch, chosen.num_samples)
    if not own:
        weight = state.config.warmup(state.config.beta if beta is None else beta, state.step)
        chosen = partial(chosen, beta=weight, axis_name=axis_name if across_batch else None)
    examples = (keys, images) if labels is None else (keys, images, labels)
    size = batch
    if not across_batch:
        size = max(1, block_size(batch * num_samples, state.params) // num_samples)
    grads, metrics = _mean_gradient(chosen, state.params, examples, size, axis_name)
    return _updated(state, grads, learning_rate, axis_name), metrics


def _updated(
    state: TrainState, grads: Params, learning_rate: Any, axis_name: str | None
) -> TrainState:
    """Return the state after the optimizer has taken a step with this gradient."""
    config = state.config
    limited = config.clip_norm or config.skip_norm
    norm = _global_norm(grads, axis_name) if limited else jnp.float32(0)
    if config.clip_norm:
        # Pascanu, Mikolov and Bengio (2013), On the difficulty of training recurrent neural
        # networks, algorithm 1: g min(1, c / |g|).
        factor = config.clip_norm / jnp.maximum(norm, config.clip_norm)
        grads = jax.tree.map(lambda g: g * factor, grads)
    updates, opt_state = optimizer(config, learning_rate).update(
        grads, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)  # type: ignore[arg-type]
    ema = state.ema
    if ema is not None:
        # The average of few steps is short: as TensorFlow's, min(decay, (1 + t) / (10 + t)).
        decay = jnp.minimum(config.ema, (1 + state.step) / (10 + state.step))
        ema = optax.incremental_update(params, ema, 1 - decay)
    new = replace(state, params=params, opt_state=opt_state, ema=ema)
    if config.skip_norm:
        # Child (2021), Very Deep VAEs, section 4: a rare huge gradient ends a training. One that
        # is NaN is skipped as well.
        new = jax.tree.map(lambda a, b: jnp.where(norm <= config.skip_norm, a, b), new, state)
    return replace(new, step=state.step + 1)


@jit(static_argnames=("axis_name", "objective"), donate_argnames="state")
def train_epoch(
    state: TrainState,
    images: jax.Array,
    labels: jax.Array | None = None,
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
      labels: [N], their classes, where the model is conditional.
      axis_name: of the `pmap` whose devices share every batch; each is handed all the images
        and takes its own part.
      objective, learning_rate, beta: as in `train_step`.
    Returns:
      The state after the epoch, and the metrics of `train_step` averaged over its steps.
    Raises:
      InputError: fewer images than one batch, or as of `train_step`; values on an accelerator are
        checked too.
    """
    images = expected_images(state.params, images)
    labels = expected_labels(state.params, labels, len(images))
    _expect_numbers(learning_rate, beta)
    batches = shuffle(state, len(images))
    state, totals = train_steps(
        state,
        images,
        batches,
        0,
        len(batches),
        labels,
        axis_name=axis_name,
        objective=objective,
        learning_rate=learning_rate,
        beta=beta,
    )
    del totals["finite"]
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
    order = jax.random.permutation(shuffle_key(state), num_images)
    return order[: steps * batch_size].reshape(steps, batch_size)


@partial(jax.jit, static_argnames=("axis_name", "objective"), donate_argnames="state")
def train_steps(
    state: TrainState,
    images: jax.Array,
    batches: jax.Array,
    first: jax.Array | int,
    last: jax.Array | int,
    labels: jax.Array | None = None,
    *,
    axis_name: str | None = None,
    objective: Objective | None = None,
    learning_rate: jax.Array | float | None = None,
    beta: jax.Array | float | None = None,
) -> tuple[TrainState, Metrics]:
    """The steps on batches[first:last], in one dispatch; the metrics are summed over them.

    One more, `finite`, is how many steps came before the first whose loss is NaN or infinite.

    `first` and `last` are traced, so that one compiled program serves every part of an epoch.
    The state is donated, as in `train_epoch`.
    """
    steps = state.config.epochs * len(batches)
    batches = own_part(batches, axis_name, axis=1)

    one = partial(
        _step_of_a_run,
        images=images,
        labels=labels,
        steps=steps,
        learning_rate=learning_rate,
        axis_name=axis_name,
        objective=objective,
        beta=beta,
    )
    return _summed(lambda state, i: one(state, batches[i]), state, first, last)


@partial(jax.jit, static_argnames=("axis_name", "objective", "steps"), donate_argnames="state")
def train_portion(
    state: TrainState,
    images: jax.Array,
    labels: jax.Array | None,
    count: jax.Array | int,
    *,
    steps: int,
    axis_name: str | None = None,
    objective: Objective | None = None,
) -> tuple[TrainState, Metrics]:
    """The steps on images[:count], [batches, batch, ...], as of `train_steps`.

    Every device is handed its own part of each batch; `steps` is how many the run has in all.
    """

    one = partial(
        _step_of_a_run,
        images=images,
        labels=labels,
        steps=steps,
        axis_name=axis_name,
        objective=objective,
    )
    return _summed(one, state, 0, count)


def _expect_numbers(learning_rate: Any, beta: Any) -> None:
    for name, value in (("learning_rate", learning_rate), ("beta", beta)):
        if value is not None:
            expect_number(name, value)


def _step_of_a_run(
    state: TrainState,
    batch: jax.Array,
    *,
    images: jax.Array,
    labels: jax.Array | None,
    steps: int,
    learning_rate: jax.Array | float | None = None,
    **options: Any,
) -> tuple[TrainState, Metrics]:
    """`train_step` on images[batch], at the learning rate that a run of so many steps has there."""
    config = state.config
    if not isinstance(config.optimizer, optax.GradientTransformation):
        rate = config.learning_rate if learning_rate is None else learning_rate
        learning_rate = rate_at(config.schedule, rate, state.step, steps)
    return train_step(
        state,
        images[batch],
        None if labels is None else labels[batch],
        learning_rate=learning_rate,
        **options,
    )


def _summed(
    one: Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]],
    state: TrainState,
    first: jax.Array | int,
    last: jax.Array | int,
) -> tuple[TrainState, Metrics]:
    """The state after one(state, i) for i in [first, last), and the sums of the metrics."""

    def step(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, totals = carry
        state, metrics = one(state, i)
        so_far = totals.pop("finite")
        good = jnp.isfinite(metrics["loss"]) & (so_far == i - first)
        totals = jax.tree.map(jnp.add, totals, metrics)
        return state, {**totals, "finite": so_far + good}

    _, metrics = jax.eval_shape(one, state, jnp.int32(0))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)
    nothing["finite"] = jnp.int32(0)
    return lax.fori_loop(first, last, step, (state, nothing))


def _mean_gradient(
    objective: Objective,
    params: Params,
    examples: tuple[jax.Array, ...],
    size: int,
    axis_name: str | None,
) -> tuple[Params, Metrics]:
    """The gradient of the mean loss over a batch, and the mean of its metrics.

    Summed over blocks of `size` examples, each taken forward and backward before the next, so
    that what the backward pass needs is still in cache.
    """

    batch = examples[0].shape[0]
    full_shapes = _full_shapes(params) if axis_name else None
    full_objective = on_parts(objective, params, full_shapes, axis_name)

    def part(params: Params, examples: tuple[jax.Array, ...]) -> tuple[jax.Array, Metrics]:
        loss, terms = full_objective(params, *examples)
        metrics = {
            "loss": loss,
            "elbo": terms.value,
            "log_likelihood": terms.log_likelihood,
            "kl": terms.kl,
        }
        return jnp.sum(loss) / batch, jax.tree.map(lambda x: jnp.sum(x) / batch, metrics)

    gradient = jax.grad(part, has_aux=True)
    divisible = batch // size * size

    def mean(sums: tuple[Params, Metrics]) -> tuple[Params, Metrics]:
        return mean_over(axis_name, sums, (full_shapes, sums[1]))

    if size == batch:
        return mean(gradient(params, examples))

    def add(sums: Any, block: tuple[jax.Array, ...]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, gradient(params, block)), None

    nothing = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[:size], examples)),
    )
    blocks = jax.tree.map(lambda x: x[:divisible].reshape(-1, size, *x.shape[1:]), examples)
    sums, _ = lax.scan(add, nothing, blocks)
    if divisible < batch:
        sums, _ = add(sums, jax.tree.map(lambda x: x[divisible:], examples))
    return mean(sums)


def _global_norm(grads: Params, axis_name: str | None) -> jax.Array:
    """Compute the norm of a gradient over all parameters, of which these may be a device's part."""
    full_shapes = _full_shapes(grads) if axis_name else None
    squares = jax.tree.map(lambda g: jnp.sum(g**2), grads)
    return jnp.sqrt(sum_over(axis_name, squares, grads, full_shapes))


def _full_shapes(params: Params) -> Params:
    """The shapes that parameters have in whole, of which these may be a device's part."""
    return jax.eval_shape(lambda: init(jax.random.key(0), params.config))
