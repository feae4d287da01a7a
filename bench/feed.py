"""(b) How much of the joint step's throughput is left when the real input pipeline feeds it.

    python bench/feed.py [--classes 10 --size 224 --batch 80 --copies 1 --epochs 4] [--record]

`fed` is an epoch of the joint stage as a worker runs it: `TrainLoader` reads, decodes and augments (the paper's
recipe) photographs beside the training, on the same cores. `ready` is the same number of the same steps on one batch
that is there already: figure (a). The first epoch decodes every photograph; later ones find them in the loader's
cache. They are told apart, and each is compared with `ready` measured just before and just after it. 0.75 of (a) is
asked for, of both kinds of epochs. On a machine that others use too, `--threads 1 --clock cpu` compares CPU seconds:
what is left when training and feeding share cores that are never idle.
"""

import argparse
import statistics
from collections.abc import Iterable
from itertools import pairwise

import torch
from common import Ratio, arguments_of, conclude, photographs, seconds, table

from protopnet.config import RunSettings
from protopnet.datasets.loader import Batch, TrainLoader
from protopnet.model.losses import objective_of
from protopnet.model.network import build_network, placed, set_phase
from protopnet.training.optimiser import build_optimiser
from protopnet.training.step import Stepper


class Trainer:
    """A ProtoPNet in its joint phase."""

    def __init__(self, settings: RunSettings, classes: int) -> None:
        self.train = settings.train
        torch.manual_seed(0)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = placed(build_network(settings.model, classes), device)
        set_phase(self.network, "joint")
        optimiser = build_optimiser(self.network, self.train, "joint")
        objective = objective_of(self.network, self.train, torch.arange(classes), classes)
        self.step = Stepper(self.network, self.network, optimiser, objective, self.train)

    def run(self, batches: Iterable[Batch]) -> int:
        """Train on the batches; returns how many images they held."""
        images = 0
        for batch in batches:
            self.step(batch)
            images += len(batch[1])
        return images


def settings_of(arguments: argparse.Namespace) -> RunSettings:
    return RunSettings.model_validate(
        {
            "model": {"backbone": arguments.backbone, "image_size": arguments.size},
            "train": {"batch_size": arguments.batch},
            "augment": {"recipe": arguments.recipe, "copies": arguments.copies},
        }
    )


def main() -> None:
    arguments = arguments_of(
        __doc__,
        backbone="resnet18",
        classes=10,
        size=224,
        batch=80,
        recipe="paper",
        copies=1,
        epochs=5,
        clock="wall",
    )
    settings, data = settings_of(arguments), photographs(arguments.classes)
    loader = TrainLoader(data.split("train"), settings, settings.train.batch_size)
    trainer = Trainer(settings, len(data.classes))
    pixels_BHWC = torch.randint(0, 256, (arguments.batch, arguments.size, arguments.size, 3), dtype=torch.uint8)
    ready = (pixels_BHWC, torch.arange(arguments.batch) % len(data.classes))
    trainer.run([ready])
    steps = max(1, round(loader.images / arguments.batch))

    def ready_rate() -> float:
        return steps * arguments.batch / seconds(lambda: trainer.run([ready] * steps), arguments.clock)

    def fed_rate(epoch: int) -> float:
        return loader.images / seconds(lambda: trainer.run(loader.epoch(epoch)), arguments.clock)

    alone, fed = [ready_rate()], []
    for epoch in range(arguments.epochs):
        fed.append(fed_rate(epoch))
        alone.append(ready_rate())
    beside = [(before + after) / 2 for before, after in pairwise(alone)]
    first, later = Ratio.of(fed[:1], beside[:1]), Ratio.of(fed[1:], beside[1:])
    decoding, cached = "fed, first epoch (decodes)", "fed, later epochs (cached)"
    rates = {"ready": statistics.median(alone), decoding: fed[0], cached: statistics.median(fed[1:])}
    ratios = {"ready": "", decoding: f"{first.median:.2f}", cached: str(later)}
    print(f"{loader.images} images an epoch")
    table({name: {"img/s": f"{rate:.1f}", "of ready": ratios[name]} for name, rate in rates.items()})
    figures = {
        "images_an_epoch": loader.images,
        "images_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "first_epoch": first.as_figures(),
        "later_epochs": later.as_figures(),
    }
    checks = {"first epoch / ready": (first.median, 0.75), "later epochs / ready": (later.median, 0.75)}
    conclude("feed", arguments, figures, checks)


if __name__ == "__main__":
    main()
