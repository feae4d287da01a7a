"""What it costs to feed the network: read, decode, augment, an image at a time and as a loader beside training.

    python bench/input_pipeline.py [FOLDER] [--classes 10] [--size 224] [--beside resnet18 --steps 8]

FOLDER: class folders; the CUB crops of the test data when left out. Costs are CPU milliseconds an image of one
thread, which other work on the machine changes little. The chain it is compared with does what the offline recipe
does, step by step with PIL: decode, transform at full size, crop, resize back, and then resize for the network.

With --beside, a backbone trains (bf16) while a loader feeds it, once for each way of loading, taking turns; the
ratios are to the same steps on one batch that is there already. On a machine that others use too, take --threads 1
and believe the CPU time, in which the processes of a loader are counted.
"""

import argparse
import contextlib
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from protopnet import imaging
from protopnet.config import RunSettings
from protopnet.datasets import augment
from protopnet.datasets.folders import scan_folder
from protopnet.datasets.loader import Batch, TrainLoader
from protopnet.datasets.reader import ImageReader

ROUNDS = 3
BATCH = 40


def default_folder() -> str:
    root = os.environ.get("PROTOPNET_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data"
    return str(Path(root) / "cub100" / "train")


def cpu_ms(work: Callable[[], object], images: int) -> float:
    """Milliseconds an image of this thread, the best of a few rounds."""
    best = math.inf
    for _ in range(ROUNDS):
        started = time.thread_time()
        work()
        best = min(best, time.thread_time() - started)
    return 1e3 * best / images


# ------------------------------------------------------------------------------------ cost of each part


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


# --------------------------------------------------------------------------------------- beside training


class Trainer:
    """A backbone that trains; what `TrainLoader` has to keep up with."""

    def __init__(self, backbone: str, classes: int) -> None:
        import torchvision

        self.network = torchvision.models.get_model(backbone, num_classes=classes)
        self.network.to(memory_format=torch.channels_last).train()
        self.optimiser = torch.optim.Adam(self.network.parameters())

    def step(self, pixels_BHWC: torch.Tensor, labels_B: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits_BK = self.network(imaging.normalise(pixels_BHWC))
        self.optimiser.zero_grad()
        torch.nn.functional.cross_entropy(logits_BK.float(), labels_B).backward()
        self.optimiser.step()


def print_beside_training(rows: pa.Table, size: int, backbone: str, steps: int) -> None:
    """Images/s of training with each way of loading, relative to training alone."""
    trainer = Trainer(backbone, classes=int(max(rows["label"].to_pylist())) + 1)
    loaders = {
        f"{'processes' if processes else 'threads'} {count}": make_loader(rows, size, count, processes)
        for processes in (False, True)
        for count in (1, 2)
    }
    ready = next(loaders["threads 1"].epoch(0))
    for _ in range(2):
        trainer.step(*ready)
    costs: dict[str, list[np.ndarray]] = defaultdict(list)
    for turn in range(ROUNDS):
        costs["alone"].append(cost_of_steps(trainer, iter([ready] * steps)))
        for name, loader in loaders.items():
            batches = loader.epoch(turn)
            next(batches)  # starting is not what is measured
            costs[name].append(cost_of_steps(trainer, batches, steps))
    for name, values in costs.items():
        wall, cpu = 1e3 * np.median(values, axis=0)
        wall_ratio, cpu_ratio = np.median(np.array(costs["alone"]) / np.array(values), axis=0)
        print(
            f"{name:12} {1e3 / wall:7.1f} images/s, {wall_ratio:.2f} of training alone; "
            f"{cpu:6.2f} ms CPU an image, {cpu_ratio:.2f}"
        )


def make_loader(rows: pa.Table, size: int, count: int, processes: bool) -> TrainLoader:
    settings = {"model": {"image_size": size}, "data": {"workers": count if processes else None}}
    loader = TrainLoader(rows, RunSettings.model_validate(settings), BATCH)
    if not processes:
        loader.feed.threads = count
    return loader


def cost_of_steps(trainer: Trainer, batches: Iterator[Batch], steps: int = sys.maxsize) -> np.ndarray:
    """Seconds and CPU seconds an image of training on the next batches."""
    images, began = 0, np.array([time.perf_counter(), cpu_seconds()])
    for _, (pixels_BHWC, labels_B) in zip(range(steps), batches, strict=False):
        trainer.step(pixels_BHWC, labels_B)
        images += len(labels_B)
    return (np.array([time.perf_counter(), cpu_seconds()]) - began) / images


def cpu_seconds() -> float:
    """CPU time of this process and its living children (Linux)."""
    ticks = 0
    for process in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            fields = process.read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == os.getpid():
                ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", default=default_folder())
    parser.add_argument("--classes", type=int, default=10, help="only the first N classes")
    parser.add_argument("--size", type=int, default=224, help="input size of the network")
    parser.add_argument("--beside", metavar="BACKBONE", help="also load while this torchvision network trains")
    parser.add_argument("--steps", type=int, default=6, help=f"steps of {BATCH} images a measurement, with --beside")
    parser.add_argument("--threads", type=int, help="threads of the training, with --beside; all cores if left out")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    data = {"source": "folder", "path": arguments.folder, "classes": arguments.classes}
    settings = RunSettings.model_validate({"data": data}).data
    rows = scan_folder(arguments.folder, settings, seed=0).split("train")
    print(f"{len(rows)} images, input {arguments.size} x {arguments.size}")
    print_costs(rows, arguments.size)
    if arguments.beside:
        print_beside_training(rows, arguments.size, arguments.beside, arguments.steps)


if __name__ == "__main__":
    main()
