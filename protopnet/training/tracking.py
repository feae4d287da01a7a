"""Trackers of experiments: they hear of a run's settings, of its numbers as they come, and of its report and bundle.

A run's own folder has all of it (`metrics.jsonl`, `report.html`, `bundle/`), so a server that fails later than at the
start costs a note, not the run.
"""

import importlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any, Protocol

from protopnet import __version__, storage
from protopnet.config import RunSettings
from protopnet.errors import UserError
from protopnet.settings_text import flat, shown
from protopnet.training.runlog import RunLog

_AN_IMAGE_EXPLAINED = Path(__file__).parents[1] / "api/pyfunc.py"  # code that MLflow keeps with the model

Row = Mapping[str, Any]


class Tracker(Protocol):
    """One place that figures go to; id: of the run there."""

    id: str

    def note(self, rows: Sequence[Row]) -> None:
        """Numbers, as lines of metrics.jsonl."""

    def finish(self, summary: Mapping[str, Any], report: Path, bundle: Path) -> None:
        """Of a complete run."""


class MLflow:
    """Parameters, metrics, the report and the bundle, which becomes a pyfunc model that explains images."""

    def __init__(self, settings: RunSettings, run_id: str | None) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # else a server that is gone costs minutes
        self.mlflow, self.settings = _module("mlflow"), settings
        self.client = self.mlflow.MlflowClient()
        if run_id is not None:
            self.client.update_run(run_id, status="RUNNING")
            self.id = run_id
            return
        found = self.client.get_experiment_by_name(settings.tracking.project)
        experiment = found.experiment_id if found else self.client.create_experiment(settings.tracking.project)
        self.id = self.client.create_run(experiment, run_name=settings.name).info.run_id
        parameters = [
            self.mlflow.entities.Param(name, shown(value))
            for name, value in flat(settings.model_dump(mode="json")).items()
        ]
        for first in range(0, len(parameters), 100):  # more it doesn't take at a time
            self.client.log_batch(self.id, params=parameters[first : first + 100])

    def note(self, rows: Sequence[Row]) -> None:
        metric = self.mlflow.entities.Metric
        metrics = [metric(row["name"], row["value"], int(1000 * row["time"]), row["step"]) for row in rows]
        for first in range(0, len(metrics), 1000):
            self.client.log_batch(self.id, metrics=metrics[first : first + 1000])

    def finish(self, summary: Mapping[str, Any], report: Path, bundle: Path) -> None:
        with self.mlflow.start_run(run_id=self.id, log_system_metrics=False):
            self.mlflow.log_artifact(str(report))
            self.mlflow.pyfunc.log_model(
                name="model",
                python_model=str(_AN_IMAGE_EXPLAINED),
                artifacts={"bundle": str(bundle)},
                pip_requirements=[f"protopnet=={__version__}"],
                registered_model_name=self.settings.tracking.register_as,
            )


class WandB:
    """Settings, metrics, and the report and the bundle as an artefact."""

    def __init__(self, settings: RunSettings, run_id: str | None) -> None:
        self.wandb = _module("wandb")
        project, config = settings.tracking.project, settings.model_dump(mode="json")
        self.run = self.wandb.init(project=project, name=settings.name, id=run_id, config=config, resume="allow")
        self.run.define_metric("*", step_metric="at")
        self.id = self.run.id

    def note(self, rows: Sequence[Row]) -> None:
        for step in sorted({row["step"] for row in rows}):
            self.run.log({"at": step} | {row["name"]: row["value"] for row in rows if row["step"] == step})

    def finish(self, summary: Mapping[str, Any], report: Path, bundle: Path) -> None:
        artefact = self.wandb.Artifact(summary["name"], type="model")
        artefact.add_dir(str(bundle), name="bundle")
        artefact.add_file(str(report))
        self.run.log_artifact(artefact)
        self.run.finish()


_KINDS: dict[str, Callable[[RunSettings, str | None], Tracker]] = {"mlflow": MLflow, "wandb": WandB}


class Tracking:
    """The trackers that a run's settings ask for. tell: hears of one that failed; it hears no more of the run.

    `tracking.json` in the run's folder has of each its id there, the time of the last number it heard, and whether it
    has the finished run: so a run that goes on tells what they don't have.
    """

    def __init__(self, settings: RunSettings, log: RunLog, run_uri: str, tell: Callable[[str], None]) -> None:
        self.log, self.tell = log, tell
        self.events = "tensorboard" in settings.tracking.to
        self.uri = storage.join(run_uri, "tracking.json")
        self.told: dict[str, dict[str, Any]] = storage.read_json(self.uri) if storage.exists(self.uri) else {}
        self.trackers: dict[str, Tracker] = {}
        for name in settings.tracking.to:
            before = self.told.get(name, {"id": None, "until": 0.0, "finished": False})
            if name in _KINDS and not before["finished"]:
                self.trackers[name] = _reached(name, settings, before["id"])
                self.told[name] = before | {"id": self.trackers[name].id}
        if self.trackers:
            storage.write_json(self.uri, self.told)

    def flush(self) -> None:
        """Numbers that are new since the last time."""
        for name in list(self.trackers):
            if new := [row for row in self.log.rows if row["time"] > self.told[name]["until"]]:
                self._tell(name, methodcaller("note", new), until=max(row["time"] for row in new))

    def finish(self, summary: Mapping[str, Any], report_uri: str, bundle_uri: str) -> None:
        """All that is left: TensorBoard's events, and a finished run at each tracker."""
        if self.events:
            self.log.write_tensorboard()
        self.flush()
        if not self.trackers:
            return
        with tempfile.TemporaryDirectory() as folder:
            report, bundle = Path(folder, "report.html"), Path(folder, "bundle")
            report.write_bytes(storage.read_bytes(report_uri))
            bundle.mkdir()
            for uri in storage.list_files(bundle_uri):
                Path(bundle, uri.rsplit("/", 1)[-1]).write_bytes(storage.read_bytes(uri))
            for name in list(self.trackers):
                self._tell(name, methodcaller("finish", summary, report, bundle), finished=True)

    def _tell(self, name: str, what: Callable[[Tracker], None], **told: Any) -> None:
        try:
            what(self.trackers[name])
        except Exception as error:
            del self.trackers[name]
            self.tell(f"tracking: {name} failed and hears no more of this run ({_in_a_line(error)})")
        else:
            self.told[name] |= told
            storage.write_json(self.uri, self.told)


def _reached(name: str, settings: RunSettings, run_id: str | None) -> Tracker:
    try:
        return _KINDS[name](settings, run_id)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"tracking.to: {name} can't be reached ({_in_a_line(error)}); start it, or leave it out"
        ) from error


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"tracking.to has {name}, which isn't installed: pip install 'protopnet[{name}]'") from None
