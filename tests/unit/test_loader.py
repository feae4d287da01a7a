"""Training batches: every image as often as asked, equal steps on all ranks, the same pixels whoever decodes."""

import io
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from protopnet.config import RunSettings
from protopnet.datasets import loader, order
from protopnet.datasets.loader import TrainLoader
from protopnet.datasets.masks import of_box
from protopnet.datasets.rows import MANIFEST_SCHEMA
from protopnet.errors import UserError

SIZE = 32


def picture(number: int) -> bytes:
    """A JPEG of its own colours and size."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    file = io.BytesIO()
    small.resize((40 + number % 7 * 20, 90), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def manifest(files: list[str], groups: list[int], rows: list[int]) -> pa.Table:
    count = len(files)
    columns = {
        "image_id": [100 + i for i in range(count)],
        "uri": files,
        "label": [i % 3 for i in range(count)],
        "class_name": ["abc"[i % 3] for i in range(count)],
        "split": ["train"] * count,
        "width": [40 + i % 7 * 20 for i in range(count)],
        "height": [90] * count,
        "sha256": [""] * count,
        "parts": [None] * count,
        "object": [None] * count,
        "file": files,
        "row_group": groups,
        "row": rows,
    }
    return pa.table(columns, schema=MANIFEST_SCHEMA)


@pytest.fixture
def table(tmp_path: Path) -> pa.Table:
    """23 images as plain files."""
    files = [tmp_path / f"{i:02d}.jpg" for i in range(23)]
    for i, file in enumerate(files):
        file.write_bytes(picture(i))
    return manifest([str(file) for file in files], [-1] * 23, [-1] * 23)


def run_settings(**sections: dict) -> RunSettings:
    return RunSettings.model_validate({"model": {"image_size": SIZE}, **sections})


def epoch(table: pa.Table, number: int = 0, batch_size: int = 8, **sections: dict) -> list[loader.Batch]:
    return list(TrainLoader(table, run_settings(**sections), batch_size).epoch(number))


def equal(first: list[loader.Batch], second: list[loader.Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)
    )


# ------------------------------------------------------------------------------------------ batches


def test_batches_are_pixels_and_labels_as_the_network_wants_them(table: pa.Table) -> None:
    batches = epoch(table)
    assert [len(labels) for _, labels in batches] == [8, 8, 7]
    for pixels, labels in batches:
        assert pixels.shape[1:] == (SIZE, SIZE, 3)
        assert pixels.dtype == torch.uint8
        assert labels.dtype == torch.int64
    assert Counter(torch.cat([labels for _, labels in batches]).tolist()) == {0: 8, 1: 8, 2: 7}


def test_an_epoch_can_be_replayed_and_differs_from_the_next(table: pa.Table) -> None:
    assert equal(epoch(table, 3), epoch(table, 3))
    assert not equal(epoch(table, 3), epoch(table, 4))
    assert not equal(epoch(table, 3), epoch(table, 3, seed=1))


def test_one_loader_serves_any_epoch_in_any_order_even_after_a_broken_off_one(table: pa.Table) -> None:
    batches = TrainLoader(table, run_settings(), 8)
    next(batches.epoch(5))
    assert equal(list(batches.epoch(3)), epoch(table, 3))
    assert equal(list(batches.epoch(0)), epoch(table, 0))


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_threads_makes_the_same_batches(table: pa.Table, workers: int) -> None:
    data = {"workers": workers}
    batches = TrainLoader(table, run_settings(data=data, augment={"copies": 2}), 8)
    next(batches.epoch(5))
    for number in (0, 1):
        assert equal(list(batches.epoch(number)), epoch(table, number, augment={"copies": 2}))


def test_the_cache_changes_nothing_but_the_time(table: pa.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = TrainLoader(table, run_settings(), 8)
    list(cached.epoch(0))
    assert len(cached.pictures.cache.images) == 23
    monkeypatch.setattr(loader, "CACHE_BYTES", 0)
    plain = TrainLoader(table, run_settings(), 8)
    assert equal(list(cached.epoch(1)), list(plain.epoch(1)))
    assert not plain.pictures.cache.images


def test_the_cache_keeps_within_its_budget(table: pa.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "CACHE_BYTES", 100_000)
    batches = TrainLoader(table, run_settings(), 8)
    list(batches.epoch(0))
    held = sum(image.width * image.height * 4 for image in batches.pictures.cache.images.values())
    assert 50_000 < held <= 100_000


def test_the_object_of_a_mask_is_kept_where_the_settings_say_so(tmp_path: Path) -> None:
    image = Image.new("RGB", (80, 80))
    image.paste("white", (0, 0, 6, 6))
    image.save(tmp_path / "corner.png")
    whole, at = (
        manifest([str(tmp_path / "corner.png")] * 60, [-1] * 60, [-1] * 60),
        MANIFEST_SCHEMA.names.index("object"),
    )
    marked = whole.set_column(at, "object", pa.array([of_box((0, 0, 6, 6), (80, 80))] * 60))

    def bright(table: pa.Table, keep: float) -> float:
        pixels = torch.cat([batch for batch, _ in epoch(table, augment={"keep_object": keep})])
        return float((pixels.flatten(1).amax(1) > 200).float().mean())

    assert bright(marked, 0) == bright(whole, 0) == bright(whole, 0.9) < 0.9
    assert bright(marked, 0.9) > 0.95


def test_copies_of_an_image_differ(table: pa.Table) -> None:
    pixels = torch.cat([pixels for pixels, _ in epoch(table.slice(0, 1), augment={"copies": 12})])
    assert len(pixels) == 12
    assert len({image.numpy().tobytes() for image in pixels}) > 9


def test_without_augmentation_the_pixels_are_those_of_every_other_path(table: pa.Table) -> None:
    from protopnet import imaging

    expected = {imaging.load(picture(i), SIZE).tobytes() for i in range(23)}
    pixels = torch.cat([pixels for pixels, _ in epoch(table, augment={"recipe": "none"})])
    assert {image.numpy().tobytes() for image in pixels} == expected


def test_shards_give_the_same_pictures_as_files(table: pa.Table, tmp_path: Path) -> None:
    shard = tmp_path / "shard.parquet"
    images = pa.table({"image": pa.array([picture(i) for i in range(23)], pa.binary())})
    pq.write_table(images, shard, row_group_size=5)
    shards = manifest([str(shard)] * 23, [i // 5 for i in range(23)], [i % 5 for i in range(23)])
    seen = [{image.numpy().tobytes() for pixels, _ in epoch(source) for image in pixels} for source in (table, shards)]
    assert seen[0] == seen[1]


# --------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("workers", [None, 1])
def test_a_file_that_vanished_is_named_in_one_line(table: pa.Table, workers: int | None) -> None:
    Path(table["uri"][4].as_py()).unlink()
    with pytest.raises(UserError, match=r"04\.jpg: can't be read") as caught:
        epoch(table, data={"workers": workers})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [None, 1])
def test_a_file_that_was_damaged_is_named_in_one_line(table: pa.Table, workers: int | None) -> None:
    Path(table["uri"][4].as_py()).write_bytes(picture(4)[:300])
    with pytest.raises(UserError, match=r"04\.jpg: damaged") as caught:
        epoch(table, data={"workers": workers})
    assert "\n" not in str(caught.value)


def test_no_images_is_said_at_once(table: pa.Table) -> None:
    with pytest.raises(UserError, match="no training images"):
        TrainLoader(table.slice(0, 0), run_settings(), 8)


def test_len_is_the_number_of_batches(table: pa.Table) -> None:
    for world in (1, 2, 3):
        batches = TrainLoader(table, run_settings(augment={"copies": 2}), 7, rank=world - 1, world=world)
        assert len(batches) == len(list(batches.epoch(0))) == len(list(batches.weights())) == math.ceil(46 / 7)


def test_the_pictures_of_a_step_are_the_same_for_any_number_of_ranks(table: pa.Table) -> None:
    def steps(world: int) -> list[set[bytes]]:
        ranks = [TrainLoader(table, run_settings(), 8, rank=rank, world=world).epoch(1) for rank in range(world)]
        return [
            {image.numpy().tobytes() for pixels, _ in step for image in pixels} for step in zip(*ranks, strict=True)
        ]

    assert steps(1) == steps(2) == steps(3)


def test_row_groups_are_told_apart_by_file_and_number(table: pa.Table) -> None:
    mixed = manifest(["a", "a", "b", "b", "c", "d"], [0, 1, 0, 0, -1, -1], [0, 0, 0, 1, -1, -1])
    groups = order.row_groups(mixed)
    assert groups[2] == groups[3]
    assert len(set(groups.tolist())) == 5
