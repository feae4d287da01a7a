"""Writing Parquet shards from a stream of rows (the layout of the folder: see `shards`)."""

import secrets
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from protopnet import storage
from protopnet.datasets.rows import MANIFEST_SCHEMA, ROW_SCHEMA, SPLITS, BadRow, error_table


@dataclass(frozen=True)
class Limits:
    """When a row group and a file are full. A row group is the least that is read for a single image."""

    group_rows: int = 64
    group_bytes: int = 2 << 20
    file_bytes: int = 240 << 20
    index_rows: int = 16384

    @classmethod
    def for_images(cls, images: int) -> "Limits":
        """Row groups small enough that there are enough of them to share out among 64 workers, but not tiny."""
        return cls(group_rows=min(64, max(8, images // 2048)))


@dataclass
class ShardWriter:
    """Rows in, files out; one row group, one open shard and a piece of the index are in memory at a time.

    A row group holds rows of one split.
    """

    uri: str
    limits: Limits
    images: int = 0
    errors: list[BadRow] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    files: list[dict[str, Any]] = field(default_factory=list)

    def __enter__(self) -> "ShardWriter":
        self.token = secrets.token_hex(4)
        self._group: list[dict[str, Any]] = []
        self._group_bytes = 0
        self._index: list[pa.Table] = []
        self._shard = _File(self.uri, "")
        self._index_file = _File(self.uri, f"_index-{self.token}.parquet")
        self._errors_name = f"_errors-{self.token}.parquet"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._end_group()
                self._end_index_piece()
                self._write_errors()
        except BaseException as failure:
            error = failure
            raise
        finally:
            self._close(error)

    def _close(self, error: BaseException | None) -> None:
        self._shard.close(error)
        self._index_file.close(error)
        if error is not None:  # without dataset.json nobody looks at them, but they fill the storage
            with suppress(Exception):
                for name in (entry["name"] for entry in self.files):
                    storage.delete_file(storage.join(self.uri, name))

    def add(self, row: dict[str, Any]) -> None:
        """Take one row; write a row group when it is full."""
        size = len(row["image"])
        too_large = self._group_bytes + size > self.limits.group_bytes
        full = len(self._group) >= self.limits.group_rows
        if self._group and (full or too_large or row["split"] != self._group[-1]["split"]):
            self._end_group()
        self._group.append(row)
        self._group_bytes += size
        self.images += 1
        self.counts[row["split"]] += 1

    def _end_group(self) -> None:
        if not self._group:
            return
        if self.files and self.files[-1]["bytes"] + self._group_bytes > self.limits.file_bytes:
            self._shard.close(None)
        if not self._shard.is_open:
            name = f"shard-{self.token}-{len(self.files):05d}.parquet"
            self._shard = _File(self.uri, name)
            self.files.append({"name": name, "rows": 0, "bytes": 0, "row_groups": 0})
        table = pa.Table.from_pylist(self._group, schema=ROW_SCHEMA)
        self._shard.write(table)
        self._add_to_index(table)
        entry = self.files[-1]
        entry["rows"] += len(self._group)
        entry["bytes"] += self._group_bytes
        entry["row_groups"] += 1
        self._group, self._group_bytes = [], 0

    def _add_to_index(self, table: pa.Table) -> None:
        rows = table.num_rows
        place = {
            "file": pa.array([len(self.files) - 1] * rows, pa.int32()),
            "row_group": pa.array([self.files[-1]["row_groups"]] * rows, pa.int32()),
            "row": pa.array(range(rows), pa.int32()),
        }
        table = table.drop_columns(["image"])
        self._index.append(pa.table([*table.columns, *place.values()], schema=_index_schema()))
        if sum(piece.num_rows for piece in self._index) >= self.limits.index_rows:
            self._end_index_piece()

    def _write_errors(self) -> None:
        with storage.open_writer(storage.join(self.uri, self._errors_name)) as handle:
            pq.write_table(error_table(self.errors), handle)

    def _end_index_piece(self) -> None:
        if self._index or not self._index_file.is_open:
            pieces = self._index or [_index_schema().empty_table()]
            self._index_file.write(pa.concat_tables(pieces).combine_chunks())
            self._index = []

    def summary(self) -> dict[str, Any]:
        """Counts and file names for dataset.json, once the block has ended well."""
        return {
            "images": self.images,
            "counts": self.counts,
            "error_count": len(self.errors),
            "files": self.files,
            "index": self._index_file.name,
            "errors": self._errors_name,
        }


class _File:
    """A Parquet file that is opened by the first table written to it, and appears when it is closed well."""

    def __init__(self, uri: str, name: str) -> None:
        self.name, self.is_open = name, False
        self._uri, self._stack = uri, ExitStack()

    def write(self, table: pa.Table) -> None:
        """Append a table as one row group."""
        if not self.is_open:
            handle = self._stack.enter_context(storage.open_writer(storage.join(self._uri, self.name)))
            self._parquet = self._stack.enter_context(_parquet_writer(handle, table.schema))
            self.is_open = True
        self._parquet.write_table(table, row_group_size=max(1, table.num_rows))

    def close(self, error: BaseException | None) -> None:
        """Complete the file or, with the error that ended the work, drop it."""
        if self.is_open:
            self.is_open = False
            trace = error.__traceback__ if error else None
            self._stack.__exit__(type(error) if error else None, error, trace)


def _index_schema() -> pa.Schema:
    """The manifest's, with the file as a position in dataset.json's list: the folder may be moved."""
    at = MANIFEST_SCHEMA.get_field_index("file")
    return MANIFEST_SCHEMA.set(at, pa.field("file", pa.int32()))


def _parquet_writer(handle: IO[bytes], schema: pa.Schema) -> pq.ParquetWriter:
    point = [f"parts.list.element.{name}" for name in ("part", "x", "y")]
    others = [name for name in schema.names if name not in ("image", "parts")] + point
    compression = dict.fromkeys(others, "zstd") | {"image": "none"} if "image" in schema.names else "zstd"
    return pq.ParquetWriter(
        handle,
        schema,
        compression=compression,  # images are compressed already
        use_dictionary=["class_name", "split", point[0]],
        write_statistics=[name for name in others if name != "object"],  # nobody uses the least and the greatest JPEG
    )
