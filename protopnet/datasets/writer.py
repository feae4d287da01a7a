"""Cutting rows in a drawn order into Parquet shards, and writing one of them (the layout of the folder: see `shards`).

Sources come class by class. Written like that, whatever reads a stretch of a shard sees a few classes only: a batch,
a worker's share of it, BatchNorm. So rows are mixed once, before they are written; reading shuffles only near rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from protopnet import storage
from protopnet.datasets.reader import ImageReader
from protopnet.datasets.rows import MANIFEST_SCHEMA, ROW_SCHEMA, SPLITS

_SEED = 3  # last word of the seed of the order
_READ_ROWS = 256  # that are asked for together, so that a bucket answers many requests at once
_READ_BYTES = 32 << 20  # and held at most, where one row group isn't more


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


def drawn(splits: np.ndarray, seed: int = 0) -> np.ndarray:
    """The order of rows in shards, from the split of each: training, validation, test, each at random.

    No row group of a shard then serves two of them. Depends on splits and seed alone.
    """
    random = np.random.default_rng((seed, _SEED))
    return np.concatenate([random.permutation(np.flatnonzero(splits == split)) for split in SPLITS])


def cut(splits: np.ndarray, sizes: np.ndarray, limits: Limits) -> np.ndarray:
    """(n, 3) file, row group in it and row in that of rows in their order; sizes: bytes of each image.

    A row group holds rows of one split.
    """
    place = np.empty((len(sizes), 3), np.int32)
    file = file_bytes = group = group_start = group_bytes = 0
    for i, size in enumerate(sizes.tolist()):
        full = i - group_start >= limits.group_rows or group_bytes + size > limits.group_bytes
        if i > group_start and (full or splits[i] != splits[i - 1]):
            group, group_start, group_bytes = group + 1, i, 0
        place[i] = 0, group, i - group_start
        group_bytes += size
    edges = [0, *(np.flatnonzero(place[1:, 2] == 0) + 1).tolist(), len(sizes)] if len(sizes) else []
    group = 0
    for start, end in pairwise(edges):
        more = int(sizes[start:end].sum())
        if group and file_bytes + more > limits.file_bytes:
            file, file_bytes, group = file + 1, 0, 0
        place[start:end, 0], place[start:end, 1] = file, group
        file_bytes, group = file_bytes + more, group + 1
    return place


def write_shard(uri: str, rows: pa.Table, groups: np.ndarray) -> None:
    """One file. rows: manifest rows with `size`, where their images are now; groups: (n,) the row group of each."""
    with storage.open_writer(uri) as handle, parquet_writer(handle, ROW_SCHEMA) as parquet:
        for piece in _with_images(rows, groups):
            parquet.write_table(piece, row_group_size=max(1, len(piece)))


def _with_images(rows: pa.Table, groups: np.ndarray) -> Iterator[pa.Table]:
    """Row group by row group; of several the images are read at once."""
    edges = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)]
    sizes = np.concatenate([[0], np.cumsum(rows["size"].to_numpy())])
    reader, start = ImageReader(), 0
    while start < len(edges) - 1:
        end = start + 1
        while end < len(edges) - 1 and (
            edges[end + 1] - edges[start] <= _READ_ROWS and sizes[edges[end + 1]] - sizes[edges[start]] <= _READ_BYTES
        ):
            end += 1
        first = edges[start]
        images = reader.read(rows, range(first, edges[end]))
        for low, high in pairwise(edges[start : end + 1]):
            group = rows.slice(low, high - low)
            columns = {name: group[name] for name in ROW_SCHEMA.names if name != "image"}
            columns["image"] = pa.array(images[low - first : high - first], pa.binary())
            yield pa.table({name: columns[name] for name in ROW_SCHEMA.names}, schema=ROW_SCHEMA)
        start = end


def write_index(uri: str, rows: pa.Table, place: np.ndarray, limits: Limits) -> None:
    """The rows without their images, with the place of each; a file is a position in dataset.json's list, since the
    folder may be moved."""
    at = MANIFEST_SCHEMA.get_field_index("file")
    schema = MANIFEST_SCHEMA.set(at, pa.field("file", pa.int32()))
    columns = {name: rows[name] for name in MANIFEST_SCHEMA.names[:-3]}
    columns |= {name: pa.array(place[:, i]) for i, name in enumerate(("file", "row_group", "row"))}
    index = pa.table({name: columns[name] for name in schema.names}, schema=schema)
    with storage.open_writer(uri) as handle, parquet_writer(handle, schema) as parquet:
        parquet.write_table(index, row_group_size=limits.index_rows)


def parquet_writer(handle: object, schema: pa.Schema) -> pq.ParquetWriter:
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
