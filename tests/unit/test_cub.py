"""CUB-200-2011 in its official layout."""

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flowers import check_rows, jpeg

from protopnet.config import DataSettings, RunSettings
from protopnet.datasets.cub import cub_classes, cub_photos, read_photos
from protopnet.datasets.open import open_dataset
from protopnet.datasets.rows import BadRow
from protopnet.errors import UserError
from protopnet.imaging import decode

# CUB-200-2011


def small_cub(root: Path) -> Path:
    """Two classes, three photographs of 40 x 30 pixels, in the official layout."""
    lines = {
        "classes.txt": "1 001.Auk\n2 002.Jay\n",
        "images.txt": "1 001.Auk/z.jpg\n2 001.Auk/a.jpg\n3 002.Jay/j.jpg\n",
        "image_class_labels.txt": "1 1\n2 1\n3 2\n",
        "train_test_split.txt": "1 1\n2 0\n3 1\n",
        "bounding_boxes.txt": "1 4.0 2.0 20.0 10.0\n2 10.0 5.0 31.0 26.0\n3 0.0 0.0 40.0 30.0\n",
        "parts/parts.txt": "1 back\n2 left eye\n",
        "parts/part_locs.txt": "1 1 14 7 1\n1 2 0.0 0.0 0\n2 2 25.0 5.0 1\n2 1 9.0 6.0 1\n3 1 40.0 30.0 1\n",
    }
    for name, text in lines.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for i, name in enumerate(("001.Auk/z.jpg", "001.Auk/a.jpg", "002.Jay/j.jpg")):
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / name).write_bytes(jpeg(i, (40, 30)))
    return root


def cub_rows(root: Path, settings: DataSettings) -> list[dict[str, Any] | BadRow]:
    photos = cub_photos(str(root), cub_classes(str(root), settings), settings)
    return list(read_photos(photos, 2, root=str(root), settings=settings))


def test_the_official_layout_gives_crops_with_their_key_points(tmp_path: Path) -> None:
    settings = DataSettings(source="cub", path=str(small_cub(tmp_path)))
    rows = cub_rows(tmp_path, settings)
    assert all(isinstance(row, dict) for row in rows)
    a, z, j = (row for row in rows if isinstance(row, dict))
    assert [row["split"] for row in (a, z, j)] == ["test", "train", "train"]
    assert a["uri"] == f"{tmp_path}/images/001.Auk/a.jpg#xywh=10,5,30,25"  # cut off at the image's edge
    assert (z["width"], z["height"]) == decode(z["image"]).size == (20, 10)
    assert z["parts"] == [{"part": "back", "x": 0.5, "y": 0.5}]
    assert a["parts"] == [{"part": "left eye", "x": 0.5, "y": 0.0}]
    assert j["parts"] == [{"part": "back", "x": 1.0, "y": 1.0}]
    whole = np.asarray(decode((tmp_path / "images/001.Auk/z.jpg").read_bytes()), np.int16)[2:12, 4:24]
    assert np.abs(whole - np.asarray(decode(z["image"]), np.int16)).mean() < 4


def test_whole_images_stay_as_they_came(tmp_path: Path) -> None:
    settings = DataSettings(source="cub", path=str(small_cub(tmp_path)), crop="none", classes=["002.Jay"])
    (row,) = cub_rows(tmp_path, settings)
    assert isinstance(row, dict)
    assert row["image"] == (tmp_path / "images/002.Jay/j.jpg").read_bytes()
    assert (row["label"], row["uri"]) == (0, f"{tmp_path}/images/002.Jay/j.jpg")


def test_a_broken_official_layout_is_named(tmp_path: Path) -> None:
    settings = DataSettings(source="cub", path=str(small_cub(tmp_path)))
    os.unlink(tmp_path / "images/001.Auk/a.jpg")
    (tmp_path / "bounding_boxes.txt").write_text("1 4 2 20 10\n2 1 1 9 9\n3 90 90 5 5\n")
    gone, good, outside = cub_rows(tmp_path, settings)
    assert isinstance(gone, BadRow)
    assert "No such file" in gone.reason
    assert isinstance(good, dict)
    assert isinstance(outside, BadRow)
    assert "lies outside" in outside.reason
    os.unlink(tmp_path / "images.txt")
    with pytest.raises(UserError, match=r"images\.txt is missing; data\.path must be"):
        cub_rows(tmp_path, settings)


def test_official_photographs_are_cropped_to_the_published_sizes(test_data: Path, tmp_path: Path) -> None:
    settings = RunSettings(data=DataSettings(source="cub", path=str(test_data / "CUB_200_2011"), validation=0))
    dataset = open_dataset(settings, str(tmp_path))
    check_rows(dataset)
    names = (test_data / "CUB_200_2011/parts/parts.txt").read_text().splitlines()
    part_number = {name: number for number, name in (line.split(maxsplit=1) for line in names)}
    with open(test_data / "cub100/parts.csv", newline="") as handle:
        published = {row["path"]: row for row in csv.DictReader(handle) if int(row["class_id"]) <= 6}
    rows = dataset.table.to_pylist()
    assert len(rows) == len(published) == 323
    for row in rows:
        path, _, box = row["uri"].partition("/images/")[2].partition("#xywh=")
        expected = published.pop(path)
        x0, y0, x1, y1 = (int(expected[f"crop_{name}"]) for name in ("x0", "y0", "x1", "y1"))
        assert (row["width"], row["height"]) == (x1 - x0, y1 - y0)
        assert box == f"{x0},{y0},{x1 - x0},{y1 - y0}"
        assert row["split"] == expected["split"]
        points = [item.split(":") for item in expected["parts_in_crop_frac_id:x:y"].split(";") if item]
        ours = {part_number[part["part"]]: (part["x"], part["y"]) for part in row["parts"]}
        assert ours.keys() == {number for number, _, _ in points}
        assert all(np.allclose(ours[n], (float(x), float(y)), atol=1e-4) for n, x, y in points)
    assert not published
