"""Nearest patches over a data set, at most one an image: those of brute force, however the work is cut."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
import torch

from protopnet.model.network import ProtoPNet
from protopnet.passes.nearest_patches import nearest_patches

K = 6  # fewer than the copies of an image
Candidate = tuple[float, int, int, int]  # distance, image, row, column


def brute_force(network: ProtoPNet, latents: torch.Tensor, rows: pa.Table) -> list[list[Candidate]]:
    """For each prototype the best patch of each image, the nearest first, in float64 by the definition."""
    found = []
    for prototype in network.prototypes.double():
        distances = (latents.double() - prototype).square().sum(1).detach().numpy()
        best = []
        for image_id, map_HW in zip(rows["image_id"].to_pylist(), distances, strict=True):
            row, column = np.unravel_index(map_HW.argmin(), map_HW.shape)
            best.append((float(map_HW.min()), image_id, int(row), int(column)))
        found.append(sorted(best)[:K])
    return found


@pytest.fixture
def among_ties(network: ProtoPNet, rows: pa.Table, latents_of: Callable[..., torch.Tensor]) -> ProtoPNet:
    """Prototypes near a patch that seven images share, and in the middle of an image of one colour."""
    latents = latents_of(network, rows)
    with torch.no_grad():
        for p in range(6):
            network.prototypes[p, :, 0, 0] = latents[0 if p % 2 else 7, :, 3, 4] + 0.001 * p
    return network


def test_they_are_those_of_brute_force_however_the_work_is_cut(
    among_ties: ProtoPNet, rows: pa.Table, options: Callable, latents_of: Callable[..., torch.Tensor]
) -> None:
    expected = brute_force(among_ties, latents_of(among_ties, rows), rows)
    seen: list[int] = []
    for workers, blocks, batch in [(2, 7, 5), (1, 1, 1)]:
        how = options(workers, blocks, batch)
        table = nearest_patches(among_ties, rows, k=K, options=how, on_images=seen.append)
        assert table["prototype"].to_pylist() == [p for p in range(12) for _ in range(K)]
        places = zip(*(table[name].to_pylist() for name in ("image_id", "row", "column")), strict=True)
        assert list(places) == [best[1:] for bests in expected for best in bests], (workers, blocks, batch)
        assert table["distance"].to_pylist() == pytest.approx([b[0] for bests in expected for b in bests], abs=1e-5)
    assert sum(seen) == 2 * len(rows)
    label_of = dict(zip(rows["image_id"].to_pylist(), rows["label"].to_pylist(), strict=True))
    assert table["label"].to_pylist() == [label_of[image] for image in table["image_id"].to_pylist()]


def test_where_there_are_fewer_images_each_has_its_patch(network: ProtoPNet, rows: pa.Table, options: Callable) -> None:
    few = rows.slice(0, 4)
    table = nearest_patches(network, few, k=K, options=options())
    images = np.sort(table["image_id"].to_numpy().reshape(12, 4), axis=1)
    assert images.tolist() == 12 * [few["image_id"].to_pylist()]
