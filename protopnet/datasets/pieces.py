"""Images of a source, each read once and laid down in pieces, from which shards are written in any order.

    <output>/_pieces-<key>/00012.bytes      the images of a chunk, one after the other
    <output>/_pieces-<key>/00012.parquet    their rows and what couldn't be used; written last: both are whole

A killed job keeps its pieces: the same command reads the other chunks only. The key is of all that rows depend on.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from protopnet import storage
from protopnet.datasets.rows import ERROR_SCHEMA, MANIFEST_SCHEMA, ROW_SCHEMA, BadRow, Dataset
from protopnet.tables import read_table, write_table

PREFIX = "_pieces-"
_THREADS = 16  # that read the rows of pieces from a bucket
_PIECE_SCHEMA = pa.schema(
    [field for field in ROW_SCHEMA if field.name != "image"]
    + [("first", pa.int64()), ("size", pa.int64()), ("reason", pa.string())]
)


@dataclass(frozen=True)
class Source:
    """Images that nobody has read yet: `chunk` items at a time are read together, by any process.

    read: rows with their images (`ROW_SCHEMA`) of some items, on so many cores; may be pickled. finish: the dataset of
    the rows of all items, in their order (`MANIFEST_SCHEMA` and the `size` in bytes), and of what couldn't be used: what
    depends on all images (labels, splits). path: what messages call it. images: how many, where that is known.
    """

    items: Sequence[Any]
    read: Callable[[list[Any], int], Iterable[dict[str, Any] | BadRow]]
    finish: Callable[[pa.Table, pa.Table], Dataset]
    key: str
    path: str
    images: int | None = None
    chunk: int = 1024

    @property
    def chunks(self) -> int:
        return -(-len(self.items) // self.chunk)

    def items_of(self, number: int) -> list[Any]:
        """The items of a chunk."""
        start = number * self.chunk
        return [self.items[i] for i in range(start, min(start + self.chunk, len(self.items)))]


def write_piece(folder: str, number: int, rows: Iterable[dict[str, Any] | BadRow]) -> int:
    """Lay down rows as they come; returns how many there were, bad ones too. A row and its image are held at a time."""
    kept: list[dict[str, Any]] = []
    first = 0
    with storage.open_writer(_name(folder, number, "bytes")) as handle:
        for row in rows:
            if isinstance(row, BadRow):
                kept.append({"uri": row.uri, "reason": row.reason, "class_name": row.class_name})
                continue
            image = row["image"]
            handle.write(image)
            kept.append({name: value for name, value in row.items() if name != "image"})
            kept[-1] |= {"first": first, "size": len(image)}
            first += len(image)
    write_table(_name(folder, number, "parquet"), pa.Table.from_pylist(kept, schema=_PIECE_SCHEMA))
    return len(kept)


def finished(folder: str) -> set[int]:
    """The numbers of the pieces that are whole."""
    images, rows = (
        {uri.rsplit("/", 1)[1].removesuffix(kind) for uri in storage.list_files(folder, kind)}
        for kind in (".bytes", ".parquet")
    )
    return {int(name) for name in images & rows}


def read_pieces(folder: str, number: int) -> tuple[pa.Table, pa.Table]:
    """The rows of the first pieces (`MANIFEST_SCHEMA` and `size`; `image_id` null where there is none yet), and errors."""
    with ThreadPoolExecutor(_THREADS) as pool:
        both = list(pool.map(lambda n: _read(folder, n), range(number)))
    rows, errors = zip(*both, strict=True) if both else ((_empty(),), (ERROR_SCHEMA.empty_table(),))
    return pa.concat_tables(rows).combine_chunks(), pa.concat_tables(errors).combine_chunks()


def _read(folder: str, number: int) -> tuple[pa.Table, pa.Table]:
    piece = read_table(_name(folder, number, "parquet"))
    bad = pc.is_valid(piece["reason"])
    errors, rows = piece.filter(bad).select(ERROR_SCHEMA.names), piece.filter(pc.invert(bad))
    where, first, size = _name(folder, number, "bytes"), rows["first"].cast(pa.string()), rows["size"].cast(pa.string())
    files = pc.binary_join_element_wise(pc.binary_join_element_wise(f"{where}#bytes=", first, ""), size, "+")
    none = pa.array([-1] * len(rows), pa.int32())
    columns = {name: rows[name] for name in rows.column_names} | {"file": files, "row_group": none, "row": none}
    return pa.table({name: columns[name] for name in _empty().column_names}), errors


def _empty() -> pa.Table:
    return MANIFEST_SCHEMA.append(pa.field("size", pa.int64())).empty_table()


def _name(folder: str, number: int, kind: str) -> str:
    return storage.join(folder, f"{number:05d}.{kind}")
