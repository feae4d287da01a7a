"""Datasets as people have them: one sub-folder a class, on disk or in a bucket.

    flowers/rose/1.jpg               classes are the sub-folders, in alphabetical order
    flowers/Train/rose/1.jpg         or the same below folders of splits, or splits below each class (`layout`)
    flowers/Test/rose/7.jpg
    flowers/parts.csv                optional key points: a line `image,part,x,y` each, the image as a path
                                     below flowers/, x and y in fractions of its width and height
    masks/rose/1.png                 optional masks in a folder of their own (`data.masks`)

Every image is read once and decoded to its end, so that training meets no surprises; an image that fails is
listed in `errors` with the reason. Files that aren't images by their suffix are left alone, and so are leftovers
of systems, which are counted (`files`).
"""

import csv
import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow as pa

from protopnet import storage
from protopnet.config import DataSettings
from protopnet.datasets.files import Passed, is_leftover
from protopnet.datasets.layout import layout_of
from protopnet.datasets.masks import masks_for, of_box, read_mask
from protopnet.datasets.pool import ordered, threads_for
from protopnet.datasets.rows import MANIFEST_SCHEMA, BadRow, Dataset, error_table
from protopnet.datasets.splits import chosen_classes, renumbered, with_labels, with_splits
from protopnet.errors import UserError
from protopnet.imaging import BadImage, verify

_PIECE = 10_000  # rows that are dictionaries before they become a table, which is far smaller
Progress = Callable[[int, int | None], None]  # images done, images in all where known


@dataclass(frozen=True)
class Found:
    """An image file before it is read; `path` is relative to the dataset's folder. mask: where one is. box: of the
    object, in pixels (left, top, width, height)."""

    path: str
    uri: str
    class_name: str
    split: str
    mask: str | None = None
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Listed:
    """What a folder or a list names, before an image is read: in the order (class, path), of the chosen classes only.

    parts: key points by path, where there are any. source: for the record.
    """

    found: list[Found]
    classes: list[str]
    source: dict[str, Any]
    parts: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def chosen(cls, found: list[Found], names: list[str], source: dict[str, Any], settings: DataSettings) -> "Listed":
        """Of all images and the names of all classes; `UserError` if `data.classes` names one that isn't there."""
        classes = chosen_classes(names, settings.classes)
        known = set(classes)
        kept = sorted((f for f in found if f.class_name in known), key=lambda f: (f.class_name, f.path))
        return cls(kept, classes, source)

    def dataset(self, rows: pa.Table, errors: pa.Table, settings: DataSettings, seed: int) -> Dataset:
        """From the rows of `read_images`, in order."""
        return labelled_dataset(self.classes, rows, self.source, errors, settings, seed)


def labelled_dataset(
    classes: list[str], rows: pa.Table, source: dict[str, Any], errors: pa.Table, settings: DataSettings, seed: int
) -> Dataset:
    """Rows with names of classes, in order, get their labels, numbers and splits."""
    rows = renumbered(with_labels(rows, classes).combine_chunks())
    return Dataset(classes, with_splits(rows, settings, seed), source, errors)


def list_folder(path: str, settings: DataSettings) -> Listed:
    """The images of class folders. `UserError` if the folder is missing or `data.classes` names a class it doesn't have."""
    root = storage.located(path)
    if not storage.is_folder(root):
        raise UserError(f"{path} isn't a folder (data.path); expected one sub-folder of images a class")
    if settings.masks and f"{storage.located(settings.masks)}/".startswith(f"{root}/"):
        raise UserError(
            f"data.masks {settings.masks} lies in data.path, where it would be a class: move it beside {path}"
        )
    found, names, passed = list_images(root)
    parts, unusable = _read_parts(root)
    source = {"kind": "folder", "path": root, "crop": "none"}
    if text := "; ".join(filter(None, (passed.text(), unusable))):
        source["passed_over"] = text
    if unusable:
        source["no_key_points"] = unusable
    listed = replace(Listed.chosen(found, names, source, settings), parts=parts)
    if not settings.masks:
        return listed
    masks = masks_for(settings.masks, [image.path for image in listed.found])
    return replace(listed, found=[replace(image, mask=masks[image.path]) for image in listed.found])


def scan_folder(path: str, settings: DataSettings, seed: int, progress: Progress | None = None) -> Dataset:
    """List, read and check the images of class folders.

    Missing validation and test splits are cut from the training images (see `splits`). `UserError` as `list_folder`.
    """
    return scan_listed(list_folder(path, settings), settings, seed, progress)


def scan_listed(listed: Listed, settings: DataSettings, seed: int, progress: Progress | None = None) -> Dataset:
    """Read and check the images, where they are left."""
    pieces: list[pa.Table] = [MANIFEST_SCHEMA.empty_table()]
    rows: list[dict[str, Any]] = []
    errors: list[BadRow] = []
    threads = threads_for(str(listed.source["path"]))
    work = partial(_check, max_pixels=settings.max_pixels)
    for done, (image, row) in enumerate(zip(listed.found, ordered(work, listed.found, threads), strict=True), 1):
        if isinstance(row, BadRow):
            errors.append(row)
        else:
            rows.append(row | {"parts": listed.parts.get(image.path), "file": image.uri, "row_group": -1, "row": -1})
        if len(rows) == _PIECE:
            pieces.append(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))
            rows = []
        if progress:
            progress(done, len(listed.found))
    pieces.append(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))
    return listed.dataset(pa.concat_tables(pieces), error_table(errors), settings, seed)


def read_images(
    images: list[tuple[Found, list[dict[str, Any]] | None]], cores: int, *, max_pixels: int
) -> Iterator[dict[str, Any] | BadRow]:
    """Rows with their images of files and their key points, checked on so many cores."""
    threads = threads_for(images[0][0].uri, cores)
    found = [image for image, _ in images]
    for (_, parts), row in zip(images, ordered(partial(_read, max_pixels=max_pixels), found, threads), strict=True):
        yield row if isinstance(row, BadRow) else row | {"parts": parts}


def list_images(root: str) -> tuple[list[Found], list[str], Passed]:
    """Image files, the names of all classes, those without images among them, and what was passed over.

    `UserError` if there is no image at all, or if a folder may be a split or a class.
    """
    passed = Passed()
    images = list(passed.images_among(uri[len(root) :].lstrip("/") for uri in storage.list_files(root)))
    if not images:
        raise UserError(f"{root} holds no images (data.path); {passed.instead_of_images()}")
    tops = _sub_folders(root, images)
    layout = layout_of(images, tops)
    names = set() if layout.splits else tops
    for top in layout.splits:
        names |= _sub_folders(storage.join(root, top), images, top)
    found = []
    for path in images:
        if place := layout.place(path):
            found.append(Found(path, storage.join(root, path), *place))
    passed.outside = len(images) - len(found)
    return found, sorted(names), passed


def _sub_folders(folder: str, images: list[str], below: str = "") -> set[str]:
    """Names of the folders directly in a folder; on disk the empty ones too, which a bucket can't have."""
    prefix = f"{below}/" if below else ""
    rest = (path[len(prefix) :] for path in images if path.startswith(prefix))
    names = {path.split("/")[0] for path in rest if "/" in path}
    if not storage.is_remote(folder):
        folders = (entry.name for entry in os.scandir(folder) if entry.is_dir())
        names |= {name for name in folders if not is_leftover(name)}
    return names


def _read(image: Found, max_pixels: int) -> dict[str, Any] | BadRow:
    """Read one image to its end; a row without what depends on the other images."""
    try:
        data = storage.read_bytes(image.uri)
    except OSError as error:
        return BadRow(image.uri, f"can't be read: {error.strerror or error}", image.class_name)
    row = checked_row(data, image.uri, image.class_name, image.split, max_pixels)
    return row if isinstance(row, BadRow) else row | {"object": _object_of(image, (row["width"], row["height"]))}


def _check(image: Found, max_pixels: int) -> dict[str, Any] | BadRow:
    row = _read(image, max_pixels)
    if isinstance(row, dict):
        del row["image"]
    return row


def checked_row(
    image: bytes, uri: str, class_name: str | None, split: str | None, max_pixels: int
) -> dict[str, Any] | BadRow:
    """The row of an image that can be decoded to its end."""
    try:
        width, height = verify(image, max_pixels)
    except BadImage as error:
        return BadRow(uri, error.reason, class_name)
    sha256 = hashlib.sha256(image).hexdigest()
    row = {"uri": uri, "image": image, "class_name": class_name, "split": split}
    return row | {"width": width, "height": height, "sha256": sha256}


def _object_of(image: Found, size: tuple[int, int]) -> bytes | None:
    if image.mask:
        return read_mask(image.mask, size)
    if image.box is None:
        return None
    left, top, width, height = image.box
    if min(left, top) < -1 or left + width > size[0] + 1 or top + height > size[1] + 1:
        raise UserError(
            f"{image.uri}: the box {left:g},{top:g},{width:g},{height:g} reaches beyond the image of {size[0]} x {size[1]} "
            "pixels; expected left,top,width,height in pixels"
        )
    return of_box(image.box, size)


def _read_parts(root: str) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """Key points by image path from parts.csv, if it is there, and what is wrong with one of other columns: that is passed
    over, since nothing but the quality of explanations needs it. `UserError` for places that can't be right."""
    uri = storage.join(root, "parts.csv")
    if not storage.exists(uri):
        return {}, ""
    reader = csv.DictReader(io.StringIO(storage.read_bytes(uri).decode("utf-8-sig", errors="replace")))
    names = list(reader.fieldnames or [])
    if sorted(names) != ["image", "part", "x", "y"]:
        return {}, (
            f"parts.csv is passed over, it has the columns {','.join(names)}; expected image,part,x,y: a line a key point, "
            "x and y in fractions of the image"
        )
    parts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in reader:
        try:
            x, y = float(row["x"]), float(row["y"])
        except (TypeError, ValueError):
            raise UserError(f"{uri}, line {reader.line_num}: expected image,part,x,y") from None
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise UserError(
                f"{uri}, line {reader.line_num}: x {row['x']} and y {row['y']} aren't fractions of the image's width and "
                "height; expected numbers from 0 to 1 (divide pixels by the image's size)"
            )
        parts[row["image"]].append({"part": row["part"], "x": x, "y": y})
    return dict(parts), ""
