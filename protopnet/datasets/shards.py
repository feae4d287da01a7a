"""Datasets as Parquet shards: one row an image, the image inside, in a drawn order (`writer.drawn`).

    shards/dataset.json                     classes, counts, source, and the names of the files that count
    shards/shard-<token>-00000.parquet      rows; a file at most 240 MB, a row group 8 to 64 images, at most 2 MB
    shards/_index-<token>.parquet           the rows without the images, with file, row group and row
    shards/_errors-<token>.parquet          uri and reason of each image that couldn't be used

`dataset.json` is written last and names its files: what a killed run leaves behind is never looked at, and
overwriting a dataset shows either the old one or the new one. (Names with an underscore are passed over by
readers of a whole folder of Parquet.)
"""

import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from protopnet import storage
from protopnet.config import DataSettings
from protopnet.datasets import pieces
from protopnet.datasets.folders import Progress
from protopnet.datasets.pieces import Source
from protopnet.datasets.rows import MANIFEST_SCHEMA, BadRow, Dataset, with_object
from protopnet.datasets.splits import chosen_classes, keep_classes, renumbered, with_splits
from protopnet.datasets.validate import check_bad_share
from protopnet.datasets.writer import Limits, cut, drawn, write_index, write_shard
from protopnet.errors import UserError
from protopnet.machine import usable_cpus
from protopnet.tables import read_table, write_table

FORMAT, VERSION = "protopnet-shards", 2
PREFIXES = ("shard-", "_index-", "_errors-")  # names of files that are ours to delete
Spread = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]  # `map` here or anywhere, results in any order


def is_complete(uri: str) -> bool:
    """True if a folder holds a whole sharded dataset."""
    return storage.exists(storage.join(uri, "dataset.json"))


def check_output(uri: str, overwrite: bool) -> None:
    """`UserError` if a folder already holds a dataset that isn't to be overwritten, or can't be written."""
    if is_complete(uri) and not overwrite:
        raise UserError(f"{uri} already holds a dataset; pass --overwrite, or choose another --output")
    storage.check_writable(uri, "output")


def write_source(
    source: Source,
    uri: str,
    *,
    overwrite: bool = False,
    checked: Progress | None = None,
    written: Progress | None = None,
    max_bad: float = 1.0,
    limits: Limits | None = None,
    spread: Spread = map,
    cores: int | None = None,
) -> Dataset:
    """Write a source in a drawn order, and open the result. Goes on where a killed call with the same source was.

    Each image is read once, here or where `spread` has it done, each time on so many cores (all of this machine);
    chunks, then shards are the units. What is written is the same wherever and whenever it is done. `UserError` as
    `check_output`, and if the share of bad images is above max_bad; then nothing is left behind.
    """
    check_output(uri, overwrite)
    folder = storage.join(storage.located(uri), f"{pieces.PREFIX}{source.key}")
    done = pieces.finished(folder) if storage.exists(folder) else set()
    todo = (n for n in range(source.chunks) if n not in done)
    count = min(len(done) * source.chunk, source.images or 0)
    work = partial(_read_chunk, folder, source.read, cores or usable_cpus())
    for images in spread(work, ((n, source.items_of(n)) for n in todo)):
        count += images
        if checked:
            checked(count, source.images)
    rows, errors = pieces.read_pieces(folder, source.chunks)
    return _mixed(source.finish(rows, errors), source.path, folder, uri, max_bad, limits, spread, written)


def _read_chunk(folder: str, read: Any, cores: int, chunk: tuple[int, list[Any]]) -> int:
    number, items = chunk
    return pieces.write_piece(folder, number, read(items, cores))


def write_shards(
    rows: Iterable[dict[str, Any] | BadRow],
    uri: str,
    classes: list[str],
    source: dict[str, Any],
    overwrite: bool = False,
    max_bad: float = 1.0,
    limits: Limits | None = None,
) -> Dataset:
    """As `write_source`, of a stream of rows with images, which nobody can go on with. Rows without an `image_id` are
    counted from 0 as they come. Memory doesn't grow with the number of images, apart from the manifest returned."""
    check_output(uri, overwrite)
    folder = storage.join(storage.located(uri), f"{pieces.PREFIX}{secrets.token_hex(4)}")
    try:
        pieces.write_piece(folder, 0, rows)
        table, errors = pieces.read_pieces(folder, 1)
        table = renumbered(table) if table["image_id"].null_count else table
        dataset = Dataset(classes, table, source, errors)
        return _mixed(dataset, str(source.get("path", uri)), folder, uri, max_bad, limits)
    except BaseException:
        with suppress(OSError, UserError):
            storage.delete_tree(folder)
        raise


def _mixed(
    dataset: Dataset,
    path: str,
    folder: str,
    uri: str,
    max_bad: float,
    limits: Limits | None,
    spread: Spread = map,
    progress: Progress | None = None,
) -> Dataset:
    """Write shards of the images in the pieces of a folder, and take the pieces away."""
    try:
        check_bad_share(path, dataset.table.num_rows, dataset.errors, max_bad)
    except UserError:
        storage.delete_tree(folder)  # or images that are put right would count as bad the next time
        raise
    limits = limits or Limits.for_images(dataset.table.num_rows)
    splits = dataset.table["split"].to_numpy()
    order = drawn(splits)
    rows = dataset.table.take(order).combine_chunks()
    sizes = rows["size"].to_numpy()
    place = cut(splits[order], sizes, limits)
    token = _token(folder)
    index, errors = f"_index-{token}.parquet", f"_errors-{token}.parquet"
    files = list(_files(place, sizes, token))
    there = set(storage.list_files(uri, ".parquet"))
    starts = np.cumsum([0, *(entry["rows"] for entry in files)])
    todo = [n for n, entry in enumerate(files) if storage.join(storage.located(uri), entry["name"]) not in there]
    tasks = (
        (
            storage.join(uri, files[n]["name"]),
            rows.slice(starts[n], files[n]["rows"]),
            place[starts[n] : starts[n + 1], 1],
        )
        for n in todo
    )
    count = len(rows) - sum(files[n]["rows"] for n in todo)
    for written in spread(_write_shard, tasks):
        count += written
        if progress:
            progress(count, len(rows))
    write_index(storage.join(uri, index), rows, place, limits)
    write_table(storage.join(uri, errors), dataset.errors)
    about = {
        "format": FORMAT,
        "version": VERSION,
        "classes": dataset.classes,
        "source": dataset.source,
        "images": len(rows),
        "counts": dataset.counts(),
        "error_count": dataset.errors.num_rows,
        "files": files,
        "index": index,
        "errors": errors,
    }
    storage.write_json(storage.join(uri, "dataset.json"), about)
    _delete_leftovers(uri, about)
    return open_shards(uri, DataSettings(source="shards", path=uri, validation=0, test=0), seed=0)


def _write_shard(task: tuple[str, pa.Table, np.ndarray]) -> int:
    uri, rows, groups = task
    write_shard(uri, rows, groups)
    return len(rows)


def _token(folder: str) -> str:
    """Of the names of the shards that come of these pieces, also when a killed job goes on."""
    uri = _token_of(folder)
    if not storage.exists(uri):
        storage.write_json(uri, secrets.token_hex(4))
    return str(storage.read_json(uri))


def _token_of(folder: str) -> str:
    return storage.join(folder, "token.json")


def _files(place: np.ndarray, sizes: np.ndarray, token: str) -> Iterator[dict[str, Any]]:
    edges = np.flatnonzero(np.diff(place[:, 0], prepend=-1, append=-2))
    for n, (start, end) in enumerate(pairwise(edges)):
        yield {
            "name": f"shard-{token}-{n:05d}.parquet",
            "rows": int(end - start),
            "bytes": int(sizes[start:end].sum()),
            "row_groups": int(place[end - 1, 1]) + 1,
        }


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
    below = (file[len(storage.located(uri)) :].lstrip("/").split("/")[0] for file in storage.list_files(uri))
    for name in sorted({name for name in below if name.startswith(pieces.PREFIX)}):
        storage.delete_file(_token_of(storage.join(uri, name)))  # first: nobody goes on with half of them
        storage.delete_tree(storage.join(uri, name))
