"""The report of a training run: one HTML file that needs nothing else, to read on any screen.

What goes in are plain values (`RunReport`), so a report can be written again from a finished run, or from made-up
numbers in a test. Charts are in `charts`, the page itself is `report.html.j2`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from protopnet.pages import charts
from protopnet.pages.pictures import Inlined, Picture, data_uri, encoded, opened, shrunk
from protopnet.pages.templates import render
from protopnet.quality.table import QualityRow
from protopnet.words import duration, flatten, percent, readable_names

# Loss terms in the order of the page. Each is a chart: their scales differ.
LOSS_TERMS = {
    "total": "Total loss",
    "cross_entropy": "Cross-entropy",
    "cluster": "Cluster cost",
    "separation": "Separation cost",
    "average_separation": "Average separation",
    "l1": "L1 of the class connections",
}
TERM_NOTES = {
    "total": "weighted sum of the terms below",
    "cluster": "distance to the nearest prototype of the own class: should fall",
    "separation": "distance to the nearest prototype of another class: should stay large",
    "average_separation": "mean distance to the prototypes of other classes",
    "l1": "connections of prototypes to classes other than their own",
}
STAGES = {
    "data": "Read and check the images",
    "start": "Start from data",
    "import": "Import the authors' network",
    "joint": "Train",
    "push": "Push prototypes onto patches",
    "last-layer": "Optimise the class connections",
    "bundle": "Write the bundle",
    "evaluate": "Evaluate the bundle",
}

# Of a report with many prototypes, thumbnails are made smaller: 2,000 at full size would be 40 MB.
FULL_THUMBNAILS, SMALL_SIDE = 400, 128
MATRIX_CLASSES = 32  # a confusion matrix of more classes is left out
OPEN_CLASSES = 24  # more classes than this are folded


@dataclass(frozen=True)
class StageReport:
    """One stage in order. `name` as of its folder (`03-push`); accuracies are those after it, where measured."""

    name: str
    seconds: float
    validation_accuracy: float | None = None
    test_accuracy: float | None = None


@dataclass(frozen=True)
class RunReport:
    """Everything a report says.

    settings: the resolved settings, nested. metrics: rows of metrics.jsonl (stage, epoch from 0 or None, name, value).
    classes: names by label. confusion: rows of true class, predicted class, images; None if nothing was evaluated.
    prototypes: a table with the columns of `PROTOTYPE_SCHEMA`; None for a baseline. bundle: where it is. summary: of
    summary.json, `test_accuracy`, `seconds`, `image_passes` and `versions` are shown if they are there. examples:
    explained test images (`training.examples`); images: what their pictures are of. quality: of the explanations,
    measured on the test images. calibration: the calibration error there, before and after the temperature.
    """

    settings: Mapping[str, Any]
    stages: Sequence[StageReport]
    metrics: Sequence[Mapping[str, Any]]
    classes: Sequence[str]
    bundle: str
    summary: Mapping[str, Any] = field(default_factory=dict)
    confusion: Sequence[Sequence[int]] | None = None
    prototypes: pa.Table | None = None
    examples: Sequence[Mapping[str, Any]] = ()
    images: Mapping[str, Inlined] = field(default_factory=dict)
    quality: Sequence[QualityRow] = ()
    calibration: tuple[float, float] | None = None


def write_report(run: RunReport) -> str:
    """The report as one HTML document."""
    confusion = None if run.confusion is None else np.array(run.confusion, dtype=int).reshape(-1, 3)
    names, sheet = readable_names(run.classes), dict(run.images)
    return render(
        "training/report.html.j2",
        title=run.settings.get("name", "run"),
        run=run,
        facts=_facts(run),
        charts=_charts(run),
        stages=_stage_rows(run.stages),
        confusion=_confusion_rows(confusion, names),
        confused=[] if confusion is None else most_confused(confusion, names),
        names=names,
        class_cards=_class_cards(run, names, confusion, sheet),
        sheet=sheet,
        folded=len(run.classes) > OPEN_CLASSES,
        settings=list(flatten(run.settings)),
    )


def _facts(run: RunReport) -> list[tuple[str, str]]:
    """Label and value of each figure in the headline."""
    model = run.settings.get("model", {})
    summary = run.summary
    seconds = summary.get("seconds", sum(stage.seconds for stage in run.stages))
    facts = [("test accuracy", percent(summary.get("test_accuracy"))), ("time", duration(seconds))]
    if run.calibration:
        before, after = run.calibration
        facts.append(("calibration error", f"{percent(after)} ({percent(before)} before)"))
    if summary.get("image_passes"):
        facts.append(("image passes", f"{summary['image_passes']:,}"))
    facts.append(("classes", str(len(run.classes))))
    if run.prototypes is not None:
        facts.append(("prototypes", f"{len(run.prototypes):,}"))
    kind = "black-box baseline" if model.get("kind") == "baseline" else f"{model.get('similarity', '')} similarity"
    return [*facts, ("model", f"{model.get('backbone', '')}, {kind}".strip(", "))]


# --------------------------------------------------------------------------------------------- curves


def _charts(run: RunReport) -> list[dict[str, Any]]:
    """Title, note and SVG of each small chart: accuracy, then the loss terms there are."""
    epochs = [row for row in run.metrics if row.get("epoch") is not None]
    pushes = [place for stage, place in _places(run) if _kind(stage.name) == "push"]
    shown = []
    accuracy = charts.series_by_name(epochs, {"accuracy": "training", "validation_accuracy": "validation"})
    tested = [(place, s.test_accuracy) for s, place in _places(run) if s.test_accuracy is not None and place]
    if tested:
        points = charts.Curve("test, after a stage", [x for x, _ in tested], [y for _, y in tested], joined=False)
        accuracy.append(points)
    if accuracy:
        drawn = charts.curves_chart(accuracy, pushes, percent=True, description="Accuracy by epoch, in per cent")
        shown.append({"title": "Accuracy, %", "note": "", "svg": drawn})
    for name, title in LOSS_TERMS.items():
        curves = charts.series_by_name(epochs, {name: title})
        if any(min(curve.y) < max(curve.y) for curve in curves):  # a flat line says nothing
            drawn = charts.curves_chart(curves, pushes, description=f"{title} by epoch")
            shown.append({"title": title, "note": TERM_NOTES.get(name, ""), "svg": drawn})
    return shown


def _places(run: RunReport) -> list[tuple[StageReport, float]]:
    """Each stage with the epoch it ends at; 0 before any training."""
    last: dict[str, int] = {}
    for row in run.metrics:
        if row.get("epoch") is not None:
            last[row["stage"]] = max(last.get(row["stage"], 0), int(row["epoch"]) + 1)
    places: list[tuple[StageReport, float]] = []
    epoch = 0
    for stage in run.stages:
        epoch = max(epoch, last.get(stage.name, 0))
        places.append((stage, epoch))
    return places


# --------------------------------------------------------------------------------------------- stages


def _kind(stage_name: str) -> str:
    return stage_name.split("-", 1)[-1] if stage_name[:1].isdigit() else stage_name


def _stage_rows(stages: Sequence[StageReport]) -> list[dict[str, Any]]:
    longest = max((stage.seconds for stage in stages), default=0) or 1
    return [
        {"stage": s, "title": STAGES.get(_kind(s.name), s.name), "share": 100 * s.seconds / longest} for s in stages
    ]


# -------------------------------------------------------------------------------------------- classes


def _confusion_rows(confusion_C3: np.ndarray | None, names: Sequence[str]) -> list[tuple[str, list[tuple[int, float]]]]:
    """For each true class the images taken for each class: how many, and in per cent. None of many classes: nobody
    reads such a matrix, and `most_confused` says what is in it."""
    if confusion_C3 is None or len(names) > MATRIX_CLASSES:
        return []
    counts_KK = np.zeros((len(names), len(names)), dtype=int)
    counts_KK[confusion_C3[:, 0], confusion_C3[:, 1]] = confusion_C3[:, 2]
    shares_KK = 100 * counts_KK / np.maximum(1, counts_KK.sum(1, keepdims=True))
    rows = zip(names, counts_KK.tolist(), shares_KK.tolist(), strict=True)
    return [(name, list(zip(counts, shares, strict=True))) for name, counts, shares in rows]


def most_confused(confusion_C3: np.ndarray, names: Sequence[str], limit: int = 20) -> list[dict[str, object]]:
    """The commonest mistakes: true and predicted class, how many images, and of how many."""
    totals_K = np.bincount(confusion_C3[:, 0], confusion_C3[:, 2], minlength=len(names))
    mistakes_M3 = confusion_C3[confusion_C3[:, 0] != confusion_C3[:, 1]]
    commonest = mistakes_M3[np.lexsort((mistakes_M3[:, 1], mistakes_M3[:, 0], -mistakes_M3[:, 2]))][:limit]
    return [
        {"true": names[i], "predicted": names[j], "count": images, "of": int(totals_K[i])}
        for i, j, images in commonest.tolist()
    ]


def _class_cards(
    run: RunReport, names: list[str], confusion_C3: np.ndarray | None, sheet: dict[str, Inlined]
) -> list[dict[str, Any]]:
    """For each class: its name, accuracy, what it is mostly taken for, and its prototypes."""
    pictures: dict[int, list[dict[str, Any]]] = {label: [] for label in range(len(names))}
    for picture in _pictures(run.prototypes, sheet):
        pictures[picture["class"]].append(picture)
    taken_for: dict[int, Counter[int]] = {label: Counter() for label in range(len(names))}
    for label, predicted, images in [] if confusion_C3 is None else confusion_C3.tolist():
        taken_for[label][predicted] = images
    cards = []
    for label, name in enumerate(names):
        count, right = taken_for[label].total(), taken_for[label][label]
        mistakes = [names[i] for i, _ in taken_for[label].most_common(3) if i != label]
        cards.append(
            {
                "name": name,
                "count": count,
                "right": right,
                "accuracy": right / count if count else None,
                "mistakes": mistakes[:2],
                "pictures": pictures[label],
            }
        )
    return cards


def _pictures(prototypes: pa.Table | None, sheet: dict[str, Inlined]) -> list[dict[str, Any]]:
    """What the page shows of each prototype; the images they are on are added to its `sheet`."""
    if prototypes is None:
        return []
    shown = []
    small = len(prototypes) > FULL_THUMBNAILS
    columns = ["prototype", "class", "image_id", "uri", "width", "height", "box", "thumbnail"]
    for row in prototypes.select(columns).to_pylist():
        symbol, size, image = f"i{row['image_id']}", (row["width"], row["height"]), row["uri"].rsplit("/", 1)[-1]
        if symbol not in sheet:
            jpeg = encoded(shrunk(opened(row["thumbnail"]), SMALL_SIDE)) if small else row["thumbnail"]
            sheet[symbol] = Inlined(*size, data_uri(jpeg))
        label = f"prototype {row['prototype']} on {image}"
        picture = Picture(symbol, *size, tuple(row["box"]), label)
        shown.append({"prototype": row["prototype"], "class": row["class"], "image": image, "picture": picture})
    return shown
