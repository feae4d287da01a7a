"""The rows that scoring writes, and their files: a chunk of the input is one, or one a partition.

    <output>/parts/part-00012.parquet                     a row an image, in the order of the input
    <output>/parts/class_name-robin/part-00012.parquet    the same with partition_by class_name
    <output>/job/done/00012.json                          last: what was counted, and the names of the files

A chunk without its `done` record counts as not begun: its files are written anew, or taken away.
"""

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from protopnet import __version__, storage
from protopnet.datasets.pool import ordered, threads_for
from protopnet.scoring.tally import Tally

FORMAT, VERSION = "protopnet-scores", 2
PARTS, DONE = "parts", "job/done"

TOP = pa.struct(
    [
        ("class", pa.int32()),
        ("class_name", pa.string()),
        ("probability", pa.float32()),
        ("logit", pa.float32()),
    ]
)
EVIDENCE = pa.struct(
    [
        ("member", pa.int32()),  # of the ensemble, from 0
        ("prototype", pa.int32()),  # its number in that member's bundle
        ("class", pa.int32()),  # that the prototype belongs to
        ("name", pa.string()),  # that people gave the prototype, or null
        ("similarity", pa.float32()),
        ("connection", pa.float32()),
        ("points", pa.float32()),  # similarity x connection: what the predicted class got
        ("box", pa.list_(pa.int32())),  # top, left, bottom, right, half-open, in pixels of the image
        ("source_uri", pa.string()),  # the training image that the prototype is a patch of
    ]
)


def score_schema(evidence: bool, carry: Sequence[str] = (), arrays: Sequence[pa.Field] = ()) -> pa.Schema:
    """The columns of a part. evidence: listed; arrays: of every prototype; carry: of a list, behind all others.

    What is empty in a row with `error` is null.
    """
    fields = [
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("width", pa.int32()),  # pixels, after the EXIF turn
        ("height", pa.int32()),
        ("label", pa.int32()),  # class whose name the image's folder has, if any
        ("label_name", pa.string()),
        ("prediction", pa.int32()),  # class with the highest logit; null where the job abstained
        ("class_name", pa.string()),  # of the prediction
        ("probability", pa.float32()),  # of the first class, as are logit, margin and members_agree
        ("logit", pa.float32()),  # sum of the members'
        ("margin", pa.float32()),  # probability minus that of the second class
        ("unknown", pa.bool_()),  # looks like nothing that the bundles know; null where they don't say
        ("members_agree", pa.float32()),  # share of the members that have the same first class
        ("top", pa.list_(TOP)),
        *([("evidence", pa.list_(EVIDENCE))] if evidence else []),
        *arrays,
        ("error", pa.string()),  # why the image couldn't be scored, or null
        *((name, pa.string()) for name in carry),
    ]
    return pa.schema(fields)


def write_chunk(
    output_uri: str, chunk: int, table: pa.Table, tally: Tally, *, partition_by: str | None, about: dict[str, Any]
) -> None:
    """Write the files of a chunk and, when they are all there, its record.

    about: what the files' metadata say under `protopnet` beside format and version.
    """
    metadata = {"format": FORMAT, "version": VERSION, "protopnet": __version__, "chunk": chunk} | about
    files = []
    for folder, rows in _partitions(table, partition_by):
        name = storage.join(folder, f"part-{chunk:05d}.parquet")
        rows = rows.replace_schema_metadata({"protopnet": json.dumps(metadata)})
        with storage.open_writer(storage.join(output_uri, PARTS, name)) as handle:
            pq.write_table(rows, handle, compression="zstd")
        files.append(name)
    record = {"chunk": chunk, "files": files, "tally": tally.model_dump()}
    storage.write_json(_record(output_uri, chunk), record)


def is_done(output_uri: str, chunk: int) -> bool:
    return storage.exists(_record(output_uri, chunk))


def take_stock(output_uri: str) -> tuple[set[int], Tally]:
    """Chunks that are done, and what was counted in all of them. Files that belong to none are removed."""
    parts_uri = storage.located(storage.join(output_uri, PARTS))
    present = {file[len(parts_uri) + 1 :] for file in storage.each_file(parts_uri)}
    done, total, owned = set(), Tally(), set()
    records_uri = storage.join(output_uri, DONE)
    uris, again = itertools.tee(storage.each_file(records_uri))
    for uri, record in zip(uris, ordered(storage.read_json, again, threads_for(records_uri)), strict=True):
        if present.issuperset(record["files"]):  # else somebody has removed one, to have it made again
            done.add(record["chunk"])
            total = total.plus(Tally.model_validate(record["tally"]))
            owned.update(record["files"])
        else:
            storage.delete_file(uri)
    for name in present - owned:
        if name.rsplit("/", 1)[-1].startswith("part-"):
            storage.delete_file(storage.join(parts_uri, name))
    return done, total


def clear_unfinished(output_uri: str) -> None:
    """Remove what killed processes left half-written."""
    if storage.is_remote(output_uri):
        return  # there is nothing to see of them
    for folder, _, _ in os.walk(storage.located(output_uri)):
        storage.delete_unfinished(folder, "")


def _record(output_uri: str, chunk: int) -> str:
    return storage.join(output_uri, DONE, f"{chunk:05d}.json")


def _partitions(table: pa.Table, column: str | None) -> Iterator[tuple[str, pa.Table]]:
    """Folders and their rows.

    Not Hive's `class_name=01`: readers make a number of that, a date of others, and pandas can't read the rows without
    a value. And no name may begin with `_` or `.`, which some take for hidden.
    """
    if column is None:
        yield "", table
        return
    for value in sorted(pc.unique(table[column]).to_pylist(), key=lambda value: (value is None, value)):
        chosen = pc.is_null(table[column]) if value is None else pc.equal(table[column], value)
        folder = f"without-{column}" if value is None else f"{column}-{quote(str(value), safe=' ')}"
        yield folder, table.filter(chosen)
