"""Every source yields the same rows; nothing is dropped in silence; shards hold what went in."""

import os
from pathlib import Path

import pytest
from flowers import check_rows, fill, flowers, jpeg, scan
from PIL import Image

from protopnet.datasets.rows import Dataset
from protopnet.datasets.validate import check_dataset
from protopnet.errors import UserError

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
