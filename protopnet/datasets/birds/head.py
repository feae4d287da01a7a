"""Beak, crest and face, drawn in the head's own frame. Each function returns the key point of its part."""

import numpy as np

from .anatomy import BELLY, PART_ID, Bird
from .canvas import Canvas, Colour, Points, ellipse, feather, mix, path, points, smooth
from .plumage import CORAL, GREY, INK, ORANGE, WHITE, YELLOW


def draw_beak(canvas: Canvas, bird: Bird) -> Points:
    """The beak, behind the rim of the head so that they join without a gap."""
    variant, part, place = bird.variants["beak"], PART_ID["beak"], bird.head.place
    outline, colour, gape, key = _beak_shape(variant)
    edge = mix(colour, INK, 0.6)
    canvas.fill(place(outline), colour, part, edge=edge, width=1.6 * bird.pen)
    if variant == "hook":
        hook = path("0.36 -0.12, 0.52 -0.02, 0.47 0.17, 0.38 0.05")
        canvas.fill(place(hook), INK, part, inside=(part,))
    canvas.stroke(place(smooth(gape, closed=False)), edge, 0.9 * bird.pen, part)
    return place(points(key))


def _beak_shape(variant: str) -> tuple[Points, Colour, Points, tuple[float, float]]:
    """Outline, colour, the line between upper and lower beak, and the key point."""
    if variant == "needle":
        outline = smooth(path("0.14 -0.06, 0.4 -0.035, 0.76 0.09, 0.4 0.045, 0.14 0.08"))
        return outline, INK, path("0.15 0.01, 0.4 0.01, 0.7 0.075"), (0.38, 0.0)
    if variant == "hook":
        outline = smooth(path("0.12 -0.14, 0.3 -0.14, 0.44 -0.03, 0.43 0.16, 0.35 0.07, 0.14 0.13"))
        return outline, YELLOW, path("0.15 0.02, 0.28 0.02, 0.36 0.06"), (0.28, -0.04)
    if variant == "spoon":
        outline = smooth(path("0.12 -0.07, 0.38 -0.02, 0.52 -0.09, 0.68 0, 0.66 0.12, 0.5 0.13, 0.38 0.06, 0.12 0.1"))
        return outline, ORANGE, path("0.15 0.015, 0.4 0.02, 0.64 0.06"), (0.46, 0.02)
    outline = path("0.12 -0.1, 0.24 -0.075, 0.36 0.03, 0.25 0.085, 0.12 0.12")
    return outline, GREY, path("0.15 0.02, 0.25 0.015, 0.34 0.03"), (0.255, 0.005)


def draw_crest(canvas: Canvas, bird: Bird) -> Points:
    """Head feathers, behind the head."""
    variant, part = bird.variants["crest"], PART_ID["crest"]
    plumes: list[tuple[Points, Colour]] = []
    key = (-0.04, -0.165)
    if variant == "spike":
        for tip, bend in (((-0.46, -0.22), 0.02), ((-0.50, -0.36), 0.05), ((-0.42, -0.48), 0.08)):
            plumes.append((feather((0.02, -0.10), tip, 0.11, bend), INK))
        key = (-0.24, -0.27)
    elif variant == "fan":
        for angle in np.linspace(-2.75, -1.05, 7):
            tip = (0.44 * np.cos(angle), 0.44 * np.sin(angle))
            plumes.append((feather((0, 0), tip, 0.13), ORANGE))
            plumes.append((feather((tip[0] * 0.82, tip[1] * 0.82), tip, 0.07), INK))
        key = (0.29 * np.cos(-1.9), 0.29 * np.sin(-1.9))
    elif variant == "puff":
        for x, y, r in ((-0.16, -0.17, 0.12), (0.10, -0.20, 0.12), (-0.03, -0.26, 0.15)):
            plumes.append((ellipse(x, y, r), CORAL))
        plumes.append((ellipse(-0.05, -0.30, 0.06, 0.04, -0.3), mix(CORAL, WHITE, 0.3)))
        key = (-0.03, -0.28)
    for index, (plume, colour) in enumerate(plumes):
        outlined = variant != "puff" or index < 3
        edge = mix(colour, INK, 0.5) if outlined else None
        canvas.fill(bird.head.place(plume), colour, part, edge=edge, width=1.2 * bird.pen)
    return bird.head.place(points(key))


def tag_crown(canvas: Canvas, bird: Bird) -> None:
    """A bare crown has a place too: the top of the head is the crest's, whatever grows there."""
    if bird.variants["crest"] == "bare":
        crown = bird.head.place(ellipse(-0.04, -0.20, 0.15, 0.085))
        canvas.fill(crown, None, PART_ID["crest"], inside=(BELLY,))


def draw_face(canvas: Canvas, bird: Bird) -> Points:
    """The eye and what surrounds it."""
    variant, part, place = bird.variants["face"], PART_ID["face"], bird.head.place
    inside = (BELLY, part)
    canvas.fill(place(ellipse(0.06, 0.0, 0.13, 0.11)), None, part, inside=inside)
    if variant == "mask":
        mask = smooth(path("0.24 -0.03, 0.06 -0.105, -0.14 -0.06, -0.23 0.03, -0.1 0.075, 0.08 0.085, 0.24 0.07"))
        canvas.fill(place(mask), INK, part, inside=inside)
    elif variant == "ring":
        canvas.fill(place(ellipse(0.07, -0.025, 0.118)), mix(bird.plumage.wing, INK, 0.4), part, inside=inside)
        canvas.fill(place(ellipse(0.07, -0.025, 0.106)), WHITE, part, inside=inside)
    elif variant == "cheek":
        canvas.fill(place(ellipse(-0.015, 0.085, 0.10, 0.085)), CORAL, part, inside=inside)
    eye_white = mix(WHITE, YELLOW, 0.35)
    canvas.fill(place(ellipse(0.08, -0.03, 0.056)), eye_white, part)
    canvas.fill(place(ellipse(0.085, -0.03, 0.042)), INK, part)
    canvas.fill(place(ellipse(0.098, -0.045, 0.014)), WHITE, part)
    return place(points((0.05, -0.01)))
