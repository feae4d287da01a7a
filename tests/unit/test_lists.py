"""A list with labels and splits as the source of a dataset."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image

from protopnet.config import DataSettings, RunSettings
from protopnet.datasets.count import count_images
from protopnet.datasets.open import open_dataset, open_source, recognise
from protopnet.errors import UserError


def pictures(folder: Path, number: int) -> list[str]:
    (folder / "images").mkdir()
    for place in range(number):
        sink = io.BytesIO()
        Image.new("RGB", (8 + place, 8), (place * 9, 0, 0)).save(sink, "PNG")
        (folder / "images" / f"{place}.png").write_bytes(sink.getvalue())
    return [f"images/{place}.png" for place in range(number)]


def run(path: Path, **data: object) -> RunSettings:
    return RunSettings.model_validate({"data": {"source": "list", "path": str(path), **data}})


def table(paths: list[str]) -> pa.Table:
    splits = ["train", "Training", "", "val", "test", "test"]
    return pa.table({"Path": paths, "label": ["b", "a", "b", "a", "b", "a"], "split": splits})


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_list_with_labels_and_splits(tmp_path: Path, suffix: str) -> None:
    rows, file = table(pictures(tmp_path, 6)), tmp_path / f"list{suffix}"
    if suffix == ".parquet":
        pq.write_table(rows, file)
    else:
        delimiter = "\t" if suffix == ".tsv" else ","
        pyarrow.csv.write_csv(rows, file, pyarrow.csv.WriteOptions(delimiter=delimiter))
    dataset = open_dataset(run(file), str(tmp_path / "work"))
    assert dataset.classes == ["a", "b"]
    found = {
        Path(row["uri"]).name: (row["class_name"], row["split"], row["width"]) for row in dataset.table.to_pylist()
    }
    assert found == {
        "0.png": ("b", "train", 8),
        "1.png": ("a", "train", 9),
        "2.png": ("b", "train", 10),
        "3.png": ("a", "validation", 11),
        "4.png": ("b", "test", 12),
        "5.png": ("a", "test", 13),
    }
    assert dataset.table["image_id"].to_pylist() == list(range(6))
    assert recognise(str(file)) == "list"
    counted = count_images(run(file))
    assert (counted.train, counted.validation, counted.test, counted.classes) == (3, 1, 2, 2)
    assert open_source(run(file)).images == 6
    assert open_dataset(run(file, classes=["b"]), str(tmp_path / "work")).table.num_rows == 3


def test_without_splits_they_are_cut_and_images_that_are_not_there_are_named(tmp_path: Path) -> None:
    paths = pictures(tmp_path, 10)
    lines = [f"{path},{'ab'[place % 2]}" for place, path in enumerate(paths)]
    (tmp_path / "list.csv").write_text("\n".join(["file,class", *lines, "images/gone.png,a"]))
    dataset = open_dataset(run(tmp_path / "list.csv", validation=0.2, test=0.2), str(tmp_path))
    assert dataset.counts() == {"train": 6, "validation": 2, "test": 2}
    assert [Path(row["uri"]).name for row in dataset.errors.to_pylist()] == ["gone.png"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("uri\na.png\n", r"line 2: no label; expected .* column label \(or class"),
        ("uri,label\na.png,\n", "line 2: no label"),
        ("label,split\na,train\n", r"no column uri \(or path"),
        ("uri,label,split\na.png,a,sometimes\n", "'sometimes' is no split; expected train, validation or test"),
        ("uri,label\n", "names no images"),
    ],
)
def test_what_is_wrong_with_a_list_is_said(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=says):
        open_dataset(run(tmp_path / "list.csv"), str(tmp_path))


def test_a_folder_is_no_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no list"):
        open_dataset(run(tmp_path), str(tmp_path))
    assert DataSettings(source="list", path="x").source == "list"
