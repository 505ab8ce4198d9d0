"""The training step, and an epoch of steps."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, Num, Shaped

from jaxvae.devices.convolution import block_size
from jaxvae.devices.sharding import mean_over, on_parts, own_part, sum_over
from jaxvae.errors import InputError
from jaxvae.models.likelihoods import binarize
from jaxvae.models.vae import Labels, Params, expected_images, expected_labels, init
from jaxvae.objectives import Elbo, example_keys
from jaxvae.training.config import labelled_slots
from jaxvae.training.optimizer import rate_at
from jaxvae.training.state import TrainState, binarization_key, noise_key, optimizer, shuffle_key
from jaxvae.validation import expect_number, jit

Metrics = dict[str, Num[Array, ""]]
LossFunction = Callable[..., tuple[Array, Elbo]]
_MOST_SAMPLES = 128  # of a block's images together, as memory grows with them


# Steps are dispatched ahead of an accelerator, so no check may wait for its results.
@jit(static_argnames=("axis_name", "objective"), wait=False)
def train_step(
    state: TrainState,
    images: Num[ArrayLike, " batch *shape"],
    labels: Labels = None,
    *,
    axis_name: str | None = None,
    objective: LossFunction | None = None,
    learning_rate: Num[Array, ""] | float | None = None,
    beta: Num[Array, ""] | float | None = None,
) -> tuple[TrainState, Metrics]:
    """Take one optimizer step on the mean loss of a batch.

    The given state stays valid; `jax.jit(train_step, donate_argnums=0)` donates it.

    Args:
      state: training state. Inside `shard_map` its arrays may be parts, split by
        `jaxvae.devices.sharding.fsdp_specs`.
      images: float32 in [0, 1], or uint8.
      labels: classes or covariates of the images, if the model is conditional.
      axis_name: axis of the `pmap` or `shard_map` over which the batch is split into equal parts,
        in order. Gradients and metrics are averaged over it.
      objective: overrides the configuration's objective. A function of params, keys [batch],
        images and, for a conditional model, labels returns the loss [batch] and an `Elbo`; the
        loss of an image must not depend on the other images.
      learning_rate: overrides the configuration's learning rate. It is traced, so under `vmap`
        each model can have its own. The schedule is not applied here: `train_epoch` knows the
        length of the run.
      beta: overrides the configuration's beta; traced as well. An objective that is a plain
        function takes no beta.

    Returns:
      The next state, and the metrics `loss`, `elbo`, `log_likelihood` and `kl`: means over the
      whole batch, in nats per image.

    Raises:
      InputError: images or labels of another shape or type than the model's; float images outside
        [0, 1] or invalid classes, if the values are on the host (inside `jit` and on an
        accelerator they are not checked); beta given with an objective that is a plain function.
    """
    images = expected_images(state.params, images)
    batch = images.shape[0]
    labels = expected_labels(state.params, labels, batch)
    _expect_numbers(learning_rate, beta)
    first = lax.axis_index(axis_name) * batch if axis_name else 0
    keys = example_keys(noise_key(state), batch, first)
    if state.config.binarization == "dynamic":
        images = binarize(example_keys(binarization_key(state), batch, first), images)
    chosen: Any = state.config.objective if objective is None else objective
    own = not hasattr(chosen, "across_batch")  # a plain function, which takes no beta
    if own and beta is not None:
        raise InputError(
            "beta was given, but the objective is a plain function, which takes no beta: leave it "
            "out, and weight the KL in the function"
        )
    across_batch, num_samples = (False, 1) if own else (chosen.across_batch, chosen.num_samples)
    if not own:
        weight = state.config.warmup(state.config.beta if beta is None else beta, state.step)
        chosen = partial(chosen, beta=weight, axis_name=axis_name if across_batch else None)
    examples = (keys, images) if labels is None else (keys, images, labels)
    size, rows = batch, batch * num_samples
    if not across_batch and block_size(rows, state.params) < rows:
        size = max(1, min(block_size(batch, state.params), _MOST_SAMPLES // num_samples))
    grads, metrics = _mean_gradient(chosen, state.params, examples, size, axis_name)
    return _updated(state, grads, learning_rate, axis_name), metrics


def _updated(
    state: TrainState, grads: Params, learning_rate: Any, axis_name: str | None
) -> TrainState:
    """Update the parameters by a gradient: clip, take the optimizer's step, skip outliers."""
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
        # Smaller at the start, as in TensorFlow: min(decay, (1 + t) / (10 + t)).
        decay = jnp.minimum(config.ema, (1 + state.step) / (10 + state.step))
        ema = optax.incremental_update(params, ema, 1 - decay)
    new = replace(state, params=params, opt_state=opt_state, ema=ema)
    if config.skip_norm:
        # Child (2021), Very Deep VAEs, section 4: rare huge gradients make training diverge. The
        # comparison is false for NaN, which is skipped as well.
        new = jax.tree.map(lambda a, b: jnp.where(norm <= config.skip_norm, a, b), new, state)
    return replace(new, step=state.step + 1)


@jit(static_argnames=("axis_name", "objective"), donate_argnames="state")
def train_epoch(
    state: TrainState,
    images: Num[ArrayLike, " n *shape"],
    labels: Labels = None,
    *,
    axis_name: str | None = None,
    objective: LossFunction | None = None,
    learning_rate: Num[Array, ""] | float | None = None,
    beta: Num[Array, ""] | float | None = None,
) -> tuple[TrainState, Metrics]:
    """Shuffle the images and take every step of an epoch, in one dispatch.

    The remainder that does not fill a last batch is left out; it differs from epoch to epoch. With
    the objective "m2" every batch has images with a label: see `shuffle`.

    The state is donated: its arrays are deleted and their memory is reused. Continue with the
    returned state; `jax.tree.map(jnp.copy, state)` keeps a copy of the old one.

    Args:
      state: training state at the start of the epoch; donated.
      images: float32 in [0, 1], or uint8.
      labels: classes or covariates of the images, if the model is conditional.
      axis_name: axis of the `pmap` or `shard_map` over which every batch is split. Each device is
        given all images and takes its own part of each batch.
      objective: as in `train_step`.
      learning_rate: as in `train_step`, before the schedule.
      beta: as in `train_step`.

    Returns:
      The state after the epoch, and the metrics of `train_step` averaged over its steps.

    Raises:
      InputError: fewer images than one batch, or as in `train_step`; values on an accelerator are
        checked too.
    """
    images = expected_images(state.params, images)
    labels = expected_labels(state.params, labels, len(images))
    _expect_numbers(learning_rate, beta)
    batches = shuffle(state, len(images), labels, objective=objective)
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


@partial(jax.jit, static_argnames=("num_images", "objective"))
def shuffle(
    state: TrainState,
    num_images: int,
    labels: Num[ArrayLike, " n *covariates"] | None = None,
    *,
    objective: LossFunction | None = None,
) -> Int[Array, "steps batch"]:
    """Draw the batches of the epoch that starts at this state, as indices of the images.

    With an objective that has a `labelled_share`, the images with a label are distributed evenly
    over the batches, of each of which they are at least this share. If there are too few, they are
    repeated, equally often, in the place of images without a label, which are left out of the
    epoch; these differ from epoch to epoch.

    Args:
      state: training state at the start of the epoch.
      num_images: number of training images.
      labels: classes of the images, or -1; covariates have no effect.
      objective: as in `train_step`.

    Returns:
      The indices.

    Raises:
      InputError: fewer images than one batch.
    """
    batch_size = state.config.batch_size
    if batch_size > num_images:
        raise InputError(
            f"batch_size is {batch_size}: expected at most the {num_images} training images"
        )
    steps = num_images // batch_size
    order = jax.random.permutation(shuffle_key(state), num_images)
    slots = labelled_slots(state.config, objective)
    if labels is None or not slots or jnp.ndim(labels) != 1:
        return order[: steps * batch_size].reshape(steps, batch_size)
    known = jnp.asarray(labels)[order] >= 0
    order = order[jnp.argsort(~known, stable=True)]
    count = jnp.where(jnp.any(known), jnp.sum(known), num_images)
    in_turn = jnp.arange(steps * slots).reshape(steps, slots) % count
    others = jnp.arange(steps * slots, steps * batch_size).reshape(-1, steps).T
    return order[jnp.concatenate([in_turn, others], axis=1)]


@partial(jax.jit, static_argnames=("axis_name", "objective"), donate_argnames="state")
def train_steps(
    state: TrainState,
    images: Num[Array, " n *shape"],
    batches: Int[Array, "steps batch"],
    first: Int[Array, ""] | int,
    last: Int[Array, ""] | int,
    labels: Num[Array, " n *covariates"] | None = None,
    *,
    axis_name: str | None = None,
    objective: LossFunction | None = None,
    learning_rate: Num[Array, ""] | float | None = None,
    beta: Num[Array, ""] | float | None = None,
) -> tuple[TrainState, Metrics]:
    """Take the steps on batches[first:last], in one dispatch.

    Args:
      state: training state; donated, as in `train_epoch`.
      images: all training images.
      batches: from `shuffle`.
      first: index of the first batch. It is traced, like `last`, so that one compiled program
        serves every part of an epoch.
      last: index after the last batch.
      labels: classes or covariates of all images, if the model is conditional.
      axis_name: as in `train_epoch`.
      objective: as in `train_epoch`.
      learning_rate: as in `train_epoch`.
      beta: as in `train_epoch`.

    Returns:
      The next state, and the metrics of `train_step` summed over the steps. `finite` is the number
      of steps before the first whose loss is NaN or infinite.
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
    images: Num[Array, "batches batch *shape"],
    labels: Num[Array, "batches batch *covariates"] | None,
    count: Int[Array, ""] | int,
    *,
    steps: int,
    axis_name: str | None = None,
    objective: LossFunction | None = None,
) -> tuple[TrainState, Metrics]:
    """Take the steps on the batches images[:count], in one dispatch.

    Args:
      state: training state; donated, as in `train_epoch`.
      images: batches of images; each device is given its own part of every batch.
      labels: classes or covariates of the images, if the model is conditional.
      count: number of batches to take; the others are padding.
      steps: number of steps of the whole run.
      axis_name: axis over which every batch is split.
      objective: as in `train_step`.

    Returns:
      As `train_steps`.
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
    """Raise InputError unless each is None or one number."""
    for name, value in (("learning_rate", learning_rate), ("beta", beta)):
        if value is not None:
            expect_number(name, value)


def _step_of_a_run(
    state: TrainState,
    batch: Int[Array, "*batch"],
    *,
    images: Num[Array, "..."],
    labels: Any,
    steps: int,
    learning_rate: Num[Array, ""] | float | None = None,
    **options: Any,
) -> tuple[TrainState, Metrics]:
    """Apply `train_step` to images[batch], at the scheduled learning rate of a run of `steps`."""
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
    one: Callable[[TrainState, Int[Array, ""]], tuple[TrainState, Metrics]],
    state: TrainState,
    first: Int[Array, ""] | int,
    last: Int[Array, ""] | int,
) -> tuple[TrainState, Metrics]:
    """Apply one(state, i) for i in [first, last) and sum the metrics."""

    def step(i: Int[Array, ""], carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
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
    objective: LossFunction,
    params: Params,
    examples: tuple[Shaped[Array, "batch ..."], ...],
    size: int,
    axis_name: str | None,
) -> tuple[Params, Metrics]:
    """Compute the gradient of the mean loss over a batch, and the means of its metrics.

    Forward and backward pass run on blocks of `size` examples, one block after the other, so that
    the values that the backward pass needs are still in cache.
    """
    batch = examples[0].shape[0]
    full_shapes = _full_shapes(params) if axis_name else None
    full_objective = on_parts(objective, params, full_shapes, axis_name)

    def part(params: Params, examples: tuple[Array, ...]) -> tuple[Float[Array, ""], Metrics]:
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

    def add(sums: Any, block: tuple[Array, ...]) -> tuple[Any, None]:
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


def _global_norm(grads: Params, axis_name: str | None) -> Float[Array, ""]:
    """Compute the norm of a gradient over all parameters; a device may hold parts of them."""
    full_shapes = _full_shapes(grads) if axis_name else None
    squares = jax.tree.map(lambda g: jnp.sum(g**2), grads)
    return jnp.sqrt(sum_over(axis_name, squares, grads, full_shapes))


def _full_shapes(params: Params) -> Params:
    """Return the shapes of the full parameters, of which a device may hold parts."""
    return jax.eval_shape(lambda: init(jax.random.key(0), params.config))
