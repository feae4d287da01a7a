"""CUB-200-2011 in its official layout: images.txt, classes.txt, …, parts/, images/ in one folder.

The official split is kept, images are cropped to their bounding boxes (or left whole), and the visible key
points are carried along as fractions of what is left of the image, and so is where the bird is: a mask of `data.masks` (the
dataset's segmentations/), else the box on whole images.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from PIL import Image

from protopnet import storage
from protopnet.config import DataSettings
from protopnet.datasets.masks import masks_for, of_box, read_mask
from protopnet.datasets.pool import ordered, threads_for
from protopnet.datasets.rows import BadRow
from protopnet.datasets.splits import chosen_classes
from protopnet.errors import UserError
from protopnet.imaging import BadImage, decode, verify

JPEG_QUALITY = 95  # of the crops, without subsampling of the colours

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom are outside


@dataclass(frozen=True)
class Photo:
    """One line of images.txt with what the other files say about it."""

    path: str
    label: int
    class_name: str
    split: str
    box: tuple[float, float, float, float]  # x, y, width, height in pixels
    points: list[tuple[str, float, float]] = field(default_factory=list)  # visible: part, x, y in pixels
    mask: str | None = None  # where it is


def cub_classes(path: str, settings: DataSettings) -> list[str]:
    """The classes that `data.classes` asks for, in the order of classes.txt."""
    return chosen_classes([name for _, name in _lines(path, "classes.txt", 2)], settings.classes)


def cub_photos(root: str, classes: list[str], settings: DataSettings) -> list[Photo]:
    """The photographs of these classes in the order (class, path). `UserError` if a file of the layout is missing or
    broken."""
    photos = _photos(root, classes)
    masks = masks_for(settings.masks, [photo.path for photo in photos]) if settings.masks else {}
    return [replace(photo, mask=masks.get(photo.path)) for photo in photos]


def read_photos(
    photos: list[Photo], cores: int | None, *, root: str, settings: DataSettings
) -> Iterator[dict[str, Any] | BadRow]:
    """Rows with image bytes, in order, a `BadRow` for each image that can't be used.

    Crops are JPEG (quality 95, 4:4:4), their uri ends in `#xywh=x,y,width,height`; whole images stay as they
    came. Memory is bounded by a few images.
    """
    return ordered(partial(_row, root, settings=settings), photos, threads_for(root, cores))


def cub_splits(root: str, classes: list[str]) -> list[tuple[str, str]]:
    """Class and split of each image of these classes."""
    return [(photo.class_name, photo.split) for photo in _photos(root, classes)]


def _lines(root: str, name: str, columns: int) -> list[list[str]]:
    uri = storage.join(root, name)
    try:
        text = storage.read_bytes(uri).decode()
    except OSError:
        raise UserError(f"{uri} is missing; data.path must be the folder CUB_200_2011 as published") from None
    lines = [line.split(maxsplit=columns - 1) for line in text.splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        if len(line) != columns:
            raise UserError(f"{uri}, line {number}: expected {columns} columns")
    return lines


def _photos(root: str, classes: list[str]) -> list[Photo]:
    class_of = dict(_lines(root, "image_class_labels.txt", 2))
    name_of = dict(_lines(root, "classes.txt", 2))
    training = dict(_lines(root, "train_test_split.txt", 2))
    boxes = {line[0]: line[1:] for line in _lines(root, "bounding_boxes.txt", 5)}
    points = _visible_points(root)
    photos = []
    for image, path in _lines(root, "images.txt", 2):
        try:
            name = name_of[class_of[image]]
            split = "train" if training[image] == "1" else "test"
            x, y, width, height = (float(value) for value in boxes[image])
        except (KeyError, ValueError):
            raise UserError(f"{root}: no class, split or bounding box of image {image} (images.txt)") from None
        if name in classes:
            box = x, y, width, height
            photos.append(Photo(path, classes.index(name), name, split, box, points.get(image, [])))
    return sorted(photos, key=lambda photo: (photo.label, photo.path))


def _visible_points(root: str) -> dict[str, list[tuple[str, float, float]]]:
    part_name = dict(_lines(root, "parts/parts.txt", 2))
    points: dict[str, list[tuple[str, float, float]]] = {}
    for image, part, x, y, visible in _lines(root, "parts/part_locs.txt", 5):
        if visible == "1":
            points.setdefault(image, []).append((part_name[part], float(x), float(y)))
    return points


def _row(root: str, photo: Photo, settings: DataSettings) -> dict[str, Any] | BadRow:
    uri = storage.join(root, "images", photo.path)
    try:
        data = storage.read_bytes(uri)
        if settings.crop == "none":
            size = verify(data, settings.max_pixels)
            box, grid = (0, 0, *size), of_box(photo.box, size)
        else:
            image = decode(data, max_pixels=settings.max_pixels)
            box, size, grid = _pixel_box(photo.box, image), image.size, None
            data = _jpeg(image.crop(box))
            uri += f"#xywh={box[0]},{box[1]},{box[2] - box[0]},{box[3] - box[1]}"
    except BadImage as error:
        return BadRow(uri, error.reason, photo.class_name)
    except OSError as error:
        return BadRow(uri, f"can't be read: {error.strerror or error}", photo.class_name)
    return {
        "uri": uri,
        "image": data,
        "label": photo.label,
        "class_name": photo.class_name,
        "split": photo.split,
        "width": box[2] - box[0],
        "height": box[3] - box[1],
        "sha256": hashlib.sha256(data).hexdigest(),
        "parts": _fractions(photo.points, box),
        "object": read_mask(photo.mask, size, box) if photo.mask else grid,
    }


def _pixel_box(box: tuple[float, float, float, float], image: Image.Image) -> Box:
    """Whole pixels, cut off at the image's edge: a few official boxes reach one pixel beyond it."""
    x, y, width, height = box
    left, top = max(0, round(x)), max(0, round(y))
    right, bottom = min(image.width, round(x + width)), min(image.height, round(y + height))
    if right <= left or bottom <= top:
        raise BadImage(f"its bounding box ({x}, {y}, {width}, {height}) lies outside it")
    return left, top, right, bottom


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _fractions(points: list[tuple[str, float, float]], box: Box) -> list[dict[str, Any]]:
    """Points in fractions of the box; the ones outside it aren't in the picture."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    parts = [(part, (x - left) / width, (y - top) / height) for part, x, y in points]
    return [{"part": part, "x": x, "y": y} for part, x, y in parts if 0 <= x <= 1 and 0 <= y <= 1]
