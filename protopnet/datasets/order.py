"""Which images a training worker sees in an epoch, and in which order: arithmetic only, no image is touched.

An epoch is `copies` passes over all images. Each pass is a new permutation, dealt out to the workers of the
data-parallel group in equal parts. The order depends on the seed, the epoch and the group, and on nothing
that happened before, so any epoch can be replayed when training resumes.

Images that lie together in a row group of a shard stay near each other: row groups are permuted, each worker
gets a run of them, and images are shuffled within windows of `WINDOW` row groups. So a worker reads each row
group once, one after the other, which a bucket answers fast. Plain files are row groups of one image: for
them the shuffle is complete.
"""

import math

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


def images_per_worker(images: int, copies: int, world: int) -> int:
    """Images of one worker in an epoch: the same for all, so a few images may be seen once more.

    Never a single one where it can be helped: BatchNorm can't train on one image.
    """
    return max(math.ceil(images * copies / world), 2)


def epoch_order(groups: np.ndarray, *, copies: int, seed: int, epoch: int, rank: int, world: int) -> np.ndarray:
    """(m, 2) pairs (copy, index) of one worker in the order of training, m = `images_per_worker`."""
    parts = [_part_of_pass(groups, seed, epoch, copy, rank, world) for copy in range(copies)]
    order = np.concatenate([np.column_stack([np.full_like(part, copy), part]) for copy, part in enumerate(parts)])
    if not len(order):  # fewer images than workers: the first worker's serve again
        order = epoch_order(groups, copies=copies, seed=seed, epoch=epoch, rank=0, world=world)
    return np.resize(order, (images_per_worker(len(groups), copies, world), 2))  # cycles


def split_evenly(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """The order cut into as few batches as `batch_size` allows, whose lengths differ by one at most.

    All workers have equally many images, so step k has the same length on each: averaging their gradients
    weighs every image alike, and no step is left with a remainder of one or two images.
    """
    return np.array_split(order, math.ceil(len(order) / batch_size))


def _part_of_pass(groups: np.ndarray, seed: int, epoch: int, copy: int, rank: int, world: int) -> np.ndarray:
    place = np.random.default_rng((seed, epoch, copy, 0, _SEED_PASS)).permutation(int(groups.max()) + 1)
    order = np.argsort(place[groups], kind="stable")
    part = order[_slice_of(len(order), copy, rank, world)]
    return _shuffle_windows(part, groups, np.random.default_rng((seed, epoch, copy, rank, _SEED_WINDOW)))


def _slice_of(images: int, copy: int, rank: int, world: int) -> slice:
    """A worker's run in a pass. The remainder of the division falls to other workers in each pass."""
    share, remainder = divmod(images, world)
    turn = (rank - copy * remainder) % world  # the first `remainder` in turn get one image more
    start = turn * share + min(turn, remainder)
    return slice(start, start + share + (turn < remainder))


def _shuffle_windows(part: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    own = groups[part]
    ordinal = np.cumsum(np.concatenate([[0], own[1:] != own[:-1]])) if len(own) else own
    if len(own) and ordinal[-1] + 1 == len(own):
        return part  # one image a group: shuffled already
    return part[np.lexsort((rng.random(len(part)), ordinal // WINDOW))]
