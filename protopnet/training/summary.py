"""The end of a run: `summary.json`, TensorBoard events, `report.html`, and the last lines a person reads."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import ray
import torch

from protopnet import __version__, storage
from protopnet.model.bundle import Bundle, load_bundle
from protopnet.pages.pictures import Inlined
from protopnet.predictor import Predictor
from protopnet.quality.card import write_card
from protopnet.quality.table import quality_table
from protopnet.tables import read_table
from protopnet.training.examples import explained_examples
from protopnet.training.execute import execute
from protopnet.training.report import RunReport, StageReport, write_report
from protopnet.training.run import Result, Run
from protopnet.words import duration, percent


@dataclass(frozen=True)
class FinishedRun:
    """A complete run: its folder, and the content of its `summary.json`."""

    folder: str
    summary: Mapping[str, Any]

    @property
    def bundle(self) -> str:
        return storage.join(self.folder, "bundle")

    @property
    def report(self) -> str:
        return storage.join(self.folder, "report.html")

    def __str__(self) -> str:
        """What a person reads at the end. The last line names the bundle."""
        accuracy = self.summary["test_accuracy"]
        right = f"{percent(accuracy)} of the test images right" if accuracy is not None else "no test images"
        verdict = f"{self.summary['name']}: {right}, {duration(self.summary['seconds'])}"
        return f"{verdict}\nreport  {self.report}\nbundle  {self.bundle}"


def complete(run: Run) -> FinishedRun:
    """Bring a run to its end from wherever it is. Errors as `execute`."""
    try:
        execute(run)
    finally:
        run.reporter.close()
    return conclude(run)


def conclude(run: Run) -> FinishedRun:
    """Write the summary, the report and the bundle's card of a run whose stages are complete."""
    summary = summarise(run)
    finished = FinishedRun(run.uri, summary)
    storage.write_json(storage.join(run.uri, "summary.json"), summary)
    metrics = _metrics(run)
    write_card(finished.bundle, metrics)
    storage.write_bytes(finished.report, write_report(report_of(run, summary, metrics)).encode())
    run.tracking.finish(summary, finished.report, finished.bundle)
    return finished


def summarise(run: Run) -> dict[str, Any]:
    """The run in numbers, from the results of its stages."""
    stages = [_stage_entry(result, following) for result, following in _with_following(list(run.results.values()))]
    return {
        "name": run.settings.name,
        "test_accuracy": run.results[next(reversed(run.results))].get("test_accuracy"),
        "seconds": round(run.seconds_before + run.watch.seconds, 1),
        "image_passes": sum(result.get("image_passes", 0) for result in run.results.values()),
        "stages": stages,
        "settings_sha256": sha256(run.settings.model_dump_json().encode()).hexdigest(),
        "versions": {
            "protopnet": __version__,
            "ray": ray.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def report_of(run: Run, summary: dict[str, Any], metrics: Mapping[str, Any]) -> RunReport:
    """What the report shows, from the files of a finished run."""
    bundle_uri = storage.join(run.uri, "bundle")
    bundle = load_bundle(bundle_uri)
    predictions = storage.join(_evaluated(run), "predictions.parquet")
    examples, images = _examples(run, bundle, predictions) if metrics else ([], {})
    return RunReport(
        settings=run.settings.model_dump(mode="json"),
        stages=[
            StageReport(stage["name"], stage["seconds"], stage.get("validation_accuracy"), stage["test_accuracy"])
            for stage in summary["stages"]
        ],
        metrics=run.log.rows,
        classes=bundle.classes,
        bundle=bundle_uri,
        summary=summary,
        confusion=metrics.get("confusion"),
        prototypes=bundle.prototypes,
        examples=examples,
        images=images,
        quality=quality_table(metrics.get("quality", {})),
        calibration=(metrics["calibration_error_before"], metrics["calibration_error"]) if metrics else None,
    )


def _metrics(run: Run) -> dict[str, Any]:
    """Those of the evaluation; nothing where there were no test images."""
    measured = storage.join(_evaluated(run), "metrics.json")
    return storage.read_json(measured) if storage.exists(measured) else {}


def _evaluated(run: Run) -> str:
    return storage.join(run.uri, "stages", list(run.results)[-1])


def _examples(
    run: Run, bundle: Bundle, predictions_uri: str
) -> tuple[Sequence[Mapping[str, Any]], Mapping[str, Inlined]]:
    """A few explained test images, and what their pictures are of; none for a baseline."""
    if bundle.prototypes is None:
        return [], {}
    max_pixels = run.settings.data.max_pixels
    return explained_examples(Predictor([bundle]), run.dataset, read_table(predictions_uri), max_pixels)


def _with_following(results: list[Result]) -> list[tuple[Result, Result]]:
    return list(zip(results, [*results[1:], {}], strict=True))


def _stage_entry(result: Result, following: Result) -> dict[str, Any]:
    """A stage with the accuracy after it: its own, or what the stage that follows measured before it began."""
    entry = {key: value for key, value in result.items() if key != "says"}
    if following.get("cycle") == result["cycle"] and result["name"].split("-", 1)[1] in ("start", "push"):
        for split in ("validation", "test"):
            entry[f"{split}_accuracy"] = following.get(f"{split}_accuracy_before")
    return {"test_accuracy": None, **entry}
