"""The last layer over Ray equals the same problem solved in this process."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from ray_processes import kill_first

from protopnet.config import AugmentSettings, LastLayerSettings
from protopnet.datasets.rows import Dataset
from protopnet.model.network import ProtoPNet
from protopnet.model.prototypes import true_float32
from protopnet.training.connections import anchor_KP, off_class_KP
from protopnet.training.last_layer import (
    LastLayerResult,
    RowStore,
    cache_similarities,
    optimise_last_layer,
    solve_over,
)
from protopnet.training.solver import RowBlock, mean_over, metric_over, solve

SETTINGS = LastLayerSettings(copies=0, l1=1e-3, ridge=1e-2, tolerance=1e-5, max_iterations=1000)


@pytest.fixture
def rows(birds: Dataset) -> pa.Table:
    """All images; a few of the training images are for validation."""
    split = birds.table["split"].to_pylist()
    split[-3::-7] = ["validation" if name == "train" else name for name in split[-3::-7]]
    at = birds.table.schema.get_field_index("split")
    return birds.table.set_column(at, "split", pa.array(split))


@pytest.fixture(autouse=True)
def _pushed(network: ProtoPNet, birds: Dataset, latents_of: Callable) -> None:
    """Prototypes on patches of their class, as after a push: similarities that tell images apart."""
    train = birds.split("train")
    latents, labels = latents_of(network, train), train["label"].to_numpy()
    with torch.no_grad():
        for p, label in enumerate(network.prototype_class.tolist()):
            network.prototypes[p, :, 0, 0] = latents[np.flatnonzero(labels == label)[-1 - p], :, p % 8, 3]


@pytest.fixture
def optimise(network: ProtoPNet, rows: pa.Table, options: Callable) -> Callable[..., LastLayerResult]:
    def run(settings: LastLayerSettings = SETTINGS, **cut: Any) -> LastLayerResult:
        return optimise_last_layer(network, 1.0, rows, settings=settings, options=options(**{"blocks": 3, **cut}))

    return run


def similarities(network: ProtoPNet, images: torch.Tensor) -> np.ndarray:
    with torch.inference_mode(), true_float32():
        return network(images).similarities_BP.numpy()


def accuracy(similarities_nP: np.ndarray, weights_KP: np.ndarray, labels: np.ndarray) -> float:
    return float(((similarities_nP @ weights_KP.T).argmax(1) == labels).mean())


def test_it_is_the_optimum_of_the_same_problem_solved_here(
    network: ProtoPNet, rows: pa.Table, optimise: Callable[..., LastLayerResult], pixels_of: Callable
) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    result = optimise(workers=2, batch=5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())

    split = {name: rows.filter(pa.compute.equal(rows["split"], name)) for name in ("train", "validation", "test")}
    matrix = {name: similarities(network, pixels_of(part)) for name, part in split.items()}
    labels = {name: part["label"].to_numpy() for name, part in split.items()}
    block = RowBlock(matrix["train"], labels["train"], 3)
    start = network.last_layer.weight.detach().numpy()
    off = off_class_KP(network.prototype_class.numpy(), 3)
    here = solve(
        mean_over([block]),
        anchor_KP(off, 1.0),
        off,
        l1=SETTINGS.l1,
        ridge=SETTINGS.ridge,
        tolerance=SETTINGS.tolerance,
        max_iterations=SETTINGS.max_iterations,
        metric=metric_over([block]),
        initial=start,
    )

    assert here.converged
    assert result.solution.converged
    assert result.solution.residual <= SETTINGS.tolerance
    assert result.solution.objective == pytest.approx(here.objective, abs=1e-6)
    np.testing.assert_allclose(result.solution.weights, here.weights, atol=5e-3)
    assert set(result.before) == set(result.after) == {"validation", "test"}
    for name in ("validation", "test"):
        assert result.before[name] == pytest.approx(accuracy(matrix[name], start, labels[name]))
        weights = result.solution.weights.astype(np.float32)
        assert result.after[name] == pytest.approx(accuracy(matrix[name], weights, labels[name]))


def test_rows_of_several_nodes_have_the_same_optimum(
    network: ProtoPNet, rows: pa.Table, optimise: Callable[..., LastLayerResult], options: Callable
) -> None:
    """A store for each block, as if each were on another node; which store has which rows changes nothing."""
    expected = optimise().solution
    blocks = cache_similarities(network, rows, copies=0, options=options(blocks=3))
    stores = [RowStore.remote([block], 3) for block in blocks]  # type: ignore[attr-defined]
    off = off_class_KP(network.prototype_class.numpy(), 3)
    start = network.last_layer.weight.detach().numpy()
    wanted = SETTINGS.model_dump(include={"l1", "ridge", "tolerance", "max_iterations"}) | {"initial": start}
    found = solve_over(stores, (anchor_KP(off, 1.0), off), wanted)
    for store in stores:
        ray.kill(store)
    assert len(stores) > 1
    assert found.converged
    assert found.iterations > 10 > expected.iterations
    assert found.objective == pytest.approx(expected.objective, abs=1e-6)


def test_it_goes_on_from_the_present_connections_but_is_drawn_to_the_first(
    network: ProtoPNet, optimise: Callable[..., LastLayerResult]
) -> None:
    """The optimum doesn't depend on where the search begins."""
    first = optimise()
    with torch.no_grad():
        network.last_layer.weight.copy_(torch.from_numpy(first.solution.weights))
    again = optimise()
    assert again.solution.iterations < first.solution.iterations
    assert again.solution.objective == pytest.approx(first.solution.objective, abs=1e-6)


def test_augmented_copies_are_rows_of_their_own(optimise: Callable[..., LastLayerResult]) -> None:
    quick = SETTINGS.model_copy(update={"max_iterations": 20})
    twice = quick.model_copy(update={"copies": 2})
    plain, augmented = optimise(quick), optimise(twice, augment=AugmentSettings())
    assert plain.before == augmented.before  # copies are of training images only
    assert abs(plain.solution.objective - augmented.solution.objective) > 1e-4
    assert optimise(twice).solution.objective == pytest.approx(plain.solution.objective)  # copies that are the images


def test_a_killed_store_is_replaced(optimise: Callable[..., LastLayerResult]) -> None:
    expected = optimise()
    killer = threading.Thread(target=kill_first, args=("ray::RowStore",))
    killer.start()
    result = optimise()
    killer.join()
    assert np.array_equal(result.solution.weights, expected.solution.weights)
