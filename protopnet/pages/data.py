"""What a dataset is, on one page: classes with pictures, sizes, copies, and what is doubtful about it."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from protopnet import imaging
from protopnet.config import DataSettings
from protopnet.datasets.duplicates import duplicates_across
from protopnet.datasets.reader import ImageReader
from protopnet.datasets.rows import SPLITS, Dataset
from protopnet.pages.pictures import data_uri, encoded, shrunk
from protopnet.pages.templates import render
from protopnet.words import counted, first_few, readable_names

_SAMPLES, _CLASSES_WITH_SAMPLES, _SIDE = 4, 200, 112  # pictures of a class, of how many classes, in pixels
_LISTED = 100  # rows of a table
_SMALL, _LONG, _FEW = 32, 4, 10  # pixels of the shorter side; sides' ratio; training images of a class
_FLAT = 4  # of 255, between the darkest and the brightest pixel of a sample


@dataclass(frozen=True)
class _Class:
    name: str
    counts: dict[str, int]
    pictures: list[str]


def data_page(dataset: Dataset, title: str, settings: DataSettings) -> str:
    """The page as HTML. settings: how its images are decoded, as training would."""
    table, pairs = dataset.table, duplicates_across(dataset.table)
    counts = _counts(dataset)
    pictures, flat = _samples(dataset, settings)
    classes = [
        _Class(name, {split: int(counts[split][label]) for split in SPLITS}, pictures[label])
        for label, name in enumerate(readable_names(dataset.classes))
    ]
    suspects = [*_of_classes(classes), *_of_sizes(table), *_of_labels(table)]
    if flat:
        suspects.append(f"{counted(len(flat), 'sample picture')} without contrast: {first_few(flat, 3)}")
    return render(
        "pages/data.html.j2",
        title=title,
        facts=_facts(dataset, pairs),
        suspects=suspects,
        classes=classes,
        most=max((sum(c.counts.values()) for c in classes), default=1) or 1,
        sizes=_sizes(table),
        pairs=pairs.slice(0, _LISTED).to_pylist(),
        further_pairs=max(0, len(pairs) - _LISTED),
        errors=dataset.errors.slice(0, _LISTED).to_pylist(),
        further_errors=max(0, len(dataset.errors) - _LISTED),
    )


def _facts(dataset: Dataset, pairs: pa.Table) -> list[tuple[str, str]]:
    counts = [(split, f"{number:,}") for split, number in dataset.counts().items()]
    return [
        ("images", f"{len(dataset.table):,}"),
        ("classes", f"{len(dataset.classes):,}"),
        *counts,
        ("held out and in training", f"{len(pairs):,}"),
        ("not used", f"{len(dataset.errors):,}"),
    ]


def _counts(dataset: Dataset) -> dict[str, np.ndarray]:
    of_split = {split: dataset.split(split)["label"].to_numpy() for split in SPLITS}
    return {split: np.bincount(labels, minlength=len(dataset.classes)) for split, labels in of_split.items()}


def _samples(dataset: Dataset, settings: DataSettings) -> tuple[dict[int, list[str]], list[str]]:
    """Small pictures by label, spread over the images of a class; the locations of those without contrast."""
    labels, reader = dataset.table["label"].to_numpy(), ImageReader()
    pictures: dict[int, list[str]] = defaultdict(list)
    flat: list[str] = []
    for label in range(min(len(dataset.classes), _CLASSES_WITH_SAMPLES)):
        own = np.flatnonzero(labels == label)
        rows = dataset.table.take(
            own[np.unique(np.linspace(0, len(own) - 1, _SAMPLES).astype(int))] if len(own) else []
        )
        for uri, data in zip(rows["uri"].to_pylist(), reader.read_each(rows, range(len(rows))), strict=True):
            if isinstance(data, imaging.BadImage):
                continue  # it was there a moment ago
            image = shrunk(imaging.decode(data, max_pixels=settings.max_pixels, intensity=settings.intensity), _SIDE)
            pictures[label].append(data_uri(encoded(image)))
            if np.ptp(np.asarray(image)) <= _FLAT:
                flat.append(uri)
    return pictures, flat


def _sizes(table: pa.Table) -> list[tuple[str, str, str, str]]:
    """Of width and height: least, middle and greatest."""
    if not len(table):
        return []
    found = []
    for side in ("width", "height"):
        least, middle, greatest = (f"{round(value):,}" for value in np.quantile(table[side].to_numpy(), (0, 0.5, 1)))
        found.append((side, least, middle, greatest))
    return found


def _of_classes(classes: list[_Class]) -> Iterator[str]:
    few = [f"{c.name} {c.counts['train']}" for c in classes if c.counts["train"] < _FEW]
    if few:
        of_all = f"classes ({len(few):,} of {len(classes):,})"
        yield f"{of_all} with fewer than {_FEW} training images: {first_few(few, 5)}"
    for split in ("validation", "test"):
        missing = [c.name for c in classes if not c.counts[split]]
        if missing and len(missing) < len(classes):
            yield f"without {split} images: {first_few(missing, 5)}"
    trained = [c.counts["train"] for c in classes if c.counts["train"]]
    if trained and max(trained) > 10 * min(trained):
        yield (
            f"the largest class has {max(trained):,} training images, the smallest {min(trained):,}: "
            "train.balance weighs them alike"
        )


def _of_sizes(table: pa.Table) -> Iterator[str]:
    shorter = pc.min_element_wise(table["width"], table["height"])
    longer = pc.max_element_wise(table["width"], table["height"])
    small = table.filter(pc.less(shorter, _SMALL))["uri"].to_pylist()
    if small:
        yield f"{counted(len(small), 'image')} with a side below {_SMALL} pixels: {first_few(small, 3)}"
    long = table.filter(pc.greater(longer, pc.multiply(shorter, _LONG)))["uri"].to_pylist()
    if long:
        yield (
            f"{counted(len(long), 'image')} more than {_LONG} times as long as wide, which a square "
            f"distorts: {first_few(long, 3)}"
        )


def _of_labels(table: pa.Table) -> Iterator[str]:
    """The same image in several classes, and several times in one split."""
    groups: Any = table.group_by("sha256").aggregate([("class_name", "distinct"), ("uri", "list"), ("split", "list")])
    several = groups.filter(pc.greater(pc.list_value_length(groups["uri_list"]), 1)).to_pylist()
    unsure = [row for row in several if len(row["class_name_distinct"]) > 1]
    if unsure:
        named = [f"{row['uri_list'][0]} ({', '.join(sorted(row['class_name_distinct']))})" for row in unsure]
        yield f"{counted(len(unsure), 'image')} in more than one class: {first_few(named, 3)}"
    again = sum(len(row["split_list"]) - len(set(row["split_list"])) for row in several)
    if again:
        yield f"{counted(again, 'image')} more than once in the same split"
