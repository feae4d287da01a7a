"""The input pipeline alone, without a network behind it: read, decode, augment.

    python bench/pipeline.py [--classes 40] [--size 224] [--latency 50] [--record]

Images a second of an epoch of training without augmentation and without the cache of decoded images, and of a pass, from
class folders, from shards, and from shards in a bucket (moto's server in a process of its own) that answers each request
`latency` milliseconds late. Each relative to a bare loop that only decodes and resizes the same images, in as many
threads, from memory. Then CPU milliseconds an image of each part, beside the offline recipe done step by step with PIL:
decode, transform at full size, crop, resize back, and then resize for the network.
"""

import argparse
import logging
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pyarrow as pa
from common import Ratio, arguments_of, conclude, photographs, take_turns
from PIL import Image

from protopnet import imaging
from protopnet.config import RunSettings
from protopnet.datasets import augment, loader
from protopnet.datasets.feed import manifest_feed
from protopnet.datasets.loader import TrainLoader
from protopnet.datasets.open import open_source
from protopnet.datasets.reader import ImageReader
from protopnet.datasets.rows import Dataset, as_stored
from protopnet.datasets.shards import write_source

ROUNDS = 3
BATCH = 64


def main() -> None:
    arguments = arguments_of(__doc__, classes=40, size=224, latency=50, rounds=ROUNDS)
    loader.CACHE_BYTES = 0
    folder = photographs(arguments.classes)
    print_costs(folder.split("train"), arguments.size)
    with tempfile.TemporaryDirectory() as place, slow_bucket(arguments.latency / 1000):
        sources = {
            "folders": folder,
            "shards": packed(folder, f"{place}/shards"),
            "bucket": packed(folder, "s3://pipeline/shards"),
        }
        works = {"bare loop": lambda: bare(folder, arguments)}
        for name, dataset in sources.items():
            works[f"training, {name}"] = lambda dataset=dataset: epoch(dataset, arguments)
            works[f"pass, {name}"] = lambda dataset=dataset: one_pass(dataset, arguments)
        rates = take_turns(works, arguments.rounds)
    ratios = {name: Ratio.of(values, rates["bare loop"]) for name, values in rates.items() if name != "bare loop"}
    for name, ratio in ratios.items():
        print(f"{name:18} {ratio} of the bare loop")
    figures = {
        "images_per_second_a_core": {name: float(np.median(v)) / arguments.threads for name, v in rates.items()},
        "of_the_bare_loop": {name: ratio.as_figures() for name, ratio in ratios.items()},
    }
    conclude("pipeline", arguments, figures, {name: (ratio.median, 0.9) for name, ratio in ratios.items()})


# ------------------------------------------------------------------------------------------ images a second


def bare(dataset: Dataset, arguments: argparse.Namespace) -> float:
    """Only decodes and resizes, what is in memory."""
    rows = dataset.split("train")
    encoded = ImageReader().read(rows, range(len(rows)))
    with ThreadPoolExecutor(arguments.threads) as threads:
        started = time.monotonic()
        for _ in threads.map(lambda data: imaging.load(data, arguments.size), encoded):
            pass
        return len(encoded) / (time.monotonic() - started)


def epoch(dataset: Dataset, arguments: argparse.Namespace) -> float:
    """An epoch of training batches."""
    settings = {
        "model": {"image_size": arguments.size},
        "data": {"workers": arguments.threads},
        "augment": {"recipe": "none"},
    }
    batches = TrainLoader(dataset.split("train"), RunSettings.model_validate(settings), BATCH)
    started = time.monotonic()
    images = sum(len(labels) for _, labels in batches.epoch(0))
    return images / (time.monotonic() - started)


def one_pass(dataset: Dataset, arguments: argparse.Namespace) -> float:
    """All images as push, evaluation and scoring read them."""
    rows = as_stored(dataset.split("train"))
    feed = manifest_feed(lambda data, row: imaging.load(data, arguments.size), arguments.threads)
    started = time.monotonic()
    images = sum(len(p) for _, p in feed.batches(rows.slice(i, BATCH) for i in range(0, len(rows), BATCH)))
    return images / (time.monotonic() - started)


def packed(dataset: Dataset, uri: str) -> Dataset:
    """The same images as shards."""
    settings = RunSettings.model_validate({"data": {"source": "folder", "path": dataset.source["path"]}})
    data = settings.data.model_copy(update={"classes": dataset.classes, "validation": 0, "test": 0})
    source = open_source(settings.model_copy(update={"data": data}))
    return write_source(source, uri)


@contextmanager
def slow_bucket(delay: float) -> Iterator[None]:
    """An S3 server in another process, and the environment that leads to it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, delay), daemon=True)
    process.start()
    os.environ.update(here.recv())
    yield
    here.send("enough")
    process.join()


def _serve(pipe: Connection, delay: float) -> None:
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from failing_bucket import failing_bucket_of_moto

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with failing_bucket_of_moto() as bucket:
        bucket.client().create_bucket(Bucket="pipeline")
        bucket.delay = delay
        pipe.send(bucket.variables)
        pipe.recv()


def cpu_ms(work: Callable[[], object], images: int) -> float:
    """Milliseconds an image of this thread, the best of a few rounds."""
    best = math.inf
    for _ in range(ROUNDS):
        started = time.thread_time()
        work()
        best = min(best, time.thread_time() - started)
    return 1e3 * best / images


# ------------------------------------------------------------------------------------------- cost of each part


def costs(rows: pa.Table, size: int) -> dict[str, float]:
    """CPU milliseconds an image of each part of our pipeline, and of the ways it is compared with."""
    reader, images = ImageReader(), len(rows)
    encoded = reader.read(rows, range(images))
    decoded = [imaging.decode(data, at_least=size) for data in encoded]
    recipe, rng = RunSettings().augment, np.random.default_rng(0)
    warps = [augment.draw(recipe, image.width, image.height, rng) for image in decoded]
    parts: dict[str, Callable[[], object]] = {
        "read": lambda: reader.read(rows, range(images)),
        "decode": lambda: [imaging.decode(data, at_least=size) for data in encoded],
        "draw": lambda: [augment.draw(recipe, i.width, i.height, np.random.default_rng((0, 1))) for i in decoded],
        "warp": lambda: [augment.apply(i, warp, size) for i, warp in zip(decoded, warps, strict=True)],
        "plain resize": lambda: [imaging.resize(image, size) for image in decoded],
        "chain of steps": lambda: [chain(image, size, rng) for image in decoded],
    }
    return {name: cpu_ms(work, images) for name, work in parts.items()}


def chain(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """The recipe as a chain of PIL calls: three interpolations instead of one."""
    steps = (chain_rotate, chain_skew, chain_shear)
    image = steps[rng.integers(3)](image, rng)
    if rng.random() < augment.FLIP_PROBABILITY:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return imaging.resize(image, size)


def chain_rotate(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    degrees = int(rng.integers(-15, 16))
    turned = image.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    width, height = augment.rotation_crop(degrees, *image.size)
    left, top = round((turned.width - width) / 2), round((turned.height - height) / 2)
    crop = turned.crop((left, top, turned.width - left, turned.height - top))
    return crop.resize(image.size, Image.Resampling.BICUBIC)


def chain_skew(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = int(rng.integers(1, math.ceil(0.2 * max(image.size)) + 1))
    scale = np.diag([*image.size, 1.0])
    to_source = scale @ augment.skew(int(rng.integers(12)), pixels, *image.size) @ np.linalg.inv(scale)
    coefficients = tuple((to_source / to_source[2, 2]).ravel()[:8])
    return image.transform(image.size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC)


def chain_shear(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    slope = math.tan(math.radians(int(rng.integers(1, 12))))
    width, height = image.size
    lost = min(math.ceil(slope * height), width // 2)
    coefficients = (1, slope, -lost, 0, 1, 0)
    slanted = image.transform((width + lost, height), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    return slanted.crop((lost, 0, width, height)).resize(image.size, Image.Resampling.BICUBIC)


def print_costs(rows: pa.Table, size: int) -> None:
    cost = costs(rows, size)
    ours = sum(cost[name] for name in ("read", "decode", "draw", "warp"))
    for name, value in cost.items():
        print(f"{name:15} {value:7.3f} ms")
    print(f"{'ours, together':15} {ours:7.3f} ms = {1e3 / ours:.0f} images/s a core")
    print(f"{'ours, cached':15} {cost['draw'] + cost['warp']:7.3f} ms")
    theirs = cost["read"] + cost["decode"] + cost["chain of steps"]
    print(f"ours / read and decode alone: {ours / (cost['read'] + cost['decode']):.2f}")
    print(f"ours / chain of steps (with read and decode): {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
