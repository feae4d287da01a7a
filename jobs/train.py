"""Train a ProtoPNet (or its black-box baseline), from images to a bundle.

    python jobs/train.py --config configs/quickstart.yaml
    python jobs/train.py --data.source folder --data.path my-images --name my-run
"""

from protopnet.cli import parse
from protopnet.config import RunSettings
from protopnet.errors import exit_with_a_sentence
from protopnet.training.progress import make_reporter
from protopnet.training.run import Run
from protopnet.training.stages import execute
from protopnet.training.summary import conclude


@exit_with_a_sentence
def main() -> None:
    settings = parse(RunSettings, description=__doc__)
    run = Run(settings, make_reporter())
    try:
        execute(run)
    finally:
        run.reporter.close()
    conclude(run)


if __name__ == "__main__":
    main()
