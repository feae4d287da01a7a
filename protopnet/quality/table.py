"""The quality metrics for people: what each is called, what it means, and which way is better."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from protopnet.words import percent


@dataclass(frozen=True)
class QualityRow:
    """A line of a quality table. value: as text, with its unit; chance: the same for places taken at random, if known.

    better: which way. over: what the figure was taken over. meaning: one sentence without technical terms.
    """

    name: str
    label: str
    value: str
    chance: str | None
    better: Literal["higher", "lower"]
    over: str
    meaning: str


@dataclass(frozen=True)
class _Metric:
    label: str
    meaning: str
    better: Literal["higher", "lower"] = "higher"
    percent: bool = True


METRICS: dict[str, _Metric] = {
    "truth": _Metric(
        "truth",
        "Of the birds named rightly: how often the strongest evidence is around a part that really sets the kind apart.",
    ),
    "truth_exact": _Metric("truth, exact", "The same, with the middle of the evidence exactly on such a part."),
    "on_object": _Metric(
        "evidence on the object", "How often the middle of the evidence is on what the photo shows, by its mask or box."
    ),
    "on_bird": _Metric("evidence on the bird", "How often the middle of the evidence is on the bird, not beside it."),
    "prototypes_on_bird": _Metric(
        "prototypes on the bird", "How many prototypes are a piece of bird, not of landscape."
    ),
    "prototypes_on_truth": _Metric(
        "prototypes on a telling part", "How many prototypes lie exactly on a part that sets their kind apart."
    ),
    "consistency": _Metric(
        "consistency",
        "How many prototypes mean the same part of the body in at least 8 of 10 images of their class.",
    ),
    "stability": _Metric(
        "stability", "How often a prototype stays on the same parts when the image gets a little noise."
    ),
    "purity": _Metric(
        "purity", "In the 10 images most like a prototype: how often it is on one and the same part of the body."
    ),
    "contrast": _Metric(
        "contrast",
        "How much more similar to a prototype its place is than the photo on average; near 0, its map points nowhere.",
        percent=False,
    ),
    "distinctiveness": _Metric(
        "distinctiveness", "Of two prototypes of one class: how often they look at different places of a photo."
    ),
    "misalignment": _Metric(
        "misalignment",
        "How much of a prototype's box moves when the photo is blurred beside it; 0: the box is all that counts.",
        "lower",
        percent=False,
    ),
    "pointing": _Metric("pointing game", "How often the strongest evidence is on a marked part of the body."),
    "sparsity": _Metric(
        "sparsity", "1 means one prototype a class is all one has to look at; ten a class give 0.1.", percent=False
    ),
    "deletion": _Metric(
        "deletion",
        "Confidence left on average while the evidence is blanked out step by step: it should fall quickly.",
        "lower",
        percent=False,
    ),
    "insertion": _Metric(
        "insertion",
        "Confidence on average while the evidence is put onto the blurred photo step by step: it should rise quickly.",
        percent=False,
    ),
}

_OVER = ("images", "places", "prototypes")


def quality_table(quality: Mapping[str, Any]) -> list[QualityRow]:
    """The lines for `quality` of metrics.json; metrics that weren't measured have none."""
    return [_row(name, metric, quality[name]) for name, metric in METRICS.items() if quality.get(name)]


def quality_text(quality: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    rows = quality_table(quality)
    width = max((len(row.label) for row in rows), default=0)
    return "\n".join(
        f"{row.label:<{width}}  {row.value:>7}  {f'(chance {row.chance})' if row.chance else '':<17}  {row.over}"
        for row in rows
    )


def _row(name: str, metric: _Metric, found: Mapping[str, Any]) -> QualityRow:
    over = ", ".join(f"{found[what]:,} {what}" for what in _OVER if what in found)
    chance = found.get("chance")
    return QualityRow(
        name=name,
        label=metric.label,
        value=_text(found["value"], metric),
        chance=None if chance is None else _text(chance, metric),
        better=metric.better,
        over=over,
        meaning=metric.meaning,
    )


def _text(value: float, metric: _Metric) -> str:
    return percent(value) if metric.percent else f"{value:.2f}"
