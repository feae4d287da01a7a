"""Which stages a run has, in order. Pure: settings in, a list out.

    data → start → joint → push → last-layer → joint → push → last-layer → … → bundle → evaluate

Training may end before the last cycle (see `keep_going`); the stages of cycles left out are then not run.
"""

from dataclasses import dataclass
from typing import Literal

from protopnet.config import RunSettings


@dataclass(frozen=True)
class Epochs:
    """Which epochs a joint stage trains.

    Epochs are counted over the whole run; the first `warm` of them are warm, `total` is how many the run has at
    most.
    """

    first: int
    end: int
    warm: int
    total: int

    def phase(self, epoch: int) -> Literal["warm", "joint"]:
        return "warm" if epoch < self.warm else "joint"


@dataclass(frozen=True)
class Stage:
    """One stage; its folder is named after its place in the order, which is the same at every resume."""

    number: int
    kind: str
    cycle: int = 0
    epochs: Epochs | None = None

    @property
    def name(self) -> str:
        return f"{self.number:02d}-{self.kind}"


def before_training(settings: RunSettings) -> list[Stage]:
    stages = [Stage(0, "data")]
    if settings.model.kind == "protopnet":
        stages.append(Stage(1, "start"))
    return stages


def training_cycles(settings: RunSettings) -> list[list[Stage]]:
    """The stages of each cycle. A baseline has no push: all its epochs are one stage."""
    train = settings.train
    total = train.warm_epochs + train.joint_epochs + (train.cycles - 1) * train.next_joint_epochs
    if settings.model.kind == "baseline":
        return [[Stage(2, "joint", 0, Epochs(0, total, train.warm_epochs, total))]]
    cycles, first, number = [], 0, 2
    for cycle in range(train.cycles):
        end = first + (train.warm_epochs + train.joint_epochs if cycle == 0 else train.next_joint_epochs)
        joint = [Stage(number, "joint", cycle, Epochs(first, end, train.warm_epochs, total))] if end > first else []
        rest = [Stage(number + 1, "push", cycle), Stage(number + 2, "last-layer", cycle)]
        cycles.append(joint + rest)
        first, number = end, number + 3
    return cycles


def after_training(settings: RunSettings, best: int) -> list[Stage]:
    """The bundle of the best cycle and its evaluation.

    Numbered after all cycles there could be, so that an early stop doesn't rename them.
    """
    number = 2 + 3 * settings.train.cycles
    return [Stage(number, "bundle", best), Stage(number + 1, "evaluate", best)]


def importing(settings: RunSettings) -> list[Stage]:
    """The stages that make a bundle of a network trained elsewhere; numbered as those of a run without training."""
    return [Stage(0, "data"), Stage(1, "import"), Stage(3, "push"), *after_training(settings, 0)]


def keep_going(validation_accuracies: list[float | None], patience: int) -> bool:
    """Whether another cycle is worth it: one of the last `patience` cycles was better than all before it. Without a
    validation split nothing speaks against it."""
    known = [value for value in validation_accuracies if value is not None]
    if len(known) < len(validation_accuracies) or len(known) <= patience:
        return True
    return max(known[-patience:]) > max(known[:-patience])


def best_cycle(validation_accuracies: list[float | None]) -> int:
    """The cycle whose network becomes the bundle: best on validation, the later of equals; the last without any."""
    if any(value is None for value in validation_accuracies):
        return len(validation_accuracies) - 1
    best = max(value for value in validation_accuracies if value is not None)
    return max(index for index, value in enumerate(validation_accuracies) if value == best)
