"""Pieces of pictures: heat maps, boxes, crops, as PIL images or encoded bytes.

Heat is matplotlib's inferno, more see-through the cooler it is: it reads the same to people with any kind of colour
vision and in grey, and leaves the photograph visible where nothing is active. Boxes are (top, left, bottom, right),
half-open, in pixels of the image they are drawn on unless said otherwise.
"""

import base64
import io
from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw

from protopnet.model.boxes import upsample

HEAT_OPACITY = 0.72
HEAT_SIDE = 112  # pixels of a heat map that is laid over a picture by a browser
BOX_COLOUR, BOX_EDGE = (255, 212, 0), (20, 24, 30)


def heat(map_HW: Sequence[Sequence[float]] | np.ndarray, width: int, height: int) -> Image.Image:
    """An activation map as an RGBA picture to lay over an image of this size. Coldest is see-through.

    From the map's least to its greatest value; a map that is the same everywhere shows nothing.
    """
    values_HW = np.asarray(map_HW, dtype=np.float64)
    enlarged_YX = upsample(torch.from_numpy(values_HW)[None], height, width)[0].numpy()
    flat = np.ptp(values_HW) <= 1e-6 * np.abs(values_HW).max()  # as good as: enlarging rounds
    low, high = enlarged_YX.min(), enlarged_YX.max()
    share_YX = np.zeros_like(enlarged_YX) if flat else (enlarged_YX - low) / (high - low)
    rgba_YX4 = matplotlib.colormaps["inferno"](share_YX)
    rgba_YX4[..., 3] = HEAT_OPACITY * share_YX
    return Image.fromarray((255 * rgba_YX4).round().astype(np.uint8), "RGBA")


def heat_png(map_HW: Sequence[Sequence[float]] | np.ndarray, width: int = HEAT_SIDE, height: int = HEAT_SIDE) -> bytes:
    """The same as PNG, small, to be stretched over the whole image."""
    return encoded(heat(map_HW, width, height), "PNG")


def overlay(image: Image.Image, map_HW: Sequence[Sequence[float]] | np.ndarray) -> Image.Image:
    """The image under its activation map."""
    return Image.alpha_composite(image.convert("RGBA"), heat(map_HW, *image.size)).convert("RGB")


def with_box(image: Image.Image, box: Sequence[int]) -> Image.Image:
    """The image with a box: yellow within dark, to be seen on any picture."""
    top, left, bottom, right = box
    drawn = image.copy()
    pen = max(2, round(max(image.size) / 90))
    draw = ImageDraw.Draw(drawn)
    corners = (left, top, max(left, right - 1), max(top, bottom - 1))
    draw.rectangle(corners, outline=BOX_EDGE, width=pen + 2)
    inner = (corners[0] + 1, corners[1] + 1, corners[2] - 1, corners[3] - 1)
    if inner[2] > inner[0] and inner[3] > inner[1]:
        draw.rectangle(inner, outline=BOX_COLOUR, width=pen)
    return drawn


def crop(image: Image.Image, box: Sequence[int]) -> Image.Image:
    """What is in the box."""
    top, left, bottom, right = box
    return image.crop((left, top, right, bottom))


def moved(box: Sequence[int], size: tuple[int, int], to: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box on an image of `size` (width, height), on a smaller or larger copy of it; never empty."""
    top, left, bottom, right = box
    across, down = to[0] / size[0], to[1] / size[1]
    new_top, new_left = min(round(top * down), to[1] - 1), min(round(left * across), to[0] - 1)
    return (
        new_top,
        new_left,
        min(to[1], max(new_top + 1, round(bottom * down))),
        min(to[0], max(new_left + 1, round(right * across))),
    )


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """A copy with neither side longer than `side`."""
    copy = image.copy()
    copy.thumbnail((side, side), Image.Resampling.LANCZOS)
    return copy


def opened(jpeg: bytes) -> Image.Image:
    """A thumbnail out of a bundle as an RGB picture."""
    return Image.open(io.BytesIO(jpeg)).convert("RGB")


def encoded(image: Image.Image, kind: str = "JPEG") -> bytes:
    """As JPEG or PNG."""
    sink = io.BytesIO()
    image.save(sink, kind, **({"quality": 85} if kind == "JPEG" else {}))
    return sink.getvalue()


def data_uri(data: bytes) -> str:
    """A JPEG or PNG within a page."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
