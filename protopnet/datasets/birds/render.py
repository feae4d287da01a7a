"""One picture of a bird: pose, scene, light, and the key points that can be seen in it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from .anatomy import LEG_LENGTH, PART_ID, Bird, pose
from .body import BODY, draw_breast, draw_legs, draw_tail, draw_trunk, draw_wing
from .canvas import Canvas, Frame, Points, points
from .head import draw_beak, draw_crest, draw_face, tag_crown
from .kinds import Kind
from .plumage import draw_plumage
from .scene import draw_clutter, draw_landscape, draw_occluder, draw_perch

OCCLUDED_SHARE = 0.4
NOMINAL_SPAN = 1.55  # body lengths that a bird of scale 1 would fill the frame with
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class KeyPoint:
    """Where a part can be seen, in fractions of width and height."""

    part: str
    x: float
    y: float


@dataclass(frozen=True)
class Picture:
    """A finished picture; `part_map` holds for each supersampled pixel the visible part (`PART_ID`) or 0."""

    image: Image.Image
    parts: list[KeyPoint]
    part_map: npt.NDArray[np.uint8]


def render_bird(kind: Kind, rng: np.random.Generator, size: int) -> tuple[Image.Image, list[KeyPoint]]:
    """Draw one bird of a kind; the picture (RGB) and the key points of its visible parts."""
    picture = render(kind, rng, size)
    return picture.image, picture.parts


def render(kind: Kind, rng: np.random.Generator, size: int) -> Picture:
    """Draw one bird of a kind, with the map of parts beside the picture."""
    factor = 3 if size <= 256 else 2
    side = size * factor
    canvas = Canvas(draw_landscape(side, rng))
    draw_clutter(canvas, rng)
    body = _place_body(kind, side, rng)
    bird = pose(kind.variants, draw_plumage(rng), body, rng)
    draw_perch(canvas, body.place(points((0.09, 0.27 + LEG_LENGTH[kind.variants["legs"]]))), body, rng)
    keys = draw_bird(canvas, bird, rng)
    silhouette = _coverage(canvas, factor)
    if rng.random() < OCCLUDED_SHARE:
        draw_occluder(canvas, body, rng)
    part_map = np.asarray(canvas.parts)
    image = _light(canvas.image.reduce(factor), silhouette, _coverage(canvas, factor), rng)
    return Picture(image, _visible(keys, part_map, bird), part_map)


def draw_bird(canvas: Canvas, bird: Bird, rng: np.random.Generator) -> dict[str, Points]:
    """Paint the bird from back to front; key points of all its parts."""
    keys = {
        "legs": draw_legs(canvas, bird),
        "tail": draw_tail(canvas, bird),
        "crest": draw_crest(canvas, bird),
        "beak": draw_beak(canvas, bird),
    }
    draw_trunk(canvas, bird)
    keys |= {
        "belly": bird.body.place(points((0.12, 0.24))),
        "breast": draw_breast(canvas, bird, rng),
        "wing": draw_wing(canvas, bird, rng),
        "face": draw_face(canvas, bird),
    }
    tag_crown(canvas, bird)
    return keys


def _place_body(kind: Kind, side: int, rng: np.random.Generator) -> Frame:
    """Size, tilt, direction and position, such that the bird fits the frame but for a feather tip."""
    scale = side * rng.uniform(0.6, 1.0) / NOMINAL_SPAN
    turn, flip = rng.uniform(-0.35, 0.35), bool(rng.random() < 0.5)
    extent = Frame.at(0, 0, turn, 1.0, flip).place(_extent(kind))
    low, high = extent.min(axis=0), extent.max(axis=0)
    scale = min(scale, 0.98 * side / float((high - low).max()))
    slack = side - scale * (high - low)
    origin = -low * scale + slack * rng.uniform(0, 1, 2)
    return Frame.at(origin[0], origin[1], turn, scale, flip)


def _extent(kind: Kind) -> Points:
    """Outermost points of a kind, head upright, in body lengths."""
    beak = {"cone": 0.36, "hook": 0.45, "spoon": 0.68, "needle": 0.76}[kind.variants["beak"]]
    crest = {"bare": 0.22, "spike": 0.46, "fan": 0.44, "puff": 0.41}[kind.variants["crest"]]
    tail = {
        "square": [(-0.84, 0.1)],
        "long": [(-1.29, 0.43)],
        "forked": [(-1.02, 0.38), (-1.1, -0.24)],
        "fan": [(-0.95, 0.0), (-0.8, 0.36), (-0.8, -0.36)],
    }[kind.variants["tail"]]
    foot = 0.32 + LEG_LENGTH[kind.variants["legs"]]
    head = points((0.39 + beak, -0.58), (0.41 + beak, -0.38), (0.38, -0.50 - crest))
    rest = points((0.2, foot), (-0.05, foot), *tail)
    return np.concatenate([BODY, head, rest])


def _coverage(canvas: Canvas, factor: int) -> Image.Image:
    """Share of each finished pixel that is bird."""
    return canvas.parts.point([0] + [255] * 255).reduce(factor)


def _light(image: Image.Image, silhouette: Image.Image, visible: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Round the bird off by shading its silhouette, then light the whole scene."""
    size = image.size[0]
    pixels = np.asarray(image, dtype=np.float32)
    bulge = np.asarray(silhouette.filter(ImageFilter.GaussianBlur(size * 0.035)), dtype=np.float32) / 255
    slope_y, slope_x = np.gradient(bulge)
    side_light = rng.uniform(-0.8, 0.8)
    shade = np.clip((slope_y + side_light * slope_x) * size * 0.045, -0.42, 0.30)
    grain = rng.standard_normal((size, size), dtype=np.float32) * 0.02
    cover = np.asarray(visible, dtype=np.float32) / 255
    factor = 1 + cover * (shade + grain)
    # Light of the scene: brightness, a gradient in some direction, and a warm or cool tint.
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.28)
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    falloff = 1 + strength * (np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None])
    warmth = rng.normal(0, 0.06)
    tint = np.array([1 + warmth, 1, 1 - warmth], dtype=np.float32) * np.float32(rng.uniform(0.75, 1.15))
    pixels *= (factor * falloff)[:, :, None] * tint
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _visible(keys: dict[str, Points], part_map: npt.NDArray[np.uint8], bird: Bird) -> list[KeyPoint]:
    """Key points whose surroundings still belong to their part: not covered, not outside the picture."""
    side = len(part_map)
    reach = max(1, round(0.02 * bird.body.scale))
    found = []
    for part in PART_ID:
        x, y = keys[part][0]
        column, row = int(np.floor(x)), int(np.floor(y))
        if not (0 <= column < side and 0 <= row < side) or part_map[row, column] != PART_ID[part]:
            continue
        window = part_map[max(row - reach, 0) : row + reach + 1, max(column - reach, 0) : column + reach + 1]
        if np.mean(window == PART_ID[part]) >= 0.5:
            found.append(KeyPoint(part, float(x / side), float(y / side)))
    return found
