"""How what grows, grows: the parts of push, last layer and scoring that aren't forward passes.

    python bench/scale.py [--prototypes 100000] [--record]

Forward passes grow with the images and shrink with the devices; what this measures is the rest, on made-up numbers of
the real shapes, so that it can be taken to sizes whose images nobody has here:

push         candidates of blocks of 2,048 images in a drawn order, looked through by 8 workers, 10 prototypes a class of
             128 numbers, reduced in the driver: prototypes x10 and x100, images x10; bytes that reach it, its memory
last layer   one evaluation of loss and gradient: images x10, prototypes x10, classes x10; bytes an iteration moves
scoring      the manifest and the record of finished parts: images x10; what a rerun does before it scores
units        what Ray Data costs for each unit of work, whoever does it: units x10, actors 1, 2, 4
"""

import resource
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from common import arguments_of, conclude, seconds, table

from protopnet import storage
from protopnet.budget import PassPlan
from protopnet.cluster import connect
from protopnet.config import ComputeSettings
from protopnet.passes.candidates import CANDIDATE_SCHEMA, Cutoff, Reducer
from protopnet.passes.image_pass import MAX_BLOCK_ROWS, over_blocks
from protopnet.passes.push import MOST_NUMBERS, candidates_needed
from protopnet.scoring.inputs import INPUT_SCHEMA
from protopnet.scoring.manifest import write_manifest
from protopnet.scoring.output import score_schema, take_stock, write_chunk
from protopnet.scoring.tally import Tally
from protopnet.training.solver import RowBlock

PER_CLASS, DEPTH, WORKERS = 10, 128, 8
Figures = dict[str, Any]


def main() -> None:
    arguments = arguments_of(__doc__, prototypes=100_000, images=60, seed=0)
    random = np.random.default_rng(arguments.seed)
    figures: Figures = {}
    sizes = [size for size in (1_000, 10_000, 100_000) if size <= arguments.prototypes]
    figures["push"] = [push(size, arguments.images, random) for size in sizes]
    figures["push"].append(push(sizes[0], 10 * arguments.images, random))
    shown("push: reduce in the driver", figures["push"])
    base = (2_000, 1_000, 100)
    shapes = [base, (20_000, 1_000, 100), (2_000, 10_000, 100), (2_000, 1_000, 1_000)]
    figures["last_layer"] = [last_layer(*shape, random) for shape in shapes]
    shown("last layer: one evaluation", figures["last_layer"])
    figures["scoring"] = [scoring(images) for images in (100_000, 1_000_000)]
    shown("scoring: bookkeeping", figures["scoring"])
    connect(ComputeSettings())
    figures["units"] = [units(count, actors) for actors, count in ((1, 20), (1, 200), (2, 200), (4, 200))]
    shown("units of work: Ray Data", figures["units"])
    growth = figures["push"][len(sizes) - 1]["seconds"] / figures["push"][0]["seconds"]
    per_prototype = sizes[-1] / sizes[0] / growth
    # Sorting grows a little faster than in proportion; a merge for each block would grow with the square.
    conclude("scale", arguments, figures, {"push: seconds a prototype, small / large": (per_prototype, 0.3)})


def push(prototypes: int, images_a_class: int, random: np.random.Generator) -> Figures:
    """Reduce the candidates of all blocks, as they come in."""
    classes = prototypes // PER_CLASS
    images = classes * images_a_class
    k = candidates_needed(np.repeat(np.arange(classes), PER_CLASS), distinct=True)
    vectors = prototypes * DEPTH * k <= MOST_NUMBERS
    blocks = -(-images // MAX_BLOCK_ROWS)
    moved, spent, reducer = 0, 0.0, Reducer(k)
    cutoffs = [Cutoff(prototypes, k) for _ in range(WORKERS)]
    for block in range(blocks):
        found = block_of_candidates(block, classes, k, random, vectors)
        candidates = cutoffs[block % WORKERS].passing(found)
        moved += candidates.nbytes
        spent += seconds(lambda candidates=candidates: reducer.add(candidates))
    spent += seconds(reducer.result)
    assert len(reducer.result()) == prototypes * k
    return {
        "prototypes": prototypes,
        "images": images,
        "blocks": blocks,
        "seconds": round(spent, 3),
        "MB moved": round(moved / 1e6, 1),
        "MB kept": round(reducer.result().nbytes / 1e6, 1),
        "driver's peak MB": peak_megabytes(),
    }


def block_of_candidates(block: int, classes: int, k: int, random: np.random.Generator, vectors: bool) -> pa.Table:
    """What one block finds: k candidates of each prototype of the classes that its images happen to be of; every class is
    in the first ones."""
    seen = np.unique(random.integers(0, classes, MAX_BLOCK_ROWS))
    if block * MAX_BLOCK_ROWS < classes:
        seen = np.union1d(seen, np.arange(block * MAX_BLOCK_ROWS, min(classes, (block + 1) * MAX_BLOCK_ROWS)))
    own = (seen[:, None] * PER_CLASS + np.arange(PER_CLASS)).ravel().astype(np.int32)
    prototype = np.repeat(own, k)
    rows = len(prototype)
    numbers = random.random(rows * DEPTH if vectors else 0, dtype=np.float32)
    offsets = np.arange(rows + 1, dtype=np.int32) * (DEPTH if vectors else 0)
    return pa.table(
        {
            "prototype": prototype,
            "distance": np.sort(random.random((len(own), k)), axis=1).ravel(),
            "image_id": block * MAX_BLOCK_ROWS + random.integers(0, MAX_BLOCK_ROWS, rows),
            "label": (prototype // PER_CLASS).astype(np.int32),
            "row": np.zeros(rows, np.int32),
            "column": np.zeros(rows, np.int32),
            "vector": pa.ListArray.from_arrays(offsets, numbers) if vectors else pa.nulls(rows, pa.list_(pa.float32())),
        },
        schema=CANDIDATE_SCHEMA,
    )


def last_layer(images: int, prototypes: int, classes: int, random: np.random.Generator) -> Figures:
    """Loss and gradient over rows in memory, as a store computes them."""
    block = RowBlock(random.random((images, prototypes), dtype=np.float32), np.arange(images) % classes, classes)
    weights = random.random((classes, prototypes))
    block.loss_and_gradient(weights)
    spent = min(seconds(lambda: block.loss_and_gradient(weights)) for _ in range(3))
    return {
        "images": images,
        "prototypes": prototypes,
        "classes": classes,
        "seconds": round(spent, 3),
        "GFLOP/s": round(4 * images * prototypes * classes / spent / 1e9, 1),
        "MB of rows": round(4 * images * prototypes / 1e6, 1),
        "MB moved a store": round(16 * prototypes * classes / 1e6, 1),
    }


def scoring(images: int, chunk_rows: int = 4096) -> Figures:
    """The manifest of so many locations, and looking through the records of as many finished parts."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        contents, _ = write_manifest(locations(images), f"{folder}/manifest", ["a", "b"], lambda seen: chunk_rows)
        manifest = time.monotonic() - began
        parts = -(-contents.images // chunk_rows)
        empty = score_schema(False).empty_table()
        for chunk in range(parts):
            write_chunk(folder, chunk, empty, Tally(), partition_by=None, about={})
        stock = seconds(lambda: take_stock(folder))
        size = sum(len(storage.read_bytes(file)) for file in storage.list_files(f"{folder}/manifest"))
    return {
        "images": images,
        "parts": parts,
        "manifest s": round(manifest, 2),
        "manifest MB": round(size / 1e6, 1),
        "ms a finished part": round(1000 * stock / parts, 2),
        "driver's peak MB": peak_megabytes(),
    }


def locations(images: int, piece: int = 10_000) -> Iterator[pa.Table]:
    for first in range(0, images, piece):
        count = min(piece, images - first)
        yield pa.table(
            {
                "image_id": pa.nulls(count, pa.int64()),
                "uri": [f"s3://a-bucket/photographs/2026/{number:09d}.jpg" for number in range(first, first + count)],
                "file": pa.nulls(count, pa.string()),
                "row_group": pa.nulls(count, pa.int32()),
                "row": pa.nulls(count, pa.int32()),
                "folder": ["2026"] * count,
            },
            schema=INPUT_SCHEMA,
        )


class Nothing:
    """An actor without work."""

    def __call__(self, block: pa.Table) -> pa.Table:
        return block


def units(count: int, actors: int) -> Figures:
    """Blocks through an actor pool; the pool's start is told apart by its first block."""
    plan = PassPlan(actors=actors, cpus=0.5, gpus=0.0, threads=1)
    blocks = [pa.table({"unit": [number]}) for number in range(count)]
    began, first = time.monotonic(), 0.0
    results: Any = over_blocks(blocks, Nothing, (), plan)
    for _ in results.iter_batches(batch_size=None, batch_format="pyarrow"):
        first = first or time.monotonic()
    spent = time.monotonic() - first
    return {
        "units": count,
        "actors": actors,
        "start s": round(first - began, 2),
        "ms a unit": round(1000 * spent / (count - 1), 1),
    }


def peak_megabytes() -> int:
    """The most memory this process has had so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def shown(title: str, rows: list[Figures]) -> None:
    print(f"\n{title}")
    table({str(number): {name: f"{value:,}" for name, value in row.items()} for number, row in enumerate(rows, 1)})


if __name__ == "__main__":
    try:
        main()
    finally:
        ray.shutdown()
