"""How the training images reach the devices, in the order that `shuffle` gives them.

Images in memory lie on every device in whole, and a dispatch says only which of them to take.
Images on disk, and those of a training of several processes, come in portions: every process
reads the rows of a batch that its own devices take, ahead of the step. Which rows these are
follows from the state alone, so that a training goes on from any step, with any number of
devices, processes and readers.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxvae.data import Images
from jaxvae.devices.sharding import AXIS, data_parallel, shard
from jaxvae.training.config import TrainConfig
from jaxvae.training.state import TrainState
from jaxvae.training.step import Metrics, Objective, shuffle, train_portion, train_steps

_IMAGES_PER_DISPATCH = 1024  # between two movements of the progress bar
_AHEAD = 4  # portions read before they are needed

Advance = Callable[[TrainState], tuple[TrainState, Metrics]]
Epoch = Callable[[TrainState, int], Iterator[tuple[int, Advance]]]


def epoch_pipeline(
    images: Images,
    labels: np.ndarray | None,
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    specs: Any,
    *,
    objective: Objective | None = None,
    workers: int = 0,
) -> Epoch:
    """The dispatches of an epoch, given the state at its start and the steps already taken in it.

    Args:
      images, labels: of the training set.
      config: how long the run is.
      mesh: the devices that share every batch.
      specs: how the state lies on them, a PartitionSpec or a tree of them.
      objective: as of `train_step`.
      workers: processes that read images on disk; 0: threads of this one.
    Returns:
      A function to pairs of how many steps a dispatch takes and what takes them: a function of
      the state, which it gives up, to the next one and the sums of the steps' metrics.
    """
    if isinstance(images, np.ndarray) and jax.process_count() == 1:
        return _resident(images, labels, mesh, specs, objective)
    steps = config.epochs * (len(images) // config.batch_size)
    rows = jax.P(None, AXIS)
    take = data_parallel(
        partial(train_portion, objective=objective, steps=steps),
        mesh,
        donate_argnums=(0,),
        in_specs=(specs, rows, rows, jax.P()),
        out_specs=(specs, jax.P()),
    )
    return _streamed(images, labels, jax.NamedSharding(mesh, rows), take, workers)


def _resident(
    images: np.ndarray,
    labels: np.ndarray | None,
    mesh: jax.sharding.Mesh,
    specs: Any,
    objective: Objective | None,
) -> Epoch:
    rest = jax.P()
    take = data_parallel(
        partial(train_steps, objective=objective),
        mesh,
        donate_argnums=(0,),
        in_specs=(specs, rest, rest, rest, rest, rest),
        out_specs=(specs, rest),
    )
    examples = shard((images, labels), mesh)

    def epoch(start: TrainState, first: int) -> Iterator[tuple[int, Advance]]:
        batches = shuffle(start, len(images))
        at_once = max(1, _IMAGES_PER_DISPATCH // batches.shape[1])

        def advance(state: TrainState, first: int, last: int) -> tuple[TrainState, Metrics]:
            return take(state, examples[0], batches, first, last, examples[1])

        for begin in range(first, len(batches), at_once):
            end = min(begin + at_once, len(batches))
            yield end - begin, partial(advance, first=begin, last=end)

    return epoch


def _streamed(
    images: Images,
    labels: np.ndarray | None,
    rows: jax.NamedSharding,
    take: Callable[..., tuple[TrainState, Metrics]],
    workers: int,
) -> Epoch:
    def epoch(start: TrainState, first: int) -> Iterator[tuple[int, Advance]]:
        batches = np.asarray(shuffle(start, len(images)))
        batch = batches.shape[1]
        here = batch // jax.process_count()
        own = batches[first:, jax.process_index() * here :][:, :here]
        at_once = max(1, _IMAGES_PER_DISPATCH // batch)
        portions = [own[i : i + at_once] for i in range(0, len(own), at_once)]

        def advance(state: TrainState, examples: Any, count: int) -> tuple[TrainState, Metrics]:
            return take(state, *examples, count)

        for wanted, seen in zip(portions, _read(images, portions, workers), strict=True):
            count = len(wanted)
            known = None if labels is None else labels[wanted]
            # All portions of one length, so that one compiled program serves them all.
            examples = jax.tree.map(
                lambda x: jax.make_array_from_process_local_data(
                    rows,
                    np.concatenate([x, np.zeros((at_once - len(x), *x.shape[1:]), x.dtype)]),
                ),
                (seen.reshape(count, here, *seen.shape[1:]), known),
            )
            yield count, partial(advance, examples=examples, count=count)

    return epoch


def _read(images: Images, portions: list[np.ndarray], workers: int) -> Iterator[np.ndarray]:
    """The images of every portion's rows, read before they are asked for."""
    import grain
    from absl.flags import FLAGS

    read = grain.MapDataset.source(portions).map(lambda rows: images[rows.reshape(-1)])
    ahead = read.to_iter_dataset(grain.ReadOptions(num_threads=_AHEAD, prefetch_buffer_size=_AHEAD))
    if workers:
        # Grain's workers look at their command-line flags, which nobody has given.
        if not FLAGS.is_parsed():
            FLAGS.mark_as_parsed()
        ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(ahead)
