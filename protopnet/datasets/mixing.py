"""A stream of rows in a drawn order, in bounded memory, so that neighbours in a shard have nothing in common.

Sources come class by class. Written like that, whatever reads a stretch of a shard sees a few classes only: a batch,
a worker's share of it, BatchNorm. So rows are mixed once, before they are written; reading shuffles only near rows.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from protopnet.datasets.rows import ROW_SCHEMA, SPLITS
from protopnet.errors import UserError

HELD_BYTES = 64 << 20  # of images in memory; beyond them they wait in files
BUCKETS = 256  # files a split; each is held in memory once, so 256 GB of images take 1 GB
_SEED = 3  # last word of the seed


class Pile:
    """Takes rows (`ROW_SCHEMA`, with images) in any order and gives them back split by split, each in a drawn order.

    The order depends on the number of rows and on `seed` alone. What doesn't fit into `held_bytes` waits in a temporary
    folder (TMPDIR), which needs as much room as the images. `UserError` where it has too little.
    """

    def __init__(self, seed: int = 0, held_bytes: int = HELD_BYTES, buckets: int = BUCKETS) -> None:
        self.random = np.random.default_rng((seed, _SEED))
        self.held_bytes, self.buckets = held_bytes, buckets
        self.rows = 0
        self._held: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self._bytes = 0

    def __enter__(self) -> "Pile":
        self._folder = tempfile.TemporaryDirectory(prefix="protopnet-mixing-")
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    def add(self, row: dict[str, Any]) -> None:
        """Take one row."""
        self._held[row["split"]].append(row)
        self.rows += 1
        self._bytes += len(row["image"])
        if self._bytes > self.held_bytes:
            self._spill()

    def drawn(self) -> Iterator[dict[str, Any]]:
        """Every row once: training, validation, test; no row group of a shard then serves two of them."""
        if any(Path(self._folder.name).iterdir()):
            self._spill()
        for split in SPLITS:
            yield from self._shuffled(self._held[split])
            for bucket in sorted(Path(self._folder.name).glob(f"{split}-*")):
                yield from self._shuffled(_read(bucket))

    def _shuffled(self, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        return (rows[i] for i in self.random.permutation(len(rows)))

    def _spill(self) -> None:
        """Move what is held into files, each row into one at random."""
        for split, rows in self._held.items():
            bucket_n = self.random.integers(0, self.buckets, len(rows))
            for bucket in np.unique(bucket_n):
                own = [rows[i] for i in np.flatnonzero(bucket_n == bucket)]
                self._append(Path(self._folder.name) / f"{split}-{bucket:04d}", own)
        self._held = {split: [] for split in SPLITS}
        self._bytes = 0

    def _append(self, file: Path, rows: list[dict[str, Any]]) -> None:
        try:
            with file.open("ab") as handle, pa.ipc.new_stream(handle, ROW_SCHEMA) as stream:
                stream.write_table(pa.Table.from_pylist(rows, schema=ROW_SCHEMA))
        except OSError as error:
            raise UserError(
                f"{file.parent}: {error.strerror or error}; mixing the images needs as much room there as they take: "
                "set TMPDIR to a folder with room"
            ) from error


def _read(file: Path) -> list[dict[str, Any]]:
    """Rows of a file of several Arrow streams, one after the other."""
    rows: list[dict[str, Any]] = []
    with file.open("rb") as handle:
        end = file.stat().st_size
        while handle.tell() < end:
            with pa.ipc.open_stream(handle) as stream:
                rows += stream.read_all().to_pylist()
    return rows
