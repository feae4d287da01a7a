"""Where the object is: masks and boxes of every source, what they are refused for, and what they are used for."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from protopnet.config import BirdSettings, DataSettings, RunSettings
from protopnet.datasets.birds import bird_kinds, image_rng
from protopnet.datasets.birds.render import Picture, render
from protopnet.datasets.folders import scan_folder
from protopnet.datasets.lists import scan_list
from protopnet.datasets.masks import GRID, of_box, on_mask, packed, unpacked
from protopnet.datasets.open import open_dataset, open_source
from protopnet.datasets.rows import Dataset
from protopnet.datasets.shards import open_shards, write_source
from protopnet.errors import UserError

BIRDS = BirdSettings(classes=2, train_per_class=2, test_per_class=1, size=64)


def mask_of(picture: Picture, size: int = 64) -> Image.Image:
    """The bird's silhouette at the picture's own size, as a person would draw it."""
    return Image.fromarray((picture.part_map > 0).astype(np.uint8) * 255).resize((size, size), Image.Resampling.BOX)


def rows_of(settings: RunSettings) -> Iterable[Any]:
    source = open_source(settings)
    return source.read(list(source.items), 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Generated birds as class folders, and their masks beside."""
    for label, kind in enumerate(bird_kinds(BIRDS)):
        for index in range(2):
            picture = render(kind, image_rng(0, "train", label, index), BIRDS.size)
            for top, image, suffix in (("images", picture.image, "jpg"), ("masks", mask_of(picture), "png")):
                (tmp_path / top / kind.name).mkdir(parents=True, exist_ok=True)
                image.save(tmp_path / top / kind.name / f"{index}.{suffix}")
    return tmp_path


def scan(folder: Path, masks: str = "masks") -> Dataset:
    settings = DataSettings(source="folder", path=str(folder / "images"), masks=str(folder / masks))
    return scan_folder(str(folder / "images"), settings, seed=0)


def grids(dataset: Dataset) -> list[np.ndarray]:
    return [unpacked(grid) for grid in dataset.table["object"].to_pylist()]


def first(folder: Path) -> Path:
    return sorted((folder / "masks").rglob("*.png"))[0]


def test_masks_beside_the_images_are_what_the_renderer_drew(folder: Path) -> None:
    drawn = [row for row in rows_of(RunSettings(birds=BIRDS)) if isinstance(row, dict) and row["split"] == "train"]
    table = scan(folder).table.sort_by([("class_name", "ascending"), ("uri", "ascending")])
    drawn.sort(key=lambda row: (row["class_name"], row["uri"]))
    assert len(table) == len(drawn) == 4
    for grid, row in zip(table["object"].to_pylist(), drawn, strict=True):
        assert (unpacked(row["object"]) == unpacked(grid)).mean() > 0.99
        assert 0.05 < unpacked(grid).mean() < 0.6
        assert on_mask(np.array([(point["x"], point["y"]) for point in row["parts"]]), grid).mean() > 0.9


def test_a_place_is_on_the_mask_or_not() -> None:
    mask = np.zeros((10, 20), np.uint8)
    mask[:5, 10:] = 1  # numbers of objects rather than grey values
    places = np.array([(0.75, 0.25), (0.25, 0.25), (0.75, 0.75), (1.0, 0.0), (np.nan, np.nan)])
    assert on_mask(places, packed(mask)).tolist() == [True, False, False, True, False]
    assert len(packed(mask)) == 512
    assert on_mask(places, of_box((10, 0, 10, 5), (20, 10))).tolist() == [True, False, False, True, False]


def test_an_object_smaller_than_a_cell_does_not_get_lost() -> None:
    mask = np.zeros((640, 640), np.uint8)
    mask[323, 7] = 255
    assert np.argwhere(unpacked(packed(mask))).tolist() == [[32, 0]]
    assert np.argwhere(unpacked(of_box((7, 323, 1, 1), (640, 640)))).tolist() == [[32, 0]]


@pytest.mark.parametrize("mode", ["1", "P", "I;16", "RGB"])
def test_masks_of_all_kinds(folder: Path, mode: str) -> None:
    before, path = grids(scan(folder))[0], first(folder)
    values = np.asarray(Image.open(path)) > 127
    if mode == "P":
        image = Image.fromarray(values.astype(np.uint8))
        image.putpalette([0, 0, 0, 128, 0, 0])
    else:
        image = (
            Image.fromarray(values.astype(np.uint16) * 4095)
            if mode == "I;16"
            else Image.fromarray(values).convert(mode)
        )
    image.save(path)
    assert (grids(scan(folder))[0] == before).mean() > 0.99


def test_masks_that_cannot_be_right_are_refused_in_one_line(folder: Path) -> None:
    path = first(folder)
    good = path.read_bytes()
    Image.new("L", (32, 64), 255).save(path)
    with pytest.raises(UserError, match=r"0\.png: this mask has 32 x 64 pixels, its image 64 x 64 \(data\.masks\)"):
        scan(folder)
    Image.new("L", (64, 64), 0).save(path)
    with pytest.raises(UserError, match=r"0\.png: this mask is empty \(data\.masks\)"):
        scan(folder)
    path.write_bytes(good[:60])
    with pytest.raises(UserError, match=r"0\.png: this mask can't be read"):
        scan(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"no mask for 1 image of 4, .*/0\.jpg the first \(data\.masks\)"):
        scan(folder)
    with pytest.raises(UserError, match=r"isn't a folder \(data\.masks\)"):
        scan(folder, "nowhere")
    with pytest.raises(UserError, match=r"lies in data\.path, where it would be a class"):
        scan(folder, "images/masks")
    with pytest.raises(ValueError, match="list has a column mask or box"):
        DataSettings(source="list", path="a.csv", masks="masks")


def test_lists_have_a_column_of_masks_or_of_boxes(folder: Path) -> None:
    rows = [f"{path.relative_to(folder)},{path.parent.name}" for path in sorted((folder / "images").rglob("*.jpg"))]
    mask = first(folder).relative_to(folder)
    columns = [f'{mask},""', ',"16,0,32,64"', ',""', ',"0 0 64 16"']
    text = "\n".join(["uri,label,mask,box", *(f"{row},{more}" for row, more in zip(rows, columns, strict=True))])
    (folder / "list.csv").write_text(text + "\n")
    settings = DataSettings(source="list", path=str(folder / "list.csv"), validation=0, test=0)
    found = scan_list(str(folder / "list.csv"), settings, 0).table["object"].to_pylist()
    assert found[0] == scan(folder).table["object"][0].as_py()
    assert found[2] is None
    assert [unpacked(found[i]).mean() for i in (1, 3)] == [0.5, 0.25]
    for box, said in (
        ("1,2,3", "line 3: '1,2,3' is no box"),
        ("40,0,32,64", "reaches beyond the image of 64 x 64 pixels"),
    ):
        (folder / "list.csv").write_text(text.replace("16,0,32,64", box))
        with pytest.raises(UserError, match=said):
            scan_list(str(folder / "list.csv"), settings, 0)


def test_shards_keep_the_object_and_old_ones_have_none(folder: Path, tmp_path: Path) -> None:
    data = DataSettings(source="folder", path=str(folder / "images"), masks=str(folder / "masks"))
    written = write_source(open_source(RunSettings(data=data)), str(tmp_path / "shards"))
    assert written.table["object"].to_pylist() == scan(folder).table["object"].to_pylist()
    written.save(str(tmp_path / "manifest"))
    for name, index in (("shards", "_index-*.parquet"), ("manifest", "manifest.parquet")):
        (path,) = (tmp_path / name).glob(index)
        pq.write_table(pq.read_table(path).drop_columns(["object"]), path)  # as version 1 wrote it
        about = json.loads((tmp_path / name / "dataset.json").read_text())
        assert about["version"] == 2
        (tmp_path / name / "dataset.json").write_text(json.dumps(about | {"version": 1}))
    shards = DataSettings(source="shards", path=str(tmp_path / "shards"))
    for old in (open_shards(str(tmp_path / "shards"), shards, 0), Dataset.load(str(tmp_path / "manifest"))):
        assert old.table.schema.equals(written.table.schema)
        assert old.table["object"].null_count == len(old.table) == 4


def test_of_official_photographs_crops_have_masks_and_whole_ones_boxes(test_data: Path, tmp_path: Path) -> None:
    """The masks are all that lies left of the middle of each bird's box."""
    data = DataSettings(source="cub", path=str(test_data / "CUB_200_2011"), classes=1, validation=0)
    whole = open_dataset(RunSettings(data=data.model_copy(update={"crop": "none"})), str(tmp_path)).table
    crops = open_dataset(RunSettings(data=data), str(tmp_path)).table
    assert crops["object"].null_count == len(crops)
    for row, crop in zip(whole.to_pylist(), crops["uri"].to_pylist(), strict=True):
        left, top, width, height = map(int, crop.partition("#xywh=")[2].split(","))
        share = width * height / row["width"] / row["height"]
        assert unpacked(row["object"]).mean() == pytest.approx(share, abs=0.03)
        mask = np.zeros((row["height"], row["width"]), np.uint8)
        mask[top : top + height, : left + width // 2] = 255
        path = tmp_path / "masks" / row["uri"].partition("/images/")[2].replace(".jpg", ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)
    masked = data.model_copy(update={"masks": str(tmp_path / "masks")})
    for grid in grids(open_dataset(RunSettings(data=masked), str(tmp_path))):
        assert grid[:, : GRID // 2 - 1].all()
        assert not grid[:, GRID // 2 + 1 :].any()
    mask[:] = 0
    mask[:, left + width :], mask[top + height :] = 255, 255
    Image.fromarray(mask).save(path)
    with pytest.raises(UserError, match=r"nothing of this mask lies in the image's bounding box"):
        list(rows_of(RunSettings(data=masked)))
