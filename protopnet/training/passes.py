"""One pass of a network over images, without gradients, as a Ray Data map.

Push, the cached similarities of the last layer, the start from data and every evaluation are such passes; they
differ only in their `ImageTask`. The rows that travel through Ray Data are rows of the manifest: an actor reads
and decodes its own images (in threads, beside the network), so no pixel crosses a process.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
import torch

from protopnet import imaging
from protopnet.cluster import PassPlan
from protopnet.config import AugmentSettings
from protopnet.datasets import augment
from protopnet.datasets.loader import changed
from protopnet.datasets.reader import ImageReader
from protopnet.errors import UserError
from protopnet.model.prototypes import true_float32
from protopnet.tables import from_bytes, to_bytes

# Rows of one unit of work. Small enough that a lost actor costs little and that all actors end together, large
# enough that Ray's cost per unit (some 10 ms) doesn't show.
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 128, 2048
PLAIN = -1  # the value of column `copy` that stands for the image without augmentation
_USED_OF_ROW = ("uri", "image_id", "copy", "width", "height")


class ImageTask(Protocol):
    """What to do with a batch of images. Tasks are values: they are sent to the actors once a pass."""

    @property
    def size(self) -> int:
        """Side of the images that the task takes, in pixels."""

    def to(self, device: torch.device) -> "ImageTask":
        """Move the networks inside to the device, in eval mode; called once in each actor."""

    def __call__(self, images_B3HW: torch.Tensor, rows: pa.Table) -> pa.Table:
        """Rows of the manifest with their normalised images -> any rows."""


@dataclass(frozen=True)
class PassOptions:
    """How a pass runs, apart from what it computes."""

    plan: PassPlan
    batch_size: int = 64
    blocks: int | None = None
    augment: AugmentSettings | None = None
    seed: int = 0
    max_pixels: int = 50_000_000


class _ImageActor:
    """Ray Data actor: reads and decodes the images of a block and feeds them to the task."""

    def __init__(self, task_ref: ray.ObjectRef, options: PassOptions):
        torch.set_num_threads(options.plan.threads)
        self.device = torch.device("cuda" if options.plan.gpus else "cpu")
        # Ray Data hands over the reference itself, not the value.
        self.task: ImageTask = ray.get(task_ref).to(self.device)
        self.options = options
        self.reader = ImageReader()
        self.decoders = ThreadPoolExecutor(max(2, options.plan.threads))

    def __call__(self, block: pa.Table) -> pa.Table:
        try:
            results = [self._forward(rows, pixels) for rows, pixels in self._batches(block)]
            return _envelope(len(block), to_bytes(pa.concat_tables(results)), None)
        except UserError as error:  # goes back as a value: Ray would wrap an exception in stories of its own
            return _envelope(len(block), b"", str(error))

    def _batches(self, block: pa.Table) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """Batches with their pixels; the next batch is decoded while the caller works on the present one."""
        starts = range(0, len(block), self.options.batch_size)
        slices = [block.slice(start, self.options.batch_size) for start in starts]
        decoding = self._decode(slices[0])
        for index, rows in enumerate(slices):
            pixels = np.stack([future.result() for future in decoding])
            if index + 1 < len(slices):
                decoding = self._decode(slices[index + 1])
            yield rows, pixels

    def _decode(self, rows: pa.Table) -> list[Any]:
        encoded = self.reader.read_each(rows, np.arange(len(rows)))
        known = rows.select([name for name in _USED_OF_ROW if name in rows.column_names]).to_pylist()
        return [
            self.decoders.submit(_pixels, data, row, self.task.size, self.options)
            for data, row in zip(encoded, known, strict=True)
        ]

    def _forward(self, rows: pa.Table, pixels_BHWC: np.ndarray) -> pa.Table:
        # True float32 for the backbone as well: TF32 would make a patch depend on the GPU and on the batch.
        with torch.inference_mode(), true_float32():
            images_B3HW = imaging.normalise(torch.from_numpy(pixels_BHWC).to(self.device))
            return self.task(images_B3HW, rows)


def _envelope(images: int, payload: bytes, error: str | None) -> pa.Table:
    return pa.table(
        {"images": [images], "payload": pa.array([payload], pa.large_binary()), "error": pa.array([error], pa.string())}
    )


def _pixels(data: bytes | imaging.BadImage, row: dict[str, Any], size: int, options: PassOptions) -> np.ndarray:
    """Pixels of one image; `UserError` if it can't be read any more."""
    copy = row.get("copy", PLAIN)
    try:
        if isinstance(data, imaging.BadImage):
            raise data
        if copy == PLAIN or options.augment is None:
            return imaging.load(data, size, options.max_pixels)
        image = imaging.decode(data, max_pixels=options.max_pixels, at_least=size)
    except imaging.BadImage as bad:
        raise UserError(changed(row["uri"], bad.reason)) from bad
    random = np.random.default_rng((options.seed, copy, row["image_id"]))
    return augment.apply(image, augment.draw(options.augment, row["width"], row["height"], random), size)


def run_pass(rows: pa.Table, task: ImageTask, options: PassOptions) -> Iterator[tuple[int, pa.Table]]:
    """Run the task over the rows of a manifest; yields (images done, output rows) of each block as it ends.

    Blocks end in any order: whatever reduces the outputs must not depend on it. `UserError` if an image can't be
    read any more.
    """
    blocks: Any = _execute(rows, task, options).iter_batches(batch_size=None, batch_format="pyarrow")
    for block in blocks:
        _raise_error_in(block)
        for images, payload in zip(block["images"].to_pylist(), block["payload"], strict=True):
            yield images, from_bytes(payload.as_py())


def run_pass_in_place(rows: pa.Table, task: ImageTask, options: PassOptions) -> list[ray.ObjectRef]:
    """Run the task and leave the outputs where they were computed: references to blocks for `unpack`.

    Errors: as `run_pass`.
    """
    blocks = _execute(rows, task, options).materialize().to_arrow_refs()
    for errors in ray.get([_errors_in.remote(block) for block in blocks]):
        _raise_error_in(errors)
    return blocks


@ray.remote(num_cpus=0)
def _errors_in(block: pa.Table) -> pa.Table:
    return block.select(["error"])


def _raise_error_in(block: pa.Table) -> None:
    for error in block["error"].to_pylist():
        if error is not None:
            raise UserError(error)


def unpack(block: pa.Table) -> pa.Table:
    """The output rows inside a block that `run_pass_in_place` left in the object store."""
    return pa.concat_tables([from_bytes(payload.as_py()) for payload in block["payload"]])


def _execute(rows: pa.Table, task: ImageTask, options: PassOptions) -> ray.data.Dataset:
    plan, blocks = options.plan, _cut(rows, options)
    return ray.data.from_arrow(blocks).map_batches(
        _ImageActor,
        fn_constructor_args=(ray.put(task), options),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(plan.actors, len(blocks))),
        num_cpus=plan.cpus,
        num_gpus=plan.gpus or None,
    )


def _cut(rows: pa.Table, options: PassOptions) -> list[pa.Table]:
    """Slices of the manifest, one a unit of work."""
    wanted = options.blocks or -(-len(rows) // MAX_BLOCK_ROWS)
    if options.blocks is None:
        wanted = max(wanted, min(8 * options.plan.actors, -(-len(rows) // MIN_BLOCK_ROWS)))
    edges = np.linspace(0, len(rows), min(wanted, len(rows)) + 1).round().astype(int)
    return [rows.slice(start, end - start).combine_chunks() for start, end in pairwise(edges)]
