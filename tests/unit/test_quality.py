"""The quality metrics on hand-made cases whose answers are known, and the places they are taken at."""

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from observations import BETWEEN, HEAD, NOWHERE, ON_HEAD, ON_TAIL, TAIL, image, own, places

from protopnet.config import ModelSettings
from protopnet.evidence.records import MapKind
from protopnet.imaging import Preprocessing
from protopnet.model.boxes import upsample
from protopnet.model.bundle import Bundle, BundleInfo
from protopnet.model.network import ProtoPNet, build_network
from protopnet.model.prototypes import Kind
from protopnet.predictor import Predictor
from protopnet.quality.key_points import BOX, PATCH, PartPoint, covered, middles, parts_near, peaks, without_sides
from protopnet.quality.metrics import Observation, on_object, part_quality, sparsity
from protopnet.quality.observer import Observer
from protopnet.quality.table import METRICS, quality_table, quality_text


class TestPlaces:
    def test_the_peak_of_one_active_cell_is_its_middle(self) -> None:
        maps = torch.zeros(1, 7, 7)
        maps[0, 2, 5] = 1
        assert np.abs(peaks(maps, 224) - (2.5 / 7, 5.5 / 7)).max() < 1 / 224

    def test_the_peak_of_a_cell_in_the_corner_is_in_it(self) -> None:
        maps = torch.zeros(1, 7, 7)
        maps[0, 6, 0] = 1  # enlarged, it rises towards the edge
        y, x = peaks(maps, 224)[0]
        assert 6 / 7 < y < 1
        assert 0 < x < 1 / 7

    @given(st.integers(0, 2**32 - 1), st.sampled_from([(7, 7), (12, 12), (3, 5)]))
    def test_a_peak_is_the_highest_pixel_of_the_enlarged_map(self, seed: int, shape: tuple[int, int]) -> None:
        maps = torch.rand(70, *shape, generator=torch.Generator().manual_seed(seed))
        enlarged = upsample(maps, 96, 96).numpy()
        y, x = (peaks(maps, 96) * 96 - 0.5).round().astype(int).T
        assert np.allclose(enlarged[np.arange(70), y, x], enlarged.max((1, 2)), rtol=1e-6)

    def test_a_flat_map_points_nowhere_and_hits_nothing(self) -> None:
        found = peaks(torch.full((1, 7, 7), 0.3), 224)
        assert np.isnan(found).all()
        assert not parts_near(found, [PartPoint("head", 0.0, 0.0)], ["head"], BOX).any()

    def test_boxes_are_square_and_hold_their_edge(self) -> None:
        points = [PartPoint("in", 0.5 + BOX, 0.5 - BOX), PartPoint("out", 0.5, 0.5 + BOX + 1e-3)]
        assert parts_near(places(BETWEEN), points, ["in", "out"], BOX).tolist() == [[True, False]]

    def test_a_part_with_several_points_is_hit_if_one_is(self) -> None:
        points = [PartPoint("leg", 0.9, 0.1), PartPoint("leg", 0.5, 0.5)]
        assert parts_near(places(BETWEEN), points, ["leg"], PATCH).tolist() == [[True]]

    def test_the_middle_of_a_patch(self) -> None:
        assert middles(np.array([0, 8, 48]), (7, 7), (7, 7)) * 14 == pytest.approx(places((1, 1), (3, 3), (13, 13)))
        assert middles(np.array([0, 35]), (6, 6), (7, 7)) * 7 == pytest.approx(places((1, 1), (6, 6)))  # 2 x 2 cells

    def test_the_share_of_an_image_that_boxes_cover(self) -> None:
        inside, corner = PartPoint("a", 0.5, 0.5), PartPoint("b", 0.0, 0.0)
        assert covered([inside], BOX) == pytest.approx((2 * BOX) ** 2, rel=0.05)
        assert covered([inside, inside], BOX) == covered([inside], BOX)
        assert covered([corner], BOX) == pytest.approx(BOX**2, rel=0.1)

    def test_left_and_right_become_one(self) -> None:
        names = ["left eye", "right_wing", "leftover", "tail"]
        assert [p.part for p in without_sides([PartPoint(n, 0, 0) for n in names])] == [
            "eye",
            "wing",
            "leftover",
            "tail",
        ]


class TestConsistency:
    def test_eight_of_ten_images_on_one_part_are_enough_and_seven_are_not(self) -> None:
        seen = [image(i, **own([ON_HEAD if i < 8 else BETWEEN, ON_HEAD if i < 7 else ON_TAIL])) for i in range(10)]
        found = part_quality(seen, 2)
        assert found.metrics["consistency"] == {"value": 0.5, "prototypes": 2}
        assert found.prototypes["part"] == ["head", "head"]
        assert found.prototypes["part_share"] == [0.8, 0.7]

    def test_only_images_in_which_the_part_is_visible_count(self) -> None:
        seen = [image(i, points=[TAIL] if i < 6 else [HEAD, TAIL], **own([ON_HEAD])) for i in range(10)]
        found = part_quality(seen, 1)
        assert found.prototypes["part_share"] == [1.0]
        assert found.prototypes["images"] == [10]

    def test_prototypes_whose_class_has_no_images_are_left_out(self) -> None:
        found = part_quality([image(0, **own([ON_TAIL]))], 3)
        assert found.metrics["consistency"] == {"value": 1.0, "prototypes": 1}
        assert found.prototypes["part"] == ["tail", None, None]
        assert found.prototypes["stability"] == [1.0, None, None]

    def test_a_class_without_prototypes_and_images_without_points_change_nothing(self) -> None:
        seen = [image(0, **own([ON_HEAD]))]
        more = [image(1, label=1), image(2, points=[], **own([BETWEEN], [ON_HEAD]))]
        assert part_quality(seen + more, 1).metrics | {"pointing": None} == part_quality(seen, 1).metrics

    def test_without_any_key_point_there_is_nothing_to_say(self) -> None:
        found = part_quality([image(0, points=[]), image(1, points=[])], 2)
        assert set(found.metrics.values()) == {None}
        assert found.prototypes["part"] == [None, None]


class TestStability:
    def test_an_image_counts_if_the_prototype_keeps_to_the_same_parts(self) -> None:
        moved = [image(0, **own([ON_HEAD], [ON_HEAD])), image(1, **own([ON_HEAD], [ON_TAIL]))]
        within = [image(2, **own([ON_HEAD], [(0.15, 0.2)])), image(3, **own([BETWEEN], [(0.5, 0.1)]))]
        assert part_quality(moved + within, 1).metrics["stability"] == {"value": 0.75, "prototypes": 1}

    def test_each_prototype_has_the_same_weight(self) -> None:
        """Three images of one prototype, one of the other."""
        seen = [image(i, **own([ON_HEAD], [ON_TAIL])) for i in range(3)]
        seen.append(image(3, label=1, own=[1], own_places=places(ON_HEAD), own_places_noisy=places(ON_HEAD)))
        assert part_quality(seen, 2).metrics["stability"]["value"] == 0.5


class TestContrast:
    def test_each_prototype_has_the_same_weight(self) -> None:
        seen = [image(i, **own([ON_HEAD]), own_contrast=[contrast]) for i, contrast in enumerate((0.5, 0.3))]
        seen.append(
            image(2, label=1, own=[1], own_places=places(ON_HEAD), own_places_noisy=places(ON_HEAD), own_contrast=[0.2])
        )
        found = part_quality(seen, 2).metrics["contrast"]
        assert found is not None
        assert found["value"] == pytest.approx(0.3)
        assert found["prototypes"] == 2


class TestPurity:
    def near(self, image_id: int, at: tuple[float, float], similarity: float = 0.9, **more: Any) -> Observation:
        return image(image_id, nearest=[0], nearest_similarity=[similarity], nearest_places=places(at), **more)

    def test_the_part_most_often_in_the_patch(self) -> None:
        seen = [self.near(i, (0.2, 0.25) if i < 6 else (0.85, 0.8)) for i in range(10)]
        found = part_quality(seen, 1)
        assert found.metrics["purity"] == {"value": 0.6, "deviation": 0.0, "above_half": 1, "prototypes": 1}
        assert found.prototypes["nearest_part"] == ["head"]

    def test_only_the_ten_most_similar_images_count(self) -> None:
        seen = [self.near(i, (0.2, 0.2)) for i in range(10)]
        far = [self.near(i, BETWEEN, 0.8) for i in range(10, 30)]
        assert part_quality(far + seen, 1).metrics["purity"]["value"] == 1.0

    def test_a_patch_is_smaller_than_a_box(self) -> None:
        assert part_quality([self.near(0, (0.2 + 20 / 224, 0.2))], 1).metrics["purity"]["value"] == 0.0

    def test_left_and_right_are_one_part(self) -> None:
        left, right = PartPoint("left eye", 0.2, 0.2), PartPoint("right eye", 0.6, 0.6)
        seen = [self.near(i, (0.2, 0.2), points=[left, right]) for i in range(2)]
        seen += [self.near(i, (0.6, 0.6), points=[left, right]) for i in (2, 3)]
        assert part_quality(seen, 1).metrics["purity"]["value"] == 1.0

    def test_the_order_in_which_images_come_doesn_t_matter(self) -> None:
        """Equally similar ones: those with the lowest ids are taken."""
        seen = [self.near(i, (0.2, 0.2) if i < 10 else BETWEEN) for i in range(20)]
        assert part_quality(seen[::-1], 1).metrics["purity"] == part_quality(seen, 1).metrics["purity"]
        assert part_quality(seen, 1).metrics["purity"]["value"] == 1.0


def test_pointing_game_counts_places_and_says_what_chance_would_give() -> None:
    seen = [
        image(0, evidence_places=places((0.2, 0.2), BETWEEN, NOWHERE)),
        image(1, evidence_places=places((0.8, 0.85))),
    ]
    found = part_quality(seen, 1).metrics["pointing"]
    assert found["value"] == 2 / 4
    assert found["chance"] == pytest.approx(2 * (2 * PATCH) ** 2, rel=0.1)
    assert (found["places"], found["images"]) == (4, 2)


def test_evidence_on_the_object_beside_what_the_object_s_size_alone_would_give() -> None:
    found = on_object([[True, False], [True], None, []], [0.5, 0.2, None, 0.9])
    assert found == {"value": pytest.approx(2 / 3), "chance": pytest.approx(0.4), "places": 3, "images": 2}
    assert on_object([None], [None]) is None


class TestSparsity:
    def test_one_distinct_prototype_a_class_is_1_and_ten_are_a_tenth(self) -> None:
        prototypes = np.random.default_rng(0).random((10, 16, 1, 1), dtype=np.float32)
        assert sparsity(prototypes, 10, 49)["value"] == pytest.approx(1)
        assert sparsity(prototypes, 1, 49)["value"] == pytest.approx(0.1)

    def test_copies_count_once(self) -> None:
        prototypes = np.random.default_rng(0).random((4, 16, 1, 1), dtype=np.float32)
        found = sparsity(np.concatenate([prototypes, prototypes]), 4, 49)
        assert found == {"value": pytest.approx(1), "prototypes": 8, "distinct": 4}

    def test_the_cells_of_larger_prototypes_count_too(self) -> None:
        prototypes = np.random.default_rng(0).random((2, 8, 2, 1), dtype=np.float32)
        assert sparsity(prototypes, 2, 10)["value"] == pytest.approx(2 * 1.1 / (2 + 4 / 10))


class TestObserver:
    """A real small network, two classes with three and one prototypes as after pruning, the third with none."""

    SIZE = 64

    @pytest.fixture(scope="class", params=["log", "cosine"])
    def network(self, request: pytest.FixtureRequest) -> ProtoPNet:
        torch.manual_seed(0)
        built = build_network(self.settings(request.param), 3)
        assert isinstance(built, ProtoPNet)
        return ProtoPNet(built.backbone, self.settings(request.param), 3, torch.tensor([1, 0, 0, 0])).eval()

    def settings(self, similarity: Kind) -> ModelSettings:
        shape: dict[str, Any] = {"cut": "layer2", "image_size": self.SIZE, "prototype_depth": 8, "prototypes": 6}
        return ModelSettings(backbone="resnet18", similarity=similarity, **shape)

    def observer(self, network: ProtoPNet, map: MapKind = "gradient") -> Observer:
        info = BundleInfo(
            format_version=1,
            architecture=self.settings(network.kind),
            similarity=network.kind,
            classes=["a", "b", "c"],
            prototype_class=network.prototype_class.tolist(),
            preprocessing=Preprocessing(size=self.SIZE),
            provenance={},
            sha256="",
            prototypes_sha256=None,
        )
        return Observer(Predictor([Bundle(network, info, None, "")]), batch_size=6, seed=0, map=map)

    @pytest.fixture(scope="class")
    def images(self) -> torch.Tensor:
        return torch.rand(6, 3, self.SIZE, self.SIZE, generator=torch.Generator().manual_seed(1))

    def observe(self, network: ProtoPNet, images: torch.Tensor, chosen: list[int], curves: Sequence[int] = ()) -> list:
        labels = [0, 1, 2, 0, 1, 2]
        with torch.inference_mode():
            ids, every = [10 * i for i in chosen], list(range(len(chosen)))
            return self.observer(network).observe(images[chosen], ids, [labels[i] for i in chosen], every, curves)

    def test_own_prototypes_are_those_of_the_class_however_many(self, network: ProtoPNet, images: torch.Tensor) -> None:
        records = self.observe(network, images, [0, 1, 2])
        assert [record["own"] for record in records] == [[1, 2, 3], [0], []]
        assert [len(record["own_places"]) for record in records] == [3, 1, 0]
        assert [len(record["own_places_noisy"]) for record in records] == [3, 1, 0]

    def test_contrast_is_how_far_the_best_place_stands_out(self, network: ProtoPNet, images: torch.Tensor) -> None:
        record = self.observe(network, images, [0])[0]
        with torch.inference_mode():
            latent_1DHW = network.latent(images[:1])
            maps_3HW = self.observer(network).head.maps(latent_1DHW, np.zeros(3, int), np.array([1, 2, 3])).numpy()
        assert np.allclose(record["own_contrast"], maps_3HW.max((1, 2)) - maps_3HW.mean((1, 2)), atol=1e-5)
        assert min(record["own_contrast"]) > 0

    def test_an_image_is_seen_alike_in_any_batch(self, network: ProtoPNet, images: torch.Tensor) -> None:
        together = self.observe(network, images, [0, 1, 2, 3, 4, 5])
        alone = [self.observe(network, images, [i])[0] for i in range(6)]
        for one, other in zip(together, alone, strict=True):
            for name in ("own_places", "own_places_noisy", "evidence_places"):
                assert np.allclose(one[name], other[name]), name
            assert np.allclose(one["logits"], other["logits"], rtol=1e-4)

    def test_evidence_is_in_the_order_of_points(self, network: ProtoPNet, images: torch.Tensor) -> None:
        record = self.observe(network, images, [0])[0]
        with torch.inference_mode():
            out = network(images[:1])
            points = network.points(out.similarities_BP, out.logits_BK.argmax(1))[0]
            best = points.argsort(descending=True)[: int((points > 0).sum())]
            maps = self.observer(network).head.maps(network.latent(images[:1]), np.zeros(len(best), int), best.numpy())
        assert np.allclose(record["evidence_places"], peaks(maps, self.SIZE))

    def test_curves_begin_and_end_at_the_same_confidence(self, network: ProtoPNet, images: torch.Tensor) -> None:
        records = self.observe(network, images, [0, 1], curves=[1])
        assert records[1]["prediction"] == 0
        assert "deletion" not in records[0]
        confidence = torch.from_numpy(records[1]["logits"]).softmax(0)[0]
        assert records[1]["deletion"][0] == records[1]["insertion"][-1] == pytest.approx(float(confidence), abs=1e-4)

    def test_curves_go_by_the_map_asked_for_weighed_by_points(self, network: ProtoPNet, images: torch.Tensor) -> None:
        predictor, own = self.observer(network).predictor, np.array([1, 2, 3])
        with torch.inference_mode():
            [view] = predictor.views(images[:1])
            by_points = self.observer(network, "similarity")._saliency(images[0], view, 0, own)
            maps = self.observer(network).head.maps(view.latent_BDHW, np.zeros(3, int), own)
            expected = (maps * network.last_layer.weight[0, own][:, None, None]).sum(0)
            assert torch.allclose(by_points, upsample(expected[None], self.SIZE, self.SIZE)[0], atol=1e-5)
            by_gradient = self.observer(network)._saliency(images[0], view, 0, own)
        assert by_gradient.shape == by_points.shape
        assert np.corrcoef(by_gradient.flatten(), by_points.flatten())[0, 1] < 0.99

    def test_a_box_that_depends_on_nothing_beside_it_stays(
        self, network: ProtoPNet, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        [moved] = [r["misalignment"] for r in self.observe(network, images, [0], curves=[0])]
        assert len(moved) in (1, 3)
        assert all(0 <= value <= 1 for value in moved)
        assert max(moved) > 0  # this network sees the whole image
        monkeypatch.setattr(
            "protopnet.quality.observer.only_in_focus", lambda image, boxes: image.repeat(len(boxes), 1, 1, 1)
        )
        [still] = [r["misalignment"] for r in self.observe(network, images, [0], curves=[0])]
        assert still == pytest.approx([0] * len(still), abs=1e-6)

    def test_a_class_without_prototypes_has_no_curves(self, network: ProtoPNet, images: torch.Tensor) -> None:
        changed = copy.deepcopy(network)
        with torch.no_grad():
            changed.last_layer.weight[2] = 500
        record = self.observe(changed, images, [0], curves=[0])[0]
        assert record["prediction"] == 2
        assert "deletion" not in record


class TestTable:
    QUALITY: ClassVar = {
        "definitions": 1,
        "consistency": {"value": 0.25, "prototypes": 60},
        "purity": None,
        "deletion": {"value": 0.153, "images": 1200, "curve": []},
        "truth": {"value": 0.9, "chance": 0.412, "places": 236},
    }

    def test_what_was_measured_has_a_line(self) -> None:
        rows = {row.name: row for row in quality_table(self.QUALITY)}
        assert list(rows) == ["truth", "consistency", "deletion"]
        assert (rows["truth"].value, rows["truth"].chance, rows["truth"].over) == ("90.0 %", "41.2 %", "236 places")
        assert (rows["deletion"].value, rows["deletion"].better, rows["deletion"].over) == (
            "0.15",
            "lower",
            "1,200 images",
        )

    def test_for_a_terminal(self) -> None:
        lines = quality_text(self.QUALITY).splitlines()
        assert lines[0].split() == ["truth", "90.0", "%", "(chance", "41.2", "%)", "236", "places"]
        assert quality_text({}) == ""

    def test_each_metric_says_what_it_means(self) -> None:
        assert all(metric.meaning.endswith(".") and len(metric.meaning) < 130 for metric in METRICS.values())
