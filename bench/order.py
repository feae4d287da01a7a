"""How well an epoch's batches are mixed, and what it reads for that.

    python bench/order.py [--images 2700000] [--record]

Made-up manifests of the shapes of CUB-200-2011, of 1,000 and of 10,000 classes, as each source yields them: plain files
(a folder), and shards as `jobs/prepare.py` writes them (of a folder, of CUB-200-2011, of generated birds and of shards
that others sorted by class, which are written anew before training: see `datasets.open.mixed`). For comparison the
same shards as they were written before: class by class.

classes      distinct classes in a batch, relative to a full shuffle
in a share   the same in one worker's share of a batch, which is what BatchNorm sees
least        the batch with the fewest, relative to a full shuffle's mean
reads        row groups that all workers together read in an epoch, relative to how many there are; each worker keeps as
             many as the reader does while eight threads read ahead
"""

import math
from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice, product

import numpy as np
from common import arguments_of, conclude, table

from protopnet.datasets import order
from protopnet.datasets.writer import Limits, drawn

SHAPES = {
    "CUB-200": (5_994, 200, 80),
    "1,000 classes": (130_000, 1_000, 256),
    "10,000 classes": (2_700_000, 10_000, 1_024),
}
BATCHES = 400  # of an epoch whose classes are counted
THREADS = 8
LEAST_SHARE = 4  # images of a batch for each worker
Figures = dict[str, float]


def main() -> None:
    arguments = arguments_of(__doc__, images=2_700_000, seed=0)
    rows: dict[str, dict[str, str]] = {}
    figures: dict[str, Figures] = {}
    for (shape, (images, classes, batch)), source, world in product(SHAPES.items(), LAYOUTS, (1, 8, 64)):
        labels = np.sort(np.arange(min(images, arguments.images)) % classes)
        groups = LAYOUTS[source](labels, arguments.seed)
        key = f"{shape}, {source}, {world}"
        batch = max(batch, LEAST_SHARE * world)
        figures[key] = measure(groups, labels, batch=batch, world=world, seed=arguments.seed)
        rows[key] = {name: f"{value:.3f}" for name, value in figures[key].items()}
    table(rows)
    sound = [value for key, value in figures.items() if "as before" not in key]
    checks = {
        "classes in a batch / a full shuffle's": (min(each["classes"] for each in sound), 0.95),
        "classes in a share / a full shuffle's": (min(each["in a share"] for each in sound), 0.95),
        "row groups there are / read": (1 / max(each["reads"] for each in sound), 1 / 1.1),
    }
    conclude("order", arguments, figures, checks)


def plain_files(labels: np.ndarray, seed: int) -> np.ndarray:
    """(n,) row groups of images that are files of their own."""
    return np.arange(len(labels))


def shards(labels: np.ndarray, seed: int) -> np.ndarray:
    """(n,) row groups of images in shards in a drawn order, as they are written."""
    groups = np.empty(len(labels), np.int64)
    order_drawn = drawn(np.full(len(labels), "train"), seed)
    groups[order_drawn] = np.arange(len(labels)) // Limits.for_images(len(labels)).group_rows
    return groups


def sorted_shards(labels: np.ndarray, seed: int) -> np.ndarray:
    """(n,) row groups of 64 images, class by class."""
    return np.arange(len(labels)) // 64


LAYOUTS = {"files": plain_files, "shards": shards, "shards as before": sorted_shards}


def measure(groups: np.ndarray, labels: np.ndarray, *, batch: int, world: int, seed: int) -> Figures:
    """Figures of one epoch, see above."""
    epoch = list(order.epoch_batches(groups, copies=1, seed=seed, epoch=0, batch_size=batch, world=world))
    shown = list(islice(epoch, 0, None, max(1, len(epoch) // BATCHES)))
    drawn = np.random.default_rng(seed).permutation(labels)
    shares = [drawn[start : start + batch // world] for start in range(0, len(drawn) - batch, batch // world)]
    whole = [drawn[start : start + batch] for start in range(0, len(drawn) - batch, batch)]
    full, full_share = (np.mean([classes_in(piece) for piece in pieces[: 4 * BATCHES]]) for pieces in (whole, shares))
    seen = [classes_in(labels[each[:, 1]]) for each in shown]
    in_share = [classes_in(labels[order.part(each, rank, world)[:, 1]]) for each in shown for rank in range(world)]
    read = sum(
        row_group_reads(
            (groups[order.part(each, rank, world)[:, 1]] for each in epoch),
            kept=2 * order.LANES + math.ceil(batch // world * (THREADS + 2) * (groups.max() + 1) / len(groups)),
        )
        for rank in range(world)
    )
    return {
        "classes": float(np.mean(seen) / full),
        "least": float(min(seen) / full),
        "in a share": float(np.mean(in_share) / full_share),
        "reads": read / (int(groups.max()) + 1),
    }


def classes_in(labels: np.ndarray) -> int:
    """How many different ones there are."""
    return len(np.unique(labels))


def row_group_reads(batches: Iterable[np.ndarray], kept: int) -> int:
    """Reads of a reader that keeps the `kept` row groups used last. batches: (b,) the row group of each image."""
    open_groups: OrderedDict[int, None] = OrderedDict()
    reads = 0
    for batch in batches:
        for group in np.unique(batch).tolist():
            if group in open_groups:
                open_groups.move_to_end(group)
                continue
            reads += 1
            open_groups[group] = None
            if len(open_groups) > kept:
                open_groups.popitem(last=False)
    return reads


if __name__ == "__main__":
    main()
