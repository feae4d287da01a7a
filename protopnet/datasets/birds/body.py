"""Trunk, breast, wing, tail and legs. Each function paints one part and returns its key point."""

import numpy as np

from .anatomy import BELLY, HEAD_RADIUS, LEG_LENGTH, PART_ID, Bird
from .canvas import Canvas, Colour, Points, ellipse, feather, mix, path, points, shift, smooth
from .plumage import BLUE, GREY, INK, ORANGE, RED, WHITE, YELLOW

BODY = smooth(
    path(
        "-0.53 -0.03, -0.28 -0.2, 0.02 -0.29, 0.25 -0.34, 0.47 -0.2, 0.53 0.02, "
        "0.38 0.23, 0.08 0.32, -0.25 0.22, -0.48 0.08"
    )
)
WING = smooth(path("0.25 -0.1, 0.1 -0.21, -0.16 -0.2, -0.4 -0.09, -0.62 0.06, -0.4 0.13, -0.15 0.19, 0.12 0.12"))


def draw_trunk(canvas: Canvas, bird: Bird) -> None:
    """Body, neck and head as one silhouette, with a paler underside."""
    back, pen = bird.plumage.back, bird.pen
    shapes = [
        bird.body.place(BODY),
        _neck(bird),
        bird.head.place(ellipse(0, 0, HEAD_RADIUS)),
    ]
    for shape in shapes:
        canvas.fill(shape, None, BELLY, edge=bird.plumage.edge, width=2 * pen)
    for shape in shapes:
        canvas.fill(shape, back, BELLY)
    pale = path("0.6 -0.16, 0.44 -0.17, 0.27 0.02, 0 0.12, -0.3 0.11, -0.62 0.06, -0.4 0.4, 0.6 0.4")
    canvas.fill(bird.body.place(smooth(pale)), mix(back, bird.plumage.belly, 0.55), BELLY, inside=(BELLY,))
    inner = shift(shift(pale, -0.05, 0) * 0.95, 0.05, 0.055)
    canvas.fill(bird.body.place(smooth(inner)), bird.plumage.belly, BELLY, inside=(BELLY,))


def _neck(bird: Bird) -> Points:
    """Quadrilateral joining shoulders and head."""
    shoulders = bird.body.place(points((0.07, -0.27), (0.50, -0.12)))
    cheeks = bird.head.place(points((0.165, 0.13), (-0.20, -0.03)))
    return np.concatenate([shoulders, cheeks])


def draw_breast(canvas: Canvas, bird: Bird, rng: np.random.Generator) -> Points:
    """Plain, a broad dark band, a red bib, or dark speckles, within the silhouette."""
    part, inside, place = PART_ID["breast"], (BELLY,), bird.body.place
    zone = smooth(path("0.3 -0.16, 0.62 -0.24, 0.62 0.2, 0.36 0.24, 0.24 0.06"))
    variant = bird.variants["breast"]
    if variant == "bib":
        canvas.fill(place(zone), RED, part, inside=inside)
        shine = smooth(path("0.36 -0.1, 0.62 -0.18, 0.62 0.06, 0.36 0.06"))
        canvas.fill(place(shine), mix(RED, ORANGE, 0.45), part, inside=(part,))
        return place(points((0.42, 0.03)))
    canvas.fill(place(zone), None, part, inside=inside)
    if variant == "band":
        band = smooth(path("0.2 -0.09, 0.34 0.02, 0.6 -0.04, 0.6 0.12, 0.33 0.17, 0.13 0.06"))
        canvas.fill(place(band), INK, part, inside=(*inside, part))
    elif variant == "speckled":
        for row, y in enumerate((-0.11, -0.025, 0.06, 0.145)):
            for column in range(4):
                x = 0.27 + 0.085 * column + (0.042 if row % 2 else 0) + rng.uniform(-0.008, 0.008)
                spot = ellipse(x, y + rng.uniform(-0.008, 0.008), 0.023, 0.034)
                canvas.fill(place(spot), INK, part, inside=(*inside, part))
    return place(points((0.41, 0.06)))


def draw_wing(canvas: Canvas, bird: Bird, rng: np.random.Generator) -> Points:
    """Folded wing: flight feathers, coverts, and its pattern."""
    part, base, place = PART_ID["wing"], bird.plumage.wing, bird.wing.place
    edge = mix(base, INK, 0.5)
    # A shadow under the wing lifts it off the body.
    shadow = mix(bird.plumage.back, INK, 0.35)
    canvas.fill(place(shift(WING * (0.98, 1.0), 0.012, 0.03)), shadow, BELLY, inside=(BELLY, PART_ID["breast"]))
    canvas.fill(place(WING), base, part, edge=edge, width=1.6 * bird.pen)
    for index in range(5):
        y = -0.07 + 0.045 * index
        plume = feather((-0.05, y), (-0.59 + 0.04 * index, 0.055 + 0.018 * index), 0.07, 0.03)
        tone = mix(base, INK, 0.16 + 0.10 * (index % 2))
        canvas.fill(place(plume), tone, part, inside=(part,))
    coverts = mix(base, bird.plumage.back, 0.45)
    for column in range(4):
        for row in range(4):
            x, y = -0.24 + 0.13 * column + 0.05 * (row % 2), -0.17 + 0.085 * row
            scallop = ellipse(x, y, 0.082, 0.058, 0.15)
            canvas.fill(place(scallop), mix(coverts, INK, 0.22), part, inside=(part,))
            canvas.fill(place(shift(scallop, 0.016, -0.007)), coverts, part, inside=(part,))
    _wing_pattern(canvas, bird, rng)
    return place(points((-0.14, 0.01)))


def _wing_pattern(canvas: Canvas, bird: Bird, rng: np.random.Generator) -> None:
    part, place = PART_ID["wing"], bird.wing.place
    variant = bird.variants["wing"]
    if variant == "barred":
        for x in (0.05, -0.17, -0.39):
            bar = smooth(shift(path("0.05 -0.3, 0.085 0, 0.03 0.3, -0.055 0.3, 0 0, -0.035 -0.3"), x, 0))
            canvas.fill(place(bar), WHITE, part, inside=(part,))
    elif variant == "spotted":
        for row, y in enumerate((-0.135, -0.03, 0.075)):
            for column in range(5):
                x = -0.42 + 0.135 * column + (0.068 if row % 2 else 0) + rng.uniform(-0.01, 0.01)
                canvas.fill(place(ellipse(x, y, 0.034)), WHITE, part, inside=(part,))
    elif variant == "patch":
        patch = smooth(path("0.06 -0.09, -0.4 -0.1, -0.46 0.08, 0 0.13"))
        canvas.fill(place(patch * 1.17), WHITE, part, inside=(part,))
        canvas.fill(place(patch), BLUE, part, inside=(part,))
        shine = smooth(path("0.02 -0.07, -0.36 -0.08, -0.38 -0.02, 0.01 -0.01"))
        canvas.fill(place(shine), mix(BLUE, WHITE, 0.3), part, inside=(part,))


def draw_tail(canvas: Canvas, bird: Bird) -> Points:
    """Feathers that start at the rump; the farthest first."""
    base, variant = bird.plumage.wing, bird.variants["tail"]
    key = (-0.31, 0.05)
    plumes: list[tuple[Points, Colour]] = []
    if variant == "square":
        for y in (0.075, 0.0, -0.06):
            blade = points((0.05, y - 0.035), (-0.38, y + 0.01), (-0.40, y + 0.10), (0.05, y + 0.05))
            plumes.append((blade, mix(base, INK, 0.12 + y)))
    elif variant == "long":
        for sag in (0.05, -0.02):
            plumes.append(
                (
                    feather((0.05, sag), (-0.86, 0.44 + sag * 1.6), 0.135, 0.10),
                    mix(base, INK, 0.2 + sag),
                )
            )
        key = (-0.42, 0.16)
    elif variant == "forked":
        plumes.append((feather((0.08, 0.03), (-0.58, 0.40), 0.15, 0.10), mix(base, INK, 0.25)))
        plumes.append((feather((0.08, -0.02), (-0.66, -0.24), 0.15, -0.10), mix(base, INK, 0.15)))
        key = (-0.36, -0.14)
    else:
        for index, angle in enumerate(np.linspace(-0.85, 0.85, 7)):
            tip = (-0.50 * np.cos(angle), -0.50 * np.sin(angle))
            plumes.append((feather((0.04, 0.0), tip, 0.19), mix(base, INK, 0.05 + 0.18 * (index % 2))))
    part = PART_ID["tail"]
    for plume, colour in plumes:
        canvas.fill(bird.tail.place(plume), colour, part, edge=bird.plumage.edge, width=1.3 * bird.pen)
    if variant == "fan":
        key = (-0.38, 0.0)
        _fan_bands(canvas, bird)
    return bird.tail.place(points(key))


def _fan_bands(canvas: Canvas, bird: Bird) -> None:
    """A white rim and a dark band across the spread tail."""
    part = PART_ID["tail"]
    angles = np.linspace(-1.15, 1.15, 15)
    arc = np.stack([-np.cos(angles), -np.sin(angles)], axis=1)
    for inner, outer, colour in ((0.40, 0.6, WHITE), (0.31, 0.40, INK)):
        ring = np.concatenate([arc * inner, (arc * outer)[::-1]])
        canvas.fill(bird.tail.place(ring), colour, part, inside=(part,))


def draw_legs(canvas: Canvas, bird: Bird) -> Points:
    """Two legs with toes; the far one darker."""
    variant, part = bird.variants["legs"], PART_ID["legs"]
    length = LEG_LENGTH[variant]
    colour = {"short": GREY, "stilts": RED, "webbed": YELLOW, "booted": GREY}[variant]
    width = {"short": 0.042, "stilts": 0.05, "webbed": 0.052, "booted": 0.05}[variant] * bird.body.scale
    for x, shade in ((0.17, 0.3), (0.0, 0.0)):
        tone, foot_y = mix(colour, INK, shade), 0.25 + length
        knee = points((x, 0.22), (x - 0.03, 0.27 + length * 0.45), (x + 0.01, foot_y))
        edge = mix(tone, INK, 0.55)
        canvas.stroke(bird.body.place(knee), edge, width + bird.pen, part)
        _draw_foot(canvas, bird, (x + 0.01, foot_y), tone, width)
        canvas.stroke(bird.body.place(knee), tone, width, part)
        if variant == "booted":
            boot = smooth(shift(path("-0.12 0.2, 0.12 0.2, 0.085 0.4, 0 0.46, -0.09 0.4"), x, 0))
            canvas.fill(bird.body.place(boot), mix(WHITE, INK, shade * 0.5), part, edge=edge, width=bird.pen)
    key = {"booted": (0.0, 0.38)}.get(variant, (-0.025, 0.27 + length * 0.5))
    return bird.body.place(points(key))


def _draw_foot(canvas: Canvas, bird: Bird, ankle: tuple[float, float], colour: Colour, width: float) -> None:
    x, y = ankle
    part, edge = PART_ID["legs"], mix(colour, INK, 0.55)
    if bird.variants["legs"] == "webbed":
        web = shift(path("-0.07 -0.01, 0.03 -0.05, 0.2 0.02, 0.13 0.045, 0.06 0.035, -0.05 0.05"), x, y)
        canvas.fill(bird.body.place(web), colour, part, edge=edge, width=bird.pen)
        return
    for toe_x, toe_y in ((0.13, 0.005), (0.10, 0.05), (-0.08, 0.02)):
        toe = points((x, y), (x + toe_x, y + toe_y))
        canvas.stroke(bird.body.place(toe), mix(colour, INK, 0.2), width * 0.8, part)
