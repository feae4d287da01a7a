"""Training batches for one worker of a data-parallel group: read, decode, augment, in the background.

What an image looks like in an epoch depends on (seed, epoch, copy, image_id) alone, and the order of images
on `protopnet.datasets.order`; so a batch is the same whoever decodes it, and an epoch can be replayed.

The work is done by threads of the training process, or by processes of their own where `data.workers` asks
for them. PIL lets go of the interpreter's lock while it decodes and warps (some 0.15 ms an image are left
under it), so up to `MAX_THREADS` threads are as fast as processes, start at once, need no /dev/shm, and share
one cache of decoded images. Processes are for machines that feed a GPU from more cores than that.
"""

import math
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from protopnet import imaging
from protopnet.config import RunSettings
from protopnet.datasets import augment, order
from protopnet.datasets.reader import ImageReader
from protopnet.errors import UserError
from protopnet.machine import usable_cpus

Batch = tuple[torch.Tensor, torch.Tensor]

# Decoded images are kept up to this much memory a machine, and up to this share of what it has.
CACHE_BYTES = 2_000_000_000
CACHE_SHARE = 0.1

# Threads that decode where there are no processes for it: one a core, up to this many.
MAX_THREADS = 8

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
        threads = default_threads(on_this_machine)
        ahead = batch_size // world * (threads + 2)  # images: each thread is at a batch, two more wait
        self.pictures = _Pictures(
            table,
            settings,
            cache_bytes=_cache_bytes() // on_this_machine,
            cache_groups=2 * order.LANES + math.ceil(ahead * (int(self.groups.max()) + 1) / len(table)),
        )
        pin = torch.cuda.is_available() and settings.compute.gpu is not False
        self.feed: _ThreadFeed | _ProcessFeed
        if settings.data.workers:
            self.feed = _ProcessFeed(self.pictures, settings.data.workers, pin)
        else:
            self.feed = _ThreadFeed(self.pictures, threads, pin)

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
        return self.feed.run([_Key(epoch, pairs[:, 0], pairs[:, 1]) for pairs in own])


@dataclass(frozen=True)
class _Key:
    """One batch: which augmented copy of which images."""

    epoch: int
    copies: np.ndarray
    indices: np.ndarray


@dataclass(frozen=True)
class _Failed:
    """What comes back in place of a batch; an exception would cross the process boundary as a long story."""

    message: str


class _Pictures(Dataset["Batch | _Failed"]):
    """Makes batches. May be used by many threads, or be forked into many processes."""

    def __init__(self, table: pa.Table, settings: RunSettings, cache_bytes: int, cache_groups: int) -> None:
        self.places = table.select(["file", "row_group", "row"])
        self.uris = table["uri"]
        self.ids, self.labels, self.widths, self.heights = (
            table[name].to_numpy() for name in ("image_id", "label", "width", "height")
        )
        self.seed, self.augment, self.size = settings.seed, settings.augment, settings.model.image_size
        self.max_pixels = settings.data.max_pixels
        self.reader = ImageReader(cache_groups)
        self.cache = _Cache(cache_bytes)

    def __getitem__(self, key: _Key) -> Batch | _Failed:
        images = {index: image for index in key.indices if (image := self.cache.get(int(index))) is not None}
        missing = [index for index in key.indices if index not in images]
        pixels_BHWC = np.empty((len(key.indices), self.size, self.size, 3), np.uint8)
        for index, data in zip(missing, self.reader.read_each(self.places, missing), strict=True):
            try:
                images[index] = self._decode(index, data)
            except imaging.BadImage as bad:
                return _Failed(changed(self.uris[int(index)].as_py(), bad.reason))
        for row, (copy, index) in enumerate(zip(key.copies, key.indices, strict=True)):
            pixels_BHWC[row] = self._augmented(images[index], index, (self.seed, key.epoch, copy))
        labels_B = self.labels[key.indices].astype(np.int64)
        return torch.from_numpy(pixels_BHWC), torch.from_numpy(labels_B)

    def _decode(self, index: int, data: bytes | imaging.BadImage) -> Image.Image:
        """The image with both sides at least twice the network's, but no more than is good for."""
        if isinstance(data, imaging.BadImage):
            raise data
        image = imaging.decode(data, max_pixels=self.max_pixels, at_least=self.size)
        factor = min(image.size) // (2 * self.size)
        image = image.reduce(factor) if factor > 1 else image
        self.cache.put(int(index), image)
        return image

    def _augmented(self, image: Image.Image, index: int, seeds: tuple[int, int, int]) -> np.ndarray:
        rng = np.random.default_rng((*seeds, self.ids[index], _SEED_PICTURE))
        warp = augment.draw(self.augment, int(self.widths[index]), int(self.heights[index]), rng)
        return augment.apply(image, warp, self.size)


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


class _ThreadFeed:
    """Batches made by threads of this process, a few ahead of the training."""

    def __init__(self, pictures: _Pictures, threads: int, pin: bool) -> None:
        self.pictures, self.threads, self.pin = pictures, threads, pin

    def run(self, keys: list[_Key]) -> Iterator[Batch]:
        ahead: deque[Future[Batch | _Failed]] = deque()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="pictures") as threads:
            try:
                for key in keys:
                    ahead.append(threads.submit(self._make, key))
                    if len(ahead) > self.threads + 1:
                        yield _checked(ahead.popleft().result())
                while ahead:
                    yield _checked(ahead.popleft().result())
            finally:
                for future in ahead:  # the caller has had enough
                    future.cancel()

    def _make(self, key: _Key) -> Batch | _Failed:
        batch = self.pictures[key]
        if self.pin and not isinstance(batch, _Failed):
            return batch[0].pin_memory(), batch[1].pin_memory()
        return batch


class _ProcessFeed:
    """Batches made by forked processes, which live as long as the loader."""

    def __init__(self, pictures: _Pictures, processes: int, pin: bool) -> None:
        pictures.cache.free = 0  # each process would have one, and meet an image again only by chance
        self.keys: list[_Key] = []
        self.loader = DataLoader(
            pictures,
            batch_size=None,
            sampler=self.keys,  # type: ignore[arg-type]
            num_workers=processes,
            persistent_workers=True,
            multiprocessing_context="fork",
            pin_memory=pin,
        )

    def run(self, keys: list[_Key]) -> Iterator[Batch]:
        self.keys[:] = keys
        return map(_checked, self.loader)


def _checked(batch: Batch | _Failed | list[torch.Tensor]) -> Batch:
    if isinstance(batch, _Failed):
        raise UserError(batch.message)
    pixels_BHWC, labels_B = batch
    return pixels_BHWC, labels_B


def changed(uri: str, reason: str) -> str:
    """What to tell the user of an image that was fine when the dataset was scanned and no longer is."""
    return (
        f"{uri}: {reason}; the image was in order when the dataset was scanned: "
        "put it back, or start a run under another name, which scans anew"
    )


def _cache_bytes() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(CACHE_BYTES, CACHE_SHARE * memory))


def default_threads(trainers: int) -> int:
    """Threads for each of the training workers on this machine."""
    return min(MAX_THREADS, max(1, usable_cpus() // trainers))
