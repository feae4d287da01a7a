"""Train a ProtoPNet (or its black-box baseline), from images to a bundle.

python jobs/train.py --config configs/quickstart.yaml
python jobs/train.py --data.source folder --data.path my-images --name my-run
python jobs/train.py --config configs/quickstart.yaml --plan      what it would use; starts nothing
"""

from collections.abc import Mapping
from typing import Any

from protopnet.cli import checked, parse
from protopnet.config import RunSettings
from protopnet.errors import exit_with_a_sentence
from protopnet.plan import PlanSettings, arguments, this_cluster
from protopnet.progress import make_reporter
from protopnet.training.forecast import plan_run
from protopnet.training.run import Run
from protopnet.training.summary import FinishedRun, complete


class TrainJobSettings(RunSettings):
    """Settings of `jobs/train.py`."""

    plan: PlanSettings = PlanSettings()


def train(settings: RunSettings | Mapping[str, Any]) -> FinishedRun:
    """Train a network, or go on where the run of these settings was cut off. `UserError` for what is wrong with them."""
    return complete(Run(checked(RunSettings, settings), make_reporter()))


@exit_with_a_sentence
def main() -> None:
    given = parse(TrainJobSettings, arguments(), description=__doc__)
    settings = RunSettings.model_validate(given.model_dump(exclude={"plan"}))
    if given.plan.wanted:
        print(plan_run(settings, this_cluster(settings.compute), given.plan.images_per_second))
        return
    print(f"\n{train(settings)}")
