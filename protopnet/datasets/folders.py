"""Datasets as people have them: one sub-folder a class, on disk or in a bucket.

    flowers/rose/1.jpg               classes are the sub-folders, in alphabetical order
    flowers/train/rose/1.jpg         or the same below train/ and, where there are any, test/ and
    flowers/test/rose/7.jpg          validation/ (also val/ or valid/)
    flowers/parts.csv                optional key points: a line `image,part,x,y` each, the image as a path
                                     below flowers/, x and y in fractions of its width and height

Every image is read once and decoded to its end, so that training meets no surprises; an image that fails is
listed in `errors` with the reason. Files that aren't images by their suffix, and hidden ones, are left alone.
"""

import csv
import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from protopnet import storage
from protopnet.config import DataSettings
from protopnet.datasets.pool import ordered, threads_for
from protopnet.datasets.rows import MANIFEST_SCHEMA, BadRow, Dataset, error_table
from protopnet.datasets.splits import chosen_classes, renumbered, with_splits
from protopnet.errors import UserError
from protopnet.imaging import BadImage, verify

SPLIT_FOLDERS = {"train": "train", "test": "test"} | dict.fromkeys(["val", "valid", "validation"], "validation")

# Also kinds that can't be decoded here (HEIC, JPEG XL): better named among the errors than passed over.
_KINDS = "jpg jpeg jpe jfif png apng webp gif bmp dib tif tiff ppm pgm pbm pnm jp2 j2k avif heic heif jxl"
SUFFIXES = frozenset(f".{kind}" for kind in _KINDS.split())

_PIECE = 10_000  # rows that are dictionaries before they become a table, which is far smaller
Progress = Callable[[int, int | None], None]  # images done, images in all where known


@dataclass(frozen=True)
class _Found:
    """An image file before it is read; `path` is relative to the dataset's folder."""

    path: str
    uri: str
    class_name: str
    split: str


def scan_folder(path: str, settings: DataSettings, seed: int, progress: Progress | None = None) -> Dataset:
    """List, read and check the images of class folders.

    Missing validation and test splits are cut from the training images (see `splits`). `UserError` if the
    folder is missing or `data.classes` names a class it doesn't have.
    """
    root = storage.located(path)
    if not storage.is_folder(root):
        raise UserError(f"{path} isn't a folder (data.path); expected one sub-folder of images a class")
    found, names = list_images(root)
    classes = chosen_classes(names, settings.classes)
    label_of = {name: label for label, name in enumerate(classes)}
    found = sorted((f for f in found if f.class_name in label_of), key=lambda f: (f.class_name, f.path))
    parts = _read_parts(root)
    pieces: list[pa.Table] = [MANIFEST_SCHEMA.empty_table()]
    rows: list[dict[str, Any]] = []
    errors: list[BadRow] = []
    checked = ordered(lambda f: _check(f, settings.max_pixels), found, threads_for(root))
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
    source = {"kind": "folder", "path": root, "crop": "none"}
    return Dataset(classes, table, source, error_table(errors))


def list_images(root: str) -> tuple[list[_Found], list[str]]:
    """Image files, and the names of all classes, those without images among them."""
    paths = [uri[len(root) :].lstrip("/") for uri in storage.list_files(root)]
    shown = [path for path in paths if not any(piece.startswith(".") for piece in path.split("/"))]
    images = [path for path in shown if os.path.splitext(path)[1].lower() in SUFFIXES]
    tops = _sub_folders(root, images)
    split_of = _split_folders(root, images, tops)
    names = set() if split_of else tops
    for top in split_of:
        names |= _sub_folders(storage.join(root, top), images, top)
    found = []
    for path in images:
        split = split_of.get(path.split("/")[0]) if split_of else "train"
        below = path.split("/")[1 if split_of else 0 :]
        if split and len(below) >= 2:  # a picture beside the class folders belongs to no class
            found.append(_Found(path, storage.join(root, path), below[0], split))
    return found, sorted(names)


def _sub_folders(folder: str, images: list[str], below: str = "") -> set[str]:
    """Names of the folders directly in a folder; on disk the empty ones too, which a bucket can't have."""
    prefix = f"{below}/" if below else ""
    rest = (path[len(prefix) :] for path in images if path.startswith(prefix))
    names = {path.split("/")[0] for path in rest if "/" in path}
    if not storage.is_remote(folder):
        folders = (entry.name for entry in os.scandir(folder) if entry.is_dir())
        names |= {name for name in folders if not name.startswith(".")}
    return names


def _split_folders(root: str, images: list[str], tops: set[str]) -> dict[str, str]:
    """Top folders that are splits, if any: `train` is one if it holds folders, a class if it holds images."""
    if "train" not in tops or any(path.startswith("train/") and path.count("/") == 1 for path in images):
        return {}
    if not _sub_folders(storage.join(root, "train"), images, "train"):
        return {}
    return {top: SPLIT_FOLDERS[top] for top in sorted(tops) if top in SPLIT_FOLDERS}


def _check(image: _Found, max_pixels: int) -> dict[str, Any] | BadRow:
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
        "file": image.uri,
        "row_group": -1,
        "row": -1,
    }


def _read_parts(root: str) -> dict[str, list[dict[str, Any]]]:
    """Key points by image path from parts.csv. A file of this name with other columns isn't ours."""
    uri = storage.join(root, "parts.csv")
    if not storage.exists(uri):
        return {}
    reader = csv.DictReader(io.StringIO(storage.read_bytes(uri).decode("utf-8-sig", errors="replace")))
    if list(reader.fieldnames or []) != ["image", "part", "x", "y"]:
        return {}
    parts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line, row in enumerate(reader, 2):
        try:
            parts[row["image"]].append({"part": row["part"], "x": float(row["x"]), "y": float(row["y"])})
        except (TypeError, ValueError):
            raise UserError(f"{uri}, line {line}: expected image,part,x,y") from None
    return dict(parts)
