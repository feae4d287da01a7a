"""What is worth a look about a bundle's prototypes: rules over the tables of an audit, each finding in words.

They follow the doubts that readers of the paper have: prototypes that repeat one another, that stand for other classes,
that are taken for one another, that look at the background; and classes that don't rest on their own prototypes.
Thresholds are `AuditSettings`. How severe a finding is: 3 serious, 2 worth a look, 1 minor.

Legend: P prototypes.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from protopnet.auditing.usage import Use
from protopnet.config import Section
from protopnet.words import counted

KINDS = {
    "confused": "Confused with another class",
    "other-classes": "Nearest patches show other classes",
    "background": "Looks at the background",
    "same-place": "Always at one place by the edge",
    "borrowed": "Class rests on prototypes of others",
    "repeated": "Repeats another of its class",
    "unused": "Hardly used",
}
_FEWEST, _ONE_PLACE = 3, 0.1  # images; of the sides of the image, between patches at one place
_AROUND, _WIDE = 0.15, 0.5  # of the sides: around a patch that sees the whole image; more than this is no place
UseSplit = Literal["validation", "train"]  # of the images on which use is counted
IMAGE: dict[UseSplit, str] = {"validation": "validation image", "train": "training image"}
SEVERITIES = {3: "serious", 2: "worth a look", 1: "minor"}


class AuditSettings(Section):
    """What an audit looks at, and from where on it speaks up."""

    train_patches: int = Field(6, ge=1, description="nearest training patches of each prototype, one an image")
    validation_patches: int = Field(5, ge=1, description="nearest validation patches of each prototype, one an image")
    top: int = Field(5, ge=1, description="prototypes with the most points that count as an image's top evidence")
    own_patches: int = Field(
        3, ge=0, description="flag a prototype with fewer of its nearest training patches in images of its class"
    )
    repeat: float = Field(
        0.25,
        ge=0,
        description="flag prototypes of one class no further apart than this share of their mean distance to "
        "images of the class",
    )
    twin: float = Field(1.0, ge=0, description="the same for prototypes of two classes")
    on_object: float = Field(
        0.25,
        ge=0,
        le=1,
        description="flag a prototype of whose nearest training patches less than this share lies on the "
        "object: on its mask or box, else within the outline of the image's key points",
    )
    edge: float = Field(
        0.2,
        ge=0,
        le=0.5,
        description="flag a prototype whose nearest training patches all lie at one place no further from the edge of the "
        "image than this share of it: a label, a watermark, a frame",
    )
    own_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="flag a class whose prototypes bring less than this share of the points for it on its validation "
        "images",
    )


@dataclass(frozen=True)
class Finding:
    """One thing worth a look.

    prototypes: those it is about; none where it is about a class as a whole. region: the part of the image it is about,
    as top, left, bottom, right in shares of its sides.
    """

    severity: int
    kind: str
    label: int
    prototypes: tuple[int, ...]
    text: str
    errors: int = 0
    region: tuple[float, float, float, float] | None = None

    @property
    def flagged(self) -> tuple[int, ...]:
        """The prototypes with which something is wrong: of those that repeat one another not the first."""
        return self.prototypes[1:] if self.kind == "repeated" else self.prototypes


def confused(
    pairs: pa.Table, class_P: np.ndarray, use: Use, names: Sequence[str], split: UseSplit
) -> Iterable[Finding]:
    for group in _groups(pairs.filter(pc.invert(pairs["same_class"])), class_P):
        members = sorted({p for pair in group for p in pair})
        sides = [[p for p in members if class_P[p] == label] for label in np.unique(class_P[members])]
        alike = " and ".join(f"{_named(side)} of {names[class_P[side[0]]]}" for side in sides)
        errors = errors_of(group, class_P, use)
        if errors:
            were = "was" if errors == 1 else "were"
            blame = (
                f"{counted(errors, IMAGE[split])} of one of the two {were} taken for the other mainly because of them."
            )
        else:
            blame = f"No {IMAGE[split]} was mistaken because of them."
        text = f"{alike[0].upper()}{alike[1:]} look much the same to the network. {blame}"
        ordered = tuple(side[0] for side in sides) + tuple(p for side in sides for p in side[1:])
        yield Finding(3 if errors else 1, "confused", int(class_P[ordered[0]]), ordered, text, errors)


def errors_of(pairs: Iterable[tuple[int, int]], class_P: np.ndarray, use: Use) -> int:
    """Images of the class of one of a pair that were taken for the class of the other, the other being the prototype
    that gave the most points; each image once."""
    blamed = {(p, int(class_P[q])) for pair in pairs for p, q in (pair, pair[::-1]) if class_P[p] != class_P[q]}
    return sum(use.errors.get(each, 0) for each in blamed)


def _groups(pairs: pa.Table, class_P: np.ndarray) -> list[list[tuple[int, int]]]:
    """Pairs of the same two classes that hang together through prototypes they share, the nearest first."""
    parent: dict[Any, Any] = {}

    def root(node: Any) -> Any:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    named = list(zip(pairs["prototype"].to_pylist(), pairs["other"].to_pylist(), strict=True))
    nodes = [[(*sorted((class_P[p], class_P[q])), each) for each in (p, q)] for p, q in named]
    for first, second in nodes:
        parent[root(second)] = root(first)
    groups: dict[Any, list[tuple[int, int]]] = {}
    for pair, (first, _) in zip(named, nodes, strict=True):
        groups.setdefault(root(first), []).append(pair)
    return list(groups.values())


def other_classes(
    nearest: pa.Table, class_P: np.ndarray, names: Sequence[str], settings: AuditSettings
) -> Iterable[Finding]:
    training = nearest.filter(pc.equal(nearest["split"], "train"))
    prototype, label = training["prototype"].to_numpy(), training["class"].to_numpy()
    edges = np.searchsorted(prototype, np.arange(len(class_P) + 1))
    for p, own_label in enumerate(class_P.tolist()):
        labels = label[edges[p] : edges[p + 1]]
        own = int(np.count_nonzero(labels == own_label))
        if len(labels) and own < settings.own_patches:
            others = Counter(names[other] for other in labels.tolist() if other != own_label)
            listed = ", ".join(f"{name} ({count})" for name, count in others.most_common(3))
            text = (
                f"Of the {len(labels)} training images most like prototype {p}, {len(labels) - own} show other classes: "
                f"{listed}. It may stand for something these classes share."
            )
            yield Finding(3 if own <= 1 else 2, "other-classes", own_label, (p,), text)


def background(numbers: pa.Table, settings: AuditSettings) -> Iterable[Finding]:
    for row in numbers.select(["prototype", "class", "on_object"]).to_pylist():
        share = row["on_object"]
        if share is not None and share < settings.on_object:
            text = (
                f"Of what prototype {row['prototype']} sees in the training images most like it, only {100 * share:.0f} % "
                "lies on the object."
            )
            severity = 3 if share < settings.on_object / 2 else 2
            yield Finding(severity, "background", row["class"], (row["prototype"],), text)


def same_place(nearest: pa.Table, prototypes: pa.Table, settings: AuditSettings) -> Iterable[Finding]:
    """Things that are seen stand here and there; what was added to the pictures stands where it was put.

    The region: what the patch can see, and where that is most of the image its surroundings. prototypes: of the bundle.
    """
    class_P = prototypes["class"].to_numpy()
    seen = prototypes.select(["receptive_field", "height", "width"]).to_pylist()
    training = nearest.filter(pc.equal(nearest["split"], "train"))
    edges = np.searchsorted(training["prototype"].to_numpy(), np.arange(len(class_P) + 1))
    maps, cells = training["activation_map"], (training["row"].to_numpy(), training["column"].to_numpy())
    for p, label in enumerate(class_P.tolist()):
        rows = slice(edges[p], edges[p + 1])
        if rows.stop - rows.start < _FEWEST:
            continue
        grid = maps[rows.start].as_py()
        centres_N2 = np.stack([cells[0][rows] + 0.5, cells[1][rows] + 0.5], axis=1) / (len(grid), len(grid[0]))
        low, high = centres_N2.min(axis=0), centres_N2.max(axis=0)
        if (high - low).max() > _ONE_PLACE or np.minimum(centres_N2, 1 - centres_N2).min(axis=1).max() > settings.edge:
            continue
        field = np.array(seen[p]["receptive_field"]).reshape(2, 2) / (seen[p]["height"], seen[p]["width"])
        if (field[1] - field[0]).max() > _WIDE:
            field = np.stack([low - _AROUND, high + _AROUND]).clip(0, 1)
        top, left, bottom, right = field.flatten().tolist()
        text = (
            f"The {len(centres_N2)} training images most like prototype {p} are so at one and the same place by the edge: "
            "it may be a label, a watermark or the frame rather than what the picture shows."
        )
        yield Finding(3, "same-place", label, (p,), text, region=(top, left, bottom, right))


def borrowed(per_class: pa.Table, settings: AuditSettings, split: UseSplit) -> Iterable[Finding]:
    for row in per_class.to_pylist():
        share = row["own_share"]
        if share is not None and share < settings.own_share:
            text = (
                f"On {IMAGE[split]}s of this class only {100 * share:.0f} % of the points for it come from its own "
                "prototypes, the rest from prototypes of other classes. Its prototypes explain little."
            )
            yield Finding(3 if share < settings.own_share / 2 else 2, "borrowed", row["class"], (), text)


def repeated(pairs: pa.Table, prototypes: pa.Table) -> Iterable[Finding]:
    columns = (prototypes[name].to_pylist() for name in ("sha256", "row", "column"))
    places = list(zip(*columns, strict=True))
    class_P = prototypes["class"].to_numpy()
    for group in _groups(pairs.filter(pairs["same_class"]), class_P):
        members = sorted({p for pair in group for p in pair})
        patches = len({places[p] for p in members})
        if patches == 1:
            text = f"{_named(members, start=True)} are the same patch of the same image: one of them is enough."
        else:
            same = " (some are the same patch)" if patches < len(members) else ""
            alike = f"{_named(members, start=True)} are nearly the same{same}"
            text = f"{alike}: more like each other than like images of the class."
        severity = 2 if patches < len(members) else 1
        yield Finding(severity, "repeated", int(class_P[members[0]]), tuple(members), text)


def unused(numbers: pa.Table, use: Use, settings: AuditSettings, split: UseSplit) -> Iterable[Finding]:
    for row in numbers.filter(pc.equal(numbers["top"], 0)).select(["prototype", "class"]).to_pylist():
        text = (
            f"Prototype {row['prototype']} is not among the {settings.top} prototypes with the most points in any of the "
            f"{counted(use.images, IMAGE[split])}."
        )
        yield Finding(1, "unused", row["class"], (row["prototype"],), text)


def _named(prototypes: Sequence[int], start: bool = False) -> str:
    """prototype 3; prototypes 3, 5 and 8."""
    *others, last = [str(p) for p in prototypes]
    listed = f"{', '.join(others)} and {last}" if others else last
    return f"{'P' if start else 'p'}rototype{'s' if others else ''} {listed}"
