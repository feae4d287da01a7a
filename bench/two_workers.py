"""Two training workers of one thread each against one worker of one thread: the joint stage on Ray Train.

    python bench/two_workers.py [--classes 10 --size 224 --batch 80 --copies 4 --rounds 2] [--record]

Each measurement is the real joint stage (`protopnet.training.sgd.train_stage`); the figure is images a second of
an epoch as the worker reports it, so starting, evaluating and checkpointing are outside. Inputs are decoded already:
nothing is augmented, an epoch passes `--copies` times over the images, and only epochs after the first count, when
each worker's cache holds (nearly) all images. The batch is over all workers together. 1.7 is asked for.
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Ratio, arguments_of, conclude, photographs, table, take_turns

from protopnet.cluster import TrainPlan, connect
from protopnet.config import RunSettings
from protopnet.model.network import build_network
from protopnet.training.schedule import Epochs
from protopnet.training.sgd import train_stage
from protopnet.training.state import save_state


def settings_of(arguments: argparse.Namespace) -> RunSettings:
    return RunSettings.model_validate(
        {
            "model": {"backbone": arguments.backbone, "image_size": arguments.size},
            "train": {"batch_size": arguments.batch, "warm_epochs": 0, "joint_epochs": arguments.epochs},
            "augment": {"recipe": "none", "copies": arguments.copies},
            "compute": {"gpu": False},
        }
    )


def prepare(settings: RunSettings, classes: int, folder: Path) -> None:
    """The files that a joint stage starts from."""
    data = photographs(classes)
    data.save(str(folder))
    torch.manual_seed(0)
    save_state(str(folder / "start.safetensors"), build_network(settings.model, len(data.classes)).state_dict())


def images_per_second(workers: int, settings: RunSettings, folder: Path) -> float:
    """Median over the epochs after the first."""
    rates: dict[int, float] = {}

    def on_message(message: dict[str, Any]) -> None:
        if message["kind"] == "epoch":
            rates[message["epoch"]] = message["metrics"]["images_per_second"]

    epochs = Epochs(0, settings.train.joint_epochs, 0, settings.train.joint_epochs)
    with tempfile.TemporaryDirectory(dir=folder) as stage:
        start, end = str(folder / "start.safetensors"), str(Path(stage) / "end.safetensors")
        plan = TrainPlan(workers=workers, threads=1, gpu=False)
        train_stage(settings, str(folder), start, end, epochs, plan, str(Path(stage) / "train"), on_message)
    return statistics.median(rate for epoch, rate in rates.items() if epoch > 0)


def main() -> None:
    arguments = arguments_of(__doc__, backbone="resnet18", classes=10, size=224, batch=80, copies=4, epochs=4, rounds=2)
    settings = settings_of(arguments)
    connect(settings.compute)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(settings, arguments.classes, folder)
        measure = partial(images_per_second, settings=settings, folder=folder)
        rates = take_turns(
            {"one worker": partial(measure, 1), "two workers": partial(measure, 2)}, arguments.rounds, warm_up=0
        )
    speed_up = Ratio.of(rates["two workers"], rates["one worker"])
    median = {name: statistics.median(values) for name, values in rates.items()}
    table({name: {"img/s": f"{value:.1f}"} for name, value in median.items()})
    print(f"speed-up: {speed_up}")
    figures = {
        "images_per_second": {name: round(value, 2) for name, value in median.items()},
        "speed_up": speed_up.as_figures(),
    }
    conclude("two_workers", arguments, figures, {"speed-up": (speed_up.median, 1.7)})


if __name__ == "__main__":
    main()
