"""The order of training: every image as often as asked, batches mixed as by a full shuffle, row groups read once."""

import hashlib
import io
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bench.order import LAYOUTS, classes_in, row_group_reads
from protopnet.config import BirdSettings, DataSettings, RunSettings
from protopnet.datasets import order, shards
from protopnet.datasets.open import mixed, open_dataset, open_source
from protopnet.datasets.reader import ImageReader
from protopnet.datasets.rows import SPLITS, Dataset, as_stored
from protopnet.datasets.shards import open_shards, write_shards, write_source
from protopnet.datasets.writer import Limits, cut, drawn
from protopnet.errors import UserError


def parts(groups: np.ndarray, world: int, *, batch_size: int = 8, **more: int) -> list[list[np.ndarray]]:
    """What each rank takes of each batch of an epoch."""
    given = {"copies": 1, "seed": 1, "epoch": 2} | more
    batches = list(order.epoch_batches(groups, batch_size=batch_size, world=world, **given))
    return [[order.part(batch, rank, world) for batch in batches] for rank in range(world)]


def pairs(batch: np.ndarray) -> Counter[tuple[int, int]]:
    return Counter((int(copy), int(index)) for copy, index in batch)


@settings(max_examples=200, deadline=None)
@given(
    images=st.integers(1, 60),
    copies=st.integers(1, 5),
    world=st.integers(1, 7),
    group_size=st.integers(1, 9),
    batch_size=st.integers(2, 20),
)
def test_the_ranks_take_every_copy_of_every_image_once(
    images: int, copies: int, world: int, group_size: int, batch_size: int
) -> None:
    groups = np.arange(images) // group_size
    batches = list(order.epoch_batches(groups, copies=copies, seed=1, epoch=2, batch_size=batch_size, world=world))
    assert sum(map(pairs, batches), Counter()) == {(c, i): 1 for c in range(copies) for i in range(images)}
    assert [len(batch) for batch in batches] == order.batch_lengths(images * copies, batch_size)
    assert len(batches) == math.ceil(images * copies / batch_size)
    assert max(map(len, batches)) <= batch_size
    for batch in batches:
        own = [order.part(batch, rank, world) for rank in range(world)]
        assert set(sum(map(pairs, own), Counter())) == set(pairs(batch))
        assert min(map(len, own)) >= 2  # BatchNorm can't train on one image
        if len(batch) >= 2 * world:
            assert sum(map(pairs, own), Counter()) == pairs(batch)


@given(length=st.integers(1, 40), world=st.integers(1, 7), seed=st.integers(0, 99))
def test_weighted_means_of_the_ranks_average_to_the_mean_over_the_batch(length: int, world: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=length)
    batch = np.column_stack([np.zeros(length, int), np.arange(length)])
    means = [values[order.part(batch, rank, world)[:, 1]].mean() for rank in range(world)]
    weights = [order.weight(length, rank, world) for rank in range(world)]
    assert np.mean(weights) == pytest.approx(1)
    if length >= 2 * world:
        assert np.mean(np.multiply(weights, means)) == pytest.approx(values.mean())


def test_plain_files_are_shuffled_completely_and_alike_for_any_number_of_ranks() -> None:
    own = np.concatenate(parts(np.arange(1000), 1, seed=0, epoch=0)[0])[:, 1]
    assert abs(np.corrcoef(own, np.arange(1000))[0, 1]) < 0.15
    for world in (2, 4):
        steps = zip(*parts(np.arange(1000), world, seed=0, epoch=0), strict=True)
        assert np.array_equal(np.concatenate([np.concatenate(step) for step in steps])[:, 1], own)


@settings(max_examples=40, deadline=None)
@given(
    images=st.integers(2_000, 12_000),
    classes=st.integers(5, 400),
    world=st.sampled_from([1, 2, 3, 8, 16, 64]),
    share=st.integers(4, 20),
    layout=st.sampled_from(["files", "shards"]),
    seed=st.integers(0, 1000),
)
def test_batches_are_as_mixed_as_by_a_full_shuffle_and_row_groups_are_read_once(
    images: int, classes: int, world: int, share: int, layout: str, seed: int
) -> None:
    labels = np.sort(np.arange(images) % classes)
    groups = LAYOUTS[layout](labels, seed)
    ranks = parts(groups, world, batch_size=share * world, seed=seed)
    batches = [np.concatenate(step)[:, 1] for step in zip(*ranks, strict=True)]
    drawn = np.random.default_rng(seed).permutation(labels)
    full = np.split(drawn, np.cumsum([len(batch) for batch in batches])[:-1])
    assert np.mean([classes_in(labels[b]) for b in batches]) >= 0.95 * np.mean([classes_in(b) for b in full])
    in_share = np.mean([classes_in(labels[own[:, 1]]) for rank in ranks for own in rank])
    full_share = np.mean([classes_in(own) for b in full for own in np.array_split(b, world)])
    assert in_share >= 0.95 * full_share
    num_groups = int(groups.max()) + 1
    reads = sum(row_group_reads((groups[own[:, 1]] for own in rank), 2 * order.LANES) for rank in ranks)
    assert reads < num_groups + world  # twice only where the shares of two ranks meet
    if num_groups >= 10 * world:
        assert reads <= 1.1 * num_groups


# ------------------------------------------------------------------------------------------- sources


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 9), (number % 256, number // 256, 7)).save(file, "PNG")
    return file.getvalue()


def rows_by_class(classes: int, each: int) -> Iterator[dict[str, Any]]:
    """Rows as sources yield them: class by class, a test image after every three."""
    for number in range(classes * each):
        data = picture(number)
        label = number // each
        yield {
            "uri": f"{number}.png",
            "image": data,
            "label": label,
            "class_name": f"c{label:03d}",
            "split": "test" if number % 4 == 3 else "train",
            "width": 9,
            "height": 9,
            "parts": None,
            "object": None,
            "sha256": hashlib.sha256(data).hexdigest(),
        }


def folder(path: Path, classes: int, each: int) -> str:
    for row in rows_by_class(classes, each):
        (path / row["class_name"]).mkdir(parents=True, exist_ok=True)
        (path / row["class_name"] / row["uri"]).write_bytes(row["image"])
    return str(path)


def sorted_shards(path: Path, classes: int, each: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """As they were written before there was a drawn order, and as others write them."""
    with monkeypatch.context() as patched:
        patched.setattr(shards, "drawn", lambda splits: np.argsort(splits != "train", kind="stable"))
        write_shards(rows_by_class(classes, each), str(path), [f"c{k:03d}" for k in range(classes)], {"kind": "test"})
    return str(path)


def distinct(dataset: Dataset, world: int = 2, batch_size: int = 20) -> float:
    """Distinct classes in a batch, relative to a full shuffle."""
    training = dataset.split("train")
    labels = training["label"].to_numpy()
    drawn = np.random.default_rng(0).permutation(labels)
    steps = [np.concatenate(s)[:, 1] for s in zip(*parts(order.row_groups(training), world, batch_size=batch_size))]  # noqa: B905
    full = np.split(drawn, np.cumsum([len(step) for step in steps])[:-1])
    return float(np.mean([classes_in(labels[step]) for step in steps]) / np.mean([classes_in(b) for b in full]))


def settings_of(source: str, path: str | None = None) -> RunSettings:
    birds = BirdSettings(classes=12, train_per_class=20, test_per_class=1, size=32)
    data = DataSettings.model_validate({"source": source, "path": path, "validation": 0.1})
    return RunSettings(data=data, birds=birds)


@pytest.mark.parametrize("source", ["folder", "birds", "prepared", "sorted by others"])
def test_every_source_gives_mixed_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    if source == "folder":
        chosen = settings_of("folder", folder(tmp_path / "in", 20, 40))
    elif source == "birds":
        chosen = settings_of("birds")
    elif source == "prepared":
        unread = open_source(settings_of("folder", folder(tmp_path / "in", 20, 40)))
        write_source(unread, str(tmp_path / "shards"))
        chosen = settings_of("shards", str(tmp_path / "shards"))
    else:
        chosen = settings_of("shards", sorted_shards(tmp_path / "shards", 20, 40, monkeypatch))
    dataset = mixed(open_dataset(chosen, str(tmp_path / "work")), str(tmp_path / "work"))
    assert distinct(dataset) >= 0.95


def test_sorted_shards_are_noticed_and_written_anew_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings_of("shards", sorted_shards(tmp_path / "shards", 20, 40, monkeypatch))
    dataset = open_dataset(chosen, "")
    seen, drawn = order.mixing(order.row_groups(dataset.table), dataset.table["label"].to_numpy())
    assert (seen, drawn) == (pytest.approx(1.2, abs=0.2), pytest.approx(7, abs=0.5))
    work = str(tmp_path / "work")
    anew = mixed(dataset, work)
    place = ["file", "row_group", "row"]
    assert anew.table.drop_columns(place).equals(dataset.table.drop_columns(place))
    assert (anew.classes, anew.source) == (dataset.classes, dataset.source)
    reader = ImageReader()
    assert reader.read(anew.table, range(50)) == reader.read(dataset.table, range(50))
    files = sorted((tmp_path / "work").rglob("shard-*"))
    assert mixed(dataset, work).table.equals(anew.table)
    assert mixed(anew, work) is anew
    assert sorted((tmp_path / "work").rglob("shard-*")) == files


def test_large_sorted_shards_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sorted_shards(tmp_path / "shards", 20, 40, monkeypatch)
    monkeypatch.setattr("protopnet.datasets.open._COPIED_BYTES", 1000)
    with pytest.raises(UserError, match=r"sorted by class.*jobs/prepare\.py --data\.source shards.*data\.path"):
        mixed(open_dataset(settings_of("shards", path), ""), str(tmp_path / "work"))
    assert not (tmp_path / "work").exists()


def test_a_row_group_serves_one_split_and_image_ids_stay_in_the_order_of_the_source(tmp_path: Path) -> None:
    classes = [f"c{k:03d}" for k in range(9)]
    written = write_shards(rows_by_class(9, 40), str(tmp_path), classes, {"kind": "test"})
    assert written.table["uri"].to_pylist() == [f"{number}.png" for number in range(360)]
    stored = as_stored(written.table)
    assert stored["image_id"].to_pylist() != written.table["image_id"].to_pylist()
    splits = stored["split"].to_pylist()
    assert splits == sorted(splits, reverse=True)  # train before test
    in_group = zip(order.row_groups(stored).tolist(), splits, strict=True)
    assert len(set(in_group)) == int(order.row_groups(stored).max()) + 1
    assert open_shards(str(tmp_path), DataSettings(validation=0, test=0), 0).table.equals(written.table)


# -------------------------------------------------------------------------------------------- mixing


@given(
    images=st.lists(st.tuples(st.sampled_from(SPLITS), st.integers(1, 40)), max_size=60),
    seed=st.integers(0, 3),
)
def test_rows_are_drawn_split_by_split_and_cut_into_groups_and_files(images: list, seed: int) -> None:
    limits = Limits(group_rows=4, group_bytes=60, file_bytes=150)
    splits = np.array([split for split, _ in images], object)
    sizes = np.array([size for _, size in images], np.int64)
    rows = drawn(splits, seed)
    assert sorted(rows.tolist()) == list(range(len(images)))
    splits, sizes = splits[rows], sizes[rows]
    assert splits.tolist() == sorted(splits, key=SPLITS.index)
    place = cut(splits, sizes, limits)
    groups = [list(group) for _, group in itertools.groupby(range(len(images)), lambda i: tuple(place[i, :2]))]
    assert [tuple(place[group[0], :2]) for group in groups] == sorted({tuple(each[:2]) for each in place.tolist()})
    for group in groups:
        assert place[group, 2].tolist() == list(range(len(group)))
        assert len(set(splits[group])) == 1
        assert len(group) <= 4
        assert sizes[group].sum() <= 60
    for file in set(place[:, 0].tolist()):
        own = place[:, 0] == file
        assert place[own, 1].min() == 0
        assert sizes[own].sum() <= 150
    for before, after in itertools.pairwise(groups):  # as full as they may be
        same = splits[before[0]] == splits[after[0]]
        assert not same or len(before) == 4 or sizes[before].sum() + sizes[after[0]] > 60
        new_file = place[after[0], 0] > place[before[0], 0]
        in_file = sizes[place[:, 0] == place[before[0], 0]].sum()
        assert not new_file or in_file + sizes[after].sum() > 150


@given(images=st.integers(0, 10**7))
def test_row_groups_are_small_where_images_are_few(images: int) -> None:
    assert 8 <= Limits.for_images(images).group_rows <= 64
