"""Barred patches: `IMAGE:BOX` as people write it, and the patches that lie on such a box."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protopnet.auditing.barred_patches import Barred, Bars, barred_before, parse_barred, patches_on
from protopnet.errors import UserError
from protopnet.passes.candidates import local_nearest


def row(image_id: int, uri: str, split: str = "train", **more: Any) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "uri": uri,
        "split": split,
        "width": 200,
        "height": 100,
        "sha256": f"s{image_id}",
    } | more


ROWS = pa.Table.from_pylist(
    [
        row(0, "/data/jay/1.jpg"),
        row(1, "/data/jay/2.jpg"),
        row(2, "/data/wren/1.jpg"),
        row(3, "s3://bucket/wren/odd,name:3.jpg"),
        row(4, "/data/wren/4.jpg#xywh=5,6,70,80"),
        row(5, "/data/wren/5.jpg", "test"),
        row(6, "/data/wren/copy of 4.jpg", sha256="s4"),
    ]
)


def message(text: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_barred(text, ROWS)
    assert f"--forbid {text}" in str(caught.value)
    return str(caught.value)


class TestParsing:
    @pytest.mark.parametrize(
        ("name", "image"),
        [
            ("/data/jay/1.jpg", 0),
            ("jay/1.jpg", 0),
            ("2.jpg", 1),
            ("2", 2),
            ("s3://bucket/wren/odd,name:3.jpg", 3),
            ("odd,name:3.jpg", 3),
            ("4.jpg", 4),
            ("wren/4.jpg#xywh=5,6,70,80", 4),
        ],
    )
    def test_an_image_by_its_uri_the_end_of_it_or_its_number(self, name: str, image: int) -> None:
        assert parse_barred(f"{name}:1,2,30,40", ROWS).uri == ROWS["uri"][image].as_py()

    def test_a_box_in_pixels_of_the_image(self) -> None:
        assert parse_barred("2.jpg:10,20,100,200", ROWS) == Barred("/data/jay/2.jpg", "s1", (10, 20, 100, 200))
        assert parse_barred("2.jpg: 10, 20, 30, 40", ROWS).box == (10, 20, 30, 40)

    def test_all_of_it(self) -> None:
        assert parse_barred("2.jpg:all", ROWS).box == (0, 0, 100, 200)

    @pytest.mark.parametrize("text", ["2.jpg", "2.jpg:", ":1,2,3,4", "2.jpg:1,2,3", "2.jpg:1,2,3,x", "2.jpg:-1,2,3,4"])
    def test_another_form(self, text: str) -> None:
        assert "expected IMAGE:top,left,bottom,right" in message(text)

    @pytest.mark.parametrize("box", ["5,5,5,9", "9,0,5,9", "0,0,101,9", "0,0,9,201"])
    def test_a_box_that_isn_t_on_the_image(self, box: str) -> None:
        assert "100 rows and 200 columns" in message(f"2.jpg:{box}")

    def test_a_name_of_several_images(self) -> None:
        said = message("1.jpg:all")
        assert "2 training images" in said
        assert "/data/jay/1.jpg (image_id 0), /data/wren/1.jpg (image_id 2)" in said

    def test_a_name_of_none_offers_the_nearest(self) -> None:
        assert "nearest names are /data/jay/2.jpg" in message("jay/22.jpg:all")
        assert "one of them is" in message("nothing like it:all")

    def test_a_test_image(self) -> None:
        assert "is a test image" in message("5.jpg:all")


SIDES = st.integers(1, 40)


class TestPatches:
    @given(st.data())
    def test_a_patch_lies_on_a_box_when_they_share_area(self, data: st.DataObject) -> None:
        height, width = data.draw(SIDES), data.draw(SIDES)
        cells = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
        shape = data.draw(st.tuples(st.integers(1, cells[0]), st.integers(1, cells[1])))
        top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
        box = (top, left, data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width)))

        found = patches_on(box, (height, width), cells, shape)

        # On a grid so fine that cells and pixels both have whole sides.
        pixels = np.zeros((height * cells[0], width * cells[1]), dtype=bool)
        pixels[top * cells[0] : box[2] * cells[0], left * cells[1] : box[3] * cells[1]] = True
        assert found.shape == (cells[0] - shape[0] + 1, cells[1] - shape[1] + 1)
        for (r, c), is_on in np.ndenumerate(found):
            covered = pixels[r * height : (r + shape[0]) * height, c * width : (c + shape[1]) * width]
            assert is_on == covered.any()

    def test_the_whole_image_and_a_corner(self) -> None:
        assert patches_on((0, 0, 100, 200), (100, 200), (7, 7), (1, 1)).all()
        assert np.argwhere(patches_on((0, 0, 1, 1), (100, 200), (7, 7), (2, 2))).tolist() == [[0, 0]]


class TestBars:
    bars = Bars.of([Barred("x", "s1", (0, 0, 50, 200)), Barred("y", "s4", (0, 0, 1, 1))], ROWS, (4, 4), (1, 1))

    def test_copies_of_an_image_are_barred_with_it(self) -> None:
        assert sorted(self.bars.masks) == [1, 4, 6]
        assert self.bars.masks[6].tolist() == self.bars.masks[4].tolist()

    def test_boxes_of_one_image_add_up(self) -> None:
        both = Bars.of([Barred("x", "s1", (0, 0, 50, 200)), Barred("x", "s1", (50, 0, 100, 50))], ROWS, (4, 4), (1, 1))
        assert both.masks[1].sum() == 8 + 2

    def test_which_places_they_hold(self) -> None:
        assert self.bars.holding([(1, 0, 0), (1, 2, 0), (0, 0, 0), (6, 0, 0), (6, 0, 1)]) == [0, 3]

    def test_how_many_patches_are_free(self) -> None:
        assert self.bars.free([0, 1]) == 16 + 8
        assert self.bars.free([]) == 0

    def test_more_places_leave_the_first_bars_alone(self) -> None:
        more = self.bars.with_places([(1, 3, 3), (0, 1, 2)])
        assert more.free([0, 1]) == 15 + 7
        assert self.bars.free([0, 1]) == 16 + 8

    def test_what_was_barred_before_stays_so(self) -> None:
        barred = parse_barred("4.jpg:1,2,3,4", ROWS)
        history = [{"steps": [{"step": "rule"}, {"step": "forbid", "barred": [barred.record()]}]}]
        assert barred_before(history) == [barred]
        assert barred_before([]) == []


@pytest.mark.parametrize("any_class", [True, False])
def test_the_nearest_patches_are_those_without_the_barred_ones(any_class: bool) -> None:
    random = np.random.default_rng(0)
    latents = torch.from_numpy(random.random((6, 3, 4, 4), np.float32))
    prototypes = torch.from_numpy(random.random((4, 3, 1, 1), np.float32))
    labels, classes = np.array([0, 1, 0, 1, 0, 1], np.int32), np.array([0, 0, 1, 1])
    barred = random.random((6, 16)) < 0.7
    barred[2] = True
    found = local_nearest(
        latents,
        np.arange(6),
        labels,
        prototypes,
        "log",
        5,
        prototype_class_P=None if any_class else classes,
        barred_BL=barred,
    )
    for p, label in enumerate(classes):
        distances = (latents - prototypes[p]).square().sum(1).flatten(1).double().numpy()
        distances[barred | (False if any_class else (labels != label)[:, None])] = np.inf
        order = np.argsort(distances, axis=None, kind="stable")[: min(5, int(np.isfinite(distances).sum()))]
        own = found.filter(pa.compute.equal(found["prototype"], p))
        places = own["image_id"].to_numpy() * 16 + own["row"].to_numpy() * 4 + own["column"].to_numpy()
        assert places.tolist() == order.tolist()
