"""Training batches for one worker of a data-parallel group: read, decode, augment, in threads beside the training.

What an image looks like in an epoch depends on (seed, epoch, copy, image_id) alone, and the order of images
on `protopnet.datasets.order`; so a batch is the same whoever decodes it, and an epoch can be replayed.

Threads, not processes: PIL lets go of the interpreter's lock while it decodes and warps (some 0.15 ms an image are left
under it, so it would be the limit from some 6,000 images a second on), they start at once, need no /dev/shm, may share
CUDA's process, and share one cache of decoded images and one reader, which reads each row group once.
"""

import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from protopnet import imaging
from protopnet.config import RunSettings
from protopnet.datasets import augment, order
from protopnet.datasets.feed import Feed
from protopnet.datasets.masks import places_on
from protopnet.datasets.reader import ImageReader
from protopnet.errors import UserError
from protopnet.machine import usable_cpus

Batch = tuple[torch.Tensor, torch.Tensor]

# Decoded images are kept up to this much memory a machine, and up to this share of what it has.
CACHE_BYTES = 2_000_000_000
CACHE_SHARE = 0.1

# Batches that are read and made beside the training.
AHEAD = 4

# Last word of the seed of an image's augmentation; see `order`.
_SEED_PICTURE = 0


class TrainLoader:
    """Batches of augmented images: uint8 (B, size, size, 3) and int64 labels (B,).

    All ranks together see batches of at most `batch_size` images; each rank yields its part of every batch.
    `len(loader)` = ceil(images * copies / batch_size) steps an epoch.

    table: rows of a manifest (`rows.MANIFEST_SCHEMA`), the same on every rank. batch_size: images a step, over all
    ranks together. Uses `settings.seed`, `.augment`, `.model.image_size`, `.data.workers` and `.data.max_pixels`.
    Iterating raises `UserError` if an image can no longer be read.
    """

    def __init__(
        self, table: pa.Table, settings: RunSettings, batch_size: int, *, rank: int = 0, world: int = 1
    ) -> None:
        if not len(table):
            raise UserError("there are no training images")
        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        self.settings, self.batch_size, self.rank, self.world = settings, batch_size, rank, world
        self.groups = order.row_groups(table)
        self.lengths = order.batch_lengths(len(table) * settings.augment.copies, batch_size)
        threads = settings.data.workers or max(1, usable_cpus() // on_this_machine)
        self.pictures = _Pictures(
            table,
            settings,
            cache_bytes=_cache_bytes() // on_this_machine,
            cache_groups=2 * order.LANES + math.ceil(AHEAD * batch_size / world * (self.groups.max() + 1) / len(table)),
            pin=torch.cuda.is_available() and settings.compute.gpu is not False,
        )
        self.feed: Feed[_Key, Batch, _Item, None] = Feed(self.pictures.read, self.pictures.make, threads, AHEAD)

    def __len__(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return len(self.lengths)

    def weights(self) -> Iterator[float]:
        """For each batch: what this rank's mean over its part counts for (`order.weight`)."""
        return (order.weight(length, self.rank, self.world) for length in self.lengths)

    def steps(self, epoch: int, first: int = 0) -> Iterator[tuple[Batch, float]]:
        """The batches of an epoch from step `first` on, each with its weight (see `weights`)."""
        return zip(self.epoch(epoch, first), islice(self.weights(), first, None), strict=True)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch; any epoch, in any order, any number of times."""
        batches = order.epoch_batches(
            self.groups,
            copies=self.settings.augment.copies,
            seed=self.settings.seed,
            epoch=epoch,
            batch_size=self.batch_size,
            world=self.world,
        )
        own = (order.part(batch, self.rank, self.world) for batch in islice(batches, first, None))
        keys = (_Key(epoch, pairs[:, 0], pairs[:, 1]) for pairs in own)
        return (batch for batch, _ in self.feed.batches(keys))


@dataclass(frozen=True)
class _Key:
    """One batch: which augmented copy of which images."""

    epoch: int
    copies: np.ndarray
    indices: np.ndarray


@dataclass(frozen=True)
class _Item:
    """One picture of a batch: what is known of the image, what is to become of it, and where it goes."""

    image: bytes | imaging.BadImage | Image.Image
    index: int
    seeds: tuple[int, int, int]
    out_HWC: np.ndarray


class _Pictures:
    """Reads the images of a batch, and makes pictures of them, in any number of threads."""

    def __init__(
        self, table: pa.Table, settings: RunSettings, *, cache_bytes: int, cache_groups: int, pin: bool
    ) -> None:
        self.places = table.select(["file", "row_group", "row"])
        self.uris = table["uri"]
        self.ids, self.labels, self.widths, self.heights = (
            table[name].to_numpy() for name in ("image_id", "label", "width", "height")
        )
        self.seed, self.augment, self.size = settings.seed, settings.augment, settings.model.image_size
        self.max_pixels, self.intensity = settings.data.max_pixels, settings.data.intensity
        self.reader = ImageReader(cache_groups)
        self.cache = _Cache(cache_bytes)
        self.objects = table["object"] if settings.augment.keep_object else None
        self.pin = pin

    def read(self, key: _Key) -> tuple[Batch, list[_Item]]:
        """An empty batch, and what its pictures are made of."""
        images: dict[int, Any] = {i: kept for i in key.indices if (kept := self.cache.get(int(i))) is not None}
        missing = [index for index in np.unique(key.indices) if index not in images]
        images |= zip(missing, self.reader.read_each(self.places, missing), strict=True)
        pixels_BHWC = torch.empty((len(key.indices), self.size, self.size, 3), dtype=torch.uint8, pin_memory=self.pin)
        labels_B = torch.from_numpy(self.labels[key.indices].astype(np.int64))
        out_BHWC = pixels_BHWC.numpy()
        items = [
            _Item(images[index], int(index), (self.seed, key.epoch, int(copy)), out_BHWC[place])
            for place, (copy, index) in enumerate(zip(key.copies, key.indices, strict=True))
        ]
        return (pixels_BHWC, labels_B.pin_memory() if self.pin else labels_B), items

    def make(self, item: _Item) -> None:
        """Put the picture where it belongs; `UserError` if its image can't be read any more."""
        try:
            image = item.image if isinstance(item.image, Image.Image) else self._decode(item.index, item.image)
        except imaging.BadImage as bad:
            raise UserError(changed(self.uris[item.index].as_py(), bad.reason)) from bad
        rng = np.random.default_rng((*item.seeds, self.ids[item.index], _SEED_PICTURE))
        size = int(self.widths[item.index]), int(self.heights[item.index])
        grid = self.objects[item.index].as_py() if self.objects is not None else None
        if grid is None:
            warp = augment.draw(self.augment, *size, rng)
        else:
            warp = augment.draw_keeping(self.augment, *size, rng, places_on(grid))
        item.out_HWC[:] = augment.apply(image, warp, self.size)

    def _decode(self, index: int, data: bytes | imaging.BadImage) -> Image.Image:
        """The image with both sides at least twice the network's, but no more than is good for."""
        if isinstance(data, imaging.BadImage):
            raise data
        image = imaging.decode(data, max_pixels=self.max_pixels, at_least=self.size, intensity=self.intensity)
        factor = min(image.size) // (2 * self.size)
        image = image.reduce(factor) if factor > 1 else image
        self.cache.put(index, image)
        return image


class _Cache:
    """Decoded images by index. The first ones that fit stay: every pass needs every image equally."""

    def __init__(self, budget: int) -> None:
        self.free = budget
        self.images: dict[int, Image.Image] = {}
        self.lock = threading.Lock()

    def get(self, index: int) -> Image.Image | None:
        return self.images.get(index)

    def put(self, index: int, image: Image.Image) -> None:
        size = image.width * image.height * 4  # PIL keeps RGB in four bytes
        with self.lock:
            if size <= self.free and index not in self.images:
                self.free -= size
                self.images[index] = image


def changed(uri: str, reason: str) -> str:
    """What to tell the user of an image that was fine when the dataset was scanned and no longer is."""
    return (
        f"{uri}: {reason}; the image was in order when the dataset was scanned: "
        "put it back, or start a run under another name, which scans anew"
    )


def _cache_bytes() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(CACHE_BYTES, CACHE_SHARE * memory))
