"""The passes of an audit over a real network: what they add up doesn't depend on how the work is cut."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
import torch

from protopnet.auditing.audit import count_use, describe_patches
from protopnet.auditing.usage import use_of_batch
from protopnet.datasets.rows import Dataset
from protopnet.model.network import ProtoPNet
from protopnet.model.prototypes import similarity
from protopnet.passes.nearest_patches import nearest_patches


def test_use_is_that_of_all_images_at_once(
    network: ProtoPNet, birds: Dataset, options: Callable, pixels_of: Callable[[pa.Table], torch.Tensor]
) -> None:
    rows = birds.split("test")
    with torch.inference_mode():
        seen = network(pixels_of(rows))
    connections = network.last_layer.weight.detach().numpy()
    expected = use_of_batch(seen, connections, network.prototype_class.numpy(), rows["label"].to_numpy(), top=3)
    use = count_use(network, rows, top=3, options=options(workers=2, blocks=3, batch=5))
    assert use.images == len(rows)
    assert dict(use.errors) == dict(expected.errors)
    for name in ("first_P", "top_P", "predicted_K", "right_K"):
        assert np.array_equal(getattr(use, name), getattr(expected, name)), name
    for name in ("points_P", "own_distance_P", "own_points_K", "other_points_K", "against_K"):
        np.testing.assert_allclose(getattr(use, name), getattr(expected, name), rtol=1e-4)


def test_patches_are_described_with_one_picture_an_image(network: ProtoPNet, birds: Dataset, options: Callable) -> None:
    rows, how = birds.split("test"), options(blocks=3)
    found = nearest_patches(network, rows, k=4, options=how)
    seen = describe_patches(network, birds.table, found, birds.classes, options=how)
    assert set(seen.thumbnails) == set(found["image_id"].to_pylist())
    assert all(picture.startswith(b"\xff\xd8") for picture in seen.thumbnails.values())
    by_pair = {(row["prototype"], row["image_id"]): row for row in seen.rows.to_pylist()}
    assert len(by_pair) == len(found) == len(seen.rows)
    for row in found.to_pylist():
        described = by_pair[row["prototype"], row["image_id"]]
        assert (described["row"], described["column"]) == (row["row"], row["column"])
        expected = float(similarity(torch.tensor(row["distance"]), network.kind, network.epsilon))
        assert described["self_similarity"] == pytest.approx(expected, rel=1e-3)
        assert described["self_similarity"] >= np.max(described["activation_map"]) - 1e-4
        top, left, bottom, right = described["box"]
        assert 0 <= top < bottom <= described["height"]
        assert 0 <= left < right <= described["width"]
