"""Small datasets of images that are nothing but noise, and what holds for the rows of all datasets."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from protopnet.config import DataSettings
from protopnet.datasets.folders import scan_folder
from protopnet.datasets.reader import ImageReader
from protopnet.datasets.rows import MANIFEST_SCHEMA, Dataset
from protopnet.imaging import decode

FOLDER = DataSettings(source="folder", path="-")


def jpeg(seed: int, size: tuple[int, int] = (12, 10)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def fill(folder: Path, images: int, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(images):
        (folder / f"{i:02d}.jpg").write_bytes(jpeg(seed + i))


def flowers(root: Path, classes: int = 3, images: int = 10) -> Path:
    for label in range(classes):
        fill(root / f"class {label}", images, 1000 * label)
    return root


def scan(path: Path, seed: int = 0, **options: Any) -> Dataset:
    return scan_folder(str(path), FOLDER.model_copy(update=options), seed)


def images_of(dataset: Dataset) -> list[bytes]:
    return ImageReader().read(dataset.table, range(dataset.table.num_rows))


def check_rows(dataset: Dataset) -> None:
    """What holds for every dataset whatever its source."""
    rows = dataset.table.to_pylist()
    assert dataset.table.schema.equals(MANIFEST_SCHEMA)
    assert [row["image_id"] for row in rows] == list(range(len(rows)))
    for row, data in zip(rows, images_of(dataset), strict=True):
        assert row["class_name"] == dataset.classes[row["label"]]
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        assert (row["width"], row["height"]) == decode(data).size
