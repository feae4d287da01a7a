"""Quality against the truth of generated birds, distinctiveness and noise: by hand, without Ray."""

from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch
from observations import BETWEEN, NOWHERE, ON_HEAD, ON_TAIL, image, own, places

from protopnet import imaging
from protopnet.config import BirdSettings
from protopnet.datasets.birds import PART_ID, bird_kinds, bird_row, redraw
from protopnet.quality.generated_birds import Birds, parts_under, prototypes_on_birds
from protopnet.quality.key_points import PartPoint
from protopnet.quality.metrics import Observation, drawn, part_quality
from protopnet.quality.perturbations import with_noise


class TestTruth:
    """A picture of 4 x 4: the left half is bird, its upper half head, which distinguishes class 0."""

    PARTS = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [2, 2, 0, 0], [2, 2, 0, 0]])
    NAMES: ClassVar = {1: "head", 2: "tail"}
    POINTS = (PartPoint("head", 0.25, 0.25), PartPoint("tail", 0.75, 0.25))

    def bird(self, at: tuple[float, float], under: str, **more: Any) -> Observation:
        known = drawn([under], self.PARTS, self.NAMES, self.POINTS, {"head"})
        return image(points=self.POINTS, evidence_places=places(at), drawn=known, **more)

    def test_what_a_picture_says(self) -> None:
        known = drawn(["head"], self.PARTS, self.NAMES, self.POINTS, {"head"})
        assert (known.bird, known.chance) == (0.5, 0.5)
        assert known.chance_box == 0.5  # the four pixels of the head; the next row is 0.375 away
        assert drawn([], np.zeros((4, 4), int), self.NAMES, [], {"head"}).chance == 0

    def test_the_best_evidence_of_correct_predictions_is_looked_at(self) -> None:
        right = [self.bird((0.3, 0.3), "head"), self.bird((0.4, 0.4), ""), self.bird((0.7, 0.2), "tail")]
        wrong = [self.bird((0.7, 0.2), "tail", prediction=1)]
        found = part_quality(right + wrong, 1, [{"head"}, {"tail"}]).metrics
        assert found["truth"].pop("per_class") == [pytest.approx(2 / 3), None]
        assert found["truth"] == {"value": pytest.approx(2 / 3), "chance": 0.5, "places": 3}
        assert found["truth_exact"] == {"value": pytest.approx(1 / 3), "chance": 0.5, "places": 3}
        assert found["on_bird"] == {"value": 0.75, "chance": 0.5, "places": 4}

    def test_a_correct_prediction_without_evidence_is_a_miss(self) -> None:
        known = drawn([], self.PARTS, self.NAMES, self.POINTS, {"head"})
        found = part_quality([image(points=self.POINTS, drawn=known)], 1, [{"head"}]).metrics
        assert found["truth"]["value"] == found["truth_exact"]["value"] == 0

    def test_other_pictures_have_none(self) -> None:
        assert "truth" not in part_quality([image()], 1).metrics
        assert part_quality([image()], 1, [{"head"}]).metrics["truth"] is None

    def test_the_part_under_a_place(self) -> None:
        parts = np.zeros((10, 20), dtype=np.uint8)
        parts[9, 19] = PART_ID["tail"]
        assert parts_under(places((0.95, 0.98), (1.0, 1.0), (0.1, 0.1), NOWHERE), parts) == ["tail", "tail", "", ""]


class TestBirdsDrawnAgain:
    SETTINGS = BirdSettings(classes=4, size=48, train_per_class=2, test_per_class=2)

    def test_the_key_points_lie_on_their_parts(self) -> None:
        kinds = bird_kinds(self.SETTINGS)
        birds = Birds.of({"kind": "birds", "crop": "none", "shards": "x"} | self.SETTINGS.model_dump(), self.names())
        assert birds is not None
        for split in ("train", "test"):
            row = bird_row(self.SETTINGS, kinds, 2, split, 1)
            points = [PartPoint(p["part"], p["y"], p["x"]) for p in row["parts"]]
            at = places(*((p.y, p.x) for p in points))
            found = birds.drawn(row["uri"], row["sha256"], 2, points, at)
            assert found is not None
            assert found.under == [p.part for p in points]
            assert 0 < found.chance < found.chance_box <= 1

    def test_another_picture_is_not_taken_for_it(self) -> None:
        kinds = bird_kinds(self.SETTINGS)
        row = bird_row(self.SETTINGS, kinds, 0, "test", 0)
        assert redraw(self.SETTINGS, kinds, row["uri"], "0" * 64) is None
        for uri in ("/data/a.jpg", "birds://test/Nobody/0000", "birds://else/x/0000", "birds://test"):
            assert redraw(self.SETTINGS, kinds, uri, row["sha256"]) is None

    def test_classes_are_told_apart_among_those_of_the_bundle(self) -> None:
        source = {"kind": "birds"} | self.SETTINGS.model_dump()
        two = Birds.of(source, self.names()[:2])
        assert two is not None
        assert two.distinguishing_K[0] == two.distinguishing_K[1] != set()  # what differs between just these two
        assert Birds.of(source, ["Robin"]) is None
        assert Birds.of({"kind": "folder"}, self.names()) is None

    def test_prototypes_on_the_ground_and_on_telling_parts(self) -> None:
        """Maps of 24 x 24 cells with one active cell each, all of which is one part."""
        kinds = bird_kinds(self.SETTINGS)
        birds = Birds.of({"kind": "birds"} | self.SETTINGS.model_dump(), self.names())
        assert birds is not None
        row = bird_row(self.SETTINGS, kinds, 0, "train", 0)
        picture = redraw(self.SETTINGS, kinds, row["uri"], row["sha256"])
        assert picture is not None
        telling = [PART_ID[part] for part in birds.distinguishing_K[0]]
        cells = picture.part_map.reshape(24, 6, 24, 6).swapaxes(1, 2).reshape(24, 24, 36)
        places = [np.isin(cells, telling).all(2), (cells == PART_ID["belly"]).all(2), (cells == 0).all(2)]
        maps = []
        for y, x in (np.argwhere(place[1:-1, 1:-1])[0] + 1 for place in places):
            active = np.zeros((24, 24), dtype=np.float32)
            active[y, x] = 1
            maps.append(active.tolist())
        columns = {name: [row[name]] * 3 for name in ("uri", "sha256")}
        table = pa.table(columns | {"class": [0] * 3, "activation_map": maps})
        found = prototypes_on_birds(table, birds, 48)
        assert found["prototypes_on_bird"]["value"] == pytest.approx(2 / 3)
        assert found["prototypes_on_truth"]["value"] == pytest.approx(1 / 3)
        assert found["prototypes_on_truth"]["prototypes"] == 3
        assert prototypes_on_birds(table.slice(0, 0), birds, 48) == {}

    def names(self) -> list[str]:
        return [kind.name for kind in bird_kinds(self.SETTINGS)]


class TestDistinctiveness:
    def test_pairs_of_places_that_are_more_than_half_a_patch_apart_count(self) -> None:
        seen = [image(0, **own([ON_HEAD, ON_HEAD, ON_TAIL])), image(1, **own([BETWEEN]))]
        found = part_quality(seen, 3).metrics["distinctiveness"]
        assert found == {"value": pytest.approx(2 / 3), "places": 3, "images": 1}

    def test_a_place_that_there_is_not_is_no_place(self) -> None:
        assert part_quality([image(0, **own([NOWHERE, NOWHERE]))], 2).metrics["distinctiveness"] is None


class TestNoise:
    def test_it_depends_on_the_image_and_not_on_its_place(self) -> None:
        images = torch.zeros(3, 3, 16, 16)
        noisy = with_noise(images, [5, 6, 7], seed=1)
        assert torch.equal(with_noise(images[:1], [6], seed=1)[0], noisy[1])
        assert not torch.equal(noisy[0], noisy[1])
        assert not torch.equal(with_noise(images[:1], [6], seed=2)[0], noisy[1])

    def test_it_is_normal_and_cut_off(self) -> None:
        noise = with_noise(torch.zeros(1, 3, 100, 100), [0], seed=0)
        assert noise.abs().max() == pytest.approx(0.25)
        assert noise.mean() == pytest.approx(0, abs=0.005)
        assert (noise.abs() < 0.2).float().mean() == pytest.approx(0.683, abs=0.01)

    def test_pixels_get_the_same_noise_whatever_a_network_divides_them_by(self) -> None:
        zero = torch.zeros(1, 3, 16, 16)
        std = torch.tensor(imaging.IMAGENET_STD)[:, None, None]
        on_pixels = with_noise(zero, [0], seed=0) * std
        torch.testing.assert_close(with_noise(zero, [0], seed=0, std=(0.5, 0.5, 0.5)) * 0.5, on_pixels)
