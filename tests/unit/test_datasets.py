"""Every source yields the same rows; nothing is dropped in silence; shards hold what went in."""

import csv
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import runpy
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from PIL import Image

from protopnet import storage
from protopnet.config import BirdSettings, DataSettings, PrepareSettings, RunSettings
from protopnet.datasets import open as open_module
from protopnet.datasets.cub import cub_photos, read_photos
from protopnet.datasets.folders import scan_folder
from protopnet.datasets.open import open_dataset, open_source
from protopnet.datasets.pool import ordered
from protopnet.datasets.reader import ImageReader
from protopnet.datasets.rows import MANIFEST_SCHEMA, ROW_SCHEMA, BadRow, Dataset
from protopnet.datasets.shards import open_shards, write_shards, write_source
from protopnet.datasets.validate import check_dataset
from protopnet.datasets.writer import Limits
from protopnet.errors import UserError
from protopnet.imaging import BadImage, decode

PREPARE = Path(__file__).parents[2] / "jobs/prepare.py"
FOLDER = DataSettings(source="folder", path="-")
TINY = Limits(group_rows=3, group_bytes=10_000, file_bytes=4_000, index_rows=5)


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


# Folders


def test_plain_class_folders_give_dense_rows_in_order_of_class_and_path(tmp_path: Path) -> None:
    dataset = scan(flowers(tmp_path))
    check_rows(dataset)
    assert dataset.classes == ["class 0", "class 1", "class 2"]
    uris = dataset.table["uri"].to_pylist()
    assert uris == sorted(uris)
    assert uris[0] == str(tmp_path / "class 0" / "00.jpg")
    assert dataset.counts() == {"train": 21, "validation": 3, "test": 6}
    assert set(dataset.table["row_group"].to_pylist()) == {-1}


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_split_folders_are_kept(tmp_path: Path, name: str) -> None:
    for split, images in (("train", 5), ("test", 3), (name, 2)):
        flowers(tmp_path / split, 2, images)
    (tmp_path / "notes").mkdir()
    dataset = scan(tmp_path)
    assert dataset.classes == ["class 0", "class 1"]
    assert dataset.counts() == {"train": 10, "validation": 4, "test": 6}
    for row in dataset.table.to_pylist():
        assert f"/{name if row['split'] == 'validation' else row['split']}/" in row["uri"]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    fill(tmp_path / "train", 4)
    fill(tmp_path / "bus", 4, 50)
    assert scan(tmp_path).classes == ["bus", "train"]
    fill(tmp_path / "train" / "details", 2, 80)
    assert scan(tmp_path).classes == ["bus", "train"]


def test_validation_is_cut_from_training_only_and_from_every_class(tmp_path: Path) -> None:
    flowers(tmp_path / "train", 3, 20)
    flowers(tmp_path / "test", 3, 5)
    dataset = scan(tmp_path, validation=0.25)
    assert dataset.counts() == {"train": 45, "validation": 15, "test": 15}
    labels = dataset.split("validation")["label"].to_pylist()
    assert [labels.count(label) for label in range(3)] == [5, 5, 5]
    assert all("/train/" in uri for uri in dataset.split("validation")["uri"].to_pylist())
    assert scan(tmp_path, validation=0).counts() == {"train": 60, "validation": 0, "test": 15}


@pytest.mark.parametrize(("images", "kept"), [(1, 1), (2, 1), (3, 1), (4, 1), (10, 1)])
def test_one_image_of_a_class_always_stays_in_training(tmp_path: Path, images: int, kept: int) -> None:
    flowers(tmp_path, 2, images)
    train = scan(tmp_path, validation=0.99, test=0.5).split("train")["label"].to_pylist()
    assert [train.count(label) for label in range(2)] == [kept, kept]


def test_the_cut_depends_on_content_and_seed_only(tmp_path: Path) -> None:
    def held_out(dataset: Dataset) -> set[str]:
        return {
            *dataset.split("validation")["sha256"].to_pylist(),
            *dataset.split("test")["sha256"].to_pylist(),
        }

    here, there = flowers(tmp_path / "here"), flowers(tmp_path / "there")
    for path in sorted(there.rglob("*.jpg")):
        path.rename(path.with_name(f"renamed {path.name[::-1]}.jpg"))
    assert held_out(scan(here)) == held_out(scan(there))
    assert held_out(scan(here)) != held_out(scan(here, seed=1))
    fill(here / "class 3", 10, 5000)
    assert held_out(scan(there)) <= held_out(scan(here))


def test_bad_images_are_named_with_their_reason_and_the_rest_stays_dense(tmp_path: Path) -> None:
    flowers(tmp_path, 2, 4)
    good = jpeg(1)
    bad = {
        "empty.jpg": b"",
        "text.PNG": b"hello",
        "cut.jpeg": good[: len(good) // 2],
        "phone.heic": b"\0\0\0\x18ftypheic",
    }
    for name, data in bad.items():
        (tmp_path / "class 0" / name).write_bytes(data)
    (tmp_path / "class 1" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    dataset = scan(tmp_path)
    check_rows(dataset)
    assert dataset.table.num_rows == 8
    reasons = {os.path.basename(e["uri"]): e["reason"] for e in dataset.errors.to_pylist()}
    assert reasons.keys() == {*bad, "gone.jpg"}
    assert reasons["empty.jpg"] == "the file is empty"
    assert reasons["text.PNG"].startswith("not an image")
    assert reasons["cut.jpeg"].startswith("damaged or cut off")
    assert reasons["phone.heic"].startswith(("HEIC", "damaged"))  # by what is installed
    assert "No such file" in reasons["gone.jpg"]


def test_hidden_files_and_other_kinds_of_file_are_left_alone(tmp_path: Path) -> None:
    flowers(tmp_path, 2, 2)
    for name in (".DS_Store.jpg", "Thumbs.db", "readme.txt"):
        (tmp_path / "class 0" / name).write_bytes(b"?")
    fill(tmp_path / ".git", 1)
    (tmp_path / "cover.jpg").write_bytes(jpeg(7))
    dataset = scan(tmp_path)
    assert (dataset.table.num_rows, dataset.errors.num_rows) == (4, 0)
    assert dataset.classes == ["class 0", "class 1"]


@pytest.mark.parametrize("name", ["a b", "ümlaut 鳥", "quote'\"", "star*[0]?", "per%20cent#1", "new\nline"])
def test_any_name_of_class_and_image_works(tmp_path: Path, name: str) -> None:
    fill(tmp_path / name, 2)
    fill(tmp_path / "other", 2, 50)
    (tmp_path / name / f"{name}.JPG").write_bytes(jpeg(9))
    dataset = scan(tmp_path)
    check_rows(dataset)
    assert name in dataset.classes
    assert str(tmp_path / name / f"{name}.JPG") in dataset.table["uri"].to_pylist()


def test_linked_folders_and_images_count(tmp_path: Path) -> None:
    flowers(tmp_path / "pool", 2, 3)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a").symlink_to(tmp_path / "pool" / "class 0")
    (tmp_path / "set" / "b").mkdir()
    (tmp_path / "set" / "b" / "x.jpg").symlink_to(tmp_path / "pool" / "class 1" / "00.jpg")
    dataset = scan(tmp_path / "set")
    assert dataset.table["class_name"].to_pylist() == ["a", "a", "a", "b"]


def test_width_and_height_are_those_after_the_exif_turn(tmp_path: Path) -> None:
    flowers(tmp_path, 2, 2)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "class 0" / "turned.jpg", exif=exif)
    dataset = scan(tmp_path)
    check_rows(dataset)
    row = next(row for row in dataset.table.to_pylist() if row["uri"].endswith("turned.jpg"))
    assert (row["width"], row["height"]) == (20, 30)


def test_images_with_too_many_pixels_are_refused(tmp_path: Path) -> None:
    flowers(tmp_path, 2, 2)
    Image.new("RGB", (40, 40)).save(tmp_path / "class 0" / "large.png")
    dataset = scan(tmp_path, max_pixels=1000)
    assert dataset.errors["reason"].to_pylist() == ["40 x 40 pixels are more than data.max_pixels (1000)"]


def test_key_points_beside_a_folder_are_carried_along(tmp_path: Path) -> None:
    flowers(tmp_path, 2, 2)
    (tmp_path / "parts.csv").write_text("image,part,x,y\nclass 0/00.jpg,beak,0.25,0.5\nclass 0/00.jpg,tail,1,0\n")
    parts = scan(tmp_path).table["parts"].to_pylist()
    assert parts[0] == [{"part": "beak", "x": 0.25, "y": 0.5}, {"part": "tail", "x": 1.0, "y": 0.0}]
    assert parts[1:] == [None, None, None]
    (tmp_path / "parts.csv").write_text("image,part,x,y\nclass 0/00.jpg,beak,left,0.5\n")
    with pytest.raises(UserError, match=r"parts\.csv, line 2"):
        scan(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image,part,x,y\nclass 0/00.jpg,beak,250,0.5\n", "line 2: x 250 and y 0.5 aren't fractions"),
        ("image,part,x,y\nclass 0/00.jpg,beak,0.5,-0.1\n", "line 2: .* expected numbers from 0 to 1"),
        ("image,part,x,y\nclass 0/00.jpg,beak,0.5,0.5\nclass 0/00.jpg,tail,nan,0.5\n", "line 3: x nan"),
    ],
)
def test_key_points_that_cannot_be_right_are_refused(tmp_path: Path, text: str, said: str) -> None:
    flowers(tmp_path, 2, 1)
    (tmp_path / "parts.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        scan(tmp_path)
    (tmp_path / "parts.csv").write_text("y,x,part,image\n0.25,0.5,beak,class 0/00.jpg\n")
    assert scan(tmp_path).table["parts"].to_pylist()[0] == [{"part": "beak", "x": 0.5, "y": 0.25}]


@pytest.mark.parametrize("columns", ["file,part,x,y", "image,part,x,y,visible", ""])
def test_key_points_in_other_columns_are_passed_over_and_said(tmp_path: Path, columns: str) -> None:
    flowers(tmp_path, 2, 1)
    (tmp_path / "parts.csv").write_text(f"{columns}\n")
    found = scan(tmp_path)
    assert found.table["parts"].null_count == len(found.table)
    assert f"has the columns {columns}; expected image,part,x,y" in found.source["no_key_points"]
    assert found.source["no_key_points"] in found.source["passed_over"]


def test_classes_are_chosen_by_number_and_by_name(tmp_path: Path) -> None:
    flowers(tmp_path)
    assert scan(tmp_path, classes=2).classes == ["class 0", "class 1"]
    chosen = scan(tmp_path, classes=["class 2", "class 0"])
    check_rows(chosen)
    assert chosen.classes == ["class 0", "class 2"]
    with pytest.raises(UserError, match=r"'clas 1'.*did you mean 'class 1'"):
        scan(tmp_path, classes=["class 0", "clas 1"])
    with pytest.raises(UserError, match="asks for 4 classes; there are 3"):
        scan(tmp_path, classes=4)


# Fit to be trained on?


def test_a_folder_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere isn't a folder \(data\.path\)"):
        scan(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no images \(data\.path\)"):
        check_dataset(scan(tmp_path), 0.05)


def test_a_class_without_training_images_is_named(tmp_path: Path) -> None:
    flowers(tmp_path)
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="class 'bare' has no training image;"):
        check_dataset(scan(tmp_path), 0.05)
    (tmp_path / "bare" / "x.jpg").write_bytes(b"")
    with pytest.raises(
        UserError,
        match=r"class 'bare' has no training image: 1 can't be used, e.g. .*x\.jpg \(the file is empty",
    ):
        check_dataset(scan(tmp_path), 0.05)
    check_dataset(scan(tmp_path, classes=["class 0", "class 1"]), 0.05)


def test_a_class_with_test_images_only_is_named(tmp_path: Path) -> None:
    flowers(tmp_path / "train", 2, 4)
    flowers(tmp_path / "test", 3, 2)
    with pytest.raises(UserError, match="class 'class 2' has no training image"):
        check_dataset(scan(tmp_path), 0.05)


def test_one_class_only_is_refused(tmp_path: Path) -> None:
    flowers(tmp_path, 1)
    with pytest.raises(UserError, match="one class only"):
        check_dataset(scan(tmp_path), 0.05)


def test_too_many_bad_images_are_refused_and_the_first_named(tmp_path: Path) -> None:
    flowers(tmp_path, 2, 9)
    (tmp_path / "class 0" / "bad.jpg").write_bytes(b"")
    (tmp_path / "class 1" / "bad.jpg").write_bytes(b"")
    dataset = scan(tmp_path)
    check_dataset(dataset, 0.1)
    with pytest.raises(
        UserError, match=r"2 of 20 images can't be used.*max_bad \(0\.09\).*class 0/bad\.jpg \(the file"
    ):
        check_dataset(dataset, 0.09)


# Manifest and reader


def test_a_manifest_survives_saving(tmp_path: Path) -> None:
    (flowers(tmp_path / "in") / "class 0" / "bad.jpg").write_bytes(b"")
    dataset = scan(tmp_path / "in")
    dataset.save(str(tmp_path / "saved"))
    loaded = Dataset.load(str(tmp_path / "saved"))
    assert loaded.table.equals(dataset.table)
    assert loaded.errors.equals(dataset.errors)
    assert (loaded.classes, loaded.source) == (dataset.classes, dataset.source)
    with pytest.raises(UserError, match=r"dataset\.json is missing"):
        Dataset.load(str(tmp_path / "in"))


def packed(tmp_path: Path, **options: Any) -> tuple[Dataset, Dataset]:
    """A folder, and the same folder as many small shards."""
    settings = PrepareSettings(
        output="-", data=DataSettings(source="folder", path=str(flowers(tmp_path / "in")), **options)
    )
    source = open_source(settings)
    written = write_source(source, str(tmp_path / "shards"), limits=TINY)
    return scan(tmp_path / "in", **options), written


def test_the_reader_gives_any_image_in_any_order(tmp_path: Path) -> None:
    folder, shards = packed(tmp_path)
    expected = [Path(uri).read_bytes() for uri in folder.table["uri"].to_pylist()]
    rng = np.random.default_rng(0)
    for dataset in (folder, shards):
        reader = ImageReader(cache_groups=2)
        columns = {name: dataset.table[name].to_numpy(zero_copy_only=False) for name in ("file", "row_group", "row")}
        for _ in range(20):
            indices = rng.integers(0, 30, rng.integers(0, 12)).tolist()
            assert reader.read(dataset.table, indices) == [expected[i] for i in indices]
            assert reader.read(columns, indices) == [expected[i] for i in indices]
        assert len(reader._groups) <= 2


def test_the_reader_may_be_pickled_and_used_by_many_threads(tmp_path: Path) -> None:
    folder, shards = packed(tmp_path)
    expected = images_of(folder)
    reader = ImageReader(cache_groups=3)
    reader.read(shards.table, [0])
    again = pickle.loads(pickle.dumps(reader))
    assert not again._shards
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda i: again.read(shards.table, [i % 30, (7 * i) % 30]), range(200)))
    assert seen == [[expected[i % 30], expected[(7 * i) % 30]] for i in range(200)]


def _read_in_child(reader: ImageReader, table: pa.Table, pipe: Any) -> None:
    pipe.send(reader.read(table, range(table.num_rows)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_reader_survives_a_fork_with_its_lock_held(tmp_path: Path) -> None:
    _, shards = packed(tmp_path)
    reader = ImageReader()
    expected = reader.read(shards.table, range(30))
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=_read_in_child, args=(reader, shards.table, theirs))
    with reader._lock:
        child.start()
    assert ours.poll(30)
    assert ours.recv() == expected
    child.join()


def test_an_image_that_went_missing_is_named_or_raised(tmp_path: Path) -> None:
    dataset = scan(flowers(tmp_path))
    os.unlink(dataset.table["uri"][1].as_py())
    with pytest.raises(FileNotFoundError):
        ImageReader().read(dataset.table, [0, 1, 2])
    first, second, _ = ImageReader().read_each(dataset.table, [0, 1, 2])
    assert isinstance(first, bytes)
    assert isinstance(second, BadImage)
    assert "No such file" in second.reason


def test_work_in_threads_keeps_its_order_and_takes_items_late() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for i in range(10_000):
            taken += 1
            yield i

    results = ordered(lambda i: i * i, items(), threads=3)
    assert [next(results) for _ in range(50)] == [i * i for i in range(50)]
    assert taken <= 50 + 4 * 3
    results.close()  # type: ignore[attr-defined]


# Shards


def test_shards_hold_what_the_folder_holds(tmp_path: Path) -> None:
    folder, shards = packed(tmp_path)
    check_rows(shards)
    place = ["file", "row_group", "row"]
    assert shards.table.drop_columns(place).equals(folder.table.drop_columns(place))
    assert images_of(shards) == images_of(folder)
    assert shards.counts() == folder.counts()


def test_a_shard_folder_is_plain_parquet_in_small_row_groups(tmp_path: Path) -> None:
    _, shards = packed(tmp_path)
    table = ds.dataset(str(tmp_path / "shards"), format="parquet", exclude_invalid_files=True).to_table()
    assert table.schema.equals(ROW_SCHEMA)
    assert sorted(table["image_id"].to_pylist()) == list(range(30))
    files = sorted((tmp_path / "shards").glob("shard-*.parquet"))
    assert len(files) > 2
    for file in files:
        about = pq.ParquetFile(file).metadata
        assert all(about.row_group(i).num_rows <= 3 for i in range(about.num_row_groups))
    about = json.loads((tmp_path / "shards" / "dataset.json").read_text())
    assert about["classes"] == shards.classes
    assert about["counts"] == shards.counts()
    assert about["source"]["crop"] == "none"


def test_a_shard_folder_may_be_moved_and_cut_down_to_some_classes(tmp_path: Path) -> None:
    packed(tmp_path)
    (tmp_path / "shards").rename(tmp_path / "moved")
    chosen = open_shards(str(tmp_path / "moved"), FOLDER.model_copy(update={"classes": ["class 2", "class 0"]}), 0)
    check_rows(chosen)
    assert chosen.classes == ["class 0", "class 2"]
    assert chosen.table.num_rows == 20


def test_shards_without_a_validation_split_get_the_one_the_folder_gets(tmp_path: Path) -> None:
    _, uncut = packed(tmp_path, validation=0, test=0)
    assert uncut.counts() == {"train": 30, "validation": 0, "test": 0}
    opened = open_shards(str(tmp_path / "shards"), FOLDER, 3)
    assert opened.table["split"].equals(scan(tmp_path / "in", seed=3).table["split"])


def test_a_complete_folder_is_not_overwritten_unasked(tmp_path: Path) -> None:
    folder, _ = packed(tmp_path)
    uri = str(tmp_path / "shards")
    with pytest.raises(UserError, match=r"already holds a dataset; pass --overwrite"):
        write_shards([], uri, folder.classes, folder.source)
    before = set(os.listdir(uri))
    smaller = write_source(open_source(_copy_of(uri, folder.classes[:2])), uri, overwrite=True)
    check_rows(smaller)
    assert smaller.table.num_rows == 20
    assert set(os.listdir(uri)) & before == {"dataset.json"}


def _copy_of(uri: str, classes: list[str] | None = None) -> PrepareSettings:
    data = DataSettings(source="shards", path=uri, classes=classes, validation=0, test=0)
    return PrepareSettings(output="-", data=data)


def test_a_run_that_fails_or_is_killed_harms_nothing(tmp_path: Path) -> None:
    folder, _ = packed(tmp_path)
    uri = str(tmp_path / "shards")

    def failing() -> Iterator[dict[str, Any] | BadRow]:
        source = open_source(_copy_of(uri))
        for i, row in enumerate(source.read(source.items_of(0), 1)):
            if i == 20:
                raise RuntimeError("disk on fire")
            yield row

    before = set(os.listdir(uri))
    with pytest.raises(RuntimeError):
        write_shards(failing(), uri, folder.classes, folder.source, overwrite=True, limits=TINY)
    assert set(os.listdir(uri)) == before
    storage.write_bytes(f"{uri}/shard-deadbeef-00000.parquet", b"left by a killed run")
    assert images_of(open_shards(uri, FOLDER, 0)) == images_of(folder)
    os.rename(f"{uri}/dataset.json", f"{uri}/elsewhere")
    with pytest.raises(UserError, match="no complete dataset"):
        open_shards(uri, FOLDER, 0)


def test_errors_travel_with_the_shards_and_too_many_stop_them(tmp_path: Path) -> None:
    row = {
        "uri": "u",
        "image": jpeg(0),
        "label": 0,
        "class_name": "a",
        "split": "train",
        "width": 12,
        "height": 10,
    }
    row |= {"sha256": hashlib.sha256(row["image"]).hexdigest(), "parts": None}  # type: ignore[arg-type]
    rows: list[dict[str, Any] | BadRow] = [row, BadRow("x.jpg", "the file is empty", "a"), row]
    written = write_shards(rows, str(tmp_path / "s"), ["a"], {"kind": "test"})
    assert written.errors.to_pylist() == [{"uri": "x.jpg", "reason": "the file is empty", "class_name": "a"}]
    assert written.table["image_id"].to_pylist() == [0, 1]
    with pytest.raises(UserError, match=r"1 of 3 images can't be used.*x\.jpg \(the file is empty\)"):
        write_shards(rows, str(tmp_path / "t"), ["a"], {"kind": "test"}, max_bad=0.3)
    assert os.listdir(tmp_path / "t") == []


def test_an_image_that_changes_after_it_was_checked_stops_the_copy(tmp_path: Path) -> None:
    dataset = scan(flowers(tmp_path / "in"))
    source = open_module._of_dataset(dataset, "in", "warn")
    (tmp_path / "in" / "class 1" / "03.jpg").write_bytes(jpeg(12345))
    with pytest.raises(UserError, match=r"03\.jpg changed while it was copied"):
        write_source(source, str(tmp_path / "out"))


# Peak resident memory in a process of its own. Not tracemalloc, which doesn't see Arrow's memory; not ru_maxrss, which
# a child inherits from its parent.
_WRITE_AND_MEASURE = """
import re, sys
from protopnet.datasets.shards import write_shards

def rows(number):
    for i in range(number):
        image = i.to_bytes(4, "big") * 25_000
        yield {"uri": str(i), "image": image, "label": 0, "class_name": "a", "split": "train", "sha256": str(i)}

for number in (1000, 2500):
    write_shards(rows(number), f"{sys.argv[1]}/{number}", ["a"], {})
    print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


def test_memory_does_not_grow_with_the_images_written(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _WRITE_AND_MEASURE, str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    few, many = (int(line) for line in printed.split())
    assert many - few < 60  # MB; the images of the second are 150 MB more


# Birds, settings


def test_generated_birds_are_written_once_for_the_same_settings(tmp_path: Path) -> None:
    birds = BirdSettings(classes=3, train_per_class=4, test_per_class=2, size=32)
    settings = RunSettings(birds=birds)
    first = open_dataset(settings, str(tmp_path))
    check_rows(first)
    assert first.counts() == {"train": 9, "validation": 3, "test": 6}
    assert all(first.table["parts"].to_pylist())
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    again = open_dataset(settings, str(tmp_path))
    assert again.table.equals(first.table)
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    two = open_dataset(settings.model_copy(update={"data": DataSettings(classes=2)}), str(tmp_path))
    check_rows(two)
    assert two.classes == first.classes[:2]
    check_dataset(two, 0)


def test_a_source_without_a_path_names_the_setting() -> None:
    with pytest.raises(UserError, match=r"data\.path is missing"):
        open_source(PrepareSettings(output="-", data=DataSettings(source="cub")))


def prepare(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of jobs/prepare.py."""
    monkeypatch.setattr("sys.argv", [str(PREPARE), *arguments])
    try:
        runpy.run_path(str(PREPARE), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_job_prints_what_it_wrote_and_what_it_could_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (flowers(tmp_path / "in") / "class 0" / "bad.jpg").write_bytes(b"")
    arguments = [
        "--data.source",
        "folder",
        "--data.path",
        str(tmp_path / "in"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert prepare(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("30 images of 3 classes in ")
    assert printed[0].endswith(": 21 train, 3 validation, 6 test")
    assert printed[1] == f"not used: {tmp_path}/in/class 0/bad.jpg: the file is empty"
    assert printed[-1] == f"dataset: {tmp_path}/out"
    check_rows(open_shards(str(tmp_path / "out"), FOLDER, 0))
    assert prepare(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err.splitlines()
    assert error == [f"error: {tmp_path}/out already holds a dataset; pass --overwrite, or choose another --output"]
    assert prepare(monkeypatch, *arguments, "--overwrite") == 0
    assert prepare(monkeypatch, *arguments, "--overwrite", "--data.max_bad", "0.01") == 2
    assert "1 of 31 images can't be used" in capsys.readouterr().err


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
    return list(read_photos(cub_photos(str(root), settings), 2, root=str(root), settings=settings))


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
