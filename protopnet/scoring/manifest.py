"""The images of a scoring job, written down before it starts, so that a chunk is the same at every attempt.

<output>/job/manifest-00000.parquet          a row an image; each row group is one chunk
<output>/job/batch-00001/manifest-…          images that came later (--incremental), in chunks of their own
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from protopnet import storage
from protopnet.errors import UserError
from protopnet.scoring.inputs import CARRIED

MANIFEST_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),  # 0, 1, 2, … in the order of the input; of shards their own
        ("uri", pa.string()),
        ("file", pa.string()),  # as in a dataset's manifest
        ("row_group", pa.int32()),
        ("row", pa.int32()),
        ("label", pa.int32()),  # of the class whose name the folder has; null where none has
    ]
)
_FILE_ROWS = 1_000_000
_LOOK_AHEAD = 100_000  # images held until the size of a chunk is chosen


@dataclass(frozen=True)
class Contents:
    """What an input holds. The digest is of the locations, in order."""

    images: int
    digest: str


def contents_of(tables: Iterator[pa.Table]) -> Contents:
    """Read the input through without keeping anything."""
    digest, images = hashlib.sha256(), 0
    for table in tables:
        _update(digest, table)
        images += len(table)
    return Contents(images, digest.hexdigest())


def write_manifest(
    tables: Iterator[pa.Table],
    folder_uri: str,
    classes: list[str],
    chunk_rows_for: Callable[[int], int],
    first_id: int = 0,
) -> tuple[Contents, int]:
    """Number the images, give them labels, and write them in chunks; returns also the rows of a chunk.

    chunk_rows_for: rows of a chunk from the number of images, or of those seen so far if there are very many.
    """
    digest, images = hashlib.sha256(), 0
    names = pa.array(classes, pa.string())

    def numbered() -> Iterator[pa.Table]:
        nonlocal images
        for table in tables:
            _update(digest, table)
            labels = pc.index_in(table["folder"], value_set=names).cast(pa.int32())
            first = first_id + images
            ids = pc.coalesce(table["image_id"], pa.array(range(first, first + len(table)), pa.int64()))
            images += len(table)
            columns = [ids, *(table[name] for name in MANIFEST_SCHEMA.names[1:-1]), labels]
            numbers = pa.table(columns, schema=MANIFEST_SCHEMA)
            yield numbers.append_column(CARRIED, table["carried"]) if "carried" in table.column_names else numbers

    stream = numbered()
    first: list[pa.Table] = []
    while sum(map(len, first)) < _LOOK_AHEAD and (table := next(stream, None)) is not None:
        first.append(table)
    chunk_rows = chunk_rows_for(sum(map(len, first)))
    with _Files(folder_uri, chunk_rows) as files:
        for chunk in _regrouped(first, stream, chunk_rows):
            files.write(chunk)
    return Contents(images, digest.hexdigest()), chunk_rows


def read_chunk(folder_uri: str, chunk: int, chunk_rows: int) -> pa.Table:
    """The rows of one chunk."""
    number, group = divmod(chunk, _groups_a_file(chunk_rows))
    try:
        with storage.open_reader(_file(folder_uri, number)) as handle:
            return pq.ParquetFile(handle, pre_buffer=False).read_row_group(group, use_threads=False)
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise UserError(
            f"the manifest in {folder_uri} is damaged: {error}; start anew with another --output"
        ) from error


def without(tables: Iterator[pa.Table], known: pa.Array) -> Iterator[pa.Table]:
    """The rows whose images aren't among those known, given as `hashes`."""
    for table in tables:
        is_new = pc.invert(pc.is_in(hashes(table["uri"]), value_set=known))
        yield table.filter(is_new)


def known_images(folder_uri: str, chunks: int, chunk_rows: int) -> Iterator[pa.Array]:
    """`hashes` of all images of a manifest, piece by piece."""
    for number in range(-(-chunks // _groups_a_file(chunk_rows))):
        with storage.open_reader(_file(folder_uri, number)) as handle:
            for batch in pq.ParquetFile(handle, pre_buffer=False).iter_batches(columns=["uri"], use_threads=False):
                yield hashes(batch.column(0))


def hashes(uris: pa.Array | pa.ChunkedArray) -> pa.Array:
    """16 bytes a location: tens of millions of them can be held."""
    digests = [hashlib.blake2b(uri.encode(), digest_size=16).digest() for uri in uris.to_pylist()]
    return pa.array(digests, pa.binary(16))


def _update(digest: "hashlib._Hash", table: pa.Table) -> None:
    digest.update("".join(f"{uri}\n" for uri in table["uri"].to_pylist()).encode())


def _regrouped(first: list[pa.Table], stream: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of `rows`; the last may be smaller."""
    waiting = pa.concat_tables(first or [MANIFEST_SCHEMA.empty_table()])
    first.clear()
    while waiting is not None:
        following = next(stream, None)
        while len(waiting) >= rows or (following is None and len(waiting)):
            yield waiting.slice(0, rows)
            waiting = waiting.slice(rows)
        waiting = pa.concat_tables([waiting, following]) if following is not None else None


class _Files:
    """Parquet files of at most `_FILE_ROWS`, so that nobody ever reads an endless footer."""

    def __init__(self, folder_uri: str, chunk_rows: int) -> None:
        self.folder_uri, self.groups = folder_uri, _groups_a_file(chunk_rows)
        self.chunks = 0

    def __enter__(self) -> "_Files":
        return self

    def write(self, chunk: pa.Table) -> None:
        if self.chunks % self.groups == 0:
            self._close()
            self.opened = storage.open_writer(_file(self.folder_uri, self.chunks // self.groups))
            self.writer = pq.ParquetWriter(self.opened.__enter__(), chunk.schema, compression="zstd")
        self.writer.write_table(chunk, row_group_size=len(chunk))
        self.chunks += 1

    def _close(self) -> None:
        if self.chunks:
            self.writer.close()
            self.opened.__exit__(None, None, None)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self._close()
        elif self.chunks:
            self.opened.__exit__(kind, error, None)


def _groups_a_file(chunk_rows: int) -> int:
    return max(1, _FILE_ROWS // chunk_rows)


def _file(folder_uri: str, number: int) -> str:
    return storage.join(folder_uri, f"manifest-{number:05d}.parquet")
