"""The table of a search, and its best settings as a file: arithmetic and words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from protopnet.config import RunSettings
from protopnet.experiments.sheets import Sheet, markdown, page
from protopnet.experiments.space import Drawn, TuneSettings, score
from protopnet.quality.table import METRICS
from protopnet.settings_text import shown
from protopnet.words import duration, percent


@dataclass(frozen=True)
class Ended:
    """A trial: what became of it, its validation accuracy after each epoch, what its run and its bundle came to."""

    state: Literal["finished", "stopped", "failed"]
    epochs: Sequence[float] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    failure: str | None = None
    quality: Mapping[str, Any] = field(default_factory=dict)


def trials_figures(trials: Sequence[Drawn], ended: Mapping[str, Ended], searched: TuneSettings) -> dict[str, Any]:
    """The content of table.json: the trials that have ended, and which of the finished ones is best."""
    rows = [_row(each, ended[each.name], searched) for each in trials if each.name in ended]
    finished = [row for row in rows if row["score"] is not None]
    best = max(finished, key=lambda row: row["score"], default=None)  # the earlier of equals
    return {
        "name": "Search",
        "measure": searched.measure,
        "weight": searched.weight if searched.measure else None,
        "best": best and best["trial"],
        "trials": rows,
    }


def _row(trial: Drawn, ended: Ended, searched: TuneSettings) -> dict[str, Any]:
    accuracy = validation_accuracy(ended.summary) if ended.state == "finished" else None
    measured = (ended.quality.get(searched.measure) or {}).get("value") if searched.measure else None
    known = accuracy is not None and (searched.measure is None or measured is not None)
    return {
        "trial": trial.name,
        "state": ended.state,
        "settings": dict(trial.changes),
        "accuracy": accuracy,
        "measured": measured,
        "score": score(accuracy, measured, searched) if known and accuracy is not None else None,
        "epochs": len(ended.epochs),
        "last_epoch": ended.epochs[-1] if ended.epochs else None,
        "image_passes": ended.summary.get("image_passes"),
        "seconds": ended.summary.get("seconds"),
        "failure": ended.failure,
    }


def validation_accuracy(summary: Mapping[str, Any]) -> float | None:
    """Of the bundle of a finished run: after the last stage of its cycle that training had."""
    *stages, bundle, _ = summary["stages"]
    known = [
        stage["validation_accuracy"]
        for stage in stages
        if stage["cycle"] == bundle["cycle"] and stage.get("validation_accuracy") is not None
    ]
    return known[-1] if known else None


def as_markdown(figures: Mapping[str, Any]) -> str:
    return markdown(figures["name"], _sheets(figures))


def as_page(figures: Mapping[str, Any]) -> str:
    return page(figures["name"], _sheets(figures))


def _sheets(figures: Mapping[str, Any]) -> list[Sheet]:
    measure = figures["measure"]
    names = list(figures["trials"][0]["settings"]) if figures["trials"] else []
    extra = [METRICS[measure].label, "score"] if measure else []
    header = ["trial", *names, "validation", *extra, "after the last epoch", "epochs", "image passes", "time", "state"]
    rows = [
        [
            row["trial"],
            *(shown(row["settings"][name]) for name in names),
            _percent(row["accuracy"]),
            *((_number(row["measured"]), _number(row["score"])) if measure else ()),
            _percent(row["last_epoch"]),
            str(row["epochs"]),
            "" if row["image_passes"] is None else f"{row['image_passes']:,}",
            "" if row["seconds"] is None else duration(row["seconds"]),
            "best" if row["trial"] == figures["best"] else row["state"],
        ]
        for row in figures["trials"]
    ]
    note = "On validation images; trial-000 has the settings as given. No trial has seen the test images."
    failed = [[row["trial"], row["failure"]] for row in figures["trials"] if row["failure"]]
    return [
        Sheet("Trials", note, header, rows),
        Sheet("Failed", "The same command tries them again.", ["trial", "why"], failed),
    ]


def best_yaml(figures: Mapping[str, Any], trials: Sequence[Drawn], given: RunSettings) -> str:
    """All settings of the best trial, with the data and the storage as given: for `jobs/train.py --config`."""
    [best] = [each for each in trials if each.name == figures["best"]]
    [row] = [row for row in figures["trials"] if row["trial"] == best.name]
    settings = best.settings.model_copy(update={"name": f"{given.name}-tuned"})
    changes = "".join(f"#   {name}: {shown(value)}\n" for name, value in best.changes.items())
    head = f"# {best.name} of {len(figures['trials'])}: {percent(row['accuracy'])} of the validation images right.\n"
    return head + changes + yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def _percent(value: float | None) -> str:
    return "" if value is None else percent(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
