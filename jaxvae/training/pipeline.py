"""The input pipeline: it moves the training images to the devices, in the order of `shuffle`.

Images in memory are copied to every device once, and a dispatch passes the indices of its batches.
Images on disk, and those of a training of several processes, are streamed in portions: ahead of
the step, every process reads the rows of each batch that belong to its own devices. The rows
follow from the training state alone, so a run can be resumed at any step, with any number of
devices, processes and workers.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Num

from jaxvae.data import Images
from jaxvae.devices.sharding import AXIS, data_parallel, shard
from jaxvae.training.config import TrainConfig
from jaxvae.training.state import TrainState
from jaxvae.training.step import Metrics, shuffle, train_portion, train_steps

_IMAGES_PER_DISPATCH = 1024  # the progress bar moves after each dispatch
_AHEAD = 4  # portions that are read ahead

Advance = Callable[[TrainState], tuple[TrainState, Metrics]]
Epoch = Callable[[TrainState, int], Iterator[tuple[int, Advance]]]


def epoch_pipeline(
    images: Images,
    labels: Num[np.ndarray, " n *covariates"] | None,
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    specs: Any,
    *,
    workers: int = 0,
) -> Epoch:
    """Return a function that yields the dispatches of an epoch.

    Args:
      images: training images, [n, height, width, channels].
      labels: classes or covariates of the images, if the model is conditional.
      config: training configuration; `epochs` and `batch_size` set the length of the run.
      mesh: the devices over which every batch is split.
      specs: sharding of the state, a PartitionSpec or a tree of them.
      workers: processes that read images from disk; 0: threads of this process.

    Returns:
      epoch(state, first), where `state` is the state at the start of the epoch and `first` the
      number of steps already taken in it. It yields pairs (steps, advance): advance(state) takes
      that many steps, donates the state, and returns the next one and the metrics summed over
      the steps.
    """
    if isinstance(images, np.ndarray) and jax.process_count() == 1:
        return _resident(images, labels, mesh, specs)
    steps = config.epochs * (len(images) // config.batch_size)
    rows = jax.P(None, AXIS)
    take = data_parallel(
        partial(train_portion, steps=steps),
        mesh,
        donate_argnums=(0,),
        in_specs=(specs, rows, rows, jax.P()),
        out_specs=(specs, jax.P()),
    )
    return _streamed(images, labels, jax.NamedSharding(mesh, rows), take, workers)


def _resident(
    images: Num[np.ndarray, " n *shape"],
    labels: Num[np.ndarray, " n *covariates"] | None,
    mesh: jax.sharding.Mesh,
    specs: Any,
) -> Epoch:
    """Return the dispatches of images that are copied to every device."""
    rest = jax.P()
    take = data_parallel(
        train_steps,
        mesh,
        donate_argnums=(0,),
        in_specs=(specs, rest, rest, rest, rest, rest),
        out_specs=(specs, rest),
    )
    examples = shard((images, labels), mesh)

    def epoch(start: TrainState, first: int) -> Iterator[tuple[int, Advance]]:
        batches = shuffle(start, len(images), examples[1])
        at_once = max(1, _IMAGES_PER_DISPATCH // batches.shape[1])

        def advance(state: TrainState, first: int, last: int) -> tuple[TrainState, Metrics]:
            return take(state, examples[0], batches, first, last, examples[1])

        for begin in range(first, len(batches), at_once):
            end = min(begin + at_once, len(batches))
            yield end - begin, partial(advance, first=begin, last=end)

    return epoch


def _streamed(
    images: Images,
    labels: Num[np.ndarray, " n *covariates"] | None,
    rows: jax.NamedSharding,
    take: Callable[..., tuple[TrainState, Metrics]],
    workers: int,
) -> Epoch:
    """Return the dispatches of images that every process reads in portions."""

    def epoch(start: TrainState, first: int) -> Iterator[tuple[int, Advance]]:
        batches = np.asarray(shuffle(start, len(images), labels))
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
            # Padded to one length, so that one compiled program serves all portions.
            examples = jax.tree.map(
                lambda x: jax.make_array_from_process_local_data(
                    rows,
                    np.concatenate([x, np.zeros((at_once - len(x), *x.shape[1:]), x.dtype)]),
                ),
                (seen.reshape(count, here, *seen.shape[1:]), known),
            )
            yield count, partial(advance, examples=examples, count=count)

    return epoch


def _read(
    images: Images, portions: list[Int[np.ndarray, "steps batch"]], workers: int
) -> Iterator[Num[np.ndarray, " rows *shape"]]:
    """Read the images of every portion, ahead of their use."""
    import grain
    from absl.flags import FLAGS

    read = grain.MapDataset.source(portions).map(lambda rows: images[rows.reshape(-1)])
    ahead = read.to_iter_dataset(grain.ReadOptions(num_threads=_AHEAD, prefetch_buffer_size=_AHEAD))
    if workers:
        # Grain's workers require that command-line flags were parsed.
        if not FLAGS.is_parsed():
            FLAGS.mark_as_parsed()
        ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(ahead)
