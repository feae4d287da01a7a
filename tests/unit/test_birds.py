"""Generated birds: kinds share parts and differ, key points are true, pixels alone don't tell the class."""

import hashlib
import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

from protopnet.config import BirdSettings
from protopnet.datasets.birds import (
    PARTS,
    bird_kinds,
    bird_row,
    bird_rows,
    distinguishing_parts,
    image_rng,
    render_bird,
)
from protopnet.datasets.birds.anatomy import PART_ID
from protopnet.datasets.birds.kinds import COMMON, MARKS, Kind, draw_kinds
from protopnet.datasets.birds.render import render

SMALL = BirdSettings(classes=3, train_per_class=3, test_per_class=2, size=64)


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 12, 30, 200])
def test_kinds_differ_in_two_parts_and_have_names_of_their_own(classes: int) -> None:
    kinds = draw_kinds(classes, seed=1)
    assert len(kinds) == len({kind.name for kind in kinds}) == classes
    assert [kind.name for kind in kinds] == sorted(kind.name for kind in kinds)
    assert all(len(a.differs(b)) >= 2 for i, a in enumerate(kinds) for b in kinds[:i])
    assert all(set(kind.name) <= set("-ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz") for kind in kinds)


@pytest.mark.parametrize("seed", range(5))
def test_no_single_part_gives_the_class_away(seed: int) -> None:
    kinds = draw_kinds(12, seed)
    for part in PARTS:
        assert min(Counter(kind.variants[part] for kind in kinds).values()) >= 2


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 12, 50])
def test_distinguishing_parts_are_those_most_others_have_otherwise(classes: int) -> None:
    for seed in range(5):
        kinds = draw_kinds(classes, seed)
        for label, kind in enumerate(kinds):
            parts = distinguishing_parts(kinds, label)
            assert parts
            for part in PARTS:
                shared = sum(other.variants[part] == kind.variants[part] for other in kinds) - 1
                assert (part in parts) == (shared <= (classes - 1) / 3)
    kinds = draw_kinds(50, 0)
    marked = {part for part in PARTS if kinds[7].variants[part] != COMMON[part]}
    assert distinguishing_parts(kinds, 7) == marked


def test_seed_draws_other_kinds() -> None:
    assert draw_kinds(12, 0) == draw_kinds(12, 0)
    assert {kind.name for kind in draw_kinds(12, 0)} != {kind.name for kind in draw_kinds(12, 1)}


def test_rows_have_the_form_of_the_data_set() -> None:
    rows = list(bird_rows(SMALL))
    assert [row["image_id"] for row in rows] == list(range(15))
    assert [(row["label"], row["uri"]) for row in rows] == sorted((row["label"], row["uri"]) for row in rows)
    assert Counter(row["split"] for row in rows) == {"train": 9, "test": 6}
    names = [kind.name for kind in bird_kinds(SMALL)]
    for row in rows:
        assert set(row) == {
            *(
                "image_id",
                "uri",
                "image",
                "label",
                "class_name",
                "split",
                "width",
                "height",
                "sha256",
                "parts",
                "object",
            )
        }
        assert row["class_name"] == names[row["label"]]
        assert row["uri"].startswith(f"birds://{row['split']}/{row['class_name'].replace(' ', '_')}/")
        assert row["sha256"] == hashlib.sha256(row["image"]).hexdigest()
        image = Image.open(io.BytesIO(row["image"]))
        assert (image.size, image.mode) == ((row["width"], row["height"]), "RGB")
        assert len({point["part"] for point in row["parts"]}) == len(row["parts"])
        assert all(0 <= point["x"] < 1 and 0 <= point["y"] < 1 for point in row["parts"])
    assert len({row["sha256"] for row in rows}) == len({row["uri"] for row in rows}) == len(rows)


def test_a_row_depends_on_its_own_place_only() -> None:
    rows = list(bird_rows(SMALL))
    kinds = bird_kinds(SMALL)
    alone = bird_row(SMALL, kinds, 2, "train", 1)
    assert next(row for row in rows if row["uri"] == alone["uri"]) == alone | {"image_id": 13}
    more = SMALL.model_copy(update={"train_per_class": 9})
    assert bird_row(more, kinds, 2, "train", 1) == alone
    other_seed = SMALL.model_copy(update={"seed": 1})
    assert bird_row(other_seed, kinds, 2, "train", 1)["sha256"] != alone["sha256"]


def test_key_points_lie_on_their_part_and_most_are_visible() -> None:
    seen: Counter[str] = Counter()
    pictures = 0
    for label, kind in enumerate(draw_kinds(21, 0)):
        for index in range(4):
            picture = render(kind, image_rng(0, "train", label, index), 96)
            pictures += 1
            side = len(picture.part_map)
            for point in picture.parts:
                assert 0 <= point.x < 1
                assert 0 <= point.y < 1
                assert picture.part_map[int(point.y * side), int(point.x * side)] == PART_ID[point.part]
                seen[point.part] += 1
    assert set(seen) == {*PARTS, "belly"}
    assert min(seen.values()) >= 0.8 * pictures


def test_each_mark_changes_the_picture_near_its_key_point() -> None:
    """A mark is painted where its key point says: the same bird without it looks different there."""
    plain = Kind("plain", COMMON)
    for part in ("face", "breast", "wing"):  # marks that don't change the bird's extent, hence its place
        for mark in MARKS[part]:
            marked = Kind("marked", COMMON | {part: mark.variant})
            picture, points = render_bird(marked, np.random.default_rng(3), 128)
            before, _ = render_bird(plain, np.random.default_rng(3), 128)
            point = next(point for point in points if point.part == part)
            x, y = int(point.x * 128), int(point.y * 128)
            window = np.s_[max(y - 12, 0) : y + 13, max(x - 12, 0) : x + 13]
            change = np.abs(np.asarray(picture, dtype=int)[window] - np.asarray(before, dtype=int)[window])
            assert change.mean() > 8, mark


@pytest.mark.parametrize("size", [32, 128, 300])
def test_pictures_of_any_size(size: int) -> None:
    image, points = render_bird(draw_kinds(2, 0)[0], np.random.default_rng(0), size)
    assert image.size == (size, size)
    assert len(points) >= 6


def test_a_linear_model_on_pixels_fails() -> None:
    settings = BirdSettings(train_per_class=24, test_per_class=10, size=48)
    pixels: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    for row in bird_rows(settings):
        small = Image.open(io.BytesIO(row["image"])).resize((32, 32), Image.Resampling.BILINEAR)
        pixels[row["split"]].append(np.asarray(small, dtype=np.float32).ravel() / 255 - 0.5)
        labels[row["split"]].append(row["label"])
    model = LogisticRegression(C=0.01, max_iter=60).fit(np.array(pixels["train"]), labels["train"])
    assert model.score(np.array(pixels["test"]), labels["test"]) < 0.5
