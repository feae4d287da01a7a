"""The push and the pruning of the authors' code, figure for figure. See tests/golden/README.md."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from patch_search import Search
from safetensors.torch import load_file

from protopnet.model.boxes import activation_boxes, receptive_field_boxes
from protopnet.model.prototypes import distance_maps, similarity
from protopnet.model.receptive_field import ReceptiveField
from protopnet.passes.push import choose

GOLDEN = Path(__file__).parent.parent / "golden"
META = json.loads((GOLDEN / "meta.json").read_text())


@pytest.mark.parametrize("case", ["push_1x1", "push_2x2"])
class TestTheAuthorsPush:
    @pytest.fixture
    def figures(self, case: str) -> dict[str, torch.Tensor]:
        return load_file(GOLDEN / f"{case}.safetensors")

    @pytest.fixture
    def search(self, figures: dict[str, torch.Tensor]) -> Search:
        prototypes, classes = figures["prototypes"], figures["prototype_class"].numpy()
        return Search(figures["latents"], figures["labels"].numpy(), prototypes, classes)

    @pytest.fixture
    def chosen(self, search: Search) -> pa.Table:
        return choose(search.nearest(1), search.classes, distinct=False)

    def test_prototypes_become_their_patches(self, figures: dict[str, torch.Tensor], chosen: pa.Table) -> None:
        vectors = torch.from_numpy(np.stack(chosen["vector"].to_numpy()))
        assert torch.equal(vectors, figures["projected"].flatten(1))

    def test_from_their_images(self, case: str, figures: dict[str, torch.Tensor], chosen: pa.Table) -> None:
        for boxes in (figures["bound_boxes"], figures["receptive_field_boxes"]):
            assert chosen["image_id"].to_pylist() == boxes[:, 0].tolist()
            assert chosen["label"].to_pylist() == boxes[:, 5].tolist()

    def test_of_equal_patches_the_earlier_image_wins(self, case: str, search: Search) -> None:
        first, second = META[case]["duplicate"]
        h, w = search.prototypes.shape[2:]
        search.prototypes = search.latents[second : second + 1, :, 2 : 2 + h, 3 : 3 + w].clone()
        search.classes = search.labels[second : second + 1]
        best = search.nearest(2).to_pylist()
        assert [row["image_id"] for row in best] == [first, second]
        assert [row["distance"] for row in best] == [0, 0]

    def test_receptive_fields_are_theirs(self, case: str, figures: dict[str, torch.Tensor], chosen: pa.Table) -> None:
        cells = list(zip(chosen["row"].to_pylist(), chosen["column"].to_pylist(), strict=True))
        boxes = receptive_field_boxes(cells, ReceptiveField(*META[case]["rf_info"]), META[case]["image_size"])
        assert as_theirs(boxes) == figures["receptive_field_boxes"][:, 1:5].tolist()

    def test_boxes_around_high_activation_are_theirs(
        self, case: str, figures: dict[str, torch.Tensor], search: Search, chosen: pa.Table
    ) -> None:
        maps = distance_maps(search.latents, search.prototypes, "log")
        own = maps[chosen["image_id"].to_numpy().copy(), torch.arange(len(search.classes))]
        boxes = activation_boxes(similarity(own, "log"), META[case]["image_size"])
        assert as_theirs(boxes) == figures["bound_boxes"][:, 1:5].tolist()


def test_pruning_removes_what_they_remove() -> None:
    """They count among the 6 images with the nearest patches those of the prototype's class: fewer than 3, and it goes."""
    figures = load_file(GOLDEN / "push_1x1.safetensors")
    own = figures["prototype_class"].numpy()
    search = Search(figures["latents"], figures["labels"].numpy(), figures["prototypes"], own)
    nearest = search.nearest(6, any_class=True, one_per_image=True)
    classes = nearest["label"].to_numpy().reshape(-1, 6)
    assert classes.tolist() == figures["nearest6_classes"].tolist()
    assert np.flatnonzero((classes == own[:, None]).sum(1) < 3).tolist() == figures["pruned_k6_t3"].tolist()


def as_theirs(boxes: np.ndarray) -> list[list[int]]:
    top, left, bottom, right = boxes.T
    return np.stack([top, bottom, left, right], axis=1).tolist()
