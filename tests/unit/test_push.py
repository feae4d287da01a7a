"""Choosing among candidates: who gets which patch, and when rounding could decide."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protopnet.config import ModelSettings
from protopnet.errors import UserError
from protopnet.model.network import ProtoPNet, build_network
from protopnet.passes.candidates import CANDIDATE_SCHEMA, merge_nearest, rounding
from protopnet.passes.nearest_patches import doubtful_images, exact_candidates
from protopnet.passes.push import (
    PushResult,
    _check_all_found,
    apply_push,
    candidates_needed,
    choose,
)

Place = tuple[int, int, int]  # image, row, column


def candidates(*rows: tuple[int, float, Place]) -> pa.Table:
    """Candidates (prototype, distance, place), sorted."""
    columns = {
        "prototype": [prototype for prototype, _, _ in rows],
        "distance": [distance for _, distance, _ in rows],
        "image_id": [place[0] for *_, place in rows],
        "label": [0] * len(rows),
        "row": [place[1] for *_, place in rows],
        "column": [place[2] for *_, place in rows],
        "vector": [[0.0]] * len(rows),
    }
    return merge_nearest([pa.table(columns, schema=CANDIDATE_SCHEMA)], k=len(rows))


def places(table: pa.Table) -> list[Place]:
    return list(zip(table["image_id"].to_pylist(), table["row"].to_pylist(), table["column"].to_pylist(), strict=True))


A, B, C = (0, 0, 0), (0, 0, 1), (4, 1, 0)


class TestChoose:
    def test_each_its_nearest(self) -> None:
        best = candidates((0, 0.1, A), (0, 0.2, B), (1, 0.1, B), (1, 0.3, C))
        assert places(choose(best, np.array([0, 0]), distinct=True)) == [A, B]

    def test_shared_patches_are_allowed_where_they_needn_t_be_distinct(self) -> None:
        best = candidates((0, 0.1, A), (0, 0.2, B), (1, 0.1, A), (1, 0.3, C))
        assert places(choose(best, np.array([0, 0]), distinct=False)) == [A, A]

    def test_a_taken_patch_gives_way_to_the_next_nearest(self) -> None:
        best = candidates((0, 0.1, A), (0, 0.2, B), (1, 0.05, A), (1, 0.3, C))
        chosen = choose(best, np.array([0, 0]), distinct=True)
        assert places(chosen) == [A, C]  # the earlier prototype chooses first, though the later is nearer
        assert chosen["distance"].to_pylist() == [0.1, 0.3]

    def test_other_classes_take_nothing_away(self) -> None:
        best = candidates((0, 0.1, A), (0, 0.2, B), (1, 0.1, A), (1, 0.3, C))
        assert places(choose(best, np.array([0, 1]), distinct=True)) == [A, A]

    def test_with_fewer_patches_than_prototypes_they_are_shared_again(self) -> None:
        best = candidates((0, 0.1, A), (0, 0.2, B), (1, 0.1, A), (1, 0.2, B), (2, 0.1, B), (2, 0.2, A))
        assert places(choose(best, np.array([0, 0, 0]), distinct=True)) == [A, B, B]

    @given(st.data())
    @settings(max_examples=60, deadline=None)
    def test_keeping_as_many_candidates_as_a_class_has_prototypes_is_enough(self, data: st.DataObject) -> None:
        """Distinct choices from the kept candidates are those of a greedy search over all patches."""
        random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        classes = np.sort(random.integers(0, 3, random.integers(1, 10)))
        patches = [(i, r, c) for i in range(random.integers(1, 6)) for r in range(2) for c in range(2)]
        distances = random.integers(0, 12, (len(classes), len(patches))) / 4
        every = [(p, float(distances[p, n]), patch) for p in range(len(classes)) for n, patch in enumerate(patches)]
        best = merge_nearest([candidates(*every)], candidates_needed(classes, distinct=True))

        chosen = places(choose(best, classes, distinct=True))

        for label in np.unique(classes):
            own = np.flatnonzero(classes == label)
            assert len({chosen[p] for p in own}) == min(len(own), len(patches))
            free = list(patches)
            for p in own[: len(patches)]:
                assert chosen[p] == min(free, key=lambda patch, p=p: (distances[p, patches.index(patch)], patch))
                free.remove(chosen[p])


class TestDoubt:
    close = 1.0 + float(rounding(np.array(1.0))) / 2

    def test_clear_choices_are_not_doubted(self) -> None:
        assert len(doubtful_images(candidates((0, 0.1, A), (0, 0.2, C), (1, 0.1, B)), [0, 2])) == 0

    def test_near_ties_are(self) -> None:
        best = candidates((0, 1.0, A), (0, self.close, C), (0, 2.0, (7, 0, 0)), (1, 1.0, (9, 0, 0)))
        assert doubtful_images(best, [0, 3]).tolist() == [0, 4]

    def test_so_are_those_that_follow_a_near_tie_closely(self) -> None:
        best = candidates((0, 1.0, A), (0, self.close, C), (0, self.close, (7, 0, 0)), (0, 2.0, (9, 0, 0)))
        assert doubtful_images(best, [0]).tolist() == [0, 4, 7]

    def test_ties_before_the_picked_one_decide_too_but_none_behind_it(self) -> None:
        """A distinct choice goes down the list as far as it must."""
        best = candidates((0, 0.1, A), (0, 1.0, C), (0, 1.0, (7, 0, 0)), (0, 3.0, B))
        assert doubtful_images(best, [3]).tolist() == [4, 7]
        assert doubtful_images(best, [1]).tolist() == [4, 7]
        assert doubtful_images(best, [0]).tolist() == []

    def test_equal_distances_of_two_prototypes_are_no_tie(self) -> None:
        assert len(doubtful_images(candidates((0, 1.0, A), (1, 1.0, C)), [0, 1])) == 0


def test_exact_candidates_are_measured_by_difference_in_float64() -> None:
    random = torch.Generator().manual_seed(0)
    latents = torch.rand(3, 16, 4, 4, generator=random)
    latents[2] = latents[0]
    prototypes = torch.rand(2, 16, 2, 1, generator=random)
    network = SimpleNamespace(prototypes=prototypes, kind="log")
    coarse = candidates((0, 9.0, (5, 2, 3)), (0, 9.0, (6, 1, 1)), (1, 9.0, (7, 2, 3)), (0, 9.0, (7, 2, 3)))

    exact = exact_candidates(coarse, [5, 6, 7], latents, network)  # type: ignore[arg-type]

    assert exact.schema == CANDIDATE_SCHEMA
    for row in exact.to_pylist():
        z = latents[row["image_id"] - 5, :, row["row"] : row["row"] + 2, row["column"] : row["column"] + 1]
        expected = float((z.double() - prototypes[row["prototype"]].double()).square().sum())
        assert row["distance"] == pytest.approx(expected, rel=1e-14)
        assert row["vector"] == z.flatten().tolist()
    of_copies = [row["distance"] for row in exact.to_pylist() if row["prototype"] == 0 and row["image_id"] != 6]
    assert of_copies[0] == of_copies[1]  # equal patches measure equal, so the earlier image wins


def test_a_push_replaces_the_prototypes_and_nothing_else() -> None:
    settings = ModelSettings(
        backbone="squeezenet1_0", image_size=64, prototype_depth=4, prototypes=4, prototype_shape=(2, 1)
    )
    network = build_network(settings, 2)
    assert isinstance(network, ProtoPNet)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    vectors = np.arange(32, dtype=np.float32).reshape(4, 8)
    apply_push(network, PushResult(pa.table({"vector": list(vectors)}), 0))
    after = network.state_dict()
    assert np.array_equal(after.pop("prototypes").flatten(1).numpy(), vectors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_a_prototype_without_any_patch_is_named() -> None:
    with pytest.raises(UserError, match="prototype 1.*diverged.*train.lr"):
        _check_all_found(candidates((0, 0.1, A), (2, 0.1, A)), 3)
    _check_all_found(candidates((0, 0.1, A), (1, 0.1, A)), 2)
