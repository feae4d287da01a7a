"""The paper's classification process as a picture: why one image got its points for one class, or more than for another.

For each prototype a row: the photo with a box | the prototype | the training image it comes from | the activation map
over the photo | similarity x class connection = points, or the points for both classes and their difference; then the
remaining prototypes together, and the total. `class_figure` draws it as an image, `page` writes the same for all classes
as one HTML file that needs nothing else.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from protopnet.errors import UserError
from protopnet.evidence.explanation import Explainer
from protopnet.evidence.records import ClassEvidence, Contrast, Evidence, Explanation, Falls
from protopnet.evidence.sources import Source
from protopnet.evidence.sums import signed
from protopnet.pages import pictures
from protopnet.pages.pictures import Box, Inlined, Picture
from protopnet.pages.templates import render
from protopnet.words import called, readable_names

PHOTO_SIDE = 320  # pixels of the longer side of the photo in a page
_COLUMNS = ("this part of the photo", "looks like this prototype", "of this training image", "where it looks like it")
_PICTURES, _NUMBERS = (1.3, 1.1, 1.3, 1.3), 2.35  # widths of the pictures' columns, and of all numbers together
_INK, _SOFT, _STRONG = "#22262b", "#646b73", "#0068a8"
_BOX = (("#14181e", 4.0, "-"), ("#ffd400", 2.0, "-"))  # yellow on dark, to be seen on any picture
_FIELD = (("#14181e", 1.6, "-"), ("#ffffff", 1.2, "--"))
_ROW_INCHES, _HEAD_INCHES, _FOOT_INCHES, _WIDTH_INCHES = 1.32, 1.05, 0.75, 9.6


class Album:
    """The pictures of an ensemble's prototypes, from the thumbnails in its bundles.

    `UserError` for a prototype whose bundle has none.
    """

    def __init__(self, explainer: Explainer) -> None:
        self.explainer = explainer

    def source(self, evidence: Evidence) -> tuple[bytes, Source]:
        """JPEG of the training image a prototype comes from, and what is known of it."""
        jpeg = self.explainer.thumbnail(evidence.member, evidence.prototype)
        if not jpeg or evidence.source is None:
            raise UserError(
                f"the bundle has no picture of prototype {evidence.prototype}: figures need a bundle with thumbnails in "
                "prototypes.parquet, as jobs/train.py writes it; --pictures none explains in numbers"
            )
        return jpeg, evidence.source


class Table(NamedTuple):
    """What is written in the table of a class or of a contrast: above it, over its numbers, in its rows and below.

    Of the numbers of each row the last is the one that is added up. rest: of the prototypes without a row, if any.
    """

    title: str
    verdict: str
    heads: tuple[str, ...]
    rows: list[tuple[Evidence, tuple[str, ...]]]
    rest: tuple[str, str] | None
    total: tuple[str, str]


def table_of(entry: ClassEvidence | Contrast, names: Sequence[str]) -> Table:
    """names: of the classes by label, for people."""
    others, name = entry.remainder.prototypes, names[entry.class_]
    rest = (f"{others:,} other prototypes together", entry.shown.remainder) if others else None
    if isinstance(entry, ClassEvidence):
        return Table(
            title=f"Why {name}?",
            verdict=f"{entry.shown.total} points in all, {entry.shown.probability} probability",
            heads=("similarity", "× connection", "= points"),
            rows=[
                (evidence, (shown.similarity, f"× {shown.connection}", shown.points))
                for evidence, shown in zip(entry.evidence, entry.shown.rows, strict=True)
            ],
            rest=rest,
            total=("total", entry.shown.total),
        )
    rival = names[entry.rival]
    return Table(
        title=f"Why {name} and not {rival}?",
        verdict=f"the differences add up to {entry.shown.total} points",
        heads=("similarity", f"points for {name}", f"points for {rival}", "difference"),
        rows=[
            (row, (shown.similarity, shown.points, shown.rival_points, shown.difference))
            for row, shown in zip(entry.rows, entry.shown.rows, strict=True)
        ],
        rest=rest,
        total=(f"{name} more than {rival}", entry.shown.total),
    )


def rests_on(falls: Falls) -> list[str]:
    """How far a similarity falls with each change, farthest first, in words."""
    found = sorted(falls.model_dump().items(), key=lambda item: -item[1])
    return [f"{name} {signed(-fall)}" for name, fall in found]


def class_figure(
    photo: Image.Image,
    entry: ClassEvidence | Contrast,
    album: Album,
    names: Sequence[str],
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """The table of one class, or of a contrast, as an image of about 1,400 pixels' width.

    photo: upright. names: of the classes by label, for people. size: width and height of the photo as uploaded, where
    `photo` is smaller. The evidence must have its activation maps.
    """
    table = table_of(entry, names)
    rows, numbers = max(1, len(table.rows)), len(table.heads)
    height = _HEAD_INCHES + rows * _ROW_INCHES + _FOOT_INCHES
    figure = Figure(figsize=(_WIDTH_INCHES, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        rows,
        len(_PICTURES) + numbers,
        left=0.012,
        right=0.99,
        top=1 - _HEAD_INCHES / height,
        bottom=_FOOT_INCHES / height,
        width_ratios=(*_PICTURES, *[_NUMBERS / numbers] * numbers),
        wspace=0.06,
        hspace=0.08,
    )
    for number, (evidence, cells) in enumerate(table.rows):
        axes = [figure.add_subplot(grid[number, column]) for column in range(len(_PICTURES) + numbers)]
        _draw_row(axes, evidence, cells, photo, size or photo.size, album, names)
    for column, title in enumerate((*_COLUMNS, *table.heads)):
        place = grid[0, column].get_position(figure)
        figure.text(
            (place.x0 + place.x1) / 2,
            place.y1 + 0.17 / height,
            title if column < len(_COLUMNS) else textwrap.fill(title, 12),
            ha="center",
            va="bottom",
            fontsize=8.5 if numbers == 3 else 7,
            color=_SOFT,
            parse_math=False,
        )
    _draw_words(figure, table, height)
    figure.canvas.draw()  # type: ignore[no-untyped-call]
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")  # type: ignore[attr-defined]


def _draw_row(
    axes: Sequence[Axes],
    evidence: Evidence,
    cells: Sequence[str],
    photo: Image.Image,
    photo_size: tuple[int, int],
    album: Album,
    names: Sequence[str],
) -> None:
    jpeg, source = album.source(evidence)
    training, size = pictures.opened(jpeg), (source.width, source.height)
    small = pictures.shrunk(photo, 640)
    _draw(axes[0], small, photo_size, box=evidence.box)
    _draw(axes[1], training, size, close=source.box)
    _draw(axes[2], training, size, box=source.box)
    _draw(
        axes[3], small, photo_size, heat=pictures.heat(evidence.shown_map, *small.size), field=evidence.receptive_field
    )
    prototype = f"{evidence.name or names[evidence.class_]}  (no. {evidence.prototype})"
    # A long one leaves on the left, where there is room, and not below the next picture.
    axes[1].set_title(prototype, fontsize=6.2, color=_SOFT, pad=2, parse_math=False, loc="right")
    for place, text in zip(axes[4:], cells, strict=True):
        colour = _STRONG if text is cells[-1] else _INK
        place.text(0.5, 0.5, text, ha="center", va="center", fontsize=13, color=colour)
    if evidence.falls is not None:
        axes[4].text(0.5, 0.36, "\n".join(rests_on(evidence.falls)), ha="center", va="top", fontsize=6.5, color=_SOFT)
    for place in axes:
        place.set_axis_off()


def _draw(
    axes: Axes,
    image: Image.Image,
    size: tuple[int, int],
    *,
    box: Box | None = None,
    close: Box | None = None,
    heat: Image.Image | None = None,
    field: Box | None = None,
) -> None:
    """An image measured in pixels of its original, of `size`: with a box, cut to one (`close`), under a heat map, or with
    what a patch can see in a broken line."""
    extent = (0, size[0], size[1], 0)
    for layer in (image, heat):
        if layer is not None:
            axes.imshow(np.asarray(layer), extent=extent, interpolation="lanczos")
    axes.set_anchor("C")
    for frame, lines in ((box, _BOX), (field, _FIELD)):
        if frame is not None:
            top, left, bottom, right = frame
            for colour, width, style in lines:
                rectangle = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour)
                rectangle.set(linewidth=width, linestyle=style)
                axes.add_patch(rectangle)
    if close is not None:
        axes.set(xlim=(close[1], close[3]), ylim=(close[2], close[0]))


def _draw_words(figure: Figure, table: Table, height: float) -> None:
    figure.text(0.012, 1 - 0.28 / height, table.title, fontsize=16, color=_INK, weight="bold", parse_math=False)
    figure.text(0.012, 1 - 0.52 / height, table.verdict, fontsize=10, color=_SOFT)
    if table.rest is not None:
        figure.text(0.975, 0.48 / height, "    ".join(table.rest), fontsize=10, color=_SOFT, ha="right")
    total = " = ".join(table.total)
    figure.text(0.975, 0.18 / height, total, fontsize=13, color=_STRONG, ha="right", weight="bold", parse_math=False)


def page(explained: Sequence[tuple[str, Image.Image, Explanation]], album: Album, title: str) -> str:
    """One HTML document with the tables of all classes and contrasts of each (name, photo as uploaded, explanation)."""
    names, sheet = readable_names(album.explainer.classes), dict[str, Inlined]()
    images = [explained_image(name, photo, e, album, names, sheet) for name, photo, e in explained]
    perturbed = any(row.falls is not None for _, _, explanation in explained for row in explanation.rows())
    return render("evidence/explanation.html.j2", title=title, images=images, sheet=sheet, perturbed=perturbed)


def explained_image(
    name: str,
    photo: Image.Image,
    explanation: Explanation,
    album: Album,
    names: Sequence[str],
    sheet: dict[str, Inlined],
) -> Mapping[str, Any]:
    """What the template `evidence.html.j2` shows of one image; the pictures it needs are added to the page's `sheet`."""
    symbol, size = f"photo-{len(sheet)}", (explanation.width, explanation.height)
    sheet[symbol] = Inlined(*size, pictures.data_uri(pictures.encoded(pictures.shrunk(photo, PHOTO_SIDE))))

    def row(evidence: Evidence, cells: Sequence[str]) -> dict[str, Any]:
        jpeg, source = album.source(evidence)
        training = f"m{evidence.member}p{evidence.prototype}"
        sheet[training] = Inlined(source.width, source.height, pictures.data_uri(jpeg))
        prototype = f"{called(evidence.prototype, evidence.name)} of {names[evidence.class_]}"
        heat = pictures.data_uri(pictures.heat_png(evidence.shown_map))
        return {
            "evidence": evidence,
            "rests_on": [] if evidence.falls is None else rests_on(evidence.falls),
            "cells": cells,
            "prototype_of": names[evidence.class_],
            "photo": Picture(
                symbol,
                *size,
                evidence.box,
                f"the photo, where it looks like {prototype}",
                heat,
                evidence.receptive_field,
            ),
            "training": Picture(training, source.width, source.height, source.box, f"training image of {prototype}"),
        }

    entries: list[ClassEvidence | Contrast] = [*explanation.classes, *explanation.contrasts]
    tables = [table_of(entry, names) for entry in entries]
    shown = [table._asdict() | {"rows": [row(*each) for each in table.rows]} for table in tables]
    return {"name": name, "members": explanation.members, "tables": shown}
