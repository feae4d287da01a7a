"""Start from data: principal directions as pairs, k-means per class, everything drawn by seed."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from protopnet.config import ModelSettings
from protopnet.model.network import ProtoPNet, add_on_layers, build_network
from protopnet.training.start import (
    PatchSample,
    PatchTask,
    kmeans,
    limit_per_class,
    patches_per_image,
    principal_directions,
    set_add_on,
    start_bytes,
    start_from_patches,
)


def network(**changes: object) -> ProtoPNet:
    settings = {"backbone": "squeezenet1_0", "image_size": 64, "prototype_depth": 16, "prototypes": 8} | changes
    torch.manual_seed(0)
    built = build_network(ModelSettings(**settings), 4)  # type: ignore[arg-type]
    assert isinstance(built, ProtoPNet)
    return built


def sample(patches: int = 400, shape: tuple[int, int] = (1, 1), classes: int = 4) -> PatchSample:
    """Correlated features with a mean and a spread that differ by class."""
    random = np.random.default_rng(0)
    labels = np.sort(random.integers(0, classes, patches))
    hidden = random.standard_normal((patches, 24, *shape)) + 2 * np.eye(24)[labels][:, :, None, None]
    mixing = random.standard_normal((512, 24)) / np.arange(1, 25)
    features = np.einsum("cd,ndhw->nchw", mixing, hidden) + 3
    return PatchSample(torch.from_numpy(features.astype(np.float16)), labels, patches)


def convolutions(add_on: nn.Module) -> list[nn.Conv2d]:
    return [module for module in add_on.modules() if isinstance(module, nn.Conv2d)]


def test_principal_directions_are_those_of_the_covariance() -> None:
    cells = torch.from_numpy(np.random.default_rng(0).standard_normal((500, 6)) * [5, 4, 3, 2, 1, 0.5] + 7).float()
    mean, directions, deviations = principal_directions(cells)
    torch.testing.assert_close(mean, cells.mean(0))
    torch.testing.assert_close(directions.T @ directions, torch.eye(6), atol=1e-5, rtol=0)
    projected = (cells - mean) @ directions
    torch.testing.assert_close(projected.std(0), deviations, rtol=1e-4, atol=1e-4)
    assert deviations.tolist() == sorted(deviations.tolist(), reverse=True)
    off_diagonal = torch.cov(projected.T) - torch.diag(projected.var(0))
    assert off_diagonal.abs().max() < 1e-3


class Largest(TorchDispatchMode):
    """The most bytes that an operation gave back in a storage of its own."""

    def __init__(self, given: torch.Tensor) -> None:
        super().__init__()
        self.given, self.bytes = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != self.given:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
def test_patches_are_in_memory_once(shape: tuple[int, int]) -> None:
    """What is made of them all is smaller: moments, and the latent windows."""
    net = network(prototype_shape=shape)
    patches = sample(12_000, shape)
    with Largest(patches.features_NChw) as largest:
        start_from_patches(net, patches, seed=0)
    bound = 4096 * 512 * shape[0] * shape[1] * 8  # a chunk in float64
    assert largest.bytes <= bound < 4 * 12_000 * 512 * shape[0] * shape[1]
    assert start_bytes(net, 10) == 10 * patches_per_image(net, 10) * shape[0] * shape[1] * (2 * 512 + 4 * 16)


@pytest.mark.parametrize("depth", [16, 15])
def test_directions_come_as_pairs(depth: int) -> None:
    add_on = add_on_layers("regular", 32, depth)
    cells = torch.rand(200, 32)
    mean, directions, deviations = principal_directions(cells)
    set_add_on(add_on, mean, directions, deviations)
    first = convolutions(add_on)[0]
    weight = first.weight.flatten(1)
    assert torch.equal(weight[1::2], -weight[0::2][: depth // 2])
    response = cells @ weight.T + first.bias
    torch.testing.assert_close(response.mean(0), torch.zeros(depth), atol=1e-4, rtol=0)
    torch.testing.assert_close(response.std(0), torch.ones(depth), atol=1e-2, rtol=0)


def test_the_latent_map_of_cosines_is_nearly_0_but_where_a_direction_stands_out() -> None:
    net = network(similarity="cosine")
    start_from_patches(net, sample(), seed=0)
    with torch.no_grad():
        latent = net.add_on(sample().features_NChw.float())
    assert 0 < latent.min() <= latent.median() < 0.2
    assert 0.8 < latent.max() < 1
    assert latent.flatten(1).std(0).min() > 0.05  # no channel is dead


def test_the_latent_map_of_distances_keeps_the_order_of_the_variances() -> None:
    net = network(similarity="log")
    start_from_patches(net, sample(), seed=0)
    with torch.no_grad():
        spread = net.add_on(sample().features_NChw.float()).flatten(1).std(0)
    assert spread[:2].min() > 2 * spread[-2:].max()  # the first pair of directions against the last


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
@pytest.mark.parametrize("add_on", ["regular", "bottleneck"])
def test_prototypes_lie_among_the_patches_of_their_class(add_on: str, shape: tuple[int, int]) -> None:
    net = network(add_on=add_on, prototype_shape=shape)
    patches = sample(shape=shape)
    start_from_patches(net, patches, seed=0)
    with torch.no_grad():
        latent = net.add_on(patches.features_NChw.float()).flatten(1)
    distances = torch.cdist(net.prototypes.flatten(1), latent)
    own = torch.from_numpy(patches.labels_N)[None] == net.prototype_class[:, None]
    nearest_own = distances.masked_fill(~own, torch.inf).amin(1)
    assert (nearest_own < distances.masked_fill(own, torch.inf).mean(1) / 2).all()
    mean_to_own = (distances * own).sum(1) / own.sum(1)
    assert (mean_to_own < (distances * ~own).sum(1) / (~own).sum(1)).all()


def test_the_same_seed_gives_the_same_start_and_another_another() -> None:
    first, second, third = network(), network(), network()
    for net, seed in ((first, 0), (second, 0), (third, 1)):
        start_from_patches(net, sample(), seed)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.prototypes, third.prototypes)


def test_fewer_patches_than_prototypes_are_shared() -> None:
    net = network(prototypes=24)
    patches = sample(patches=8)
    patches.labels_N = np.repeat(np.arange(4), 2)
    start_from_patches(net, patches, seed=0)
    with torch.no_grad():
        latent = net.add_on(patches.features_NChw.float()).flatten(1)
    assert torch.cdist(net.prototypes.flatten(1), latent).amin(1).max() < 1e-3
    assert all(torch.isfinite(tensor).all() for tensor in net.parameters())


def test_identical_patches_do_no_harm() -> None:
    net = network()
    start_from_patches(net, PatchSample(torch.ones(12, 512, 1, 1).half(), np.arange(12) % 4, 12), seed=0)
    assert all(torch.isfinite(tensor).all() for tensor in net.parameters())


def test_kmeans_finds_separate_clusters() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    random = np.random.default_rng(0)
    points = centres.repeat_interleave(50, 0) + torch.from_numpy(random.standard_normal((150, 2)).astype(np.float32))
    found = kmeans(points, 3, np.random.default_rng(5))
    assert torch.cdist(centres, found).amin(1).max() < 0.5
    assert torch.equal(found, kmeans(points, 3, np.random.default_rng(5)))


def test_at_most_so_many_images_a_class_drawn_by_seed() -> None:
    rows = pa.table({"label": pa.array([0] * 50 + [1] * 3 + [2] * 50, pa.int32()), "image_id": np.arange(103)})
    limited = limit_per_class(rows, 10, seed=0)
    assert np.bincount(limited["label"].to_numpy()).tolist() == [10, 3, 10]
    assert limited["image_id"].to_pylist() == sorted(limited["image_id"].to_pylist())
    assert limited == limit_per_class(rows, 10, seed=0)
    assert limited != limit_per_class(rows, 10, seed=1)


def test_the_patches_of_an_image_do_not_depend_on_its_batch() -> None:
    net = network(prototype_shape=(2, 2)).eval()
    task = PatchTask(net, per_image=3, seed=0)
    images = torch.randn(4, 3, 64, 64)
    rows = pa.table({"image_id": [3, 5, 7, 9], "label": pa.array([0, 0, 1, 1], pa.int32())})
    with torch.inference_mode():
        together = task(images, rows)["windows"].to_pylist()
        alone = [task(images[i : i + 1], rows.slice(i, 1))["windows"][0].as_py() for i in range(4)]
    for a, b in zip(together, alone, strict=True):
        assert len(a) == 3 * 512 * 4 * 2  # float16
        np.testing.assert_allclose(np.frombuffer(a, np.float16), np.frombuffer(b, np.float16), rtol=2e-3, atol=1e-4)
