"""Lists of images, read as they are gone through: for scoring, and with labels for training.

    list.csv, .tsv, .parquet    a location an image in the column `uri` (or path, file, image), and any other columns
    list.txt                    a location a line

Locations that are relative are meant from the list's own folder.
"""

import csv
import io
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from protopnet import storage
from protopnet.config import DataSettings
from protopnet.datasets.folders import Found, Listed, Progress, scan_listed
from protopnet.datasets.layout import BOX_COLUMNS, LABEL_COLUMNS, MASK_COLUMNS, SPLIT_COLUMNS, URI_COLUMNS, split_of
from protopnet.datasets.rows import Dataset
from protopnet.errors import UserError
from protopnet.filesystems import unsupported

LISTS = (".txt", ".csv", ".tsv", ".parquet")
_PIECE = 10_000  # rows that are Python objects at a time
_READ_BYTES = 4 << 20  # of a list in a bucket with each request


@dataclass(frozen=True)
class Entry:
    """place: what to call it in an error. values: what the list says beside, by the first name of each column asked for."""

    place: str
    uri: str
    values: Mapping[str, Any]


def is_list(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in LISTS


def scan_list(path: str, settings: DataSettings, seed: int, progress: Progress | None = None) -> Dataset:
    """The images of a list with labels, checked as those of folders; `UserError` for a list that can't be read."""
    return scan_listed(list_list(path, settings), settings, seed, progress)


def list_list(path: str, settings: DataSettings) -> Listed:
    """The images of a list with labels, of the classes that are asked for; `UserError` for a list that can't be read."""
    root = storage.located(path)
    return Listed.chosen(*labelled(root), {"kind": "list", "path": root, "crop": "none"}, settings)


def labelled(root: str) -> tuple[list[Found], list[str]]:
    """The images of a list with labels and, where it has them, splits; the names of the classes. `UserError`."""
    if not is_list(root) or not storage.exists(root):
        raise UserError(
            f"{root} is no list (data.path); expected a file {', '.join(LISTS[1:])} with columns uri and label"
        )
    columns = (LABEL_COLUMNS, SPLIT_COLUMNS, MASK_COLUMNS, BOX_COLUMNS)
    found = [_found(entry, root) for entry in listed(root, columns)]
    if not found:
        raise UserError(f"{root} names no images (data.path)")
    return found, sorted({image.class_name for image in found})


def _found(entry: Entry, root: str) -> Found:
    label, split = entry.values["label"], entry.values["split"]
    if label is None or label == "":
        raise UserError(f"{entry.place}: no label; expected the class's name in a column {_any_of(LABEL_COLUMNS)}")
    known = "train" if split in (None, "") else split_of(str(split))
    if known is None:
        raise UserError(f"{entry.place}: {split!r} is no split; expected train, validation or test")
    mask, box = entry.values["mask"], entry.values["box"]
    where = _resolved(mask, root.rsplit("/", 1)[0], entry.place) if mask not in (None, "") else None
    return Found(
        entry.uri, entry.uri, str(label), known, where, _box(box, entry.place) if box not in (None, "") else None
    )


def _box(value: Any, place: str) -> tuple[float, float, float, float]:
    """left, top, width, height in pixels, as text or as a list of numbers."""
    try:
        left, top, width, height = map(float, value.replace(",", " ").split() if isinstance(value, str) else value)
    except (TypeError, ValueError):
        left = top = width = height = math.nan
    if not (width > 0 and height > 0 and math.isfinite(left + top + width + height)):
        raise UserError(f"{place}: {value!r} is no box; expected left,top,width,height in pixels")
    return left, top, width, height


def listed(uri: str, more: Sequence[Sequence[str]] = (), *, needed: bool = False) -> Iterator[Entry]:
    """The entries of a list, in its order. more: further columns wanted, each by all its names in small letters.

    needed: `UserError` where there is no such column; else it has no values.
    """
    base, suffix = uri.rsplit("/", 1)[0], os.path.splitext(uri)[1].lower()
    with storage.open_reader(uri) as handle:
        try:
            for at, (location, *values) in _rows(handle, suffix, uri, more, needed):
                place = f"{uri}, {at}"
                named = {names[0]: value for names, value in zip(more, values, strict=True)}
                yield Entry(place, _resolved(location, base, place), named)
        except UnicodeDecodeError as error:
            raise UserError(f"{uri} isn't text in UTF-8 ({error.reason}); save the list as UTF-8") from error
        except (pa.ArrowInvalid, csv.Error) as error:
            raise UserError(f"{uri} can't be read as a list of images: {error}") from error


def _rows(
    handle: IO[bytes], suffix: str, uri: str, more: Sequence[Sequence[str]], needed: bool
) -> Iterator[tuple[str, list[Any]]]:
    """Each entry's location and further values, and what to call its place."""
    if suffix == ".parquet":
        rows = pq.ParquetFile(handle, pre_buffer=False)
        columns = _columns(rows.schema_arrow.names, uri, more, needed)
        number = itertools.count(1)
        for batch in rows.iter_batches(_PIECE, columns=[name for name in columns if name], use_threads=False):
            for row in batch.to_pylist():
                yield f"row {next(number)}", [row.get(name) for name in columns]
        return
    buffered = io.BufferedReader(handle, _READ_BYTES)  # type: ignore[type-var]
    lines = io.TextIOWrapper(buffered, "utf-8-sig", newline="")
    if suffix == ".txt":
        _columns(["uri"], uri, more, needed)
        for line, text in enumerate(lines, 1):
            if entry := text.rstrip("\r\n"):
                yield f"line {line}", [entry, *(None for _ in more)]
        return
    table = csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ",")
    columns = _columns(list(table.fieldnames or []), uri, more, needed)
    for row in table:
        yield f"line {table.line_num}", [row[name] if name else None for name in columns]


def _columns(names: list[str], uri: str, more: Sequence[Sequence[str]], needed: bool) -> list[str | None]:
    """The column of the locations, and of each of the others if there is one."""
    by_name = {name.lower(): name for name in reversed(names)}
    first, *others = [next((by_name[w] for w in wanted if w in by_name), None) for wanted in (URI_COLUMNS, *more)]
    missing = [wanted for wanted, name in zip(more, others, strict=True) if needed and name is None]
    if first is None or missing:
        absent = URI_COLUMNS if first is None else missing[0]
        raise UserError(f"{uri} has no column {_any_of(absent)}; its columns are {', '.join(names[:8])}")
    return [first, *others]


def _any_of(names: Sequence[str]) -> str:
    return f"{names[0]} (or {', '.join(names[1:])})" if len(names) > 1 else names[0]


def _resolved(location: Any, base: str, place: str) -> str:
    if not isinstance(location, str) or not location:
        raise UserError(f"{place}: expected the location of an image, found {location!r}")
    if storage.is_remote(location):
        if refusal := unsupported(location.split("://", 1)[0]):
            raise UserError(f"{place}: {location}: {refusal}")
        return location
    path = location.removeprefix("file://")
    if storage.is_remote(base) and not os.path.isabs(path):
        return f"{base}/{path}"
    return os.path.abspath(os.path.join(base, path))
