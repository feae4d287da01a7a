"""A supersampled canvas: filled outlines, and for each pixel the part of the bird it belongs to."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw

Points = npt.NDArray[np.float64]  # N x 2
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Frame:
    """Places local coordinates on the canvas: x -> matrix @ x + origin."""

    matrix: Points
    origin: npt.NDArray[np.float64]

    @staticmethod
    def at(x: float, y: float, turn: float = 0.0, scale: float = 1.0, flip: bool = False) -> "Frame":
        """Frame with its origin at (x, y), turned (radians), scaled, and perhaps mirrored left to right."""
        cos, sin = np.cos(turn) * scale, np.sin(turn) * scale
        matrix = np.array([[cos, -sin], [sin, cos]])
        if flip:
            matrix = np.array([[-1.0, 0.0], [0.0, 1.0]]) @ matrix
        return Frame(matrix, np.array([x, y], dtype=np.float64))

    def place(self, points: Points) -> Points:
        """Canvas coordinates of local points."""
        return points @ self.matrix.T + self.origin

    def within(self, inner: "Frame") -> "Frame":
        """The frame of something whose own frame is given in this one (a head on a body)."""
        return Frame(self.matrix @ inner.matrix, self.matrix @ inner.origin + self.origin)

    @property
    def scale(self) -> float:
        """Canvas pixels per local unit."""
        return float(np.sqrt(abs(np.linalg.det(self.matrix))))


class Canvas:
    """Square image being drawn, `factor` times as large as the finished one."""

    def __init__(self, background: Image.Image) -> None:
        self.image = background
        self.parts = Image.new("L", background.size, 0)
        self._draw = ImageDraw.Draw(self.image)
        self._tag = ImageDraw.Draw(self.parts)

    def fill(
        self,
        points: Points,
        colour: Colour | None,
        part: int = 0,
        *,
        edge: Colour | None = None,
        width: float = 0,
        inside: Collection[int] | None = None,
    ) -> None:
        """Fill an outline (canvas coordinates) and tag its pixels with `part`.

        With `edge`, a line of that colour is drawn around it first, half of it outside. With `inside`, only
        pixels that already belong to one of these parts are touched. Without `colour`, only tagged.
        """
        flat = points.ravel().tolist()
        if inside is not None:
            self._fill_inside(points, flat, colour, part, inside)
            return
        if edge is not None and width >= 1:
            pen = max(1, round(width))
            self._draw.line(flat + flat[:4], fill=edge, width=pen, joint="curve")
            self._tag.line(flat + flat[:4], fill=part, width=pen, joint="curve")
        if colour is not None:
            self._draw.polygon(flat, fill=colour)
        self._tag.polygon(flat, fill=part)

    def stroke(self, points: Points, colour: Colour, width: float, part: int = 0) -> None:
        """A line with round joints through points in canvas coordinates."""
        flat = points.ravel().tolist()
        pen = max(1, round(width))
        self._draw.line(flat, fill=colour, width=pen, joint="curve")
        self._tag.line(flat, fill=part, width=pen, joint="curve")

    def _fill_inside(
        self, points: Points, flat: list[float], colour: Colour | None, part: int, inside: Collection[int]
    ) -> None:
        side = self.image.size[0]
        left, top = np.clip(np.floor(points.min(axis=0)), 0, side).astype(int).tolist()
        right, bottom = np.clip(np.ceil(points.max(axis=0)) + 1, 0, side).astype(int).tolist()
        if right <= left or bottom <= top:
            return
        mask = Image.new("L", (right - left, bottom - top), 0)
        ImageDraw.Draw(mask).polygon((points - (left, top)).ravel().tolist(), fill=255)
        allowed = self.parts.crop((left, top, right, bottom)).point(_table(tuple(inside)))
        mask = ImageChops.darker(mask, allowed)
        if colour is not None:
            self.image.paste(colour, (left, top, right, bottom), mask)
        self.parts.paste(part, (left, top, right, bottom), mask)


@lru_cache(maxsize=64)
def _table(parts: tuple[int, ...]) -> list[int]:
    return [255 if value in parts else 0 for value in range(256)]


def points(*pairs: tuple[float, float]) -> Points:
    """An array of points from pairs that are computed; fixed outlines are `path`s."""
    return np.array(pairs, dtype=np.float64)


@lru_cache(maxsize=256)
def path(text: str) -> Points:
    """The points of an outline written as "x y, x y, …"; shared between calls, don't write into it."""
    return np.array([[float(number) for number in pair.split()] for pair in text.split(",")])


def shift(outline: Points, x: float, y: float) -> Points:
    """The outline, moved."""
    moved: Points = outline + np.array([x, y])
    return moved


def smooth(control: Points, samples: int = 5, closed: bool = True) -> Points:
    """Catmull-Rom curve through the control points."""
    return _spline_matrix(len(control), samples, closed) @ control


@lru_cache(maxsize=64)
def _spline_matrix(count: int, samples: int, closed: bool) -> Points:
    """Weights of the control points in each point of the curve."""
    segments = count if closed else count - 1
    matrix = np.zeros((segments * samples + (not closed), count))
    for row in range(len(matrix)):
        segment, t = divmod(row / samples, 1.0)
        weights = (
            (-t + 2 * t**2 - t**3) / 2,
            (2 - 5 * t**2 + 3 * t**3) / 2,
            (t + 4 * t**2 - 3 * t**3) / 2,
            (-(t**2) + t**3) / 2,
        )
        for offset, weight in zip((-1, 0, 1, 2), weights, strict=True):
            index = int(segment) + offset
            matrix[row, index % count if closed else min(max(index, 0), count - 1)] += weight
    return matrix


def ellipse(x: float, y: float, rx: float, ry: float | None = None, turn: float = 0.0) -> Points:
    """Outline of an ellipse."""
    circle = _CIRCLE * (rx, rx if ry is None else ry)
    if turn:
        cos, sin = np.cos(turn), np.sin(turn)
        circle = circle @ np.array([[cos, sin], [-sin, cos]])
    return shift(circle, x, y)


_ANGLES = np.linspace(0, 2 * np.pi, 28, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)


def feather(base: tuple[float, float], tip: tuple[float, float], width: float, bend: float = 0.0) -> Points:
    """A feather or leaf from base to tip: widest past its middle, bent sideways by a share of its length."""
    start, end = np.array(base), np.array(tip)
    along = end - start
    across = np.array([-along[1], along[0]])
    length = max(float(np.hypot(*along)), 1e-9)
    spine = start + _LEAF_T[:, None] * along + (bend * 4 * _LEAF_T * (1 - _LEAF_T))[:, None] * across
    half = (_LEAF_WIDTH * width / 2)[:, None] * (across / length)
    return np.concatenate([spine + half, (spine - half)[::-1]])


_LEAF_T = np.linspace(0, 1, 9)
_LEAF_WIDTH = np.sin(np.pi * _LEAF_T**1.25) ** 0.75 * (1 - 0.25 * _LEAF_T) + 0.12 * (1 - _LEAF_T)


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Colour between a and b; share 1 gives b."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue
