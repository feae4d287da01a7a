"""The nearest patches: the authors' figures, a brute force search, and no dependence on how images are cut."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patch_search import Search, places

from protopnet.passes.candidates import (
    CANDIDATE_SCHEMA,
    Cutoff,
    Reducer,
    rank_of_image,
    rounding,
)

# ------------------------------------------------------------------------------------------------- properties


@st.composite
def searches(draw: st.DrawFn) -> Search:
    """Few values, so that many distances are equal and all are exact; some images are copies of others."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    images, classes, per_class = draw(st.integers(3, 20)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    h, w = draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
    levels = draw(st.integers(2, 9))
    size = (images, 3, h + draw(st.integers(0, 2)), w + draw(st.integers(0, 2)))
    latents = random.integers(0, levels, size).astype(np.float32) / 8
    labels = np.concatenate([np.arange(classes), random.integers(0, classes, images - classes)]).astype(np.int32)
    source = random.integers(0, images, images)
    copies = random.random(images) < 0.3
    latents[copies] = latents[source[copies]]
    prototypes = random.integers(0, levels, (classes * per_class, 3, h, w)).astype(np.float32) / 8
    return Search(
        torch.from_numpy(latents),
        labels,
        torch.from_numpy(prototypes),
        np.repeat(np.arange(classes), per_class),
    )


def in_shards(
    search: Search, shards: int, batch: int, k: int, random: np.random.Generator, **options: bool
) -> pa.Table:
    """The images in any order, cut into shards and batches; their tables merged in any order, at once or by and by."""
    order = random.permutation(len(search.labels))
    parts = [search.nearest(k, part, batch, **options) for part in np.array_split(order, shards) if len(part)]
    random.shuffle(parts)  # type: ignore[arg-type]
    reducer = Reducer(k, least=int(random.choice([0, 5, 10_000])))
    for part in parts:
        reducer.add(part)
    return reducer.result()


@given(search=searches(), seed=st.integers(0, 2**32), k=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_the_result_is_that_of_brute_force_however_images_are_cut(search: Search, seed: int, k: int) -> None:
    random = np.random.default_rng(seed)
    expected = [search.all_patches(p)[:k] for p in range(len(search.classes))]
    for shards in (1, 3, 7):
        for batch in (1, 64):
            table = in_shards(search, shards, batch, k, random)
            assert table.schema == CANDIDATE_SCHEMA
            for p, patches in enumerate(expected):
                assert places(table, p) == [patch[1:] for patch in patches]
            assert table["distance"].to_pylist() == [patch[0] for patches in expected for patch in patches]


@given(search=searches(), seed=st.integers(0, 2**32), k=st.integers(1, 6), kind=st.sampled_from(["log", "cosine"]))
@settings(max_examples=30, deadline=None)
def test_one_per_image_takes_the_best_of_each_image_of_any_class(search: Search, seed: int, k: int, kind: str) -> None:
    search.kind = "log"
    random = np.random.default_rng(seed)
    for shards, batch in ((1, 64), (3, 1), (7, 64)):
        table = in_shards(search, shards, batch, k, random, any_class=True, one_per_image=True)
        for p in range(len(search.classes)):
            best = {patch[1]: patch for patch in reversed(search.all_patches(p, any_class=True))}
            assert places(table, p) == [patch[1:] for patch in sorted(best.values())[:k]]


@given(
    search=searches(),
    seed=st.integers(0, 2**32),
    k=st.integers(1, 6),
    spare=st.sampled_from([0, 4]),
    one_per_image=st.booleans(),
    workers=st.integers(1, 3),
)
@settings(max_examples=60)
def test_what_the_cutoff_leaves_out_changes_nothing(
    search: Search, seed: int, k: int, spare: int, one_per_image: bool, workers: int
) -> None:
    """Whichever worker looks through which images: each knows only what it has seen itself."""
    images = np.random.default_rng(seed).permutation(len(search.labels))
    options = {"any_class": one_per_image, "one_per_image": one_per_image, "spare": spare}
    cutoffs = [Cutoff(len(search.classes), k) for _ in range(workers)]
    all_, left = (Reducer(k, spare, one_per_image=one_per_image) for _ in range(2))
    for number, start in enumerate(range(0, len(images), 2)):
        table = search.map(images[start : start + 2], k, **options)
        all_.add(table)
        passing = cutoffs[number % workers].passing(table, one_per_image=one_per_image)
        left.add(passing)
    assert left.result().equals(all_.result())


def test_images_in_no_order_of_classes_send_few_candidates() -> None:
    torch.manual_seed(0)
    search = Search(torch.rand(600, 8, 4, 4), np.arange(600) % 3, torch.rand(30, 8, 1, 1), np.arange(30) // 10)
    cutoff, found, sent = Cutoff(30, 10), 0, 0
    for start in range(0, 600, 20):
        table = search.map(np.arange(start, start + 20), 10)
        found += len(table)
        sent += len(cutoff.passing(table))
    assert found == 30 * 30 * 10
    assert sent < 30 * 10 * (2 + np.log(200 * 16 / 10))  # k of the first batch, then k more for each e-fold of patches


def test_cosine_ranks_by_the_angle() -> None:
    latents = torch.tensor([[1.0, 0.0], [0.1, 0.1], [0.9, 0.8], [0.0, 1.0]]).view(4, 2, 1, 1)
    search = Search(latents, np.zeros(4, np.int32), torch.tensor([0.5, 0.5]).view(1, 2, 1, 1), np.array([0]), "cosine")
    table = search.nearest(3)
    assert table["image_id"].to_pylist() == [2, 1, 0]
    assert table["distance"].to_pylist() == pytest.approx([0.00186, 0.00259, 0.29304], abs=1e-4)


def test_a_vector_is_the_patch_it_names() -> None:
    random = torch.Generator().manual_seed(0)
    search = Search(
        torch.rand(5, 4, 6, 5, generator=random),
        np.array([0, 1, 0, 1, 1], np.int32),
        torch.rand(4, 4, 2, 3, generator=random),
        np.array([0, 0, 1, 1]),
    )
    for candidate in search.nearest(3).to_pylist():
        row, column = candidate["row"], candidate["column"]
        patch = search.latents[candidate["image_id"], :, row : row + 2, column : column + 3]
        assert candidate["vector"] == patch.flatten().tolist()
        prototype = search.prototypes[candidate["prototype"]].double()
        assert candidate["distance"] == pytest.approx(float((patch.double() - prototype).square().sum()), rel=1e-12)
        assert candidate["label"] == search.classes[candidate["prototype"]]


def test_prototypes_of_absent_classes_emit_nothing() -> None:
    search = Search(torch.rand(2, 3, 2, 2), np.array([1, 1], np.int32), torch.rand(4, 3, 1, 1), np.array([0, 0, 1, 2]))
    assert set(search.nearest(2)["prototype"].to_pylist()) == {2}
    search.classes = np.array([0, 0, 2, 2])
    assert search.nearest(2).num_rows == 0


def test_what_is_not_finite_is_no_candidate() -> None:
    latents = torch.full((3, 2, 1, 1), torch.nan)
    latents[1] = 0.5
    search = Search(latents, np.zeros(3, np.int32), torch.rand(1, 2, 1, 1), np.array([0]))
    assert search.nearest(3)["image_id"].to_pylist() == [1]


def noisy_copies(copies: int, noise: float) -> Search:
    """One image many times, as maps from batches of different sizes would show it; and one that is far away."""
    random = np.random.default_rng(1)
    latents = np.repeat(random.random((1, 64, 2, 2)), copies + 1, axis=0)
    latents[:-1] += noise * random.standard_normal((copies, 64, 2, 2))
    latents[-1] = 1 - latents[-1]
    prototypes = latents[0, None, :, 1:, :1] + 0.1 * random.standard_normal((1, 64, 1, 1))
    as_float = (torch.from_numpy(array.astype(np.float32)) for array in (latents, prototypes))
    maps, prototype = as_float
    return Search(maps, np.zeros(copies + 1, np.int32), prototype, np.array([0]))


def test_spare_candidates_are_those_that_rounding_could_put_first() -> None:
    search = noisy_copies(copies=30, noise=1e-6)
    kept = search.nearest(1, batch=7, spare=64)
    assert set(kept["image_id"].to_pylist()) == set(range(30))
    assert search.nearest(1, batch=7)["image_id"].to_pylist() == kept["image_id"].to_pylist()[:1]
    assert search.nearest(1, batch=7, spare=5).num_rows == 6
    assert noisy_copies(copies=30, noise=1e-2).nearest(1, batch=7, spare=64).num_rows == 1


def test_images_of_one_colour_do_not_hide_one_another() -> None:
    """Every patch of such an image is its best: there are more of them than are measured for one image."""
    search = Search(torch.full((10, 3, 7, 7), 0.5), np.zeros(10, np.int32), torch.rand(2, 3, 1, 1), np.zeros(2))
    for batch in (1, 64):
        table = search.nearest(6, batch=batch, any_class=True, one_per_image=True)
        assert places(table, 0) == places(table, 1) == [(image, 0, 0) for image in range(6)]


def test_the_second_best_patch_of_an_image_is_kept_where_rounding_could_put_it_first() -> None:
    latents = torch.zeros(2, 1, 1, 3)
    latents[0, 0, 0] = torch.tensor([0.5, 0.5 + 1e-7, 0.9])
    latents[1, 0, 0] = torch.tensor([0.7, 0.8, 0.9])
    search = Search(latents, np.zeros(2, np.int32), torch.full((1, 1, 1, 1), 0.4), np.zeros(1))
    in_doubt = search.map(np.arange(2), 2, one_per_image=True, spare=64)
    assert places(in_doubt, 0) == [(0, 0, 0), (0, 0, 1), (1, 0, 0)]
    assert rank_of_image(in_doubt).tolist() == [0, 0, 1]
    assert places(search.map(np.arange(2), 1, one_per_image=True, spare=64), 0) == [(0, 0, 0), (0, 0, 1)]
    assert places(search.map(np.arange(2), 2, one_per_image=True), 0) == [(0, 0, 0), (1, 0, 0)]


def test_rounding_grows_with_the_root_of_the_distance() -> None:
    near, middle, far = rounding(np.array([0.0, 1.0, 100.0]))
    assert near < 1e-5
    assert far == pytest.approx(10 * middle, rel=0.1)


@pytest.fixture
def large() -> Search:
    """Norms so large that float32 maps of distances are off in the fifth digit."""
    random = torch.Generator().manual_seed(3)
    return Search(
        torch.rand(12, 512, 5, 5, generator=random),
        np.zeros(12, np.int32),
        torch.rand(6, 512, 1, 1, generator=random),
        np.zeros(6, np.int64),
    )


def test_distances_are_exact_for_long_vectors(large: Search) -> None:
    table = large.nearest(4, batch=5)
    for p in range(6):
        expected = large.all_patches(p)[:4]
        assert places(table, p) == [patch[1:] for patch in expected]
