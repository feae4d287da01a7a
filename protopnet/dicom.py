"""DICOM, as scanners write it -> grey of 8 bits, or RGB. Needs pydicom: `pip install 'protopnet[dicom]'`.

Stored values become the scanner's units (rescale slope and intercept), units become 8 bits by `data.intensity`, by the
file's own window where nothing else is asked for, or by its range; MONOCHROME1 is turned over. The first frame counts.
"""

import io
from typing import Any

import numpy as np
from PIL import Image

from protopnet.config import IntensitySettings
from protopnet.intensity import limits, scaled

_GREY = ("MONOCHROME1", "MONOCHROME2")
_MARK = slice(128, 132)


class Undecodable(Exception):
    """A DICOM that is sound but of a kind that isn't read here."""


def is_dicom(data: bytes) -> bool:
    return data[_MARK] == b"DICM"


def measure(data: bytes) -> tuple[int, int]:
    """Width and height, from the header."""
    header = _read(data, stop_before_pixels=True)
    if "Rows" not in header or "Columns" not in header:
        raise Undecodable("DICOM without a picture")
    return int(header.Columns), int(header.Rows)


def decode(data: bytes, intensity: IntensitySettings) -> Image.Image:
    """Mode L or RGB. `ValueError` as `intensity.grey`."""
    dataset = _read(data)
    pixels = _pixels(dataset)
    if pixels.ndim == 3:
        if pixels.dtype != np.uint8:
            raise Undecodable("DICOM with colours of more than 8 bits")
        return Image.fromarray(pixels)
    if dataset.PhotometricInterpretation not in _GREY:
        raise Undecodable(f"DICOM of kind {dataset.PhotometricInterpretation}: expected grey or RGB")
    values_HW = _in_units(pixels, dataset)
    known = None if intensity.window or intensity.percentiles else _window(dataset)
    black, white = known or limits(values_HW, intensity, 2 ** int(dataset.BitsStored) - 1)
    return scaled(values_HW, black, white, inverted=dataset.PhotometricInterpretation == "MONOCHROME1")


def _read(data: bytes, **options: Any) -> Any:
    try:
        import pydicom  # only where it is needed: importing it takes a second
    except ImportError:
        raise Undecodable("DICOM, which needs pydicom: pip install 'protopnet[dicom]'") from None
    return pydicom.dcmread(io.BytesIO(data), **options)


def _pixels(dataset: Any) -> np.ndarray:
    """Stored values of the first frame: H x W, or H x W x 3 of RGB."""
    from pydicom.pixels import pixel_array

    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        return np.asarray(pixel_array(dataset, index=0))
    except RuntimeError as error:  # also where the pixels are damaged, which pydicom doesn't tell apart
        if "dependenc" not in str(error):
            raise
        raise Undecodable(f"DICOM compressed as {syntax.name}, for which pydicom needs another package") from error


def _in_units(pixels_HW: np.ndarray, dataset: Any) -> np.ndarray:
    if "ModalityLUTSequence" in dataset:
        from pydicom.pixels import apply_modality_lut

        return np.asarray(apply_modality_lut(pixels_HW, dataset))
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    if (slope, intercept) == (1, 0):
        return pixels_HW
    values_HW = pixels_HW.astype(np.float32)
    values_HW *= slope
    values_HW += intercept
    return values_HW


def _window(dataset: Any) -> tuple[float, float] | None:
    """The values that the file's first window makes black and white (DICOM PS3.3, C.11.2.1.2)."""
    centre, width = (_first(dataset.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None or width < 1:
        return None
    if dataset.get("VOILUTFunction") == "LINEAR_EXACT":
        return centre - width / 2, centre + width / 2
    return centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2


def _first(value: Any) -> float | None:
    from pydicom.multival import MultiValue

    if isinstance(value, MultiValue):
        value = value[0] if len(value) else None
    return None if value is None else float(value)
