"""Folders as people have them: which are splits, which are classes, and what is passed over."""

import re
from pathlib import Path

import pytest

from protopnet.datasets.folders import list_images
from protopnet.datasets.layout import split_of
from protopnet.errors import UserError
from protopnet.scoring.inputs import open_input


def lay(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")
    return root


def found(root: Path, *paths: str) -> tuple[list[str], set[tuple[str, str]]]:
    """The classes of a folder with these files, and the (class, split) pairs of its images."""
    images, names, _ = list_images(str(lay(root, *paths)))
    return names, {(image.class_name, image.split) for image in images}


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("Train", "Valid", "Test"),
        ("TRAIN", "VAL", "TEST"),
        ("Training", "Validation", "Testing"),
        ("train", "dev", "eval"),
        ("training_set", "validation-set", "Test Set"),
        ("train_images", "val_images", "evaluation"),
    ],
)
def test_split_folders_in_any_case_and_by_their_usual_names(
    tmp_path: Path, train: str, validation: str, test: str
) -> None:
    paths = [f"{folder}/{name}/1.jpg" for folder in (train, validation, test) for name in ("lily", "rose")]
    names, pairs = found(tmp_path, *paths)
    assert names == ["lily", "rose"]
    assert pairs == {(name, split) for name in names for split in ("train", "validation", "test")}


@pytest.mark.parametrize("name", ["trains", "contest", "valley", "device", "tested", "settest", "data", "images"])
def test_other_names_are_no_splits(name: str) -> None:
    assert split_of(name) is None


def test_splits_below_each_class(tmp_path: Path) -> None:
    paths = [f"{name}/{split}/1.jpg" for name in ("lily", "rose") for split in ("Train", "Test")]
    names, pairs = found(tmp_path, *paths)
    assert names == ["lily", "rose"]
    assert pairs == {(name, split) for name in names for split in ("train", "test")}
    assert found(tmp_path, "rose/details/2.jpg")[1] == {("lily", "train"), ("rose", "train")}


def test_a_test_set_alone_is_a_test_set(tmp_path: Path) -> None:
    assert found(tmp_path, "Test/lily/1.jpg", "Test/rose/1.jpg") == (
        ["lily", "rose"],
        {("lily", "test"), ("rose", "test")},
    )


def test_a_class_with_the_name_of_a_split_stays_a_class_beside_others(tmp_path: Path) -> None:
    assert found(tmp_path / "a", "Test/1.jpg", "bus/1.jpg", "car/1.jpg")[0] == ["Test", "bus", "car"]
    assert found(tmp_path / "b", "test/old/1.jpg", "bus/new/1.jpg")[0] == ["bus", "test"]


@pytest.mark.parametrize(
    ("paths", "named"),
    [
        (["train/steam/1.jpg", "bus/1.jpg"], "train/"),
        (["test/rose/1.jpg", "rose/1.jpg", "lily/1.jpg"], "test/"),
        (["Train/a/1.jpg", "training/a/1.jpg"], "Train/ and training/"),
        (["train/a/1.jpg", "val/a/1.jpg", "valid/a/1.jpg"], "val/ and valid/"),
        (["Train/1.jpg", "Test/1.jpg"], "Test/, Train/"),
    ],
)
def test_what_could_be_either_is_refused_by_name(tmp_path: Path, paths: list[str], named: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(named)} .*data.path"):
        found(tmp_path, *paths)


def test_images_beside_splits_and_classes_are_counted(tmp_path: Path) -> None:
    paths = ["train/a/1.jpg", "train/b/1.jpg", "test/1.jpg", "test/2.jpg", "cover.jpg"]
    images, _, passed = list_images(str(lay(tmp_path, *paths)))
    assert [image.path for image in images] == ["train/a/1.jpg", "train/b/1.jpg"]
    assert passed.text() == "3 images outside the class folders not used"


LEFTOVERS = [
    "__MACOSX/rose/._1.jpg",
    "__MACOSX/rose/1.jpg",
    "rose/.DS_Store",
    "rose/Thumbs.db",
    "rose/desktop.ini",
    "rose/@eaDir/1.jpg",
    "rose/.ipynb_checkpoints/1-checkpoint.jpg",
    "System Volume Information/x.jpg",
    "$RECYCLE.BIN/1.jpg",
    "lost+found/1.jpg",
    ".Trashes/rose/1.jpg",
]


def test_leftovers_of_systems_are_no_classes_and_no_images_but_are_counted(tmp_path: Path) -> None:
    (tmp_path / "in" / "__MACOSX" / "empty").mkdir(parents=True)
    images, names, passed = list_images(str(lay(tmp_path / "in", "rose/1.jpg", "lily/1.jpg", *LEFTOVERS)))
    assert (names, len(images)) == (["lily", "rose"], 2)
    assert str(passed.text()).startswith("11 leftover files of systems ignored (__MACOSX 2, $RECYCLE.BIN 1")

    source = open_input(str(tmp_path / "in"))
    for _ in range(2):  # read again, they are counted anew
        assert sum(len(table) for table in source.tables()) == 2
        assert source.passed.text() == passed.text()


def test_leftovers_inside_splits_are_no_classes(tmp_path: Path) -> None:
    paths = [f"Train/{name}/1.jpg" for name in ("a", "b", "__MACOSX", "@eaDir")]
    assert found(tmp_path, *paths)[0] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a/IM0001", r"\(no suffix 1\)"),
        ("a/notes.txt", r"\(\.txt 1\)"),
        ("photos.zip", r"unpack the \.zip"),
        (".hidden.jpg", "expected images below it"),
    ],
)
def test_a_folder_without_images_says_what_it_holds(tmp_path: Path, name: str, said: str) -> None:
    lay(tmp_path, name)
    with pytest.raises(UserError, match=rf"holds no images \(data.path\).*{said}"):
        list_images(str(tmp_path))
