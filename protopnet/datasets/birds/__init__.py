"""Generated birds: the embedded data set, with the true place of every part."""

import hashlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from protopnet.config import BirdSettings
from protopnet.datasets.masks import packed

from .anatomy import PART_ID
from .kinds import PARTS, Kind, distinguishing_parts, draw_kinds
from .render import KeyPoint, Picture, render, render_bird

__all__ = [
    "PARTS",
    "PART_ID",
    "KeyPoint",
    "Kind",
    "Picture",
    "bird_kinds",
    "bird_row",
    "bird_rows",
    "distinguishing_parts",
    "image_rng",
    "redraw",
    "render_bird",
]

# In order of their paths, which is the order of images within a class.
SPLITS: tuple[str, ...] = ("test", "train")


def bird_kinds(settings: BirdSettings) -> list[Kind]:
    """The kinds of these settings; a kind's place in the list is its label."""
    return draw_kinds(settings.classes, settings.seed)


def bird_places(settings: BirdSettings) -> Iterator[tuple[int, str, int]]:
    """Label, split and index of every image in order of (class, path)."""
    for label in range(settings.classes):
        for split in SPLITS:
            count = settings.train_per_class if split == "train" else settings.test_per_class
            yield from ((label, split, index) for index in range(count))


def bird_rows(settings: BirdSettings) -> Iterator[dict[str, Any]]:
    """All rows of the data set in order of (class, path), with the encoded images."""
    kinds = bird_kinds(settings)
    for image_id, place in enumerate(bird_places(settings)):
        yield bird_row(settings, kinds, *place) | {"image_id": image_id}


def bird_row(settings: BirdSettings, kinds: list[Kind], label: int, split: str, index: int) -> dict[str, Any]:
    """One row but for its image_id; depends on the arguments alone, so rows may be drawn in any order."""
    kind = kinds[label]
    picture = render(kind, image_rng(settings.seed, split, label, index), settings.size)
    data = _jpeg(picture.image)
    return {
        "uri": f"birds://{split}/{_folder(kind)}/{index:04d}",
        "image": data,
        "label": label,
        "class_name": kind.name,
        "split": split,
        "width": settings.size,
        "height": settings.size,
        "sha256": hashlib.sha256(data).hexdigest(),
        "parts": [{"part": point.part, "x": point.x, "y": point.y} for point in picture.parts],
        "object": packed(picture.part_map > 0),
    }


def image_rng(seed: int, split: str, label: int, index: int) -> np.random.Generator:
    """Random numbers of one image, the same in whatever order images are drawn."""
    return np.random.default_rng([seed, SPLITS.index(split), label, index])


def redraw(settings: BirdSettings, kinds: list[Kind], uri: str, sha256: str) -> Picture | None:
    """The picture behind a row, drawn once more, with its map of parts.

    None where what is drawn now isn't what the row holds: another version of the renderer, or not a bird of ours.
    """
    scheme, _, path = uri.partition("://")
    split, _, rest = path.partition("/")
    folder, _, index = rest.partition("/")
    label = next((label for label, kind in enumerate(kinds) if _folder(kind) == folder), None)
    if scheme != "birds" or label is None or split not in SPLITS or not index.isdecimal():
        return None
    picture = render(kinds[label], image_rng(settings.seed, split, label, int(index)), settings.size)
    return picture if hashlib.sha256(_jpeg(picture.image)).hexdigest() == sha256 else None


def _folder(kind: Kind) -> str:
    return kind.name.replace(" ", "_")


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()
