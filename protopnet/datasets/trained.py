"""The data that a bundle was trained on, opened again as training saw it: the same classes, splits and image_ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, ValidationError

from protopnet import storage
from protopnet.config import (
    AugmentSettings,
    BirdSettings,
    CalibrationSettings,
    DataSettings,
    LastLayerSettings,
    PushSettings,
)
from protopnet.datasets.duplicates import settled
from protopnet.datasets.open import open_dataset, recognise
from protopnet.datasets.rows import Dataset
from protopnet.datasets.validate import check_bad_share
from protopnet.errors import UserError


class TrainedWith(BaseModel):
    """Of the settings that a bundle records, those that a later correction of it needs."""

    model_config = ConfigDict(frozen=True)  # what else is recorded is left alone

    seed: int
    data: DataSettings
    push: PushSettings
    augment: AugmentSettings
    last_layer: LastLayerSettings
    calibration: CalibrationSettings = CalibrationSettings()


@dataclass(frozen=True)
class _Source:
    data: DataSettings
    seed: int
    birds: BirdSettings


def trained_with(provenance: Mapping[str, Any], uri: str) -> TrainedWith:
    """The settings a bundle was trained with; `UserError` if it doesn't record them."""
    try:
        return TrainedWith.model_validate(provenance.get("settings"))
    except ValidationError as error:
        raise UserError(
            f"bundle {uri} doesn't record the settings it was trained with, which its data is split and its last "
            "layer solved with: expected a bundle that jobs/train.py wrote"
        ) from error


def open_training_data(path: str, classes: Sequence[str], trained: TrainedWith, work_uri: str) -> Dataset:
    """Class folders, CUB-200-2011, shards, or the stage `00-data` of a run, split as in training.

    Shards of CUB-200-2011 in its official layout are written below `work_uri`. `UserError` where the classes aren't
    those given.
    """
    if _is_manifest(path):
        dataset = Dataset.load(path)
    else:
        data = trained.data.model_copy(update={"source": recognise(path), "path": path, "classes": list(classes)})
        dataset = open_dataset(_Source(data, trained.seed, BirdSettings()), work_uri)
        dataset, _ = settled(dataset, data.duplicates)
        check_bad_share(path, dataset.table.num_rows, dataset.errors, data.max_bad)
    if dataset.classes != list(classes):
        raise UserError(f"{path} isn't the data that the bundle was trained on: its classes are others")
    return dataset


def training_images_of(prototypes: pa.Table, dataset: Dataset, path: str) -> list[int]:
    """image_id, in this dataset, of the training image that each prototype is a patch of, known by its sha256.

    prototypes: PROTOTYPE_SCHEMA rows. `UserError` for a prototype whose image isn't a training image here.
    """
    if prototypes["sha256"].null_count:
        raise UserError(
            "the bundle doesn't say which images its prototypes are patches of (it was exported with --sources none): "
            "give the bundle it was made from"
        )
    table = dataset.table.filter(pc.is_in(dataset.table["sha256"], value_set=pc.unique(prototypes["sha256"])))
    places: dict[tuple[str, int], dict[int, str]] = {}
    columns = ("sha256", "label", "image_id", "split")
    for sha256, label, image_id, split in zip(*(table[name].to_pylist() for name in columns), strict=True):
        places.setdefault((sha256, label), {})[image_id] = split
    found = []
    for row in prototypes.select(["prototype", "class", "image_id", "uri", "sha256"]).to_pylist():
        copies = places.get((row["sha256"], row["class"]), {})
        training = [image_id for image_id, split in copies.items() if split == "train"]
        if not training:
            where = f"a {next(iter(copies.values()))} image there" if copies else "not there"
            raise UserError(
                f"{path} isn't the data that the bundle was trained on: {row['uri']}, from which prototype "
                f"{row['prototype']} comes, is {where} (by its sha256)"
            )
        found.append(row["image_id"] if row["image_id"] in training else training[0])
    return found


def _is_manifest(path: str) -> bool:
    about = storage.join(path, "dataset.json")
    return storage.exists(about) and storage.read_json(about).get("format") == "protopnet-manifest"
