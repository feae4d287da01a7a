"""Images packed into other files, found without reading them and read one by one.

    x.tar       members known by their suffix (WebDataset); a member is the image `x.tar/sub/name.jpg`
    x.parquet   a column of encoded images, or of Hugging Face's pairs of bytes and path; a row is `x.parquet/name.jpg`

A tar is read by ranges of its bytes, so it must not be compressed. In a manifest a member's `file` is
`x.tar#bytes=<first>+<number>`; a row of Parquet has its row group and row, as in the shards of `jobs/prepare.py`.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from protopnet import storage
from protopnet.datasets.files import SUFFIXES, is_leftover
from protopnet.datasets.layout import LABEL_COLUMNS, URI_COLUMNS
from protopnet.errors import UserError

PACKED = frozenset([".tar", ".parquet"])

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "content")  # the first that is there counts
_RANGE = re.compile(r"(.+)#bytes=(\d+)\+(\d+)", re.DOTALL)
READ_BYTES = 1 << 20  # of a tar at a time while its members are listed


class Place(NamedTuple):
    """Where an image is: a file of its own (row_group and row are -1), a range of one, or a row of Parquet.

    folder: the name of its class, or what may be one; None where there is none.
    """

    uri: str
    file: str
    row_group: int = -1
    row: int = -1
    folder: str | None = None


def places_in(uri: str) -> Iterator[Place] | None:
    """The images of a tar or a Parquet file; None of a Parquet file that holds none. `UserError` if it is damaged."""
    if uri.lower().endswith(".tar"):
        return _members(uri)
    with storage.open_reader(uri) as handle:
        schema = _parquet(handle, uri).schema_arrow
    return _rows(uri, schema) if image_column(schema) else None


def image_column(schema: pa.Schema) -> str | None:
    """The column with encoded images: `image`, or `image.bytes` where it has pairs of bytes and path; None without."""
    for name in _IMAGE_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            if _is_binary(kind):
                return name
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type):
                return f"{name}.bytes"
    return None


def read_file(file: str) -> bytes:
    """The bytes of a file, or of the range of one that a manifest names."""
    if part := _RANGE.fullmatch(file):
        return storage.read_range(part[1], int(part[2]), int(part[3]))
    return storage.read_bytes(file)


def _members(uri: str) -> Iterator[Place]:
    with storage.open_reader(uri, READ_BYTES) as handle, opened_tar(handle, uri) as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined] # or all that were seen would be held
            if member.isreg() and member.sparse is None and is_image(member.name):
                location = storage.join(uri, member.name.removeprefix("./"))
                yield Place(location, f"{uri}#bytes={member.offset_data}+{member.size}", folder=folder_of(location))


@contextmanager
def opened_tar(handle: IO[bytes], uri: str) -> Iterator[tarfile.TarFile]:
    """A tar file to go through; `UserError` where it can't be read as one."""
    try:
        with tarfile.open(fileobj=handle, mode="r:") as archive:
            yield archive
    except tarfile.ReadError as error:
        raise UserError(
            f"{uri} can't be read as a tar file: {error}; a compressed one must be unpacked first, "
            "a damaged one made anew or taken away"
        ) from error


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES and not any(
        map(is_leftover, name.removeprefix("./").split("/"))
    )


def folder_of(location: str) -> str | None:
    """The name of the folder that a file is in."""
    return location.rsplit("/", 2)[-2] if location.count("/") > 1 else None


def _rows(uri: str, schema: pa.Schema) -> Iterator[Place]:
    """Row group by row group; of the images' column only the paths are read, if it has any."""
    image = image_column(schema)
    assert image is not None
    name, label = _name_column(schema, image.split(".")[0]), _first_text(schema, LABEL_COLUMNS)
    columns = [column for column in (name, label) if column]
    with storage.open_reader(uri) as handle:
        opened = _parquet(handle, uri)
        for group in range(opened.num_row_groups):
            named = opened.read_row_group(group, columns=columns, use_threads=False).flatten() if columns else None
            for row in range(opened.metadata.row_group(group).num_rows):
                path = named[name][row].as_py() if named and name else None
                location = _row_location(uri, path or f"{group}-{row}")
                yield Place(location, uri, group, row, named[label][row].as_py() if named and label else None)


def _name_column(schema: pa.Schema, image: str) -> str | None:
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        return f"{image}.path"
    return _first_text(schema, URI_COLUMNS)


def _first_text(schema: pa.Schema, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in schema.names and _is_text(schema.field(name).type)), None)


def _row_location(uri: str, path: str) -> str:
    return path if storage.is_remote(path) or path.startswith("/") else storage.join(uri, path)


def _parquet(handle: IO[bytes], uri: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(handle, pre_buffer=False)
    except pa.ArrowInvalid as error:
        raise UserError(f"{uri} can't be read as Parquet: {error}; make it anew or take it away") from error


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
