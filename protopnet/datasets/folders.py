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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from protopnet import storage
from protopnet.config import DataSettings
from protopnet.datasets.files import Passed, is_leftover
from protopnet.datasets.layout import layout_of
from protopnet.datasets.masks import masks_for, of_box, read_mask
from protopnet.datasets.pool import ordered, threads_for
from protopnet.datasets.rows import MANIFEST_SCHEMA, BadRow, Dataset, error_table
from protopnet.datasets.splits import chosen_classes, renumbered, with_splits
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


def scan_folder(path: str, settings: DataSettings, seed: int, progress: Progress | None = None) -> Dataset:
    """List, read and check the images of class folders.

    Missing validation and test splits are cut from the training images (see `splits`). `UserError` if the
    folder is missing or `data.classes` names a class it doesn't have.
    """
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
    return read_found(found, names, source, settings, seed, parts=parts, progress=progress)


def read_found(
    found: list[Found],
    names: list[str],
    source: dict[str, Any],
    settings: DataSettings,
    seed: int,
    *,
    parts: Mapping[str, list[dict[str, Any]]] | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Read and check the images of the chosen classes. names: of all. parts: key points by path.

    `UserError` as `scan_folder`.
    """
    classes, parts = chosen_classes(names, settings.classes), parts or {}
    label_of = {name: label for label, name in enumerate(classes)}
    found = sorted((f for f in found if f.class_name in label_of), key=lambda f: (f.class_name, f.path))
    if settings.masks and source["kind"] == "folder":
        masks = masks_for(settings.masks, [f.path for f in found])
        found = [replace(f, mask=masks[f.path]) for f in found]
    pieces: list[pa.Table] = [MANIFEST_SCHEMA.empty_table()]
    rows: list[dict[str, Any]] = []
    errors: list[BadRow] = []
    threads = threads_for(str(source["path"]))
    checked = ordered(lambda f: _check(f, settings.max_pixels), found, threads)
    for done, (image, result) in enumerate(zip(found, checked, strict=True), 1):
        if isinstance(result, BadRow):
            errors.append(result)
        else:
            rows.append(result | {"label": label_of[image.class_name], "parts": parts.get(image.path)})
        if len(rows) == _PIECE:
            pieces.append(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))
            rows = []
        if progress:
            progress(done, len(found))
    pieces.append(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))
    table = with_splits(renumbered(pa.concat_tables(pieces).combine_chunks()), settings, seed)
    return Dataset(classes, table, source, error_table(errors))


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


def _check(image: Found, max_pixels: int) -> dict[str, Any] | BadRow:
    """Read one image to its end; a manifest row without what depends on the other images."""
    try:
        data = storage.read_bytes(image.uri)
        width, height = verify(data, max_pixels)
    except BadImage as error:
        return BadRow(image.uri, error.reason, image.class_name)
    except OSError as error:
        return BadRow(image.uri, f"can't be read: {error.strerror or error}", image.class_name)
    return {
        "uri": image.uri,
        "class_name": image.class_name,
        "split": image.split,
        "width": width,
        "height": height,
        "sha256": hashlib.sha256(data).hexdigest(),
        "object": _object_of(image, (width, height)),
        "file": image.uri,
        "row_group": -1,
        "row": -1,
    }


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
