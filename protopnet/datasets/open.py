"""From settings to a dataset, whatever the source."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from protopnet import storage
from protopnet.config import BirdSettings, DataSettings
from protopnet.datasets.cub import cub_classes, cub_rows
from protopnet.datasets.duplicates import settled
from protopnet.datasets.folders import Progress, scan_folder
from protopnet.datasets.lists import is_list, scan_list
from protopnet.datasets.order import mixing, row_groups
from protopnet.datasets.reader import ImageReader
from protopnet.datasets.rows import MANIFEST_SCHEMA, BadRow, Dataset, as_stored
from protopnet.datasets.shards import image_bytes, is_complete, open_shards, write_shards
from protopnet.datasets.splits import chosen_classes
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


@dataclass(frozen=True)
class Source:
    """A stream of rows with their images, ready for `write_shards`."""

    rows: Iterable[dict[str, Any] | BadRow]
    classes: list[str]
    about: dict[str, Any]


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
        source = open_source(settings)
        write_shards(source.rows, uri, source.classes, source.about, progress=progress)
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
        write_shards(_rows_of(dataset), uri, dataset.classes, dataset.source)
    as_written = DataSettings(source="shards", path=uri, validation=0, test=0)
    return replace(open_shards(uri, as_written, seed=0), source=dataset.source)


def open_source(settings: DatasetSettings, progress: Progress | None = None) -> Source:
    """All rows of a source with their images, read as they are asked for.

    Splits are the source's own, for folders and shards with what `data.validation` and `data.test` cut off.
    progress: of checking the images of a folder before their rows are handed out.
    """
    data = settings.data
    if data.source == "birds":
        return _birds(settings)
    path = _path(data)
    if data.source == "cub":
        about = {"kind": "cub", "path": storage.located(path), "crop": data.crop}
        return Source(cub_rows(path, data), cub_classes(path, data), about)
    if data.source == "folder":
        dataset = scan_folder(path, data, settings.seed, progress)
    elif data.source == "list":
        dataset = scan_list(path, data, settings.seed, progress)
    else:
        dataset = open_shards(path, data, settings.seed)
    dataset, _ = settled(dataset, data.duplicates)
    return Source(_rows_of(dataset), dataset.classes, dataset.source)


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


def _birds(settings: DatasetSettings) -> Source:
    # Only here: the other sources don't need the renderer.
    from protopnet.datasets.birds import bird_kinds, bird_rows

    classes = chosen_classes([kind.name for kind in bird_kinds(settings.birds)], settings.data.classes)
    label_of = {name: label for label, name in enumerate(classes)}
    chosen = (row for row in bird_rows(settings.birds) if row["class_name"] in label_of)
    rows = (row | {"image_id": i, "label": label_of[row["class_name"]]} for i, row in enumerate(chosen))
    return Source(rows, classes, {"kind": "birds", "crop": "none"} | settings.birds.model_dump())


def _rows_of(dataset: Dataset) -> Iterator[dict[str, Any] | BadRow]:
    """The rows of a dataset with their images. Files that change or go while they are copied end the copy."""
    for error in dataset.errors.to_pylist():
        yield BadRow(**error)
    reader = ImageReader()
    table = as_stored(dataset.table)
    for start in range(0, table.num_rows, _CHUNK):
        chunk = table.slice(start, _CHUNK)
        images = reader.read(chunk, range(chunk.num_rows))
        for row, image in zip(chunk.to_pylist(), images, strict=True):
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
