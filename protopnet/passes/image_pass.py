"""One pass of a network over images, without gradients, as a Ray Data map; in the driver itself where that is all there is.

Push, the cached similarities of the last layer, the start from data and every evaluation are such passes; they
differ only in their `ImageTask`. The rows that travel through Ray Data are rows of the manifest: an actor reads
and decodes its own images (in threads, beside the network), so no pixel crosses a process.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
import ray
import torch

from protopnet import imaging
from protopnet.budget import PassPlan, mark
from protopnet.config import AugmentSettings
from protopnet.datasets import augment
from protopnet.datasets.feed import manifest_feed
from protopnet.datasets.loader import changed
from protopnet.datasets.rows import as_stored
from protopnet.errors import UserError
from protopnet.imaging import Preprocessing
from protopnet.model import torchvision_networks
from protopnet.model.network import ProtoPNet, placed
from protopnet.model.prototypes import true_float32
from protopnet.tables import from_bytes, to_bytes

# Rows of one unit of work. Small enough that a lost actor costs little and that all actors end together, large
# enough that Ray's cost per unit (some 10 ms) doesn't show.
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 128, 2048
PLAIN = -1  # the value of column `copy` that stands for the image without augmentation


class ImageTask(Protocol):
    """What to do with a batch of images. Tasks are values: they are sent to the actors once a pass."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How the images become the input of its networks."""

    def to(self, device: torch.device) -> "ImageTask":
        """Move the networks inside to the device, in eval mode; called once in each actor."""

    def __call__(self, images_B3HW: torch.Tensor, rows: pa.Table) -> pa.Table:
        """Rows of the manifest with their normalised images -> any rows."""


@dataclass
class NetworkTask:
    """What the tasks of one network share."""

    network: ProtoPNet

    @property
    def preprocessing(self) -> Preprocessing:
        return self.network.preprocessing

    def to(self, device: torch.device) -> Self:
        placed(self.network, device)
        return self


@dataclass(frozen=True)
class PassOptions:
    """How a pass runs, apart from what it computes."""

    plan: PassPlan
    batch_size: int = 64
    blocks: int | None = None
    augment: AugmentSettings | None = None
    seed: int = 0
    max_pixels: int = imaging.MAX_PIXELS


class _ImageWorker:
    """Reads and decodes the images of a block and feeds them to the task."""

    def __init__(self, task: ImageTask, options: PassOptions):
        self.device = torch.device("cuda" if options.plan.gpus else "cpu")
        self.task = task.to(self.device)
        self.options = options
        pixels = partial(_pixels, preprocessing=self.task.preprocessing, options=options)
        self.feed = manifest_feed(pixels, max(2, options.plan.threads))

    def __call__(self, block: pa.Table) -> pa.Table:
        batches = self.feed.batches(in_batches(block, self.options.batch_size))
        try:
            results = [self._forward(rows, np.stack(pixels)) for rows, pixels in batches]
            return _envelope(len(block), to_bytes(pa.concat_tables(results)), None)
        except UserError as error:  # goes back as a value: Ray would wrap an exception in stories of its own
            return _envelope(len(block), b"", str(error))

    def _forward(self, rows: pa.Table, pixels_BHWC: np.ndarray) -> pa.Table:
        # True float32 for the backbone as well: TF32 would make a patch depend on the GPU and on the batch.
        with torch.inference_mode(), true_float32():
            images_B3HW = imaging.normalise(torch.from_numpy(pixels_BHWC).to(self.device), self.task.preprocessing)
            return self.task(images_B3HW, rows)


class _ImageActor(_ImageWorker):
    """The same as a Ray Data actor."""

    def __init__(self, task_ref: ray.ObjectRef, options: PassOptions):
        torch.set_num_threads(options.plan.threads)
        torchvision_networks.imported()  # before unpickling a network imports it
        super().__init__(ray.get(task_ref), options)  # Ray Data hands over the reference itself, not the value


def in_batches(rows: pa.Table, size: int) -> list[pa.Table]:
    """The rows in slices of `size`; the last may be smaller."""
    return [rows.slice(start, size) for start in range(0, len(rows), size)]


def _envelope(images: int, payload: bytes, error: str | None) -> pa.Table:
    return pa.table(
        {"images": [images], "payload": pa.array([payload], pa.large_binary()), "error": pa.array([error], pa.string())}
    )


def _pixels(
    data: bytes | imaging.BadImage, row: dict[str, Any], preprocessing: Preprocessing, options: PassOptions
) -> np.ndarray:
    """Pixels of one image; `UserError` if it can't be read any more."""
    size, intensity = preprocessing.size, preprocessing.intensity
    number = row.get("copy", PLAIN)
    try:
        if isinstance(data, imaging.BadImage):
            raise data
        if number == PLAIN or options.augment is None:
            return imaging.load(data, size, options.max_pixels, intensity)
        image = imaging.decode(data, max_pixels=options.max_pixels, at_least=size, intensity=intensity)
    except imaging.BadImage as bad:
        raise UserError(changed(row["uri"], bad.reason)) from bad
    random = np.random.default_rng((options.seed, number, row["image_id"]))
    return augment.apply(image, augment.draw(options.augment, row["width"], row["height"], random), size)


def run_pass(rows: pa.Table, task: ImageTask, options: PassOptions) -> Iterator[tuple[int, pa.Table]]:
    """Run the task over the rows of a manifest; yields (images done, output rows) of each block as it ends.

    Blocks end in any order: whatever reduces the outputs must not depend on it. `UserError` if an image can't be
    read any more.
    """
    blocks: Any = (
        _in_this_process(rows, task, options)
        if options.plan.in_driver
        else _execute(rows, task, options).iter_batches(batch_size=None, batch_format="pyarrow")
    )
    for block in blocks:
        _raise_error_in(block)
        for images, payload in zip(block["images"].to_pylist(), block["payload"], strict=True):
            yield images, from_bytes(payload.as_py())


def run_pass_in_place(rows: pa.Table, task: ImageTask, options: PassOptions) -> list[ray.ObjectRef]:
    """Run the task and leave the outputs where they were computed: references to blocks for `unpack`.

    Errors: as `run_pass`.
    """
    if options.plan.in_driver:
        blocks = [ray.put(block) for block in _in_this_process(rows, task, options)]
    else:
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
    """The output rows inside a block that `run_pass_in_place` left in the object store, and that they stay in."""
    return pa.concat_tables([from_bytes(payload.as_buffer()) for payload in block["payload"]])


def _in_this_process(rows: pa.Table, task: ImageTask, options: PassOptions) -> Iterator[pa.Table]:
    """What an actor would do, without the seconds that it takes to start."""
    threads = torch.get_num_threads()
    torch.set_num_threads(options.plan.threads)
    try:
        worker = _ImageWorker(copy.deepcopy(task), options)  # the caller's networks stay where and as they are
        yield from map(worker, _cut(rows, options))
    finally:
        torch.set_num_threads(threads)


def _execute(rows: pa.Table, task: ImageTask, options: PassOptions) -> ray.data.Dataset:
    return over_blocks(_cut(rows, options), _ImageActor, (ray.put(task), options), options.plan)


def over_blocks(
    blocks: list[pa.Table], actor: Callable[..., Any], arguments: tuple[Any, ...], plan: PassPlan
) -> ray.data.Dataset:
    """Ray Data that hands each block whole to one of the plan's actors; lost actors are replaced."""
    return ray.data.from_arrow(blocks).map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(plan.actors, len(blocks))),
        num_cpus=plan.cpus,
        num_gpus=plan.gpus or None,
        resources=mark(plan.nodes) or None,
    )


def _cut(rows: pa.Table, options: PassOptions) -> list[pa.Table]:
    """Slices of the manifest, one a unit of work."""
    rows = as_stored(rows)  # so that no two blocks read the same row group
    edges = _edges(len(rows), options.plan.actors, options.batch_size, options.blocks)
    return [rows.slice(start, end - start).combine_chunks() for start, end in pairwise(edges)]


def blocks_of(rows: int, actors: int, batch_size: int) -> int:
    """How many units of work a pass over so many images has."""
    return len(_edges(rows, actors, batch_size, None)) - 1


def _edges(rows: int, actors: int, batch_size: int, blocks: int | None) -> np.ndarray:
    wanted = blocks or -(-rows // MAX_BLOCK_ROWS)
    if blocks is None:
        wanted = max(wanted, min(8 * actors, -(-rows // MIN_BLOCK_ROWS)))
    edges = np.linspace(0, rows, min(wanted, rows) + 1)
    if blocks is None:  # whole batches, as long as there are some
        whole = (edges[:-1] / batch_size).round() * batch_size
        edges = np.unique(np.minimum([*whole, rows], rows))
    return edges.round().astype(int)
