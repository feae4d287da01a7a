"""Train a ProtoPNet (or its black-box baseline), from images to a bundle.

python jobs/train.py --config configs/quickstart.yaml
python jobs/train.py --data.source folder --data.path my-images --name my-run
python jobs/train.py --config configs/quickstart.yaml --plan      what it would use; starts nothing
"""

from protopnet.cli import parse
from protopnet.config import RunSettings
from protopnet.errors import exit_with_a_sentence
from protopnet.plan import PlanSettings, arguments, this_cluster
from protopnet.progress import make_reporter
from protopnet.training.forecast import plan_run
from protopnet.training.run import Run
from protopnet.training.stages import execute
from protopnet.training.summary import conclude


class TrainJobSettings(RunSettings):
    """Settings of `jobs/train.py`."""

    plan: PlanSettings = PlanSettings()


@exit_with_a_sentence
def main() -> None:
    given = parse(TrainJobSettings, arguments(), description=__doc__)
    settings = RunSettings.model_validate(given.model_dump(exclude={"plan"}))
    if given.plan.wanted:
        print(plan_run(settings, this_cluster(settings.compute), given.plan.images_per_second))
        return
    run = Run(settings, make_reporter())
    try:
        execute(run)
    finally:
        run.reporter.close()
    conclude(run)
