"""Pruning: which prototypes go, and what the logits are without them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from protopnet.auditing.draft import (
    Draft,
    Merge,
    check_removal,
    find_repeats,
    merged_connections,
    prune_by_neighbours,
    with_prototypes,
)
from protopnet.auditing.rewrite import places_table, union
from protopnet.config import ModelSettings
from protopnet.errors import UserError
from protopnet.model.network import ProtoPNet, build_network
from protopnet.passes.candidates import CANDIDATE_SCHEMA, local_nearest

GOLDEN = Path(__file__).parent.parent / "golden"
MODEL = ModelSettings(backbone="squeezenet1_0", image_size=64, prototype_depth=4, prototypes=6)


def neighbours(labels_Pk: list[list[int]], distances_Pk: list[list[float]] | None = None) -> pa.Table:
    """The nearest patches of each prototype, of which only classes and distances matter."""
    rows = [
        {"prototype": p, "label": label, "distance": distances_Pk[p][n] if distances_Pk else float(n), "image_id": n}
        for p, labels in enumerate(labels_Pk)
        for n, label in enumerate(labels)
    ]
    return pa.Table.from_pylist(rows, schema=CANDIDATE_SCHEMA)


@pytest.fixture(scope="module")
def pushed() -> ProtoPNet:
    torch.manual_seed(0)
    network = build_network(MODEL, 3)
    assert isinstance(network, ProtoPNet)
    with torch.no_grad():
        network.last_layer.weight.normal_()
    return network.eval()


def draft_of(network: ProtoPNet) -> Draft:
    return Draft.of(network, [(p, 0, p) for p in range(len(network.prototypes))])


class TestTheRule:
    def test_it_removes_what_the_authors_remove(self) -> None:
        figures = load_file(GOLDEN / "push_1x1.safetensors")
        classes = figures["prototype_class"].numpy()
        labels = figures["labels"].numpy()
        latents, images = figures["latents"], np.arange(len(labels))
        nearest = local_nearest(latents, images, labels, figures["prototypes"], "log", 6, one_per_image=True)
        verdict = prune_by_neighbours(nearest, classes, threshold=3)
        assert sorted(verdict.removed + verdict.spared) == figures["pruned_k6_t3"].tolist()
        assert verdict.spared == [0]  # of a class that theirs leaves with none
        assert (verdict.own_P == (figures["nearest6_classes"].numpy() == classes[:, None]).sum(1)).all()

    def test_a_class_keeps_its_best(self) -> None:
        classes = np.array([0, 0, 0, 1])
        verdict = prune_by_neighbours(neighbours([[0, 1, 1], [0, 0, 1], [1, 1, 1], [1, 1, 1]]), classes, threshold=3)
        assert verdict.spared == [1]
        assert verdict.removed == [0, 2]

    def test_of_equally_many_neighbours_the_nearer_ones_count_then_the_number(self) -> None:
        far_near_near = [[0.1, 0.9, 2.0], [2.0, 0.3, 2.0], [2.0, 0.3, 2.0]]
        labels = [[1, 0, 1], [1, 0, 1], [1, 0, 1]]
        verdict = prune_by_neighbours(neighbours(labels, far_near_near), np.array([0, 0, 0]), threshold=2)
        assert verdict.spared == [1]

    def test_without_any_neighbour_of_its_class_the_first_stays(self) -> None:
        assert prune_by_neighbours(neighbours([[1], [1]]), np.array([0, 0]), threshold=1).spared == [0]

    @given(st.data())
    @settings(max_examples=100, deadline=None)
    def test_it_never_empties_a_class_and_spares_none_but_for_that(self, data: st.DataObject) -> None:
        random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        P, K, k = random.integers(1, 12), random.integers(1, 4), random.integers(1, 7)
        classes = random.integers(0, K, P)
        labels = random.integers(0, K, (P, k))
        threshold = int(random.integers(0, k + 2))
        verdict = prune_by_neighbours(neighbours(labels.tolist(), random.random((P, k)).tolist()), classes, threshold)

        own = (labels == classes[:, None]).sum(1)
        assert sorted(verdict.removed + verdict.spared) == np.flatnonzero(own < threshold).tolist()
        left = np.delete(classes, verdict.removed)
        assert set(left) == set(classes)
        for p in verdict.spared:
            assert (left == classes[p]).sum() == 1
            assert own[p] == own[classes == classes[p]].max()


class TestRemoval:
    def test_unknown_numbers_are_named(self) -> None:
        with pytest.raises(UserError, match=r"--remove names 7, -1, but .* are 0 to 3"):
            check_removal([0, 7, -1], np.array([0, 0, 1, 1]), ["jay", "wren"])

    def test_a_class_that_would_be_empty_is_named_with_its_prototypes(self) -> None:
        with pytest.raises(UserError, match=r"class 'wren' without prototypes: keep at least one of 2, 3"):
            check_removal([0, 2, 3, 3], np.array([0, 0, 1, 1]), ["jay", "wren"])

    def test_anything_else_may_go(self) -> None:
        check_removal([0, 3], np.array([0, 0, 1, 1]), ["jay", "wren"])
        check_removal([], np.array([0, 0, 1, 1]), ["jay", "wren"])

    @given(removed=st.sets(st.integers(0, 5), max_size=5), seed=st.integers(0, 2**32))
    @settings(max_examples=40, deadline=None)
    def test_the_logits_are_the_old_ones_less_the_points_of_what_went(
        self, pushed: ProtoPNet, removed: set[int], seed: int
    ) -> None:
        latents = torch.rand(5, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
        pruned = draft_of(pushed).without(sorted(removed)).network(pushed, MODEL)
        with torch.inference_mode():
            before, after = pushed.classify(latents), pruned.classify(latents)
            for label in range(3):
                points = pushed.points(before.similarities_BP, torch.full((5,), label))[:, sorted(removed)]
                expected = before.logits_BK[:, label] - points.sum(1)
                torch.testing.assert_close(after.logits_BK[:, label], expected, rtol=1e-5, atol=1e-4)
        assert pruned.prototype_class.tolist() == [p // 2 for p in range(6) if p not in removed]

    def test_the_given_network_is_left_alone(self, pushed: ProtoPNet) -> None:
        before = {name: tensor.clone() for name, tensor in pushed.state_dict().items()}
        smaller = draft_of(pushed).only([1, 4]).network(pushed, MODEL)
        with torch.no_grad():
            smaller.prototypes.zero_()
            smaller.last_layer.weight.zero_()
        after = pushed.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert smaller.backbone is pushed.backbone
        assert not smaller.training


class TestMerging:
    def test_repeats_are_of_one_class_and_one_patch_or_one_vector(self) -> None:
        vectors = torch.tensor([0.0, 0.5, 0.0, 0.001, 0.5])[:, None, None, None]
        places = [(1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0), (5, 0, 0)]
        classes = np.array([0, 0, 0, 0, 1])
        assert find_repeats(vectors, classes, places, tolerance=0) == [Merge(0, [2])]
        assert find_repeats(vectors, classes, places, tolerance=1e-5) == [Merge(0, [2, 3])]
        places[1] = places[3]
        assert find_repeats(vectors, classes, places, tolerance=0) == [Merge(0, [2]), Merge(1, [3])]

    def test_a_chain_of_small_steps_stays(self) -> None:
        vectors = torch.arange(4.0)[:, None, None, None]
        found = find_repeats(vectors, np.zeros(4, int), [(p, 0, 0) for p in range(4)], tolerance=1)
        assert found == [Merge(0, [1]), Merge(2, [3])]

    @given(seed=st.integers(0, 2**32), source=st.lists(st.integers(0, 5), min_size=6, max_size=6))
    @settings(max_examples=40, deadline=None)
    def test_merging_exact_repeats_changes_no_logit(self, pushed: ProtoPNet, seed: int, source: list[int]) -> None:
        """Prototype p is a copy of prototype source[p]; copies of another class stay."""
        vectors, connections = pushed.prototypes.detach()[source], pushed.last_layer.weight.detach()
        classes = np.arange(6) // 2
        network = with_prototypes(pushed, MODEL, vectors, classes, connections)
        merges = find_repeats(vectors, classes, [(p, 0, 0) for p in range(6)], tolerance=0)
        draft = draft_of(with_prototypes(network, MODEL, vectors, classes, merged_connections(connections, merges)))
        merged = draft.without([p for merge in merges for p in merge.repeats]).network(network, MODEL)

        assert len(merged.prototypes) == len({(source[p], classes[p]) for p in range(6)})
        latents = torch.rand(5, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            torch.testing.assert_close(
                merged.classify(latents).logits_BK, network.classify(latents).logits_BK, rtol=1e-5, atol=1e-4
            )


class TestDraft:
    def test_it_keeps_the_numbers_of_the_bundle(self, pushed: ProtoPNet) -> None:
        draft = draft_of(pushed).without([0, 3]).without([1])
        assert draft.numbers_P.tolist() == [1, 4, 5]
        assert draft.named([0, 2]) == [1, 5]
        assert draft.places == [(1, 0, 1), (4, 0, 4), (5, 0, 5)]
        assert torch.equal(draft.connections_KP, pushed.last_layer.weight[:, [1, 4, 5]])

    def test_moved_prototypes_are_looked_for_beside_the_old_ones(self, pushed: ProtoPNet) -> None:
        old = draft_of(pushed)
        onto = pa.table({"image_id": [9], "row": [1], "column": [2]})
        new = old.without([0]).moved([1], np.full((1, 4), 0.25, np.float32), onto)
        assert new.places[1] == (9, 1, 2)
        assert old.places[2] == (2, 0, 2)
        vectors, columns = union(old, new)
        assert torch.equal(vectors[columns], new.prototypes_PDhw)
        assert torch.equal(vectors[:6], old.prototypes_PDhw)
        assert columns.tolist() == [1, 6, 3, 4, 5]

    def test_its_places_as_a_table(self, pushed: ProtoPNet) -> None:
        table = places_table(draft_of(pushed).only([2, 4]))
        assert table.to_pylist() == [
            {"prototype": 0, "image_id": 2, "row": 0, "column": 2},
            {"prototype": 1, "image_id": 4, "row": 0, "column": 4},
        ]
