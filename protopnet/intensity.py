"""Pixels of more than 8 bits -> 8 bits: which value becomes black, which white.

Nobody's files say it the same way: a camera's 12 bits lie in 16, floats have any unit. What a person knows goes before
(`data.intensity`); then what the file says of itself; then its values.
"""

import numpy as np
from PIL import ExifTags, Image

from protopnet.config import IntensitySettings

AS_THE_FILE_SAYS = IntensitySettings()
_BITS = (8, 10, 12, 14, 16)  # that sensors have
_ROWS = 256  # that are scaled at a time, for the memory


def grey(image: Image.Image, data: bytes, settings: IntensitySettings) -> Image.Image:
    """An image of one channel of more than 8 bits (mode I;16, I or F) as mode L. data: the file that it is of.

    `ValueError` if none of its pixels has a value.
    """
    values_HW = np.asarray(image)
    black, white = limits(values_HW, settings, _white(image, data))
    tags = getattr(image, "tag_v2", {})  # "white is zero" PIL minds for 8 bits only
    return scaled(values_HW, black, white, inverted=tags.get(ExifTags.Base.PhotometricInterpretation) == 0)


def limits(values_HW: np.ndarray, settings: IntensitySettings, white: int | None = None) -> tuple[float, float]:
    """The values that become black and white. white: as the file says, if it does. `ValueError` as `grey`."""
    if settings.window is not None:
        return settings.window
    known = values_HW[np.isfinite(values_HW)] if values_HW.dtype.kind == "f" else values_HW
    if not known.size:
        raise ValueError("none of its pixels has a value")
    if settings.percentiles is not None:
        low, high = np.percentile(known, settings.percentiles)
        return float(low), float(high)
    least, most = float(known.min()), float(known.max())
    if values_HW.dtype.kind == "f" or least < 0 or most > 65535:
        return least, most
    return 0, white if white is not None and most <= white else next(2**bits - 1 for bits in _BITS if most < 2**bits)


def scaled(values_HW: np.ndarray, black: float, white: float, *, inverted: bool = False) -> Image.Image:
    """Mode L: black to 0, white to 255, the nearest whole number between; what has no value is black."""
    if values_HW.dtype.kind == "u" and values_HW.dtype.itemsize == 2:
        every = _to_bytes(np.arange(65536), black, white)
        pixels_HW = every[values_HW]
    else:
        pixels_HW = np.empty(values_HW.shape, np.uint8)
        for top in range(0, len(values_HW), _ROWS):
            pixels_HW[top : top + _ROWS] = _to_bytes(values_HW[top : top + _ROWS], black, white)
    return Image.fromarray(255 - pixels_HW if inverted else pixels_HW)


def _to_bytes(values: np.ndarray, black: float, white: float) -> np.ndarray:
    shares = (np.nan_to_num(values.astype(np.float64), nan=black) - black) / (white - black if white > black else 1)
    return np.floor(shares.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _white(image: Image.Image, data: bytes) -> int | None:
    """The largest value that pixels of this file can have, if it says so."""
    if image.format == "PPM" or (image.format == "PNG" and b"sBIT" in data[:256]):
        return 65535  # whatever their bits were, their values have been spread over 16
    tags = getattr(image, "tag_v2", {})
    if isinstance(most := _first(tags.get(ExifTags.Base.MaxSampleValue)), int) and most > 0:
        return most
    bits = _first(tags.get(ExifTags.Base.BitsPerSample))
    return 2**bits - 1 if isinstance(bits, int) and bits < 16 else None


def _first(value: object) -> object:
    return value[0] if isinstance(value, tuple) and value else value
