"""The data that a bundle was trained on, found again as training saw it."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from protopnet.config import RunSettings
from protopnet.datasets.open import open_dataset
from protopnet.datasets.rows import Dataset
from protopnet.datasets.trained import open_training_data, trained_with, training_images_of
from protopnet.errors import UserError

CLASSES = ["jay", "owl", "wren"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five classes of ten images without splits, of which three are trained on."""
    for label, name in enumerate(["jay", "kite", "owl", "stork", "wren"]):
        (tmp_path / "birds" / name).mkdir(parents=True)
        for n in range(10):
            sink = io.BytesIO()
            pixels = np.random.default_rng(100 * label + n).integers(0, 256, (9, 8, 3), np.uint8)
            Image.fromarray(pixels).save(sink, "PNG")
            (tmp_path / "birds" / name / f"{n}.png").write_bytes(sink.getvalue())
    return tmp_path / "birds"


@pytest.fixture
def settings(folder: Path) -> RunSettings:
    data = {"source": "folder", "path": str(folder), "classes": CLASSES, "validation": 0.25, "test": 0.2}
    return RunSettings.model_validate({"seed": 7, "data": data})


@pytest.fixture
def dataset(settings: RunSettings, tmp_path: Path) -> Dataset:
    return open_dataset(settings, str(tmp_path / "work"))


def prototypes(dataset: Dataset, image_ids: list[int]) -> pa.Table:
    rows = dataset.table.take(image_ids)
    columns = {"class": rows["label"], **{name: rows[name] for name in ("image_id", "uri", "sha256")}}
    return pa.table({"prototype": range(len(rows)), **columns})


def opened(path: Path | str, settings: RunSettings, classes: list[str] = CLASSES) -> Dataset:
    trained = trained_with({"settings": settings.model_dump(mode="json")}, "bundle")
    return open_training_data(str(path), classes, trained, "nowhere")


def test_the_same_classes_splits_and_image_ids(folder: Path, settings: RunSettings, dataset: Dataset) -> None:
    again = opened(folder, settings)
    assert again.table.equals(dataset.table)
    assert again.counts() == {"train": 18, "validation": 6, "test": 6}


def test_the_stage_of_a_run_holds_it_too(settings: RunSettings, dataset: Dataset, tmp_path: Path) -> None:
    dataset.save(str(tmp_path / "00-data"))
    assert opened(tmp_path / "00-data", settings).table.equals(dataset.table)
    with pytest.raises(UserError, match="its classes are others"):
        opened(tmp_path / "00-data", settings, ["jay", "owl"])


def test_a_missing_class_is_named(folder: Path, settings: RunSettings) -> None:
    with pytest.raises(UserError, match="'auk'"):
        opened(folder, settings, ["auk", "jay", "owl"])


def test_a_bundle_without_settings() -> None:
    with pytest.raises(UserError, match="doesn't record the settings"):
        trained_with({"seed": 3}, "bundle")


def test_the_sources_of_prototypes(dataset: Dataset) -> None:
    training = dataset.split("train")["image_id"].to_pylist()[::5]
    assert training_images_of(prototypes(dataset, training), dataset, "data") == training


def test_they_are_found_by_their_content(folder: Path, settings: RunSettings, dataset: Dataset) -> None:
    """An image more before them moves their numbers."""
    training = dataset.split("train")["image_id"].to_pylist()[-3:]
    known = prototypes(dataset, training)
    extra = Image.new("RGB", (9, 9))
    extra.save(folder / "jay" / "0a.png")
    found = training_images_of(known, opened(folder, settings), "data")
    assert found == [image + 1 for image in training]


def test_images_that_aren_t_there_or_are_for_testing(dataset: Dataset) -> None:
    known = prototypes(dataset, dataset.split("train")["image_id"].to_pylist()[:2])
    other = pa.array([hashlib.sha256(b"?").hexdigest()] * 2)
    changed = known.set_column(known.column_names.index("sha256"), "sha256", other)
    with pytest.raises(UserError, match=r"0.png|1.png.*prototype 0 comes, is not there"):
        training_images_of(changed, dataset, "data")
    tests = prototypes(dataset, dataset.split("test")["image_id"].to_pylist()[:1])
    with pytest.raises(UserError, match="is a test image there"):
        training_images_of(tests, dataset, "data")
