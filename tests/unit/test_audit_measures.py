"""What an audit measures: pairs that are close, what a prototype is used for, and what its patches lie on."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_prototypes import CLASS_P, points

from protopnet.auditing.close_pairs import NEIGHBOURS, close_pairs
from protopnet.auditing.patch_table import most_active, share_on_object
from protopnet.auditing.usage import Use, use_of_batch
from protopnet.model.network import Output

# ------------------------------------------------------------------------------------------------- close pairs


def brute_force_pairs(
    vectors: torch.Tensor, classes: np.ndarray, reach: np.ndarray, within: float, across: float
) -> set:
    found = set()
    for a in range(len(classes)):
        for b in range(a + 1, len(classes)):
            relative = float((vectors[a].double() - vectors[b].double()).square().sum()) / min(reach[a], reach[b])
            if relative <= (within if classes[a] == classes[b] else across):
                found.add((a, b))
    return found


@given(seed=st.integers(0, 2**32), block=st.sampled_from([1, 40, 1000]))
@settings(max_examples=30, deadline=None)
def test_close_pairs_are_those_of_brute_force_whatever_the_block(seed: int, block: int) -> None:
    random = np.random.default_rng(seed)
    count = int(random.integers(1, NEIGHBOURS + 2))  # so few that each may keep all its neighbours
    vectors = torch.from_numpy(random.integers(0, 4, (count, 3, 1, 1)).astype(np.float32) / 4)
    classes, reach = random.integers(0, 3, count), random.uniform(0.1, 1, count)
    pairs = close_pairs(vectors, classes, reach, "log", within_class=0.6, across_classes=0.9, numbers=block)
    named = list(zip(pairs["prototype"].to_pylist(), pairs["other"].to_pylist(), strict=True))
    assert set(named) == brute_force_pairs(vectors, classes, reach, 0.6, 0.9)
    assert len(set(named)) == len(named)
    assert pairs["relative_distance"].to_pylist() == sorted(pairs["relative_distance"].to_pylist())
    for a, b, same, distance in zip(
        *(pairs[n].to_pylist() for n in ("prototype", "other", "same_class", "distance")), strict=True
    ):
        assert same == (classes[a] == classes[b])
        assert distance == pytest.approx(float((vectors[a] - vectors[b]).square().sum()), abs=1e-6)


def test_of_many_equal_prototypes_each_keeps_a_few_neighbours() -> None:
    pairs = close_pairs(
        torch.ones(60, 2, 1, 1), np.zeros(60, int), np.ones(60), "log", within_class=0.1, across_classes=1
    )
    assert 60 * NEIGHBOURS / 2 <= len(pairs) <= 60 * NEIGHBOURS


# --------------------------------------------------------------------------------------------------------- use

CONNECTIONS = np.array([[1.0, 1.0, -1.0, 0.5], [0.0, 0.0, 2.0, 1.0]])


def seen(similarities: list[list[float]]) -> Output:
    similarities_BP = torch.tensor(similarities)
    logits_BK = similarities_BP @ torch.tensor(CONNECTIONS, dtype=torch.float32).t()
    return Output(logits_BK, 1 - similarities_BP, similarities_BP)


# Points for class 0: 4 2 -1 0; for class 1: 0 0 2 0. Then 0 1 -3 .5 and 0 0 6 1. Then 0 1 -1 1 and 0 0 2 2.
BATCH = [[4.0, 2.0, 1.0, 0.0], [0.0, 1.0, 3.0, 1.0], [0.0, 1.0, 1.0, 2.0]]
LABELS = np.array([0, 0, 1])


def test_use_on_a_hand_made_batch() -> None:
    use = use_of_batch(seen(BATCH), CONNECTIONS, CLASS_P, LABELS, top=2)
    assert use.images == 3
    assert use.first_P.tolist() == [1, 0, 2, 0]  # of equal points the first prototype
    assert use.top_P.tolist() == [1, 1, 2, 2]
    assert use.predicted_K.tolist() == [1, 2]
    assert use.points_P.tolist() == [4, 2, 8, 3]
    assert use.right_K.tolist() == [1, 1]
    assert use.own_points_K.tolist() == [7, 4]
    assert use.other_points_K.tolist() == [0.5, 0]
    assert use.against_K.tolist() == [-4, 0]
    assert use.own_distance_P.tolist() == [-2, -1, 0, -1]
    assert dict(use.errors) == {(2, 0): 1}


def test_prototypes_without_points_are_no_evidence() -> None:
    use = use_of_batch(seen([[0.0, 0.0, 0.0, 0.0]]), CONNECTIONS, CLASS_P, np.array([1]), top=4)
    assert not use.top_P.any()
    assert not use.first_P.any()
    assert not use.errors


@given(seed=st.integers(0, 2**32), cut=st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_use_adds_up_however_the_images_are_cut(seed: int, cut: int) -> None:
    random = np.random.default_rng(seed)
    similarities, labels = random.random((10, 4)), random.integers(0, 2, 10)
    whole = use_of_batch(seen(similarities.tolist()), CONNECTIONS, CLASS_P, labels, top=2)
    parts = [
        use_of_batch(seen(similarities[part].tolist()), CONNECTIONS, CLASS_P, labels[part], top=2)
        for part in (slice(None, cut), slice(cut, None))
    ]
    travelled = Use.from_table(pa.concat_tables([part.to_table() for part in parts]))
    for total in (parts[0] + parts[1], travelled, Use.nothing(4, 2) + whole):
        for name in vars(whole):
            if name != "errors":
                np.testing.assert_allclose(getattr(total, name), getattr(whole, name), rtol=1e-9, atol=1e-12)
        assert dict(total.errors) == dict(whole.errors)


def test_a_class_without_images_has_the_reach_of_the_others() -> None:
    use = replace(Use.nothing(4, 2), own_distance_P=np.array([2.0, 4.0, 0, 0]), images_K=np.array([2.0, 0]))
    assert use.reach(CLASS_P).tolist() == [1, 2, 1.5, 1.5]


# ----------------------------------------------------------------------------------------------------- patches


class TestOnObject:
    square = points((0.2, 0.2), (0.8, 0.2), (0.8, 0.8), (0.2, 0.8), (0.5, 0.5))

    def test_within_the_outline_and_near_a_key_point(self) -> None:
        places = np.array([(0.5, 0.3), (0.85, 0.85), (0.5, 0.95), (0.05, 0.5)])  # within, near a corner, outside twice
        assert share_on_object(places, self.square) == 0.5

    def test_without_an_outline_it_is_not_known(self) -> None:
        places = np.array([(0.5, 0.5)])
        assert share_on_object(places, None) is None
        assert share_on_object(places, points((0.1, 0.1), (0.9, 0.9))) is None
        assert share_on_object(places, points((0.1, 0.1), (0.5, 0.5), (0.9, 0.9))) is None

    def test_what_is_most_active_is_where_the_map_peaks(self) -> None:
        peak = torch.zeros(1, 7, 7)
        peak[0, 1, 5] = 1.0
        places = most_active(peak)[0]
        assert len(places) == pytest.approx(0.05 * 48 * 48, rel=0.1)
        assert np.abs(places - (5.5 / 7, 1.5 / 7)).max() < 1.1 / 7
