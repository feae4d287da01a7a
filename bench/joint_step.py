"""(a) How much of a bare backbone's throughput the joint step of training keeps.

    python bench/joint_step.py [--backbone resnet18 --size 224 --batch 80 --prototypes 200 --classes 20] [--record]

`joint step` is the step of a training worker (`protopnet.training.step`), from uint8 pixels to updated parameters.
`bare` is forward and backward of the backbone alone, in the same precision, from pixels that are normalised
already, with the sum of its features as the loss and no optimiser. They take turns; the ratio is taken turn by turn.
Below it, where the rest goes: each part of the step by itself. 0.90 is asked for. On a machine that others use
too, `--threads 1 --clock cpu` gives a ratio of CPU seconds that can still be trusted.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from common import arguments_of, conclude, rate_ratio, seconds, table, take_turns

from protopnet import imaging
from protopnet.config import RunSettings
from protopnet.model.losses import objective_of, prototype_loss
from protopnet.model.network import ProtoPNet, build_network, placed, set_phase
from protopnet.training.optimiser import build_optimiser
from protopnet.training.step import Stepper, mixed_precision


class Subject:
    """A network in the joint phase, its optimiser, and one batch."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = {
            "backbone": arguments.backbone,
            "cut": arguments.cut or None,
            "image_size": arguments.size,
            "prototypes": arguments.prototypes,
            "prototype_depth": arguments.depth,
            "similarity": arguments.similarity,
        }
        settings = RunSettings.model_validate({"model": model})
        self.train = settings.train
        torch.manual_seed(0)
        network = build_network(settings.model, arguments.classes)
        assert isinstance(network, ProtoPNet)
        self.network = placed(network, self.device)
        set_phase(self.network, "joint")
        self.optimiser = build_optimiser(self.network, self.train, "joint")
        self.objective = objective_of(self.network, self.train, torch.arange(arguments.classes), arguments.classes)
        self.step = Stepper(self.network, self.network, self.optimiser, self.objective, self.train)
        shape = (arguments.batch, arguments.size, arguments.size, 3)
        pixels_BHWC = torch.randint(0, 256, shape, dtype=torch.uint8)
        self.batch = (pixels_BHWC, torch.arange(arguments.batch) % arguments.classes)
        self.images_B3HW = imaging.normalise(pixels_BHWC.to(self.device), self.network.preprocessing)

    def joint_step(self) -> None:
        self.step(self.batch)

    def bare(self) -> None:
        self.network.backbone.zero_grad(set_to_none=True)
        with mixed_precision(self.train, self.device):
            features_BCHW = self.network.backbone(self.images_B3HW)
        features_BCHW.sum().backward()

    def parts(self) -> dict[str, Callable[[], object]]:
        """What the step does beyond `bare`, each part by itself."""
        pixels_BHWC, labels_B = (tensor.to(self.device) for tensor in self.batch)
        with torch.no_grad(), mixed_precision(self.train, self.device):
            features_BCHW = self.network.backbone(self.images_B3HW)
        features_BCHW.requires_grad_()
        with mixed_precision(self.train, self.device):
            hidden = self.network.add_on[:-2](features_BCHW).detach()
        latent_BDHW = self.network.add_on[-2:](hidden.float()).detach().requires_grad_()

        def add_on() -> None:
            with mixed_precision(self.train, self.device):
                hidden = self.network.add_on[:-2](features_BCHW)
            self.network.add_on[-2:](hidden.float()).sum().backward()

        def prototypes_and_loss() -> None:
            output = self.network.classify(latent_BDHW)
            prototype_loss(output, labels_B, self.network, self.objective)["total"].backward()

        return {
            "normalise": lambda: imaging.normalise(pixels_BHWC, self.network.preprocessing),
            "add-on layers": add_on,
            "prototypes, loss": prototypes_and_loss,
            "optimiser": self.optimiser.step,
        }


def main() -> None:
    arguments = arguments_of(
        __doc__,
        backbone="resnet18",
        cut="",
        size=224,
        batch=80,
        prototypes=200,
        depth=128,
        classes=20,
        similarity="log",
        steps=2,
        rounds=9,
        clock="wall",
    )
    subject = Subject(arguments)

    def of(work: Callable[[], object]) -> Callable[[], float]:
        return lambda: seconds(lambda: [work() for _ in range(arguments.steps)], arguments.clock) / arguments.steps

    times = take_turns({"bare": of(subject.bare), "joint step": of(subject.joint_step)}, arguments.rounds)
    ratio = rate_ratio(times, "joint step", "bare")
    parts = take_turns({name: of(work) for name, work in subject.parts().items()}, arguments.rounds)
    median = {name: statistics.median(values) for name, values in (times | parts).items()}
    table(
        {
            name: {
                "ms a step": f"{1e3 * value:.1f}",
                "img/s": f"{arguments.batch / value:.0f}" if name in times else "",
                "of the joint step": f"{100 * value / median['joint step']:.1f} %",
            }
            for name, value in median.items()
        }
    )
    print(f"joint step / bare, images a second: {ratio}")
    figures = {
        "images_per_second": {name: round(arguments.batch / median[name], 2) for name in times},
        "milliseconds": {name: round(1e3 * value, 2) for name, value in median.items()},
        "ratio": ratio.as_figures(),
    }
    conclude("joint_step", arguments, figures, {"joint step / bare": (ratio.median, 0.90)})


if __name__ == "__main__":
    main()
