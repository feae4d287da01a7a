"""The paper's classification process as a picture: why one image got its points for one class.

For each prototype a row: the photo with a box | the prototype | the training image it comes from | the activation map
over the photo | similarity x class connection = points; then the remaining prototypes together, and the total.
`class_figure` draws it as an image, `page` writes the same for all classes as one HTML file that needs nothing else.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from protopnet.errors import UserError
from protopnet.evidence.explanation import ClassEvidence, Evidence, Explainer, Explanation
from protopnet.pages import pictures
from protopnet.pages.templates import render
from protopnet.words import percent, readable_names

PHOTO_SIDE = 320  # pixels of the longer side of the photo in a page
_COLUMNS = ("this part of the photo", "looks like this prototype", "of this training image", "where it looks like it")
_NUMBERS = ("similarity", "× connection", "= points")
_INK, _SOFT, _STRONG = "#22262b", "#646b73", "#0068a8"
_ROW_INCHES, _HEAD_INCHES, _FOOT_INCHES, _WIDTH_INCHES = 1.32, 1.05, 0.75, 9.6


def shown_points(entry: ClassEvidence, digits: int = 2) -> tuple[list[str], str, str]:
    """Points of each listed prototype, of the remaining ones, and the total, rounded so that what is shown adds up.

    The remainder takes the differences: it is off by at most half a last digit for each prototype listed.
    """
    listed, total = [round(e.points, digits) for e in entry.evidence], round(entry.logit, digits)
    remainder = round(total - sum(listed), digits)
    return [f"{value:.{digits}f}" for value in listed], f"{remainder:.{digits}f}", f"{total:.{digits}f}"


class Album:
    """The pictures of an ensemble's prototypes, from the thumbnails in its bundles.

    `UserError` for a prototype whose bundle has none.
    """

    def __init__(self, explainer: Explainer) -> None:
        self.explainer = explainer

    def training_image(self, evidence: Evidence) -> tuple[Image.Image, tuple[int, int, int, int]]:
        """The training image a prototype comes from, and the prototype's box on this picture of it."""
        jpeg = self.explainer.thumbnail(evidence.member, evidence.prototype)
        if not jpeg or evidence.source is None:
            raise UserError(
                f"the bundle has no picture of prototype {evidence.prototype}: figures need a bundle with thumbnails in "
                "prototypes.parquet, as jobs/train.py writes it; --pictures none explains in numbers"
            )
        image = pictures.opened(jpeg)
        source = evidence.source
        return image, pictures.moved(source.box, (source.width, source.height), image.size)


def class_figure(photo: Image.Image, entry: ClassEvidence, album: Album, names: Sequence[str]) -> Image.Image:
    """The table of one class as an image of about 1,400 pixels' width.

    photo: as uploaded, upright. names: of the classes by label, for people. The evidence must have its activation maps.
    """
    photo_small = pictures.shrunk(photo, 640)
    rows = max(1, len(entry.evidence))
    height = _HEAD_INCHES + rows * _ROW_INCHES + _FOOT_INCHES
    figure = Figure(figsize=(_WIDTH_INCHES, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        rows,
        7,
        left=0.012,
        right=0.99,
        top=1 - _HEAD_INCHES / height,
        bottom=_FOOT_INCHES / height,
        width_ratios=(1.3, 1.1, 1.3, 1.3, 0.75, 0.85, 0.75),
        wspace=0.06,
        hspace=0.08,
    )
    points, _, _ = shown_points(entry)
    for number, evidence in enumerate(entry.evidence):
        axes = [figure.add_subplot(grid[number, column]) for column in range(7)]
        _draw_row(axes, evidence, points[number], photo, photo_small, album, names)
    for column, title in enumerate((*_COLUMNS, *_NUMBERS)):
        place = grid[0, column].get_position(figure)
        figure.text((place.x0 + place.x1) / 2, place.y1 + 0.1 / height, title, ha="center", fontsize=8.5, color=_SOFT)
    _draw_words(figure, entry, names, height)
    figure.canvas.draw()  # type: ignore[no-untyped-call]
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")  # type: ignore[attr-defined]


def _draw_row(
    axes: Sequence[Axes],
    evidence: Evidence,
    points: str,
    photo: Image.Image,
    photo_small: Image.Image,
    album: Album,
    names: Sequence[str],
) -> None:
    assert evidence.activation_map is not None
    source_image, source_box = album.training_image(evidence)
    shown = (
        pictures.with_box(photo_small, pictures.moved(evidence.box, photo.size, photo_small.size)),
        pictures.crop(source_image, source_box),
        pictures.with_box(source_image, source_box),
        pictures.overlay(photo_small, evidence.activation_map),
    )
    for place, image in zip(axes[:4], shown, strict=True):
        place.imshow(np.asarray(image), interpolation="lanczos")
        place.set_anchor("C")
    axes[1].set_title(f"{names[evidence.class_]}  (no. {evidence.prototype})", fontsize=7, color=_SOFT, pad=2)
    cells = (f"{evidence.similarity:.2f}", f"× {evidence.connection:.2f}", f"= {points}")
    for place, text in zip(axes[4:], cells, strict=True):
        strong = text.startswith("=")
        place.text(0.5, 0.5, text, ha="center", va="center", fontsize=13, color=_STRONG if strong else _INK)
    for place in axes:
        place.set_axis_off()


def _draw_words(figure: Figure, entry: ClassEvidence, names: Sequence[str], height: float) -> None:
    figure.text(0.012, 1 - 0.28 / height, f"Why {names[entry.class_]}?", fontsize=16, color=_INK, weight="bold")
    _, remainder, total = shown_points(entry)
    verdict = f"{total} points in all, {percent(entry.probability)} probability"
    figure.text(0.012, 1 - 0.52 / height, verdict, fontsize=10, color=_SOFT)
    if entry.remainder.prototypes:
        line = f"{entry.remainder.prototypes:,} other prototypes together    {remainder}"
        figure.text(0.975, 0.48 / height, line, fontsize=10, color=_SOFT, ha="right")
    figure.text(0.975, 0.18 / height, f"total = {total}", fontsize=13, color=_STRONG, ha="right", weight="bold")


def page(explained: Sequence[tuple[str, Image.Image, Explanation]], album: Album, title: str) -> str:
    """One HTML document with the tables of all classes of each (name, photo as uploaded, explanation)."""
    names = readable_names(album.explainer.classes)
    images = [explained_image(name, photo, e, album, names) for name, photo, e in explained]
    return render("evidence/explanation.html.j2", title=title, images=images)


def explained_image(
    name: str, photo: Image.Image, explanation: Explanation, album: Album, names: Sequence[str]
) -> Mapping[str, Any]:
    """What the template `evidence.html.j2` shows of one image: pictures as data URIs, boxes in per cent."""
    size = (explanation.width, explanation.height)
    return {
        "name": name,
        "photo": pictures.data_uri(pictures.encoded(pictures.shrunk(photo, PHOTO_SIDE))),
        "ratio": f"{size[0] / size[1]:.4f}",
        "members": explanation.members,
        "classes": [_page_class(entry, size, album, names) for entry in explanation.classes],
    }


def _page_class(entry: ClassEvidence, size: tuple[int, int], album: Album, names: Sequence[str]) -> dict[str, Any]:
    points, remainder, total = shown_points(entry)
    rows = [_page_row(e, size, album, names) | {"points": p} for e, p in zip(entry.evidence, points, strict=True)]
    return {"name": names[entry.class_], "entry": entry, "rows": rows, "remainder": remainder, "total": total}


def _page_row(evidence: Evidence, size: tuple[int, int], album: Album, names: Sequence[str]) -> dict[str, Any]:
    assert evidence.activation_map is not None
    training, box = album.training_image(evidence)
    return {
        "evidence": evidence,
        "prototype_of": names[evidence.class_],
        "box": _in_per_cent(evidence.box, size),
        "heat": pictures.data_uri(pictures.heat_png(evidence.activation_map)),
        "crop": pictures.data_uri(pictures.encoded(pictures.crop(training, box))),
        "training": pictures.data_uri(pictures.encoded(training)),
        "training_box": _in_per_cent(box, training.size),
    }


def _in_per_cent(box: Sequence[int], size: tuple[int, int]) -> dict[str, str]:
    top, left, bottom, right = box
    width, height = size
    sides = {
        "left": left / width,
        "top": top / height,
        "width": (right - left) / width,
        "height": (bottom - top) / height,
    }
    return {name: f"{100 * value:.2f}%" for name, value in sides.items()}
