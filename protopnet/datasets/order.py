"""Which images a training step sees, and which of them each worker takes: arithmetic only, no image is touched.

An epoch is `copies` passes over all images, each pass a new permutation, cut into batches. The batches depend on the
seed and the epoch, and on nothing that happened before, so any epoch can be replayed when training resumes; nor on the
number of workers: a batch is dealt out to as many as there are, so a group may grow and shrink between epochs.

Images that lie together in a row group of a shard stay near each other: row groups are permuted, and images are
shuffled within windows of `WINDOW` row groups. Of a batch each worker takes a run in the order of the row groups, so
that it reads few of them, and those one after the other, which a bucket answers fast. Plain files are row groups of
one image: for them the shuffle is complete.
"""

import math
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

# Row groups that are shuffled together. The reader keeps as many in memory.
WINDOW = 16

# Last words of the seeds, so that no two purposes share a stream of random numbers.
_SEED_PASS, _SEED_WINDOW = 1, 2


def row_groups(table: pa.Table) -> np.ndarray:
    """(n,) number of the row group of each row of a manifest; a plain file is a group of its own."""
    row_group = table["row_group"].to_numpy()
    if (row_group < 0).all():
        return np.arange(len(table))
    files = table["file"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    in_files = files * (row_group.max() + 1) + row_group
    alone = -1 - np.arange(len(table))  # negative, so distinct from every group in a shard
    return np.unique(np.where(row_group < 0, alone, in_files), return_inverse=True)[1]


def batch_lengths(images: int, batch_size: int) -> list[int]:
    """Lengths of the batches: as few as `batch_size` allows, which differ by one at most.

    So no step is left with a remainder of one or two images.
    """
    steps = math.ceil(images / batch_size)
    share, remainder = divmod(images, steps)
    return [share + (step < remainder) for step in range(steps)]


def epoch_batches(groups: np.ndarray, *, copies: int, seed: int, epoch: int, batch_size: int) -> Iterator[np.ndarray]:
    """(b, 3) rows (copy, index, place) of each batch of an epoch; place: where its row group comes in the pass."""
    passes = (_pass(groups, seed, epoch, copy) for copy in range(copies))
    ahead = next(passes)
    for length in batch_lengths(len(groups) * copies, batch_size):
        while len(ahead) < length:
            ahead = np.concatenate([ahead, next(passes)])
        yield ahead[:length]
        ahead = ahead[length:]


def part(batch: np.ndarray, rank: int, world: int) -> np.ndarray:
    """(m, 2) pairs (copy, index) that one of `world` workers takes of a batch."""
    by_place = np.lexsort((batch[:, 2], batch[:, 0]))
    return batch[np.sort(by_place[_share(len(batch), rank, world)]), :2]


def weight(length: int, rank: int, world: int) -> float:
    """What the mean over this worker's part counts for in the mean over all workers' means, 1 on average.

    Averaging gradients gives each worker the same vote; the weight makes up for parts that differ by an image.
    """
    lengths = [len(_share(length, other, world)) for other in range(world)]
    return lengths[rank] * world / sum(lengths)


def _share(length: int, rank: int, world: int) -> np.ndarray:
    """Positions of one worker's share of a batch. With fewer than two images for each, some are taken twice.

    BatchNorm can't train on a single image.
    """
    if length < 2 * world:
        return np.arange(2 * rank, 2 * rank + 2) % length
    return np.arange(rank * length // world, (rank + 1) * length // world)


def _pass(groups: np.ndarray, seed: int, epoch: int, copy: int) -> np.ndarray:
    """(n, 3) rows (copy, index, place) of one pass over all images."""
    place = np.random.default_rng((seed, epoch, copy, 0, _SEED_PASS)).permutation(int(groups.max()) + 1)[groups]
    order = np.argsort(place, kind="stable")
    order = _shuffle_windows(order, groups, np.random.default_rng((seed, epoch, copy, 0, _SEED_WINDOW)))
    return np.column_stack([np.full_like(order, copy), order, place[order]])


def _shuffle_windows(order: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each row group's images at random, but evenly over its window: a batch has as many of one as of another.

    So the run of row groups that a worker takes of each batch is nearly the same.
    """
    own = groups[order]
    ordinal = np.cumsum(np.concatenate([[0], own[1:] != own[:-1]]))
    if ordinal[-1] + 1 == len(own):
        return order  # one image a group: shuffled already
    at_random = order[np.lexsort((rng.random(len(order)), ordinal))]
    counts = np.bincount(ordinal)
    turn = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return at_random[np.lexsort(((turn + rng.random(len(order))) / counts[ordinal], ordinal // WINDOW))]
