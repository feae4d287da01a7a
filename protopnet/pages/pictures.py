"""Pieces of pictures: heat maps, crops, and images with boxes as pages show them.

Heat is matplotlib's inferno, more see-through the cooler it is: it reads the same to people with any kind of colour
vision and in grey, and leaves the photograph visible where nothing is active. Boxes are (top, left, bottom, right),
half-open, in pixels of the original, which every picture of it is measured in, however small.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from protopnet.model.boxes import upsample

HEAT_OPACITY = 0.72
HEAT_SIDE = 112  # pixels of a heat map that a browser lays over a picture
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Inlined:
    """An image that a page holds once: width and height of the original, and a data URI of however many pixels."""

    width: int
    height: int
    data: str


@dataclass(frozen=True)
class Picture:
    """An inlined image as shown on a page (`pictures.html.j2`): its symbol and size, and what to draw over it."""

    symbol: str
    width: int
    height: int
    box: Box
    label: str
    heat: str = ""  # data URI, or nothing
    field: Box | None = None  # what a patch can see, drawn where the heat is


def heat(map_HW: Sequence[Sequence[float]] | np.ndarray, width: int, height: int) -> Image.Image:
    """An activation map as an RGBA picture to lay over an image of this size. Coldest is see-through.

    From the map's least to its greatest value; a map that is the same everywhere shows nothing.
    """
    from matplotlib import colormaps

    values_HW = np.asarray(map_HW, dtype=np.float64)
    enlarged_YX = upsample(torch.from_numpy(values_HW)[None], height, width)[0].numpy()
    flat = np.ptp(values_HW) <= 1e-6 * np.abs(values_HW).max()  # as good as: enlarging rounds
    low, high = enlarged_YX.min(), enlarged_YX.max()
    share_YX = np.zeros_like(enlarged_YX) if flat else (enlarged_YX - low) / (high - low)
    rgba_YX4 = colormaps["inferno"](share_YX)
    rgba_YX4[..., 3] = HEAT_OPACITY * share_YX
    return Image.fromarray((255 * rgba_YX4).round().astype(np.uint8), "RGBA")


def heat_png(map_HW: Sequence[Sequence[float]] | np.ndarray, side: int = HEAT_SIDE) -> bytes:
    """The same as PNG, small, to be stretched over the whole image."""
    return encoded(heat(map_HW, side, side), "PNG", compress_level=1)  # four times as fast for a tenth more bytes


def crop(image: Image.Image, box: Sequence[int], size: tuple[int, int]) -> Image.Image:
    """What is in a box that is measured on an original of `size` (width, height); never empty."""
    return image.crop(place(box, size, image.size))


def place(box: Sequence[int], size: tuple[int, int], copy: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box that is measured on an original of `size`, on a copy of another: left, top, right, bottom, as PIL has it."""
    (top, left, bottom, right), (width, height) = box, copy
    across, down = width / size[0], height / size[1]
    x, y = min(round(left * across), width - 1), min(round(top * down), height - 1)
    return x, y, min(width, max(x + 1, round(right * across))), min(height, max(y + 1, round(bottom * down)))


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """A copy with neither side longer than `side`."""
    copy = image.copy()
    copy.thumbnail((side, side), Image.Resampling.LANCZOS)
    return copy


def opened(jpeg: bytes) -> Image.Image:
    """A thumbnail out of a bundle as an RGB picture."""
    return Image.open(io.BytesIO(jpeg)).convert("RGB")


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """As JPEG or PNG. Options: PIL's for the kind."""
    sink = io.BytesIO()
    image.save(sink, kind, **({"quality": 85} if kind == "JPEG" else {}) | options)
    return sink.getvalue()


def data_uri(data: bytes) -> str:
    """A JPEG or PNG within a page."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
