"""The record of a bundle's prototypes: what is small of it in memory, pictures and maps read when they are asked for."""

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from protopnet.model.bundle import with_all_columns

_LARGE = ["activation_map", "thumbnail"]
_PIECES = 4  # row groups whose pictures and maps are kept


class PrototypeTable:
    """A row a prototype, in the columns of `bundle.PROTOTYPE_SCHEMA`.

    `small`: all columns but maps and pictures. piece: gives those of a stretch of rows; starts: the first row of each;
    pictures: how many there are in each, None where only the stretch itself says it.
    """

    def __init__(
        self,
        small: pa.Table,
        starts: np.ndarray,
        piece: Callable[[int], pa.Table],
        pictures: Sequence[int | None] = (None,),
    ) -> None:
        self.small, self._starts, self._piece, self._pictures = small, starts, piece, pictures

    @classmethod
    def of(cls, table: pa.Table) -> "PrototypeTable":
        """Of a table that is in memory already."""
        return cls(with_all_columns(table.drop_columns(_LARGE)), np.zeros(1, np.int64), lambda _: table)

    @classmethod
    def opened(cls, source: Any) -> "PrototypeTable":
        """Of a Parquet file, as pyarrow reads it, which stays open."""
        file, one_at_a_time = pq.ParquetFile(source, pre_buffer=False), threading.Lock()
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        small = [name for name in file.schema_arrow.names if name not in _LARGE]

        @lru_cache(_PIECES)
        def piece(group: int) -> pa.Table:
            with one_at_a_time:
                return file.read_row_group(group, _LARGE, use_threads=False)

        table = with_all_columns(file.read(small, use_threads=False).combine_chunks())
        return cls(table, np.cumsum([0, *rows[:-1]]), piece, [_pictures(file, group) for group in range(len(rows))])

    def is_pictured(self, prototype: int) -> bool:
        """Whether there is a picture; reads none where all of its stretch have one, or none."""
        number, _ = self._place(prototype)
        count = self._pictures[number]
        rows = np.append(self._starts, len(self.small))[number + 1] - self._starts[number]
        return count == rows if count in (0, rows) else self.picture(prototype) is not None

    def picture(self, prototype: int) -> bytes | None:
        """JPEG of the source image."""
        found: bytes | None = self._large("thumbnail", prototype)
        return found

    def activation_map(self, prototype: int) -> list[list[float]] | None:
        """Similarities on the source image, row by row."""
        found: list[list[float]] | None = self._large("activation_map", prototype)
        return found

    def _large(self, column: str, prototype: int) -> Any:
        number, row = self._place(prototype)
        return self._piece(number)[column][row].as_py()

    def _place(self, prototype: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._starts, prototype, "right")) - 1
        return number, prototype - int(self._starts[number])


def _pictures(file: pq.ParquetFile, group: int) -> int | None:
    """Of a row group, as its statistics say."""
    about = file.metadata.row_group(group)
    for number in range(about.num_columns):
        column = about.column(number)
        if column.path_in_schema == "thumbnail" and column.statistics is not None and column.statistics.has_null_count:
            return int(about.num_rows - column.statistics.null_count)
    return None
