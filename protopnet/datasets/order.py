"""Which images a training step sees, and which of them each worker takes: arithmetic only, no image is touched.

An epoch is `copies` passes over all images, each pass a new permutation, cut into batches. The batches depend on the
seed, the epoch and, where images lie in shards, the number of workers; on nothing that happened before. So any epoch
can be replayed when training resumes, and a group of workers may grow and shrink between epochs.

Images that lie together in a row group of a shard are read together. A pass permutes the row groups and deals them
out to the workers, so that each is read by one of them (but where two shares meet). A worker goes through its row
groups in `LANES` lanes side by side, and takes the images of a step from all of them. As shards are written in a drawn
order (`mixing`), a batch is then as well mixed as a full shuffle's. Plain files are row groups of one image: for them the
shuffle is complete, and the same for any number of workers.

Legend: n images, G row groups, K classes.
"""

import math
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

# Row groups that a worker reads from side by side. The reader keeps as many in memory, and those it reads ahead.
LANES = 16

# Last words of the seeds, so that no two purposes share a stream of random numbers.
_SEED_PASS, _SEED_LANES = 1, 2


def row_groups(table: pa.Table) -> np.ndarray:
    """(n,) number of the row group of each row of a manifest; a plain file is a group of its own."""
    row_group = table["row_group"].to_numpy()
    if (row_group < 0).all():
        return np.arange(len(table))
    files = table["file"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    in_files = files * (row_group.max() + 1) + row_group
    alone = -1 - np.arange(len(table))  # negative, so distinct from every group in a shard
    return np.unique(np.where(row_group < 0, alone, in_files), return_inverse=True)[1]


def mixing(groups: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Distinct classes in a row group, on average: as the images lie, and as they would if their order were drawn."""
    sizes_G = np.bincount(groups)
    share_K = np.bincount(labels) / len(labels)
    lengths, groups_of_length = np.unique(sizes_G, return_counts=True)
    drawn = sum(
        count * (1 - (1 - share_K) ** length).sum() for length, count in zip(lengths, groups_of_length, strict=True)
    )
    seen = len(np.unique(groups.astype(np.int64) * len(share_K) + labels))
    return seen / len(sizes_G), float(drawn) / len(sizes_G)


def batch_lengths(images: int, batch_size: int) -> list[int]:
    """Lengths of the batches: as few as `batch_size` allows, which differ by one at most.

    So no step is left with a remainder of one or two images.
    """
    steps = math.ceil(images / batch_size)
    share, remainder = divmod(images, steps)
    return [share + (step < remainder) for step in range(steps)]


def epoch_batches(
    groups: np.ndarray, *, copies: int, seed: int, epoch: int, batch_size: int, world: int = 1
) -> Iterator[np.ndarray]:
    """(b, 2) pairs (copy, index) of each batch of an epoch, one worker's after the other's (see `part`)."""
    images = len(groups)
    lengths = batch_lengths(images * copies, batch_size)
    owner = np.concatenate([_owners(length, world) for length in lengths]).reshape(copies, images)
    passes = enumerate(_pass(groups, owner[copy], (seed, epoch, copy, 0)) for copy in range(copies))
    ahead = np.empty((0, 2), np.int64)
    for length in lengths:
        while len(ahead) < length:
            copy, order = next(passes)
            ahead = np.concatenate([ahead, np.column_stack([np.full_like(order, copy), order])])
        yield ahead[:length]
        ahead = ahead[length:]


def part(batch: np.ndarray, rank: int, world: int) -> np.ndarray:
    """(m, 2) pairs (copy, index) that one of `world` workers takes of a batch."""
    return batch[_share(len(batch), rank, world)]


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


def _owners(length: int, world: int) -> np.ndarray:
    """(length,) which worker each position of a batch is for; of batches too short to share it is as good as any."""
    edges = np.arange(world + 1) * length // world
    return np.repeat(np.arange(world), np.diff(edges))


def _pass(groups: np.ndarray, owner_n: np.ndarray, seeds: tuple[int, ...]) -> np.ndarray:
    """(n,) all images in the order of a pass: at each position one whose row group its owner reads."""
    num_groups = int(groups.max()) + 1
    place_G = np.random.default_rng((*seeds, _SEED_PASS)).permutation(num_groups)
    in_groups = np.argsort(place_G[groups], kind="stable")
    if num_groups == len(groups):
        return in_groups
    random = np.random.default_rng((*seeds, _SEED_LANES))
    order, dealt = np.empty_like(in_groups), 0
    for rank in np.unique(owner_n):
        positions = np.flatnonzero(owner_n == rank)
        order[positions] = _in_lanes(in_groups[dealt : dealt + len(positions)], groups, random)
        dealt += len(positions)
    return order


def _in_lanes(run: np.ndarray, groups: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A run of whole row groups, taken evenly from `LANES` stretches of it, at random within each row group."""
    own = groups[run]
    ordinal = np.cumsum(np.concatenate([[0], own[1:] != own[:-1]]))
    run = run[np.lexsort((random.random(len(run)), ordinal))]
    lane = ordinal * min(LANES, ordinal[-1] + 1) // (ordinal[-1] + 1)
    images = np.bincount(lane)
    turn = np.arange(len(run)) - np.repeat(np.cumsum(images) - images, images)
    return run[np.argsort((turn + random.random(len(run))) / images[lane], kind="stable")]
