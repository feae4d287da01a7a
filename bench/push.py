"""(c) The push against a plain loop that only decodes and forwards, and against the authors' way of pushing.

    python bench/push.py [--classes 40 --size 224 --rounds 3] [--record]

Three ways over the same photographs, in float32 and eval mode with the same threads, taking turns:
`push`     the real one, `protopnet.passes.push.push` over Ray Data;
`loop`     decode an image, decode the next, forward the batch: nothing else. `loop, decoding ahead` decodes the next
           batch in threads meanwhile, which the plain loop doesn't;
`authors`  the latent maps and all distances copied to numpy, a Python loop over the prototypes for each batch, and
           pictures written whenever a prototype has found a nearer patch (see `authors_push.py`).
Starting actors is a cost of each push that doesn't grow with the data: it is measured by a pass over one image, and
ratios are given without it and with it (twice, where near-ties made the push encode some images again). 0.90 of the
loop is asked for, without the start.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from authors_push import authors_push
from common import (
    Ratio,
    arguments_of,
    conclude,
    decoded_ahead,
    photographs,
    resnet18_weights,
    seconds,
    table,
    take_turns,
)

from protopnet import imaging
from protopnet.cluster import connect, plan_pass
from protopnet.config import RunSettings
from protopnet.datasets.reader import ImageReader
from protopnet.model.network import ProtoPNet, build_network, placed
from protopnet.model.prototypes import true_float32
from protopnet.passes.image_pass import PassOptions, run_pass
from protopnet.passes.nearest_patches import NearestTask
from protopnet.passes.push import candidates_needed, push
from protopnet.training.start import sample_patches, start_from_patches

AUTHORS_BATCH = 75


class Subject:
    """A ProtoPNet whose prototypes lie among the patches of the photographs, and the ways to push it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        data = photographs(arguments.classes)
        self.rows, self.size = data.split("train"), arguments.size
        model = {"backbone": "resnet18", "weights": resnet18_weights(), "image_size": arguments.size}
        compute = {"threads": arguments.threads, "gpu": False}
        self.settings = RunSettings.model_validate({"model": model, "compute": compute})
        connect(self.settings.compute)
        self.options = PassOptions(plan=plan_pass(self.settings.compute), batch_size=arguments.batch)
        torch.manual_seed(0)
        network = build_network(self.settings.model, len(data.classes))
        assert isinstance(network, ProtoPNet)
        self.network = network
        sample = sample_patches(network, self.rows, seed=0, options=self.options)
        start_from_patches(network, sample, seed=0)
        placed(network, torch.device("cpu"))

    def push(self) -> None:
        result = push(self.network, self.rows, distinct=True, options=self.options)
        self.starts = 1 + (result.refined > 0)

    def start(self) -> object:
        """Everything a push does before its first batch, and one image."""
        k = candidates_needed(self.network.prototype_class.numpy(), distinct=True)
        return list(run_pass(self.rows.slice(0, 1), NearestTask(self.network, k), self.options))

    def loop(self, ahead: int = 0) -> None:
        with torch.inference_mode(), true_float32():
            for pixels_BHWC, _ in self.batches(self.options.batch_size, ahead):
                self.network.latent(imaging.normalise(torch.from_numpy(pixels_BHWC), self.network.preprocessing))

    def authors(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            # Their loader decodes in four processes; threads do the same here.
            authors_push(self.network, self.batches(AUTHORS_BATCH, ahead=4), folder)

    def batches(self, batch_size: int, ahead: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pixels and labels; with `ahead` > 0 the next batch is decoded in that many threads meanwhile."""
        slices = [self.rows.slice(start, batch_size) for start in range(0, len(self.rows), batch_size)]
        return decoded_ahead(slices, self._decode, ahead)

    def _decode(self, rows: pa.Table, over: Callable) -> tuple[np.ndarray, np.ndarray]:
        encoded = ImageReader().read(rows, range(len(rows)))
        return np.stack(list(over(partial(imaging.load, size=self.size), encoded))), rows["label"].to_numpy()


def main() -> None:
    arguments = arguments_of(__doc__, classes=40, size=224, batch=64, rounds=3)
    subject = Subject(arguments)
    methods: dict[str, Callable[[], object]] = {
        "push": subject.push,
        "a start": subject.start,
        "loop": subject.loop,
        "loop, decoding ahead": lambda: subject.loop(ahead=arguments.threads),
        "authors": subject.authors,
    }
    times = take_turns({name: partial(seconds, work) for name, work in methods.items()}, arguments.rounds, warm_up=0)
    times["push without start"] = [
        whole - subject.starts * start for whole, start in zip(times["push"], times["a start"], strict=True)
    ]
    median = {name: statistics.median(values) for name, values in times.items()}
    images = len(subject.rows)
    print(f"{images} images, {len(subject.network.prototypes)} prototypes, starts in a push: {subject.starts}")
    table({name: {"seconds": f"{value:.2f}", "img/s": f"{images / value:.1f}"} for name, value in median.items()})
    ratios = {
        f"{name} / {other}": Ratio.of(times[other], times[name])
        for other in ("loop", "loop, decoding ahead", "authors")
        for name in ("push without start", "push")
    }
    for name, ratio in ratios.items():
        print(f"{name}, images a second: {ratio}")
    figures = {
        "images": images,
        "starts_in_a_push": subject.starts,
        "seconds": {name: round(value, 3) for name, value in median.items()},
        "ratios": {name: ratio.as_figures() for name, ratio in ratios.items()},
    }
    conclude("push", arguments, figures, {"push / loop": (ratios["push without start / loop"].median, 0.90)})


if __name__ == "__main__":
    main()
