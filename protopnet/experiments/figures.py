"""The figures of a table: means over seeds, gaps, ensembles. What goes in are the files that finished runs have left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

import numpy as np

from protopnet import storage
from protopnet.errors import UserError
from protopnet.experiments.table import Ensemble, Published, Row, Table
from protopnet.quality.table import METRICS
from protopnet.tables import read_table


@dataclass(frozen=True)
class Outcome:
    """One run: what it left, or why it failed. evaluation: folder of its last stage."""

    seed: int
    folder: str
    failure: str | None = None
    kind: str = "protopnet"
    summary: Mapping[str, Any] = field(default_factory=dict)
    evaluation: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)


def read_outcome(seed: int, folder: str, kind: str) -> Outcome:
    """Of a complete run."""
    summary = storage.read_json(storage.join(folder, "summary.json"))
    evaluation = storage.join(folder, "stages", summary["stages"][-1]["name"])
    measured = storage.join(evaluation, "metrics.json")
    metrics = storage.read_json(measured) if storage.exists(measured) else {}
    return Outcome(seed, folder, None, kind, summary, evaluation, metrics)


def table_figures(table: Table, outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, Any]:
    """The content of table.json. outcomes: by row, one a seed; of those that aren't there yet nothing is said.

    Accuracies and gaps are shares, seconds and image passes means of a run.
    """
    rows = {name: _row_figures(name, row, outcomes.get(name, ())) for name, row in table.rows.items()}
    for name, row in table.rows.items():
        if row.baseline:
            rows[name] |= _gaps(rows[name], rows[row.baseline]) | {"baseline": row.baseline}
    ensembles = [_ensemble_figures(name, each, rows, outcomes, table.seeds) for name, each in table.ensembles.items()]
    return {"name": table.name, "seeds": table.seeds, "rows": list(rows.values()), "ensembles": ensembles}


def failures(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What failed and why, a run or an ensemble each."""
    of_runs = [(run["run"], run["failure"]) for row in figures["rows"] for run in row["runs"] if run["failure"]]
    return of_runs + [(each["ensemble"], each["failure"]) for each in figures["ensembles"] if each["failure"]]


def _row_figures(name: str, row: Row, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    done = [outcome for outcome in outcomes if outcome.failure is None]
    accuracies = [outcome.summary["test_accuracy"] for outcome in done]
    return {
        "row": name,
        **_published(name, row),
        "kind": outcomes[0].kind if outcomes else None,
        "accuracy": _spread(accuracies),
        "gap": None,
        "published_gap": None,
        "image_passes": _mean([outcome.summary["image_passes"] for outcome in done]),
        "seconds": _mean([outcome.summary["seconds"] for outcome in done]),
        "quality": _quality([outcome.metrics.get("quality") or {} for outcome in done]),
        "runs": [
            {
                "run": outcome.folder.rsplit("/", 1)[-1],
                "seed": outcome.seed,
                "accuracy": outcome.summary.get("test_accuracy"),
                "image_passes": outcome.summary.get("image_passes"),
                "seconds": outcome.summary.get("seconds"),
                "failure": outcome.failure,
            }
            for outcome in outcomes
        ],
    }


def _published(name: str, of: Published) -> dict[str, Any]:
    return {
        "label": of.label or name,
        "published": None if of.published is None else of.published / 100,
        "published_deviation": None if of.published_deviation is None else of.published_deviation / 100,
    }


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, and the standard deviation of a sample, which one value hasn't."""
    known = [value for value in values if value is not None]
    deviation = stdev(known) if len(known) > 1 else None
    return {"mean": _mean(known), "deviation": deviation, "count": len(known)}


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None


def _quality(measured: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of each measure over the runs that have it."""
    values = {name: [each[name]["value"] for each in measured if each.get(name)] for name in METRICS}
    return {name: mean(found) for name, found in values.items() if found}


def _gaps(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, float | None]:
    ours, theirs = row["accuracy"]["mean"], baseline["accuracy"]["mean"]
    published = row["published"], baseline["published"]
    return {
        "gap": None if None in (ours, theirs) else ours - theirs,
        "published_gap": None if None in published else published[0] - published[1],
    }


# ------------------------------------------------------------------------------------------ ensembles


def _ensemble_figures(
    name: str,
    ensemble: Ensemble,
    rows: Mapping[str, Mapping[str, Any]],
    outcomes: Mapping[str, Sequence[Outcome]],
    seeds: Sequence[int],
) -> dict[str, Any]:
    """One ensemble a seed, or one of all seeds; no figures while a member has none."""
    by_run = {(row, outcome.seed): outcome for row in ensemble.members for outcome in outcomes.get(row, ())}
    accuracies, failure = [], None
    for chosen in [seeds] if ensemble.across_seeds else [[seed] for seed in seeds]:
        found = [by_run.get((row, seed)) for seed in chosen for row in ensemble.members]
        lost = [outcome.folder.rsplit("/", 1)[-1] for outcome in found if outcome is not None and outcome.failure]
        if lost:
            failure = failure or f"its member {lost[0]} failed"
            continue
        whole = [outcome for outcome in found if outcome is not None]
        if len(whole) < len(found):
            continue
        try:
            accuracies.append(ensemble_accuracy([outcome.evaluation for outcome in whole]))
        except UserError as error:
            failure = failure or str(error)
    alone = [rows[row]["accuracy"]["mean"] for row in ensemble.members if rows[row]["accuracy"]["mean"] is not None]
    accuracy = _spread(accuracies)
    best = max(alone, default=None)
    return {
        "ensemble": name,
        **_published(name, ensemble),
        "members": ensemble.members,
        "across_seeds": ensemble.across_seeds,
        "accuracy": accuracy,
        "best_member": best,
        "gain": None if best is None or accuracy["mean"] is None else accuracy["mean"] - best,
        "failure": failure,
    }


def ensemble_accuracy(evaluations: Sequence[str]) -> float:
    """Accuracy of bundles as an ensemble, from the logits of the evaluations in these folders: their sum, as
    `Predictor` takes it. `UserError` unless all looked at the same images, with the same classes."""
    tables, classes = [], []
    for folder in evaluations:
        measured = storage.join(folder, "metrics.json")
        if not storage.exists(measured):
            raise UserError(f"{folder} has no evaluation: there were no test images")
        classes.append(list(storage.read_json(measured)["per_class"]))
        tables.append(read_table(storage.join(folder, "predictions.parquet")).sort_by("uri"))
    first = tables[0].select(["uri", "label"])
    for names, table in zip(classes[1:], tables[1:], strict=True):
        if names != classes[0] or table.select(["uri", "label"]) != first:
            raise UserError(
                "the members of an ensemble were tested on other images or classes; give them the same data"
            )
    logits_MnK = np.stack([np.stack(table["logits"].to_numpy()) for table in tables])
    return float(np.mean(logits_MnK.sum(0).argmax(1) == first["label"].to_numpy()))
