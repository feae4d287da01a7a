"""Trackers of experiments: they hear of a run's settings, of its numbers as they come, and of its report and bundle.

A run's own folder has all of it (`metrics.jsonl`, `report.html`, `bundle/`), so a server that fails later than at the
start costs a note, not the run. A run that goes on is the same run there: `tracking.json` has its id.
"""

import importlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
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
    """The trackers that a run's settings ask for. tell: hears, once for each, of those that failed."""

    def __init__(self, settings: RunSettings, log: RunLog, run_uri: str, tell: Callable[[str], None]) -> None:
        self.log, self.tell, self.run_uri = log, tell, run_uri
        self.events = "tensorboard" in settings.tracking.to
        asked = [name for name in settings.tracking.to if name in _KINDS]
        uri = storage.join(run_uri, "tracking.json")
        before: dict[str, str] = storage.read_json(uri) if asked and storage.exists(uri) else {}
        self.trackers: dict[str, Tracker] = {}
        self.sent: dict[str, list[Row]] = {}
        for name in asked:
            try:
                self.trackers[name] = _KINDS[name](settings, before.get(name))
            except Exception as error:
                if isinstance(error, UserError):
                    raise
                why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                raise UserError(f"tracking.to: {name} can't be reached ({why}); start it, or leave it out") from error
            self.sent[name] = list(log.rows) if name in before else []
        if asked:
            storage.write_json(uri, before | {name: tracker.id for name, tracker in self.trackers.items()})

    def flush(self) -> None:
        """Numbers that are new since the last time."""
        for name in list(self.trackers):
            with self._or_a_note(name):
                new = [row for row in self.log.rows if row not in self.sent[name]]
                self.trackers[name].note(new)
                self.sent[name] += new

    def finish(self, summary: Mapping[str, Any], report_uri: str, bundle_uri: str) -> None:
        """All that is left: TensorBoard's events, and a finished run at each tracker."""
        if self.events:
            self.log.write_tensorboard()
        self.flush()
        if not self.trackers:
            return
        with tempfile.TemporaryDirectory() as folder:
            for uri in (report_uri, *storage.list_files(bundle_uri)):
                path = Path(folder, *(("bundle",) if uri != report_uri else ()), uri.rsplit("/", 1)[-1])
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(storage.read_bytes(uri))
            for name in list(self.trackers):
                with self._or_a_note(name):
                    self.trackers[name].finish(summary, Path(folder, "report.html"), Path(folder, "bundle"))

    @contextmanager
    def _or_a_note(self, name: str) -> Any:
        try:
            yield
        except Exception as error:
            del self.trackers[name]
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.tell(f"tracking: {name} failed and hears no more of this run ({why})")


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"tracking.to has {name}, which isn't installed: pip install 'protopnet[{name}]'") from None
