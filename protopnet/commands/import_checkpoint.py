"""A network that the ProtoPNet authors' code trained -> a bundle, with where each prototype comes from, and its evaluation.

python jobs/import_checkpoint.py --config configs/cub200/resnet34.yaml --model.weights 10_18push0.7822.pth \\
    --data.path CUB_200_2011 --name theirs

The file is the network's state dict: torch.save(model.state_dict(), file) where theirs is at hand. The data must be the
images it was trained on: each prototype is looked for among them, and moved onto the patch it is. The settings are those
of jobs/train.py; the number and size of the prototypes are read from the file, and nothing is trained.
"""

from typing import Literal

from pydantic import Field

from protopnet.cli import parse
from protopnet.config import ModelSettings, RunSettings
from protopnet.errors import UserError, exit_with_a_sentence
from protopnet.model.legacy import sized_as_authors
from protopnet.model.weights import read_state
from protopnet.progress import make_reporter
from protopnet.training.execute import execute_import
from protopnet.training.run import Run
from protopnet.training.summary import conclude

FARTHEST = (
    1e-2  # squared distance to its patch that pixels read anew explain: theirs were cut out and saved as JPEG again
)


class TheirModelSettings(ModelSettings):
    """The network."""

    similarity: Literal["log", "linear", "cosine"] = Field("log", description="theirs is log, or linear")


class ImportSettings(RunSettings):
    """Settings of `jobs/import_checkpoint.py`."""

    model: TheirModelSettings = TheirModelSettings()


@exit_with_a_sentence
def main() -> None:
    given = parse(ImportSettings, description=__doc__)
    run = Run(_as_theirs(RunSettings.model_validate(given.model_dump())), make_reporter())
    try:
        execute_import(run)
    finally:
        run.reporter.close()
    print(f"\n{conclude(run)}")
    farthest = run.results["03-push"]["distance_max"]
    if farthest > FARTHEST:
        print(
            f"note: a prototype was moved by {farthest:.3g} (squared distance) onto the nearest patch of its class: the "
            "network wasn't pushed last, or these aren't the images it was trained on"
        )


def _as_theirs(settings: RunSettings) -> RunSettings:
    """The sizes of the file; nothing trained; prototypes may share a patch, as theirs do."""
    if settings.model.weights in (None, "imagenet", "pretrained") or settings.model.kind != "protopnet":
        raise UserError("model.weights is missing: which file holds the state dict of the authors' network?")
    return settings.model_copy(
        update={
            "model": sized_as_authors(settings.model, read_state(str(settings.model.weights))),
            "train": settings.train.model_copy(update={"warm_epochs": 0, "joint_epochs": 0, "cycles": 1}),
            "push": settings.push.model_copy(update={"distinct": False}),
        }
    )


if __name__ == "__main__":
    main()
