"""From settings to a dataset, whatever the source."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import pyarrow as pa

from protopnet import storage
from protopnet.config import BirdSettings, DataSettings
from protopnet.datasets.cub import cub_classes, cub_photos, read_photos
from protopnet.datasets.duplicates import Duplicates, settled
from protopnet.datasets.folders import Progress, list_folder, read_images, scan_folder
from protopnet.datasets.lists import is_list, list_list, scan_list
from protopnet.datasets.order import mixing, row_groups
from protopnet.datasets.pieces import Source
from protopnet.datasets.reader import ImageReader
from protopnet.datasets.rows import MANIFEST_SCHEMA, BadRow, Dataset, as_stored
from protopnet.datasets.shards import image_bytes, is_complete, open_shards, write_source
from protopnet.datasets.splits import chosen_classes, renumbered, with_labels
from protopnet.datasets.tars import tar_files, tar_source
from protopnet.errors import UserError

_FORMAT = 3  # raised when the same settings begin to yield other rows: what was written is then made anew
_MIXED = 0.9  # of the classes that a row group has where the order was drawn
_COPIED_BYTES = 8_000_000_000  # of shards that are written anew because they are sorted
_CHUNK = 64  # images read at a time when one dataset is copied into another


class DatasetSettings(Protocol):
    """The settings that say where images come from: `RunSettings`, `PrepareSettings`."""

    @property
    def data(self) -> DataSettings: ...
    @property
    def birds(self) -> BirdSettings: ...
    @property
    def seed(self) -> int: ...


def open_dataset(settings: DatasetSettings, work_uri: str, progress: Progress | None = None) -> Dataset:
    """The dataset that the settings describe.

    Folders, lists and shards are read in place; birds and CUB-200-2011 are written as shards under `work_uri` first,
    once for the same settings, also after a killed run. Errors: `UserError`. Whether it can be trained on is
    for `validate.check_dataset` to say.
    """
    data = settings.data
    if data.source == "folder":
        return scan_folder(_path(data), data, settings.seed, progress)
    if data.source == "list":
        return scan_list(_path(data), data, settings.seed, progress)
    if data.source == "shards":
        return open_shards(_path(data), data, settings.seed)
    uri = storage.join(work_uri, f"{data.source}-{_fingerprint(settings)}")
    if not is_complete(uri):
        write_source(open_source(settings), uri, checked=progress)
    # The shards hold just the classes that were asked for.
    return open_shards(uri, data.model_copy(update={"classes": None}), settings.seed)


def mixed(dataset: Dataset, work_uri: str) -> Dataset:
    """The same dataset, fit for batches: shards that somebody sorted are written anew under `work_uri`, mixed.

    `jobs/prepare.py` writes shards in a drawn order; those of others, and of old versions, may lie class by class.
    `UserError` where they are too large to be copied unasked.
    """
    training = dataset.split("train")
    if not len(training):
        return dataset
    seen, drawn = mixing(row_groups(training), training["label"].to_numpy())
    if seen >= _MIXED * drawn:
        return dataset
    where = dataset.source["shards"]
    size = image_bytes(where)
    if size > _COPIED_BYTES:
        raise UserError(
            f"{where}: the images lie sorted by class ({seen:.1f} classes in a row group, {drawn:.1f} if their order were "
            f"drawn), and so would be what a training step sees; {size / 1e9:.0f} GB are too much to be copied unasked: "
            f"mix them once with jobs/prepare.py --data.source shards --data.path {where} --output …, and train on the "
            "result (data.path)"
        )
    about = {"rows": dataset.table["sha256"].to_pylist(), "split": dataset.table["split"].to_pylist()}
    uri = storage.join(work_uri, f"mixed-{_digest([_FORMAT, about])}")
    if not is_complete(uri):
        write_source(_of_dataset(dataset, where, "warn"), uri)
    as_written = DataSettings(source="shards", path=uri, validation=0, test=0)
    return replace(open_shards(uri, as_written, seed=0), source=dataset.source)


def open_source(settings: DatasetSettings) -> Source:
    """All images of a source, to be read by `write_source`, wherever it has that done.

    Splits are the source's own, for folders, tar files and shards with what `data.validation` and `data.test` cut off.
    """
    data = settings.data
    if data.source == "birds":
        return _birds(settings)
    path = _path(data)
    if data.source == "cub":
        return _cub(storage.located(path), settings)
    if data.source == "shards":
        return _of_dataset(open_shards(path, data, settings.seed), path, data.duplicates)
    if data.source == "folder" and (tars := tar_files(path)):
        key = _key(settings, tars)
        return tar_source(tars, storage.located(path), key, data, settings.seed)
    listed = list_folder(path, data) if data.source == "folder" else list_list(path, data)

    def finish(rows: pa.Table, errors: pa.Table) -> Dataset:
        return settled(listed.dataset(rows, errors, data, settings.seed), data.duplicates)[0]

    items = [(image, listed.parts.get(image.path)) for image in listed.found]
    read = partial(read_images, max_pixels=data.max_pixels)
    return Source(items, read, finish, _key(settings, items), listed.source["path"], images=len(items))


def _path(data: DataSettings) -> str:
    if not data.path:
        raise UserError(f"data.path is missing: where are the images of data.source {data.source}?")
    return data.path


def _fingerprint(settings: DatasetSettings) -> str:
    """Changes with every setting on which the rows of generated birds or of CUB-200-2011 depend."""
    data = settings.data
    if data.source == "birds":
        relevant = settings.birds.model_dump() | {"only": data.classes}
    else:
        relevant = data.model_dump(include={"classes", "crop", "masks", "max_pixels"})
        relevant["path"] = storage.located(_path(data))
    return _digest([_FORMAT, relevant])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def _key(settings: DatasetSettings, items: Iterable[Any]) -> str:
    """Changes with all that the rows of a source depend on."""
    digest = hashlib.sha256(settings.data.model_dump_json(exclude={"workers", "max_bad"}).encode())
    for item in (_FORMAT, settings.seed, *items):
        digest.update(repr(item).encode())
    return digest.hexdigest()[:10]


def _cub(root: str, settings: DatasetSettings) -> Source:
    data = settings.data
    about = {"kind": "cub", "path": root, "crop": data.crop}
    classes = cub_classes(root, data)
    photos = cub_photos(root, classes, data)

    def finish(rows: pa.Table, errors: pa.Table) -> Dataset:
        return Dataset(classes, renumbered(rows), about, errors)

    read = partial(read_photos, root=root, settings=data)
    return Source(photos, read, finish, _key(settings, photos), root, images=len(photos))


def _birds(settings: DatasetSettings) -> Source:
    # Only here: the other sources don't need the renderer.
    from protopnet.datasets.birds import bird_kinds, bird_places

    names = [kind.name for kind in bird_kinds(settings.birds)]
    classes = chosen_classes(names, settings.data.classes)
    about = {"kind": "birds", "crop": "none"} | settings.birds.model_dump()

    def finish(rows: pa.Table, errors: pa.Table) -> Dataset:
        return Dataset(classes, renumbered(with_labels(rows, classes)), about, errors)

    places = [place for place in bird_places(settings.birds) if names[place[0]] in classes]
    key = _key(settings, [settings.birds])
    return Source(places, partial(_read_birds, settings.birds), finish, key, "generated birds", images=len(places))


def _read_birds(settings: BirdSettings, places: list[Any], cores: int) -> Iterator[dict[str, Any] | BadRow]:
    from protopnet.datasets.birds import bird_kinds, bird_row

    kinds = bird_kinds(settings)
    yield from (bird_row(settings, kinds, *place) for place in places)


def _of_dataset(dataset: Dataset, path: str, duplicates: Duplicates) -> Source:
    """Images that were checked before. Those that change or go while they are copied end the copy."""
    dataset, _ = settled(dataset, duplicates)
    table = as_stored(dataset.table)
    starts = range(0, len(table), _CHUNK)

    def finish(rows: pa.Table, errors: pa.Table) -> Dataset:
        return replace(dataset, table=rows.sort_by("image_id"), errors=pa.concat_tables([dataset.errors, errors]))

    key = _digest([_FORMAT, *(table[name].to_pylist() for name in ("image_id", "sha256", "split"))])
    items = _Slices(table, starts)
    return Source(items, _read_rows, finish, key, path, images=len(table), chunk=1024 // _CHUNK)


@dataclass(frozen=True)
class _Slices(Sequence[list[dict[str, Any]]]):
    """A table as rows, some at a time."""

    table: pa.Table
    starts: range

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: Any) -> Any:
        return self.table.slice(self.starts[i], self.starts.step).to_pylist()


def _read_rows(slices: list[list[dict[str, Any]]], cores: int) -> Iterator[dict[str, Any] | BadRow]:
    reader = ImageReader()
    for rows in slices:
        columns = {name: [row[name] for row in rows] for name in ("file", "row_group", "row")}
        for row, image in zip(rows, reader.read(columns, range(len(rows))), strict=True):
            if hashlib.sha256(image).hexdigest() != row["sha256"]:
                raise UserError(f"{row['uri']} changed while it was copied; run the same command again")
            yield {name: row[name] for name in MANIFEST_SCHEMA.names[:-3]} | {"image": image}


def recognise(path: str) -> Literal["folder", "list", "cub", "shards"]:
    """Which kind of data it is: a list by its suffix, a folder by the file that only this kind has."""
    if is_list(path):
        return "list"
    if storage.exists(storage.join(path, "dataset.json")):
        return "shards"
    if storage.exists(storage.join(path, "images.txt")) and storage.exists(storage.join(path, "bounding_boxes.txt")):
        return "cub"
    return "folder"
