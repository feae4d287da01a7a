"""One trial of a search, as Ray Tune runs it: an ordinary run in a process of its own, whose epochs Tune hears of.

The run itself isn't in Tune's actor: it brings stages of its own to the cluster, as any run does, and may be killed.
"""

from typing import Any

from ray import tune

from protopnet import storage
from protopnet.config import RunSettings
from protopnet.experiments.workers import Worker
from protopnet.predictor import Predictor
from protopnet.quality.evaluate import evaluate
from protopnet.quality.quality_pass import QualityOptions
from protopnet.training.run import Run
from protopnet.training.runlog import RunLog
from protopnet.training.stages import CURVE_IMAGES

POLL_SECONDS = 0.5
FOLDER = "validation"  # below a trial's: its bundle on the validation images, where a measure is asked for


class Trial(tune.Trainable):
    """A step is an epoch; the last one is the end of the run."""

    def setup(self, config: dict[str, Any]) -> None:
        self.worker = Worker()
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial in this actor; its process goes on, unless the last trial was stopped in it."""
        if getattr(self, "running", False):
            self.cleanup()
            self.worker = Worker()
        settings = RunSettings.model_validate(new_config["run"]["settings"])
        self.folder = storage.join(settings.storage, settings.name)
        self.connection = self.worker.begin(settings, on_validation_images if new_config["run"]["measured"] else None)
        self.running, self.told = True, 0
        return True

    def step(self) -> dict[str, Any]:
        while True:
            ended = self.connection.poll(POLL_SECONDS)
            epochs = accuracies(self.folder)
            if len(epochs) > self.told:
                self.told += 1
                return {"epoch": self.told, "accuracy": epochs[self.told - 1], "failure": None}
            if ended:
                failure, self.running = self.worker.outcome(), False
                last = epochs[-1] if epochs and not failure else 0.0
                return {"epoch": self.told, "accuracy": last, "failure": failure, "done": True}

    def cleanup(self) -> None:
        self.worker.tell_to_end()
        self.worker.end()


def accuracies(folder: str) -> list[float]:
    """Validation accuracy after each epoch that a run has had."""
    rows = RunLog(folder).rows
    return [row["value"] for row in rows if row["epoch"] is not None and row["name"] == "validation_accuracy"]


def on_validation_images(run: Run) -> None:
    """The bundle of a finished run on its validation images, with the quality of its explanations."""
    folder = storage.join(run.uri, FOLDER)
    if not storage.exists(storage.join(folder, "metrics.json")):
        evaluate(
            Predictor.load([storage.join(run.uri, "bundle")]),
            run.dataset.split("validation"),
            folder,
            options=run.options(),
            quality=QualityOptions(CURVE_IMAGES, run.settings.seed),
            source=run.dataset.source,
        )
