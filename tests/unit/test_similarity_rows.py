"""The last layer's rows: in one order whatever the blocks, and in memory once."""

import tracemalloc
from functools import partial

import numpy as np
import pyarrow as pa
import pytest

from protopnet.passes.image_pass import unpack
from protopnet.tables import to_bytes
from protopnet.training.similarity_rows import rows_by_split

SPLITS = np.array(["train", "validation", "test"], dtype=object)


def block(image_ids: np.ndarray, copies: np.ndarray, prototypes: int, batch: int = 16) -> pa.Table:
    """As a pass leaves it in the object store. A similarity says which row and which prototype it is of."""
    keys = 10 * image_ids + copies
    similarities = keys[:, None] + np.arange(prototypes) / prototypes
    rows = pa.table(
        {
            "image_id": image_ids,
            "copy": copies.astype(np.int32),
            "label": (image_ids % 7).astype(np.int32),
            "split": SPLITS[np.where(copies > 0, 0, image_ids % 3)].tolist(),
            "similarities": pa.FixedSizeListArray.from_arrays(similarities.astype(np.float32).ravel(), prototypes),
        }
    )
    batches = pa.concat_tables([rows.slice(first, batch) for first in range(0, len(rows), batch)])
    return pa.table({"payload": pa.array([to_bytes(batches)], pa.large_binary())})


@pytest.mark.parametrize("cuts", [[], [1, 40], [20, 21, 22, 59]])
@pytest.mark.parametrize("columns", [None, np.array([4, 0])])
def test_rows_are_in_one_order_whatever_the_blocks(cuts: list[int], columns: np.ndarray | None) -> None:
    random = np.random.default_rng(len(cuts))
    images, copies = (each.ravel() for each in np.mgrid[0:30, 0:2])
    images, copies = (each[(copies == 0) | (images % 3 == 0)] for each in (images, copies))
    mixed = random.permutation(len(images))
    blocks = [block(images[part], copies[part], 5) for part in np.split(mixed, cuts) if len(part)]
    found = rows_by_split([partial(unpack, each) for each in blocks], columns)
    assert found.keys() == set(SPLITS)
    for number, split in enumerate(SPLITS):
        keys = [10 * image + copy for image in range(number, 30, 3) for copy in range(2 if number == 0 else 1)]
        expected = np.array(keys)[:, None] + np.arange(5) / 5
        np.testing.assert_allclose(
            found[split].similarities_nP, expected if columns is None else expected[:, columns], rtol=1e-6
        )
        np.testing.assert_array_equal(found[split].labels_n, np.array(keys) // 10 % 7)
        assert found[split].similarities_nP.flags.f_contiguous


def test_a_node_without_training_images_has_none() -> None:
    found = rows_by_split([partial(unpack, block(np.array([1, 2]), np.zeros(2, int), 5))])
    assert found["train"].similarities_nP.shape == (0, 5)


def test_training_rows_may_be_kept_in_half_precision() -> None:
    found = rows_by_split([partial(unpack, block(np.arange(6), np.zeros(6, int), 5))], half=True)
    assert found["train"].similarities_nP.dtype == np.float16
    assert found["test"].similarities_nP.dtype == np.float32
    expected = np.array([[0], [30]]) + np.arange(5) / 5
    np.testing.assert_allclose(found["train"].similarities_nP, expected, rtol=2.0**-11)


def test_rows_are_in_memory_once_beside_the_blocks() -> None:
    blocks = [block(3 * np.arange(500) + 1500 * number, np.zeros(500, int), 1000) for number in range(4)]
    size, usual = 4 * 2000 * 1000, pa.default_memory_pool()
    arrow = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(arrow)
    tracemalloc.start()
    try:
        found = rows_by_split([partial(unpack, each) for each in blocks])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)
    assert found["train"].similarities_nP.nbytes == size
    assert peak + arrow.max_memory() < 1.2 * size
