"""Augmentation: the published distribution, never a black pixel, and the same picture as the chain of steps."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from protopnet import imaging
from protopnet.config import AugmentSettings
from protopnet.datasets import augment

PAPER = AugmentSettings()
SIZE = 64


def draws(count: int, width: int = 300, height: int = 240, recipe: AugmentSettings = PAPER) -> list[augment.Warp]:
    rng = np.random.default_rng(0)
    return [augment.draw(recipe, width, height, rng) for _ in range(count)]


def smooth_image(width: int, height: int) -> Image.Image:
    """Slow waves of colour, which survive any number of resamplings."""
    x, y = np.linspace(0, 1, width)[None, :, None], np.linspace(0, 1, height)[:, None, None]
    waves = np.sin(2 * np.pi * (np.array([1.3, 0.7, 2]) * x + np.array([0.5, 1.1, 1]) * y))
    return Image.fromarray((127 + 100 * waves).astype(np.uint8))


def close(shares: dict[int, float], counts: Counter[int], total: int) -> bool:
    """Whether counts fit the probabilities: the same outcomes, each within five standard deviations."""
    expected = {value for value, share in shares.items() if share > 0}
    return set(counts) == expected and all(
        abs(counts[v] - total * p) < 5 * math.sqrt(total * p * (1 - p)) for v, p in shares.items() if p > 0
    )


# --------------------------------------------------------------------------------------- distribution


def test_kinds_are_drawn_equally_often_and_flips_as_augmentor_rounds() -> None:
    warps = draws(6000)
    kinds = Counter(["rotate", "skew", "shear"].index(warp.kind) for warp in warps)
    assert close({0: 1 / 3, 1: 1 / 3, 2: 1 / 3}, kinds, 6000)
    assert close({0: 0.45, 1: 0.55}, Counter(int(warp.flipped) for warp in warps), 6000)


def test_rotations_are_whole_degrees_to_either_side_with_zero_twice_as_likely() -> None:
    angles = [warp.amount for warp in draws(12000) if warp.kind == "rotate"]
    shares = dict.fromkeys(range(-15, 16), 1 / 32) | {0: 1 / 16}
    assert close(shares, Counter(angles), len(angles))


def test_shears_are_minus_9_to_11_degrees_without_zero() -> None:
    angles = [warp.amount for warp in draws(12000) if warp.kind == "shear"]
    shares = dict.fromkeys(range(-9, 12), 1 / 22) | {-1: 2 / 22, 0: 0.0, 1: 2 / 22}
    assert close(shares, Counter(angles), len(angles))


def test_skews_pull_one_or_two_corners_outwards_by_up_to_a_fifth_of_the_longer_side() -> None:
    corners = np.array([(0, 0, 1), (1, 0, 1), (1, 1, 1), (0, 1, 1)])
    moved = Counter[int]()
    for warp in (warp for warp in draws(3000) if warp.kind == "skew"):
        assert 1 <= warp.amount <= math.ceil(0.2 * 300)
        matrix = warp.matrix @ augment._FLIP if warp.flipped else warp.matrix
        seen = corners @ np.linalg.inv(matrix).T  # where the image's corners end up in the output
        shift = (seen[:, :2] / seen[:, 2:] - corners[:, :2]) * (300, 240)
        outwards = shift * np.sign(corners[:, :2] - 0.5)
        assert outwards.min() > -1e-6
        assert np.allclose(outwards[outwards > 1e-6], warp.amount)
        moved[int((outwards > 1e-6).sum())] += 1
    assert close({1: 0.25, 2: 0.75}, moved, moved.total())  # corner, tilt


def test_all_twelve_skews_differ_and_are_drawn_with_augmentors_weights() -> None:
    assert len({direction.tobytes() for direction in augment._SKEWS}) == 12
    assert augment._SKEW_WEIGHTS.sum() == 1


def test_limits_of_the_settings_bound_the_draws() -> None:
    mild = AugmentSettings(rotate=3.9, skew=0.05, shear=2)
    warps = draws(900, recipe=mild)
    largest = {kind: max(abs(w.amount) for w in warps if w.kind == kind) for kind in ("rotate", "skew", "shear")}
    assert largest == {"rotate": 3, "skew": 15, "shear": 3}


def test_limits_of_zero_leave_the_image_as_it_is() -> None:
    still = AugmentSettings(rotate=0, skew=0, shear=0)
    assert all(warp.is_plain for warp in draws(50, recipe=still))


def test_the_same_generator_state_draws_the_same_view() -> None:
    first, second = (augment.draw(PAPER, 300, 240, np.random.default_rng((3, 1, 0, 17, 0))) for _ in range(2))
    assert (first.kind, first.amount, first.flipped) == (second.kind, second.amount, second.flipped)
    assert np.array_equal(first.matrix, second.matrix)


# ------------------------------------------------------------------------------------- plain recipes


def test_recipe_none_is_exactly_the_resize_of_every_other_path() -> None:
    image = smooth_image(97, 181)
    warp = draws(1, 97, 181, AugmentSettings(recipe="none"))[0]
    assert np.array_equal(augment.apply(image, warp, SIZE), imaging.resize(image, SIZE))


def test_recipe_flip_is_that_resize_or_its_mirror_image() -> None:
    image = smooth_image(97, 181)
    plain = imaging.resize(image, SIZE)
    warps = draws(40, 97, 181, AugmentSettings(recipe="flip"))
    assert {warp.flipped for warp in warps} == {True, False}
    for warp in warps:
        expected = plain[:, ::-1] if warp.flipped else plain
        assert np.array_equal(augment.apply(image, warp, SIZE), expected)


# ------------------------------------------------------------------------------------------- geometry


@settings(max_examples=200, deadline=None)
@given(
    width=st.integers(1, 700),
    height=st.integers(1, 700),
    seed=st.integers(0, 2**32),
    strong=st.booleans(),
)
def test_a_white_image_stays_white(width: int, height: int, seed: int, strong: bool) -> None:
    recipe = AugmentSettings(rotate=45, skew=0.5, shear=45) if strong else PAPER
    warp = augment.draw(recipe, width, height, np.random.default_rng(seed))
    picture = augment.apply(Image.new("RGB", (width, height), "white"), warp, SIZE)
    assert picture.shape == (SIZE, SIZE, 3)
    assert picture.dtype == np.uint8
    assert picture.min() == 255


@settings(max_examples=200, deadline=None)
@given(width=st.integers(60, 240), height=st.integers(60, 240), seed=st.integers(0, 2**32))
def test_a_view_shows_a_fair_part_of_the_image(width: int, height: int, seed: int) -> None:
    warp = augment.draw(PAPER, width, height, np.random.default_rng(seed))
    ends = np.array([(0, 0.5, 1), (1, 0.5, 1), (0.5, 0, 1), (0.5, 1, 1)]) @ warp.matrix.T
    left, right, top, bottom = ends[:, :2] / ends[:, 2:]
    assert abs(right - left)[0] > 0.2
    assert abs(bottom - top)[1] > 0.2


@pytest.mark.parametrize("degrees", [1, 8, 15, 30, 45])
@pytest.mark.parametrize(("width", "height"), [(100, 100), (160, 90), (50, 200)])
def test_the_inscribed_rectangle_is_the_largest_of_its_shape(degrees: int, width: int, height: int) -> None:
    crop_width, crop_height = augment.shrink_into(width, height, degrees, width, height)
    scales = np.linspace(0, 1, 4001)
    angle = math.radians(degrees)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    corners = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]) * (width, height)
    inside = [(np.abs(scale * corners @ turn.T) <= (width / 2, height / 2)).all() for scale in scales]
    brute_area = width * height * scales[np.flatnonzero(inside).max()] ** 2
    assert crop_width * crop_height == pytest.approx(brute_area, rel=2e-3)


def test_a_rotation_is_cropped_as_augmentor_crops_it() -> None:
    """Against Augmentor's formula on the expanded canvas, word for word, its bracket included."""
    width, height, angle = 300, 240, math.radians(15)
    canvas_width = width * math.cos(angle) + height * math.sin(angle)
    canvas_height = height * math.cos(angle) + width * math.sin(angle)
    tan = math.sin(angle) / math.sin(math.radians(75))
    left = tan * (canvas_height - canvas_width * tan)
    left = left / 1 - tan**2
    top = tan * (canvas_width - left)
    crop_width, crop_height = augment.rotation_crop(15, width, height)
    assert crop_width == pytest.approx(canvas_width - 2 * left, abs=0.2)
    assert crop_height == pytest.approx(canvas_height - 2 * top, abs=0.2)


# ------------------------------------------------------------------- one warp equals the chain of steps


def warp_bicubic(image: Image.Image, size: tuple[int, int], method: Image.Transform, to_source) -> Image.Image:
    return image.transform(size, method, tuple(to_source), Image.Resampling.BICUBIC)


def chain_rotate(image: Image.Image, degrees: int) -> Image.Image:
    """Rotate on a larger canvas, crop, resize back: as the offline recipe does it."""
    turned = image.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    crop_width, crop_height = augment.rotation_crop(degrees, *image.size)
    left, top = (turned.width - crop_width) / 2, (turned.height - crop_height) / 2
    box = [round(edge) for edge in (left, top, turned.width - left, turned.height - top)]
    return turned.crop(tuple(box)).resize(image.size, Image.Resampling.BICUBIC)


def chain_skew(image: Image.Image, direction: int, pixels: int) -> Image.Image:
    size = np.array(image.size)
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1)]) * size
    to_source = augment.homography(corners + augment._SKEWS[direction] * pixels, corners)
    return warp_bicubic(image, image.size, Image.Transform.PERSPECTIVE, to_source.ravel()[:8])


def chain_shear(image: Image.Image, degrees: int) -> Image.Image:
    """Along x: slant on a wider canvas, cut both slanted ends off, resize back."""
    width, height = image.size
    slope = math.tan(math.radians(abs(degrees)))
    lost = math.ceil(slope * height)
    coefficients = (1, slope, -lost, 0, 1, 0) if degrees > 0 else (1, -slope, 0, 0, 1, 0)
    slanted = warp_bicubic(image, (width + lost, height), Image.Transform.AFFINE, coefficients)
    return slanted.crop((lost, 0, width, height)).resize(image.size, Image.Resampling.BICUBIC)


def difference(chain: Image.Image, image: Image.Image, warp: augment.Warp) -> float:
    """Mean absolute difference, in grey levels, between the chain with its final resize and the single warp."""
    expected = imaging.resize(chain, SIZE).astype(float)
    return float(np.abs(expected - augment.apply(image, warp, SIZE)).mean())


@pytest.mark.parametrize("degrees", [-15, -4, 1, 9, 15])
def test_rotating_in_one_warp_equals_the_chain(degrees: int) -> None:
    image = smooth_image(320, 240)
    warp = augment.Warp("rotate", degrees, False, augment.rotation(degrees, 320, 240))
    assert difference(chain_rotate(image, degrees), image, warp) < 1.5


@pytest.mark.parametrize("direction", range(12))
def test_skewing_in_one_warp_equals_the_chain(direction: int) -> None:
    image = smooth_image(320, 240)
    warp = augment.Warp("skew", 50, False, augment.skew(direction, 50, 320, 240))
    assert difference(chain_skew(image, direction, 50), image, warp) < 1.0


@pytest.mark.parametrize("degrees", [-9, -1, 5, 11])
def test_shearing_in_one_warp_equals_the_chain(degrees: int) -> None:
    image = smooth_image(320, 240)
    warp = augment.Warp("shear", degrees, False, augment.shear(degrees, "x", 320, 240))
    assert difference(chain_shear(image, degrees), image, warp) < 1.0
    # Along y it is the same thing seen in a mirror along the diagonal.
    tall, diagonal = image.transpose(Image.Transpose.TRANSPOSE), Image.Transpose.TRANSPOSE
    along_y = augment.Warp("shear", degrees, False, augment.shear(degrees, "y", 240, 320))
    assert difference(chain_shear(image, degrees).transpose(diagonal), tall, along_y) < 1.0


def test_a_flip_comes_after_everything_else() -> None:
    image = smooth_image(320, 240)
    warp = next(warp for warp in draws(100) if warp.flipped and warp.kind == "skew")
    unflipped = augment.Warp(warp.kind, warp.amount, False, warp.matrix @ augment._FLIP)
    mirrored = augment.apply(image, unflipped, SIZE)[:, ::-1].astype(float)
    assert np.abs(augment.apply(image, warp, SIZE) - mirrored).mean() < 0.1


def test_a_large_image_is_averaged_before_it_is_warped() -> None:
    """Stripes finer than the output's pixels turn into grey, not into moiré."""
    stripes = np.zeros((600, 600, 3), np.uint8)
    stripes[:, ::2] = 255
    warp = augment.Warp("shear", 5, False, augment.shear(5, "y", 600, 600))
    picture = augment.apply(Image.fromarray(stripes), warp, SIZE).astype(float)
    assert abs(picture.mean() - 127.5) < 3
    assert picture.std() < 15  # 127 without averaging


def test_a_reduced_image_shows_the_same_view() -> None:
    image = smooth_image(640, 480)
    for warp in draws(20, 640, 480):
        full, reduced = augment.apply(image, warp, SIZE), augment.apply(image.reduce(2), warp, SIZE)
        assert np.abs(full.astype(float) - reduced).mean() < 2.0


def test_a_view_keeps_the_object_or_shows_the_most_of_it_that_was_drawn() -> None:
    corner = np.array([(0.02, 0.02), (0.5, 0.5)])  # every rotation and shear to one side cuts the corner off
    free, seeds = [], range(200)
    for seed in seeds:
        free.append(augment.seen_of(corner, augment.draw(PAPER, 300, 240, np.random.default_rng(seed))))
    keeping = PAPER.model_copy(update={"keep_object": 1.0})
    kept = [augment.draw_keeping(keeping, 300, 240, np.random.default_rng(seed), corner) for seed in seeds]
    assert np.mean(free) < 0.9
    assert np.mean([augment.seen_of(corner, warp) == 1 for warp in kept]) > 0.97  # of ten draws
    assert len({warp.amount for warp in kept}) > 5  # and isn't always the same
    everything = np.random.default_rng(0).random((500, 2))
    views = [augment.draw_keeping(keeping, 300, 240, np.random.default_rng(seed), everything) for seed in seeds]
    assert np.mean([augment.seen_of(everything, view) for view in views]) > 0.9


def test_places_are_seen_where_the_picture_shows_them() -> None:
    left = np.array([(x, 0.5) for x in (0.1, 0.3, 0.4, 0.6)])
    half = augment.Warp("shear", 1, False, np.diag([0.5, 1.0, 1.0]))  # shows the left half
    assert augment.seen_of(left, half) == 0.75
