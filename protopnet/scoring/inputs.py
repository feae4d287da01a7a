"""What is to be scored, whatever names it, as a stream of rows; only a few are held at a time.

    a folder, s3://bucket/prefix    every image below it, known by its suffix in any case, also those packed into tar and
                                    Parquet files; leftovers of systems are counted
    a tar or Parquet file           the images inside (`datasets.packed`)
    list.txt, .csv, .tsv, .parquet  a location an image: a line, or the column `uri`; relative ones are meant from
                                    the list's own folder
    shards of jobs/prepare.py       the images inside them
    one image                       itself

An image that a list names twice is two rows, with the same scores and an image_id each.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa

from protopnet import storage
from protopnet.datasets.files import SUFFIXES, Passed
from protopnet.datasets.lists import LISTS, listed
from protopnet.datasets.packed import PACKED, Place, folder_of, places_in
from protopnet.datasets.shards import stream_index
from protopnet.errors import UserError

# Where an image is (as in a dataset's manifest), and the name of the folder, or of the class, that it is in.
INPUT_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),  # of shards; null elsewhere, where images are counted as they come
        ("uri", pa.string()),
        ("file", pa.string()),
        ("row_group", pa.int32()),
        ("row", pa.int32()),
        ("folder", pa.string()),
    ]
)
# Beside them, where there is anything to carry: the values of a list's columns, in the order asked for.
CARRIED = pa.field("carried", pa.list_(pa.string()))
Kind = Literal["folder", "packed", "list", "shards", "image"]

_PIECE = 10_000  # rows that are Python objects at a time


@dataclass(frozen=True)
class Input:
    """`tables` starts the stream of rows (`INPUT_SCHEMA`) from its beginning; `passed` counts what it passes over."""

    kind: Kind
    uri: str
    tables: Callable[[], Iterator[pa.Table]]
    passed: Passed = field(default_factory=Passed)


def open_input(uri: str, carry: Sequence[str] = ()) -> Input:
    """Find out what is there; `UserError` if nothing is. carry: columns of a list that go with its images (`carried`)."""
    root, suffix = storage.located(uri), os.path.splitext(uri)[1].lower()
    if carry and (suffix not in LISTS or storage.is_folder(root)):
        raise UserError(f"{uri} is no list with columns (--carry); expected {', '.join(LISTS[1:])}")
    if storage.is_folder(root):
        if _is_shards(root):
            return Input("shards", root, lambda: _from_shards(root))
        passed = Passed()
        return Input("folder", root, lambda: _from_places(_images_below(root, passed)), passed)
    if suffix not in (*LISTS, *SUFFIXES, *PACKED):
        raise UserError(f"{uri} is no folder, no list ({', '.join(LISTS)}), no tar file and no image (--input)")
    if not storage.exists(root):
        raise UserError(f"there is nothing at {uri} (--input); expected a folder, a bucket's prefix, or a list")
    if suffix in PACKED and places_in(root) is not None:
        if carry:
            raise UserError(f"{uri} holds images, not their locations: columns are carried of lists only (--carry)")
        return Input("packed", root, lambda: _from_places(places_in(root) or []))
    if suffix in LISTS:
        return Input("list", root, lambda: _from_list(root, carry))
    return Input("image", root, lambda: _from_locations([root]))


def _is_shards(root: str) -> bool:
    about = storage.join(root, "dataset.json")
    return storage.exists(about) and storage.read_json(about).get("format") == "protopnet-shards"


def _from_shards(root: str) -> Iterator[pa.Table]:
    for rows in stream_index(root, ["image_id", "uri", "class_name", "file", "row_group", "row"]):
        yield rows.rename_columns({"class_name": "folder"}).select(INPUT_SCHEMA.names).cast(INPUT_SCHEMA)


def _from_places(places: Iterable[Place]) -> Iterator[pa.Table]:
    waiting = iter(places)
    while piece := list(itertools.islice(waiting, _PIECE)):
        uris, files, groups, rows, folders = zip(*piece, strict=True)
        columns = [[None] * len(piece), map(_as_text, uris), map(_as_text, files), groups, rows, folders]
        yield pa.table([list(column) for column in columns], schema=INPUT_SCHEMA)


def _from_locations(locations: Iterable[str]) -> Iterator[pa.Table]:
    return _from_places(Place(uri, uri, folder=folder_of(uri)) for uri in locations)


def _as_text(uri: str) -> str:
    """A name that isn't UTF-8 can't be written to Parquet: its row says that it can't be read."""
    return uri.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _from_list(root: str, carry: Sequence[str]) -> Iterator[pa.Table]:
    if not carry:
        yield from _from_locations(entry.uri for entry in listed(root))
        return
    names = [name.lower() for name in carry]
    entries = listed(root, [[name] for name in names], needed=True)
    while piece := list(itertools.islice(entries, _PIECE)):
        carried = [[None if e.values[name] is None else str(e.values[name]) for name in names] for e in piece]
        (rows,) = _from_locations(entry.uri for entry in piece)
        yield rows.append_column(CARRIED, pa.array(carried, CARRIED.type))


def _images_below(root: str, passed: Passed) -> Iterator[Place]:
    paths = (uri[len(root) :].lstrip("/") for uri in storage.each_file(root))
    for path in passed.images_among(paths, PACKED):
        uri, suffix = storage.join(root, path), os.path.splitext(path)[1].lower()
        if suffix not in PACKED:
            yield Place(uri, uri, folder=folder_of(uri))
        elif (places := places_in(uri)) is not None:
            yield from places
        else:
            passed.others[suffix] += 1
