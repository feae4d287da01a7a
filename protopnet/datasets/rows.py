"""The one row of every dataset, and the dataset as a whole: a table of rows without their images.

A row is an image: who it is (`image_id`, `uri`, `sha256`), what it shows (`label`, `class_name`, `parts`,
`object`), what it is for (`split`) and where its bytes are. Every source (folders, CUB-200-2011, shards, birds) yields
these rows; everything downstream reads nothing else.
"""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from protopnet import storage
from protopnet.errors import UserError
from protopnet.tables import read_table, write_table

SPLITS = ("train", "validation", "test")

PARTS = pa.list_(pa.struct([("part", pa.string()), ("x", pa.float32()), ("y", pa.float32())]))

ROW_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),  # dense from 0, in the order (class, path)
        ("uri", pa.string()),  # where the image came from; a crop adds #xywh=x,y,w,h in pixels
        ("image", pa.binary()),  # the encoded file as it came (a crop: encoded anew)
        ("label", pa.int32()),  # index in the dataset's classes
        ("class_name", pa.string()),
        ("split", pa.string()),  # train, validation or test
        ("width", pa.int32()),  # pixels, after the EXIF turn
        ("height", pa.int32()),
        ("sha256", pa.string()),  # of `image`
        ("parts", PARTS),  # visible key points in fractions of the image, or null
        ("object", pa.binary()),  # where the object is, or null: see `masks`
    ]
)

# A row without its image but with its place: a plain file (row_group and row are -1) or a row of a shard.
MANIFEST_SCHEMA = pa.schema(
    [field for field in ROW_SCHEMA if field.name != "image"]
    + [pa.field("file", pa.string()), pa.field("row_group", pa.int32()), pa.field("row", pa.int32())]
)

ERROR_SCHEMA = pa.schema([("uri", pa.string()), ("reason", pa.string()), ("class_name", pa.string())])


MANIFEST_VERSION = 2


def with_object(rows: pa.Table) -> pa.Table:
    """The rows with a column `object`, which those of version 1 haven't."""
    if "object" in rows.column_names:
        return rows
    at, nothing = rows.schema.get_field_index("parts") + 1, pa.nulls(len(rows), pa.binary())
    return rows.add_column(at, MANIFEST_SCHEMA.field("object"), nothing)


def as_stored(table: pa.Table) -> pa.Table:
    """The rows of a manifest as they lie in their files: read in this order, each row group is read once."""
    if pc.max(table["row_group"]).as_py() in (None, -1):  # plain files
        return table
    return table.sort_by([(name, "ascending") for name in ("file", "row_group", "row")])


@dataclass(frozen=True)
class BadRow:
    """What a source yields in place of a row when an image can't be used."""

    uri: str
    reason: str
    class_name: str | None = None


def error_table(errors: list[BadRow]) -> pa.Table:
    """Bad images as a table (uri, reason, class_name)."""
    return pa.Table.from_pylist([asdict(error) for error in errors], schema=ERROR_SCHEMA)


@dataclass(frozen=True)
class Dataset:
    """Every usable image of a source, in order of image_id, and the ones that aren't usable.

    classes: names by label. table: `MANIFEST_SCHEMA`. source: where it came from, for the record (JSON
    values). errors: uri, reason and class of each bad image.
    """

    classes: list[str]
    table: pa.Table
    source: dict[str, Any]
    errors: pa.Table

    @cached_property
    def _splits(self) -> dict[str, pa.Table]:
        return {name: self.table.filter(pc.equal(self.table["split"], name)).combine_chunks() for name in SPLITS}

    def split(self, name: str) -> pa.Table:
        """The rows of `train`, `validation` or `test`; none where the dataset has no such split."""
        return self._splits[name]

    def without(self, split: str) -> "Dataset":
        """The same without a split; image_id counts on from 0."""
        table = self.table.filter(pc.not_equal(self.table["split"], split))
        numbers = pa.array(range(len(table)), pa.int64())
        return replace(self, table=table.set_column(table.column_names.index("image_id"), "image_id", numbers))

    def counts(self) -> dict[str, int]:
        """Images a split."""
        return {name: self.split(name).num_rows for name in SPLITS}

    def save(self, uri: str) -> None:
        """Write manifest.parquet, errors.parquet and, last, dataset.json under a folder."""
        for name, table in (("manifest", self.table), ("errors", self.errors)):
            write_table(storage.join(uri, f"{name}.parquet"), table)
        about = {
            "format": "protopnet-manifest",
            "version": MANIFEST_VERSION,
            "classes": self.classes,
            "counts": self.counts(),
        }
        storage.write_json(storage.join(uri, "dataset.json"), about | {"source": self.source})

    @classmethod
    def load(cls, uri: str) -> "Dataset":
        """Read what `save` wrote; `UserError` if it isn't there or isn't a manifest."""
        try:
            about = storage.read_json(storage.join(uri, "dataset.json"))
        except FileNotFoundError:
            raise UserError(f"{uri} holds no dataset: dataset.json is missing") from None
        if about.get("format") != "protopnet-manifest" or about.get("version") not in (1, MANIFEST_VERSION):
            raise UserError(f"{uri} isn't a dataset manifest of version 1 or {MANIFEST_VERSION}")
        tables = [read_table(storage.join(uri, f"{name}.parquet")) for name in ("manifest", "errors")]
        return cls(about["classes"], with_object(tables[0]), about["source"], tables[1])
