"""Arrow tables as files and as bytes."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from protopnet import storage


def write_table(uri: str, table: pa.Table) -> None:
    """Write a small Parquet file, whole or not at all."""
    with storage.open_writer(uri) as handle:
        pq.write_table(table, handle, compression="zstd")


def read_table(uri: str) -> pa.Table:
    """Read a small Parquet file. Errors: `FileNotFoundError`, `UserError`."""
    return parse_table(storage.read_bytes(uri))


def parse_table(data: bytes) -> pa.Table:
    """The table in the bytes of a Parquet file.

    Read by this thread alone: `pq.read_table` leaves the bytes, which belong to Python, with threads of Arrow's, and
    when one lets go of them only while Python shuts down, the process aborts (some 5 % of short processes).
    """
    return pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)


def evenly(table: pa.Table, most: int) -> pa.Table:
    """At most so many rows, evenly spaced from the first to the last."""
    return table if len(table) <= most else table.take(np.linspace(0, len(table) - 1, most).astype(np.int64))


def to_bytes(table: pa.Table) -> bytes:
    """A table as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def from_bytes(data: bytes | pa.Buffer) -> pa.Table:
    """What `to_bytes` made, where it lies."""
    with pa.ipc.open_stream(data) as reader:
        return reader.read_all()
