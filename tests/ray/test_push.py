"""The push over a real network and real images: one result, however the work is cut, whoever dies."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
import torch
from ray_processes import kill_first, named

from protopnet.model.network import ProtoPNet
from protopnet.passes.push import PushResult, push

Place = tuple[int, int, int]


def places(result: PushResult) -> list[Place]:
    rows = result.chosen
    return list(zip(rows["image_id"].to_pylist(), rows["row"].to_pylist(), rows["column"].to_pylist(), strict=True))


def brute_force(network: ProtoPNet, latents: torch.Tensor, rows: pa.Table, distinct: bool) -> list[Place]:
    """Each prototype in turn on the nearest free patch of its class, distances in float64 by the definition."""
    labels, ids = rows["label"].to_numpy(), rows["image_id"].to_numpy()
    chosen: list[Place] = []
    for prototype, label in zip(network.prototypes.double(), network.prototype_class.tolist(), strict=True):
        own = np.flatnonzero(labels == label)
        distances = (latents[torch.from_numpy(own)].double() - prototype).square().sum(1).detach().numpy()
        for flat in np.argsort(distances, axis=None, kind="stable"):
            image, row, column = np.unravel_index(flat, distances.shape)
            place = (int(ids[own[image]]), int(row), int(column))
            if not (distinct and place in chosen):
                chosen.append(place)
                break
    return chosen


@pytest.fixture
def pushed_at_copies(network: ProtoPNet, rows: pa.Table, latents_of: Callable[..., torch.Tensor]) -> ProtoPNet:
    """Half of the prototypes near a patch of the image that its class has seven times, or of the plain one."""
    latents = latents_of(network, rows)
    labels = rows["label"].to_numpy()
    with torch.no_grad():
        for p, label in enumerate(network.prototype_class.tolist()):
            if p % 2:
                first = int(np.flatnonzero(labels == label)[0])
                image = first if p % 4 == 1 else first + 7
                network.prototypes[p, :, 0, 0] = latents[image, :, 3, 4] + 0.001 * p
    return network


CUTS = [(1, 3, 64), (2, 7, 1)]  # workers, blocks, images a batch


@pytest.mark.parametrize("distinct", [True, False])
def test_the_choice_is_that_of_brute_force_however_the_work_is_cut(
    pushed_at_copies: ProtoPNet,
    rows: pa.Table,
    options: Callable,
    latents_of: Callable[..., torch.Tensor],
    distinct: bool,
) -> None:
    network = pushed_at_copies
    expected = brute_force(network, latents_of(network, rows), rows, distinct)
    for workers, blocks, batch in CUTS if distinct else CUTS[:1]:
        how = options(workers, blocks, batch)
        result = push(network, rows, distinct=distinct, options=how)
        assert places(result) == expected, (workers, blocks, batch)
        assert result.refined > 0  # the copies are a matter of rounding
    if distinct:
        assert len(set(expected)) == len(expected)


def test_the_vector_is_the_patch(network: ProtoPNet, rows: pa.Table, options: Callable, latents_of: Callable) -> None:
    before = network.prototypes.clone()
    seen: list[int] = []
    result = push(network, rows, distinct=True, options=options(blocks=3), on_images=seen.append)
    assert sum(seen) == len(rows)
    assert torch.equal(network.prototypes, before)  # to put them in is for the caller
    latents = dict(zip(rows["image_id"].to_pylist(), latents_of(network, rows), strict=True))
    own = dict(zip(rows["image_id"].to_pylist(), rows["label"].to_pylist(), strict=True))
    for p, (image, row, column) in enumerate(places(result)):
        patch = latents[image][:, row, column].numpy()
        assert ((result.vectors_Pd[p] - patch) ** 2).sum() < 1e-9
        assert own[image] == network.prototype_class[p]


def test_patches_that_were_not_sent_are_looked_up(
    network: ProtoPNet, rows: pa.Table, options: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = push(network, rows, distinct=True, options=options())
    monkeypatch.setattr("protopnet.passes.push.MOST_NUMBERS", 0)
    looked_up = push(network, rows, distinct=True, options=options(workers=2, blocks=5))
    assert places(looked_up) == places(sent)
    np.testing.assert_allclose(looked_up.vectors_Pd, sent.vectors_Pd, atol=1e-5)


def test_a_killed_actor_changes_nothing(network: ProtoPNet, rows: pa.Table, options: Callable) -> None:
    expected = places(push(network, rows, distinct=True, options=options()))
    killed: list[int] = []

    def kill_once(images: int) -> None:
        if not killed:
            killed.append(kill_first("ray::MapWorker"))

    slowly = options(workers=1, blocks=len(rows), batch=1)  # so that much is left to do after the first block
    result = push(network, rows, distinct=True, options=slowly, on_images=kill_once)
    assert killed
    assert killed[0] not in named("ray::")
    assert places(result) == expected
