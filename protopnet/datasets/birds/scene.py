"""Around the bird: landscape, clutter behind it, perch, and now and then something in front of it."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .canvas import Canvas, Colour, Frame, Points, ellipse, feather, mix, points, shift, smooth
from .plumage import ACCENTS, INK, MORPHS, WHITE, jitter

Gradient = tuple[Colour, Colour, Colour]  # top, middle, bottom

# Landscapes: the gradient, and the colours of its blurred shapes.
SETTINGS: dict[str, tuple[Gradient, tuple[Colour, ...]]] = {
    "sky": (
        ((126, 176, 226), (182, 212, 238), (232, 236, 228)),
        ((255, 255, 252), (214, 226, 238)),
    ),
    "forest": (
        ((74, 104, 66), (98, 130, 78), (60, 78, 50)),
        ((146, 176, 96), (44, 66, 44), (196, 204, 128)),
    ),
    "water": (
        ((176, 208, 214), (110, 160, 178), (66, 116, 142)),
        ((208, 230, 232), (78, 134, 152), (54, 92, 110)),
    ),
    "meadow": (
        ((206, 222, 200), (170, 190, 106), (116, 142, 66)),
        ((222, 206, 110), (96, 124, 58), (236, 226, 190)),
    ),
    "dusk": (
        ((142, 112, 150), (228, 156, 122), (248, 206, 150)),
        ((250, 214, 170), (180, 116, 130), (112, 88, 128)),
    ),
    "autumn": (
        ((196, 168, 128), (204, 142, 74), (132, 92, 60)),
        ((228, 176, 84), (164, 84, 50), (108, 84, 62)),
    ),
}
LEAF_GREENS: tuple[Colour, ...] = (
    (86, 128, 56),
    (120, 152, 66),
    (58, 96, 60),
    (164, 156, 70),
    (176, 110, 50),
)
BARK: tuple[Colour, ...] = ((110, 82, 60), (92, 76, 66), (134, 108, 82))
STONE: tuple[Colour, ...] = ((142, 140, 138), (118, 124, 132), (160, 148, 132))


def draw_landscape(side: int, rng: np.random.Generator) -> Image.Image:
    """A blurred landscape: gradient, and blobs out of focus in its own and in plumage colours."""
    gradient, tones = SETTINGS[list(SETTINGS)[rng.integers(len(SETTINGS))]]
    stops = np.array([jitter(colour, rng, 8) for colour in gradient], dtype=np.float64)
    small = 64  # blurred while it is small, then enlarged
    height = np.linspace(0, 1, small)
    knots = [0, rng.uniform(0.35, 0.7), 1]
    column = np.stack([np.interp(height, knots, stops[:, channel]) for channel in range(3)], axis=1)
    image = Image.fromarray(np.broadcast_to(column[:, None], (small, small, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    plumage = [colour for morph in MORPHS for colour in (morph.back, morph.belly, morph.wing)]
    for _ in range(rng.integers(7, 14)):
        choice = rng.random()
        palette = tones if choice < 0.55 else plumage if choice < 0.8 else ACCENTS
        radius = rng.uniform(2, 10) * (0.6 if palette is ACCENTS else 1)
        x, y = rng.uniform(0, small, 2)
        colour = jitter(palette[rng.integers(len(palette))], rng)
        draw.ellipse((x - radius, y - radius * 0.8, x + radius, y + radius * 0.8), fill=colour)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.9, 1.8)))
    return image.resize((side, side), Image.Resampling.BICUBIC)


def draw_clutter(canvas: Canvas, rng: np.random.Generator) -> None:
    """Twigs, leaves, grass, berries and stones behind the bird."""
    side = canvas.image.size[0]
    painters: tuple[Callable[[Canvas, float, np.random.Generator], None], ...] = (
        _twig, _leaves, _grass, _berries, _leaves, _stones,
    )  # fmt: skip
    for _ in range(rng.integers(2, 6)):
        painters[rng.integers(len(painters))](canvas, side, rng)


def _twig(canvas: Canvas, side: float, rng: np.random.Generator) -> None:
    start, end = rng.uniform(-0.1, 1.1, 2) * side, rng.uniform(-0.1, 1.1, 2) * side
    middle = (start + end) / 2 + rng.normal(0, 0.08, 2) * side
    line = smooth(np.stack([start, middle, end]), closed=False)
    colour = jitter(BARK[rng.integers(len(BARK))], rng)
    canvas.stroke(line, colour, rng.uniform(0.008, 0.022) * side)
    for point in line[1::3]:
        if rng.random() < 0.5:
            _leaf(canvas, point, rng.uniform(0.05, 0.11) * side, _leaf_colour(rng), rng)


def _leaves(canvas: Canvas, side: float, rng: np.random.Generator) -> None:
    centre = rng.uniform(0, 1, 2) * side
    for _ in range(rng.integers(3, 7)):
        _leaf(
            canvas,
            centre + rng.normal(0, 0.08, 2) * side,
            rng.uniform(0.08, 0.17) * side,
            _leaf_colour(rng),
            rng,
        )


def _leaf_colour(rng: np.random.Generator) -> Colour:
    return jitter(LEAF_GREENS[rng.integers(len(LEAF_GREENS))], rng, 12)


def _leaf(canvas: Canvas, at: Points, length: float, colour: Colour, rng: np.random.Generator) -> None:
    angle = rng.uniform(0, 2 * np.pi)
    tip = (at[0] + length * np.cos(angle), at[1] + length * np.sin(angle))
    base = (float(at[0]), float(at[1]))
    dark = mix(colour, INK, 0.3)
    canvas.fill(feather(base, tip, length * 0.42, rng.uniform(-0.1, 0.1)), colour, edge=dark, width=length * 0.04)
    canvas.stroke(points(base, tip), mix(colour, WHITE, 0.2), length * 0.03)


def _grass(canvas: Canvas, side: float, rng: np.random.Generator) -> None:
    x0 = rng.uniform(0, side)
    for _ in range(rng.integers(3, 8)):
        x = x0 + rng.normal(0, 0.08) * side
        blade = feather(
            (x, side * 1.03),
            (x + rng.normal(0, 0.1) * side, side * rng.uniform(0.35, 0.85)),
            side * rng.uniform(0.012, 0.03),
            rng.uniform(-0.1, 0.1),
        )
        canvas.fill(blade, _leaf_colour(rng))


def _berries(canvas: Canvas, side: float, rng: np.random.Generator) -> None:
    colour = ACCENTS[rng.integers(len(ACCENTS))]
    centre = rng.uniform(0, 1, 2) * side
    for _ in range(rng.integers(3, 8)):
        x, y = centre + rng.normal(0, 0.06, 2) * side
        radius = rng.uniform(0.014, 0.038) * side
        canvas.fill(ellipse(x, y, radius), jitter(colour, rng), edge=mix(colour, INK, 0.45), width=radius * 0.25)
        canvas.fill(ellipse(x - radius * 0.3, y - radius * 0.35, radius * 0.25), mix(colour, WHITE, 0.6))


def _stones(canvas: Canvas, side: float, rng: np.random.Generator) -> None:
    for _ in range(rng.integers(1, 4)):
        x, radius = rng.uniform(0, side), rng.uniform(0.05, 0.13) * side
        _stone(canvas, x, side * rng.uniform(0.93, 1.0), radius, rng)


def _stone(canvas: Canvas, x: float, y: float, radius: float, rng: np.random.Generator) -> None:
    colour = jitter(STONE[rng.integers(len(STONE))], rng)
    outline = ellipse(0, 0, radius, radius * 0.6)[::4] * rng.uniform(0.85, 1.15, (7, 1)) + (x, y)
    canvas.fill(smooth(outline), colour, edge=mix(colour, INK, 0.4), width=radius * 0.05)
    light = (outline - (x, y)) * (0.7, 0.45) + (x - radius * 0.08, y - radius * 0.18)
    canvas.fill(smooth(light), mix(colour, WHITE, 0.22))


def draw_perch(canvas: Canvas, feet: Points, body: Frame, rng: np.random.Generator) -> None:
    """What the bird stands on, its top edge under the feet: a branch, or a stone that reaches the ground."""
    side = canvas.image.size[0]
    x, y = feet[0]
    if rng.random() < 0.65:
        _branch(canvas, feet, body, rng)
        return
    radius = 0.36 * body.scale * rng.uniform(0.9, 1.3)
    colour = jitter(STONE[rng.integers(len(STONE))], rng)
    shoulders = ((x - radius, y + radius * 0.5), (x + radius, y + radius * 0.5))
    flat = ((x - radius * 0.6, y + 2), (x + radius * 0.6, y))
    ground = ((x + radius * 1.15, side * 1.1), (x - radius * 1.15, side * 1.1))
    top = smooth(points(shoulders[0], *flat, shoulders[1], *ground))
    canvas.fill(top, colour, edge=mix(colour, INK, 0.45), width=0.02 * body.scale)
    shade = shift(top, radius * 0.12, radius * 0.22)
    canvas.fill(shade, mix(colour, INK, 0.16))


def _branch(canvas: Canvas, feet: Points, body: Frame, rng: np.random.Generator) -> None:
    side = canvas.image.size[0]
    x, y = feet[0]
    forward = body.matrix[:, 0] / np.hypot(*body.matrix[:, 0])
    slope = float(forward[1] / forward[0]) if abs(forward[0]) > 0.1 else 0.0
    half = body.scale * rng.uniform(0.045, 0.075)
    xs = np.linspace(-0.05, 1.05, 8) * side
    wobble = rng.normal(0, 0.006, 8) * side
    middle = y + half + (xs - x) * slope + wobble * (np.abs(xs - x) > 0.15 * side)
    thickness = half * np.linspace(rng.uniform(0.7, 1.3), rng.uniform(0.7, 1.3), 8)
    colour = jitter(BARK[rng.integers(len(BARK))], rng)
    top, bottom = np.stack([xs, middle - thickness], 1), np.stack([xs, middle + thickness], 1)
    outline = np.concatenate([smooth(top, closed=False), smooth(bottom, closed=False)[::-1]])
    canvas.fill(outline, colour, edge=mix(colour, INK, 0.5), width=0.02 * body.scale)
    for share, tone in ((0.45, mix(colour, WHITE, 0.2)), (-0.5, mix(colour, INK, 0.25))):
        line = np.stack([xs, middle - thickness * share], 1)
        canvas.stroke(smooth(line, closed=False), tone, half * 0.35)
    for _ in range(rng.integers(0, 4)):
        at = np.array([rng.uniform(0, 1) * side, 0.0])
        at[1] = np.interp(at[0], xs, middle)
        _leaf(canvas, at, rng.uniform(0.2, 0.32) * body.scale, _leaf_colour(rng), rng)


def draw_occluder(canvas: Canvas, body: Frame, rng: np.random.Generator) -> None:
    """A leaf, a reed or a twig in front of some place of the bird, never so large that two parts vanish."""
    side = canvas.image.size[0]
    target = body.place(points((rng.uniform(-0.75, 0.65), rng.uniform(-0.6, 0.4))))[0]
    choice = rng.random()
    if choice < 0.4:
        length = rng.uniform(0.30, 0.42) * body.scale
        _leaf(canvas, target - rng.uniform(-0.3, 0.6, 2) * length, length, _leaf_colour(rng), rng)
    elif choice < 0.75:
        lean = rng.normal(0, 0.08) * side
        tip = (target[0] + lean, target[1] - rng.uniform(0.05, 0.35) * side)
        width = body.scale * rng.uniform(0.05, 0.085)
        reed = feather((target[0] - lean, side * 1.05), tip, width, rng.uniform(-0.06, 0.06))
        colour = _leaf_colour(rng)
        canvas.fill(reed, colour, edge=mix(colour, INK, 0.35), width=0.012 * body.scale)
    else:
        reach = np.array([np.cos(turn := rng.uniform(-0.9, 0.9)), np.sin(turn)]) * side * 1.5
        line = np.stack([target - reach, target + rng.normal(0, 0.02, 2) * side, target + reach])
        colour = jitter(BARK[rng.integers(len(BARK))], rng)
        canvas.stroke(smooth(line, closed=False), colour, body.scale * rng.uniform(0.025, 0.045))
