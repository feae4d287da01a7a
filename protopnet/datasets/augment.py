"""Augmentation of training images on the fly, equal in distribution to the paper's offline set.

The authors write 30 augmented copies of each image to disk with the package Augmentor: ten by each of three
pipelines (rotate, skew, shear; each followed by a left-right flip). Here a copy is drawn when it is needed. A
draw is one homography from the picture the network sees back to the source image, with the pipeline's crop,
its flip and the resize to the network's input all in the one matrix, so a pixel is interpolated once; the
authors interpolate three times and pass through JPEG in between.

Coordinates are fractions of the image, (0, 0) the top left corner and (1, 1) the bottom right one. That makes
a draw independent of the resolution at which the image is decoded or cached, though not of its aspect ratio.

What is kept of the published recipe, and what isn't:

* Whole degrees and whole pixels, the uneven weights of angles and of skews, and the smaller-than-possible
  crop after a rotation are the recipe's: they decide what the network sees.
* Where Augmentor crashes (long thin images), leaves black pixels (rounding) or nearly nothing of the image,
  the crop is shrunk, or the draw weakened, until it is all image: see `MIN_KEPT`.

This module draws and applies; which image gets which generator is the loader's affair.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from protopnet import imaging
from protopnet.config import AugmentSettings

# Augmentor tests `round(uniform(0, 1), 1) <= 0.5`: the rounding lets draws up to 0.55 through, so the
# published "probability 0.5" flips 55 % of the pictures.
FLIP_PROBABILITY = 0.55

# Augmentor draws one of four kinds of skew, three of which are tilts: in effect each of the four tilts has
# probability 1/4 * 1/4 + 1/4 * 1/2 and each of the eight corner skews 1/4 * 1/8.
TILT_PROBABILITY = 3 / 16
CORNER_PROBABILITY = 1 / 32

# A rotation or shear leaves at least this share of each side of the image. Augmentor has no such bound: at 15
# degrees it crops an image three times as wide as high to 19 % of its height, and crashes on one four times as
# wide as high.
MIN_KEPT = 0.25

TRIES = 10  # draws of a view that is to keep the object

# Corners of the image in the order of `_SKEWS`: top left, top right, bottom right, bottom left.
_UNIT_CORNERS = np.array([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)])

# Direction in which each corner is pulled outwards by each of the twelve skews: four tilts, then eight
# corners.
_SKEWS = np.array(
    [
        [(0, -1), (0, 0), (0, 0), (0, 1)],  # left side grows
        [(0, 0), (0, -1), (0, 1), (0, 0)],  # right side
        [(-1, 0), (1, 0), (0, 0), (0, 0)],  # top
        [(0, 0), (0, 0), (1, 0), (-1, 0)],  # bottom
        [(-1, 0), (0, 0), (0, 0), (0, 0)],
        [(0, -1), (0, 0), (0, 0), (0, 0)],
        [(0, 0), (1, 0), (0, 0), (0, 0)],
        [(0, 0), (0, -1), (0, 0), (0, 0)],
        [(0, 0), (0, 0), (1, 0), (0, 0)],
        [(0, 0), (0, 0), (0, 1), (0, 0)],
        [(0, 0), (0, 0), (0, 0), (-1, 0)],
        [(0, 0), (0, 0), (0, 0), (0, 1)],
    ],
    dtype=np.float64,
)
_SKEW_WEIGHTS = np.array([TILT_PROBABILITY] * 4 + [CORNER_PROBABILITY] * 8)

_FLIP = np.array([[-1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


@dataclass(frozen=True)
class Warp:
    """One draw: where each point of the network's picture lies in the source image.

    `matrix` is a 3x3 homography from the unit square of the output to the unit square of the source, flip
    included. `amount` is what was drawn: degrees of a rotation (anticlockwise) or shear, pixels of a skew.
    """

    kind: Literal["none", "rotate", "skew", "shear"]
    amount: int
    flipped: bool
    matrix: np.ndarray

    @property
    def is_plain(self) -> bool:
        """Whether the picture is only resized (and perhaps flipped)."""
        return self.kind == "none" or self.amount == 0


def draw(settings: AugmentSettings, width: int, height: int, rng: np.random.Generator) -> Warp:
    """Draw one augmented view of an image of `width` x `height` pixels (its full size, upright).

    The same generator state and size give the same view. Angles are whole degrees, so a fractional limit in
    the settings counts as the whole number below it.
    """
    if settings.recipe == "none":
        return Warp("none", 0, False, np.eye(3))
    kind: Literal["none", "rotate", "skew", "shear"] = "none"
    amount, matrix = 0, np.eye(3)
    if settings.recipe == "paper":
        choice = rng.integers(3)
        if choice == 0:
            kind, (amount, matrix) = "rotate", _draw_rotation(int(settings.rotate), width, height, rng)
        elif choice == 1:
            kind, (amount, matrix) = "skew", _draw_skew(settings.skew, width, height, rng)
        else:
            kind, (amount, matrix) = "shear", _draw_shear(int(settings.shear), width, height, rng)
    flipped = bool(rng.random() < FLIP_PROBABILITY)
    return Warp(kind, amount, flipped, matrix @ _FLIP if flipped else matrix)


def draw_keeping(
    settings: AugmentSettings, width: int, height: int, rng: np.random.Generator, object_N2: np.ndarray
) -> Warp:
    """As `draw`, again until `settings.keep_object` of the object is seen; of `TRIES` draws without that the one that shows
    most. object_N2: places on it, x and y in fractions of the image."""
    best, most = draw(settings, width, height, rng), -1.0
    warp = best
    for _ in range(TRIES):
        if (share := seen_of(object_N2, warp)) > most:
            best, most = warp, share
        if most >= settings.keep_object:
            break
        warp = draw(settings, width, height, rng)
    return best


def seen_of(places_N2: np.ndarray, warp: Warp) -> float:
    """Share of places of the source image that are in the picture."""
    homogeneous_N3 = np.column_stack([places_N2, np.ones(len(places_N2))]) @ np.linalg.inv(warp.matrix).T
    view_N2 = homogeneous_N3[:, :2] / homogeneous_N3[:, 2:]
    return float(((view_N2 >= 0) & (view_N2 <= 1)).all(1).mean())


def apply(image: Image.Image, warp: Warp, size: int) -> np.ndarray:
    """The picture of `size` x `size` pixels that `warp` shows of an RGB image, uint8 (size, size, 3).

    `image` may be a reduced version of the one the warp was drawn for. A warp that only resizes and flips
    equals `imaging.resize` exactly. Otherwise one bilinear transform, after a box reduction by a whole factor
    where the source has at least twice the resolution of the output (a transform looks at 2 x 2 source pixels
    however much it shrinks). Bilinear, because the chain it stands for ends with a bilinear resize, as
    testing does: on photographs it comes closer to that chain than a bicubic transform does, in half the
    time.
    """
    if warp.is_plain:
        pixels = imaging.resize(image, size)
        return np.ascontiguousarray(pixels[:, ::-1]) if warp.flipped else pixels
    across, down = _reduction(image, warp, size)
    # Not the reduced image's own size: its last column and row may stand for less than a whole pixel.
    to_pixels = np.diag([image.width / across, image.height / down, 1.0])
    to_source = to_pixels @ warp.matrix @ np.diag([1 / size, 1 / size, 1.0])
    if (across, down) != (1, 1):
        image = image.reduce((across, down))
    coefficients = (to_source / to_source[2, 2]).ravel()
    # Rotations and shears are affine, which spares PIL a division for each pixel.
    method, count = (Image.Transform.PERSPECTIVE, 8) if warp.kind == "skew" else (Image.Transform.AFFINE, 6)
    warped = image.transform((size, size), method, tuple(coefficients[:count]), Image.Resampling.BILINEAR)
    return np.asarray(warped)


# ---------------------------------------------------------------------------------------------- rotation


def _draw_rotation(limit: int, width: int, height: int, rng: np.random.Generator) -> tuple[int, np.ndarray]:
    """A side by a coin, then a whole angle up to the limit: 0 is twice as likely as any other angle."""
    side = 1 if rng.integers(2) else -1
    degrees = side * int(rng.integers(limit + 1))
    return degrees, rotation(degrees, width, height)


def rotation(degrees: float, width: int, height: int) -> np.ndarray:
    """Rotate anticlockwise about the centre and crop to `rotation_crop`: output to source, in fractions."""
    crop_width, crop_height = rotation_crop(degrees, width, height)
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    # Going back from the output to the source turns clockwise; y points down.
    turn = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    return (
        np.diag([1.0 / width, 1.0 / height, 1.0])
        @ _shift(width / 2, height / 2)
        @ turn
        @ np.diag([crop_width, crop_height, 1.0])
        @ _shift(-0.5, -0.5)
    )


def rotation_crop(degrees: float, width: int, height: int) -> tuple[float, float]:
    """Width and height in pixels of the centred rectangle cut from the rotated image.

    Augmentor's own rectangle, which is not the largest: its formula inscribes a smaller one, and a missing
    bracket (`E / 1 - t**2` for `E / (1 - t**2)`, with t the tangent) makes that a little wider and lower.
    Written out without its rounding to whole pixels, the two sides are those below. Where it would keep less
    than `MIN_KEPT` of a side, the largest rectangle with the image's own aspect ratio takes its place.
    """
    angle = math.radians(abs(degrees))
    cos, sin, tan = math.cos(angle), math.sin(angle), math.tan(angle)
    crop_width = width * cos - height * sin * (1 - 2 * tan**2)
    crop_height = height * cos - width * sin - 2 * height * sin * tan**3
    if crop_width < MIN_KEPT * width or crop_height < MIN_KEPT * height:
        crop_width, crop_height = float(width), float(height)
    return shrink_into(crop_width, crop_height, degrees, width, height)


def shrink_into(
    crop_width: float, crop_height: float, degrees: float, width: float, height: float
) -> tuple[float, float]:
    """The largest rectangle of the given aspect ratio, no larger than given, inside the rotated image.

    A centred rectangle lies inside the rotated one exactly if its bounding box, seen in the frame of the
    image, is no larger than the image.
    """
    angle = math.radians(abs(degrees))
    cos, sin = math.cos(angle), math.sin(angle)
    scale = min(
        1.0,
        width / (crop_width * cos + crop_height * sin),
        height / (crop_width * sin + crop_height * cos),
    )
    return crop_width * scale, crop_height * scale


# -------------------------------------------------------------------------------------------------- skew


def _draw_skew(limit: float, width: int, height: int, rng: np.random.Generator) -> tuple[int, np.ndarray]:
    """One of the twelve skews by 1 to ceil(limit * longer side) whole pixels; none if the limit is zero."""
    furthest = math.ceil(max(width, height) * limit)
    direction = int(rng.choice(len(_SKEWS), p=_SKEW_WEIGHTS))
    pixels = int(rng.integers(1, furthest + 1)) if furthest else 0
    return pixels, skew(direction, pixels, width, height)


def skew(direction: int, pixels: float, width: int, height: int) -> np.ndarray:
    """Pull corners outwards by `pixels` and look at the original frame: output to source, in fractions.

    All of the frame stays covered by the image, since no corner moves inwards.
    """
    pulled = _UNIT_CORNERS + _SKEWS[direction] * pixels / np.array([width, height])
    return homography(pulled, _UNIT_CORNERS)


def homography(from_points: np.ndarray, to_points: np.ndarray) -> np.ndarray:
    """The 3x3 matrix, its last element 1, that takes four points (4, 2) to four others."""
    rows, targets = [], []
    for (x, y), (u, v) in zip(from_points, to_points, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        targets += [u, v]
    solution = np.linalg.solve(np.array(rows), np.array(targets))
    return np.append(solution, 1.0).reshape(3, 3)


# ------------------------------------------------------------------------------------------------- shear


def _draw_shear(limit: int, width: int, height: int, rng: np.random.Generator) -> tuple[int, np.ndarray]:
    """A whole angle and an axis. With limit 10: -9 to -1 or 1 to 11 degrees, where -1 and 1 are twice as
    likely.

    Augmentor truncates a uniform draw towards zero and then adds one degree, except to -1.
    """
    axis: Literal["x", "y"] = "x" if rng.integers(2) else "y"
    degrees = int(rng.uniform(-limit - 1, limit + 1))
    if degrees != -1:
        degrees += 1
    degrees = degrees if limit else 0
    return degrees, shear(degrees, axis, width, height)


def shear(degrees: float, axis: Literal["x", "y"], width: int, height: int) -> np.ndarray:
    """Slant along an axis and crop the sides the slant leaves empty: output to source, in fractions."""
    along, across = (width, height) if axis == "x" else (height, width)
    slope = math.tan(math.radians(abs(degrees)))
    lost = math.ceil(slope * across)  # whole pixels, as the recipe crops
    if lost > (1 - MIN_KEPT) * along:
        lost_share = 1 - MIN_KEPT
        slope = lost_share * along / across
    else:
        lost_share = lost / along
    tilt = slope * across / along  # how far one end of the image moves against the other, a fraction
    # Positive: source = out + tilt * other, the crop starting at the source's edge. Negative: mirrored.
    offset, sign = (0.0, 1.0) if degrees > 0 else (lost_share, -1.0)
    kept = 1 - lost_share
    if axis == "x":
        return np.array([[kept, sign * tilt, offset], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    return np.array([[1.0, 0.0, 0.0], [sign * tilt, kept, offset], [0.0, 0.0, 1.0]])


# ---------------------------------------------------------------------------------------------- pixels


def _shift(x: float, y: float) -> np.ndarray:
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])


def _reduction(image: Image.Image, warp: Warp, size: int) -> tuple[int, int]:
    """Whole factors across and down by which the warp shows the image smaller than it is, at least 1."""
    corners = np.column_stack([_UNIT_CORNERS, np.ones(4)]) @ warp.matrix.T
    points = corners[:, :2] / corners[:, 2:] * (image.width, image.height)
    top_left, top_right, bottom_right, bottom_left = points
    across = (_distance(top_left, top_right) + _distance(bottom_left, bottom_right)) / 2
    down = (_distance(top_left, bottom_left) + _distance(top_right, bottom_right)) / 2
    return max(1, int(across / size)), max(1, int(down / size))


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(math.hypot(*(a - b)))
