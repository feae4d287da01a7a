"""Images that are in training and in a test too are named, refused or dropped."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from protopnet.commands.prepare import summary
from protopnet.config import DataSettings, PrepareSettings
from protopnet.datasets.duplicates import duplicates_across, duplicates_text, settled
from protopnet.datasets.folders import scan_folder
from protopnet.datasets.near_duplicates import near_duplicates_across, near_duplicates_text
from protopnet.datasets.open import open_source
from protopnet.datasets.rows import Dataset
from protopnet.datasets.shards import write_source
from protopnet.errors import UserError


def folders(root: Path, copied: int) -> Path:
    """Two classes of four training and four test images, of which so many are copies of training images."""
    for label, name in enumerate(("lily", "rose")):
        for split, shift in (("train", 0), ("test", 100)):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (4, 4), (label * 50, i, shift)).save(root / split / name / f"{i}.png")
    for i in range(copied):
        shutil.copy(root / f"train/rose/{i}.png", root / f"test/lily/copy {i}.png")  # under another class too
    return root


def scan(root: Path, **options: Any) -> Dataset:
    return scan_folder(str(root), DataSettings(source="folder", path=str(root), validation=0, **options), 0)


def test_pairs_are_named_by_content(tmp_path: Path) -> None:
    dataset = scan(folders(tmp_path, 4))
    pairs = duplicates_across(dataset.table)
    assert [Path(uri).name for uri in pairs["uri"].to_pylist()] == [f"copy {i}.png" for i in range(4)]
    assert pairs["train_class_name"].unique().to_pylist() == ["rose"]
    assert pairs["class_name"].unique().to_pylist() == ["lily"]
    text = duplicates_text(pairs)
    assert text is not None
    assert text.startswith(
        f"4 test images are in training too: {tmp_path}/test/lily/copy 0.png is {tmp_path}/train/rose/0.png"
    )
    assert text.endswith("and 1 more")


def test_without_duplicates_there_is_nothing_to_say(tmp_path: Path) -> None:
    dataset = scan(folders(tmp_path, 0))
    assert duplicates_text(duplicates_across(dataset.table)) is None
    for mode in ("warn", "refuse", "drop"):
        assert settled(dataset, mode)[0] is dataset


def test_refused_or_dropped(tmp_path: Path) -> None:
    dataset = scan(folders(tmp_path, 2))
    with pytest.raises(UserError, match=r"^2 test images are in training too: .*data\.duplicates"):
        settled(dataset, "refuse")
    kept, pairs = settled(dataset, "drop")
    assert len(pairs) == 2
    assert kept.counts() == {"train": 6, "validation": 0, "test": 10}
    assert kept.table["image_id"].to_pylist() == list(range(16))
    assert not len(duplicates_across(kept.table))
    assert kept.source["passed_over"] == "2 training images dropped that are held out too (data.duplicates)"


def test_a_test_set_that_is_the_training_set_leaves_nothing_to_train_on(tmp_path: Path) -> None:
    root = folders(tmp_path, 0)
    shutil.rmtree(root / "test")
    shutil.copytree(root / "train", root / "test")
    dataset = scan(root)
    assert len(duplicates_across(dataset.table)) == 8
    assert settled(dataset, "drop")[0].counts()["train"] == 0


@pytest.mark.parametrize(
    ("mode", "images", "said"), [("warn", 18, "2 test images are in"), ("drop", 16, "2 training images dropped")]
)
def test_preparing_says_so(tmp_path: Path, mode: str, images: int, said: str) -> None:
    data = DataSettings(source="folder", path=str(folders(tmp_path / "in", 2)), validation=0, duplicates=mode)
    source = open_source(PrepareSettings(data=data))
    dataset = write_source(source, str(tmp_path / "out"))
    assert dataset.table.num_rows == images
    assert said in summary(dataset, "out", 1.0)


def photo_like(seed: int, side: int = 96) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def test_images_that_are_nearly_the_same_are_named(tmp_path: Path) -> None:
    for label, name in enumerate(("lily", "rose")):
        for split, shift in (("train", 0), ("test", 100)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                photo_like(10 * label + i + shift).save(tmp_path / split / name / f"{i}.png")
            Image.new("RGB", (9, 9), (label, shift, 9)).save(tmp_path / split / name / "even.png")
    test = tmp_path / "test/lily"
    photo_like(11).save(test / "saved anew.jpg", quality=40)
    photo_like(12).resize((50, 40)).point(lambda value: value * 2 // 3).save(test / "small and dark.png")
    photo_like(13).crop((2, 2, 94, 94)).save(test / "cropped.png")
    shutil.copy(tmp_path / "train/rose/0.png", test / "copy.png")  # is an exact one
    pairs = near_duplicates_across(scan(tmp_path).table)
    named = {Path(row["uri"]).name: Path(row["train_uri"]).name for row in pairs.to_pylist()}
    assert named == {"saved anew.jpg": "1.png", "small and dark.png": "2.png", "cropped.png": "3.png"}
    assert set(pairs["train_class_name"].to_pylist()) == {"rose"}
    text = near_duplicates_text(pairs)
    assert text is not None
    assert text.startswith("3 test images are nearly in training too: ")
    assert "is like" in text


def test_without_near_duplicates_there_is_nothing_to_say(tmp_path: Path) -> None:
    pairs = near_duplicates_across(scan(folders(tmp_path, 2)).table)
    assert (len(pairs), near_duplicates_text(pairs)) == (0, None)
