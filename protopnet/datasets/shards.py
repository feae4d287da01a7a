"""Datasets as Parquet shards: one row an image, the image inside, in a drawn order (`mixing`).

    shards/dataset.json                     classes, counts, source, and the names of the files that count
    shards/shard-<token>-00000.parquet      rows; a file at most 240 MB, a row group 8 to 64 images, at most 2 MB
    shards/_index-<token>.parquet           the rows without the images, with file, row group and row
    shards/_errors-<token>.parquet          uri and reason of each image that couldn't be used

`dataset.json` is written last and names its files: what a killed run leaves behind is never looked at, and
overwriting a dataset shows either the old one or the new one. (Names with an underscore are passed over by
readers of a whole folder of Parquet.)
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from protopnet import storage
from protopnet.config import DataSettings
from protopnet.datasets.folders import Progress
from protopnet.datasets.mixing import Pile
from protopnet.datasets.rows import MANIFEST_SCHEMA, BadRow, Dataset, error_table, with_object
from protopnet.datasets.splits import chosen_classes, keep_classes, with_splits
from protopnet.datasets.validate import check_bad_share
from protopnet.datasets.writer import Limits, ShardWriter
from protopnet.errors import UserError
from protopnet.tables import read_table

FORMAT, VERSION = "protopnet-shards", 2
PREFIXES = ("shard-", "_index-", "_errors-")  # names of files that are ours to delete


def is_complete(uri: str) -> bool:
    """True if a folder holds a whole sharded dataset."""
    return storage.exists(storage.join(uri, "dataset.json"))


def check_output(uri: str, overwrite: bool) -> None:
    """`UserError` if a folder already holds a dataset that isn't to be overwritten, or can't be written."""
    if is_complete(uri) and not overwrite:
        raise UserError(f"{uri} already holds a dataset; pass --overwrite, or choose another --output")
    storage.check_writable(uri, "output")


def write_shards(
    rows: Iterable[dict[str, Any] | BadRow],
    uri: str,
    classes: list[str],
    source: dict[str, Any],
    overwrite: bool = False,
    progress: Progress | None = None,
    max_bad: float = 1.0,
    limits: Limits | None = None,
) -> Dataset:
    """Write rows in a drawn order, and open the result. Rows without an `image_id` are counted from 0 as they come.

    Memory doesn't grow with the number of images, apart from the manifest returned. `UserError` as
    `check_output` and `Pile`, and if the share of bad images is above max_bad; then nothing is left behind.
    """
    check_output(uri, overwrite)
    errors: list[BadRow] = []
    with Pile() as pile:
        for row in rows:
            if isinstance(row, BadRow):
                errors.append(row)
            else:
                pile.add({"image_id": pile.rows, **row})
            if progress:
                progress(pile.rows + len(errors), None)
        check_bad_share(str(source.get("path", uri)), pile.rows, error_table(errors), max_bad)
        with ShardWriter(uri, limits or Limits.for_images(pile.rows), errors=errors) as writer:
            for row in pile.drawn():
                writer.add(row)
    about = {"format": FORMAT, "version": VERSION, "classes": classes, "source": source} | writer.summary()
    storage.write_json(storage.join(uri, "dataset.json"), about)
    _delete_leftovers(uri, about)
    as_written = DataSettings(source="shards", path=uri, validation=0, test=0)
    return open_shards(uri, as_written, seed=0)


def open_shards(uri: str, settings: DataSettings, seed: int) -> Dataset:
    """The dataset in a folder of shards, without reading an image.

    Missing test and validation splits are cut from the training images, as folders do. `UserError` if the
    folder isn't there or isn't complete.
    """
    root = storage.located(uri)
    about = _about(root)
    index = with_object(read_table(storage.join(root, about["index"])))
    if index.num_rows != sum(entry["rows"] for entry in about["files"]):
        raise UserError(f"{uri}: index and shards differ in their number of images; run jobs/prepare.py again")
    files = pa.array([storage.join(root, entry["name"]) for entry in about["files"]])
    at = index.schema.get_field_index("file")
    index = index.set_column(at, MANIFEST_SCHEMA.field(at), files.take(index["file"].combine_chunks()))
    index = index.cast(MANIFEST_SCHEMA).sort_by("image_id")
    if not np.array_equal(index["image_id"].to_numpy(), np.arange(index.num_rows)):
        raise UserError(f"{uri}: image_ids aren't 0, 1, 2, … without gaps; run jobs/prepare.py again")
    chosen = chosen_classes(about["classes"], settings.classes)
    table = with_splits(keep_classes(index, about["classes"], chosen), settings, seed)
    errors = read_table(storage.join(root, about["errors"]))
    if chosen != about["classes"]:
        errors = errors.filter(pc.is_in(errors["class_name"], value_set=pa.array(chosen, pa.string())))
    return Dataset(chosen, table, about["source"] | {"shards": root}, errors)


def stream_index(uri: str, columns: list[str]) -> Iterator[pa.Table]:
    """Columns of the rows of `open_shards`, as they lie in the shards, a piece at a time; `file` is a full location."""
    root = storage.located(uri)
    about = _about(root)
    files = pa.array([storage.join(root, entry["name"]) for entry in about["files"]])
    with storage.open_reader(storage.join(root, about["index"])) as handle:
        index = pq.ParquetFile(handle, pre_buffer=False)
        for group in range(index.num_row_groups):
            rows = index.read_row_group(group, columns=columns, use_threads=False)
            at = rows.schema.get_field_index("file")
            yield rows.set_column(at, "file", files.take(rows["file"].combine_chunks()))


def image_bytes(uri: str) -> int:
    """Of all images in a folder of shards."""
    return sum(entry["bytes"] for entry in _about(storage.located(uri))["files"])


def _about(root: str) -> dict[str, Any]:
    try:
        about = storage.read_json(storage.join(root, "dataset.json"))
    except FileNotFoundError:
        raise UserError(
            f"{root} holds no complete dataset: no dataset.json; jobs/prepare.py writes one (data.path)"
        ) from None
    if about.get("format") != FORMAT or about.get("version") not in (1, VERSION):
        raise UserError(f"{root}/dataset.json isn't a sharded dataset of version 1 or {VERSION} (data.path)")
    return about


def _delete_leftovers(uri: str, about: dict[str, Any]) -> None:
    """Remove what killed runs and an overwritten dataset have left; only files named as ours are."""
    kept = {entry["name"] for entry in about["files"]} | {about["index"], about["errors"]}
    for file in storage.list_files(uri, ".parquet"):
        name = file.rsplit("/", 1)[1]
        if name not in kept and name.startswith(PREFIXES):
            storage.delete_file(file)
    for prefix in PREFIXES:
        storage.delete_unfinished(uri, prefix)
