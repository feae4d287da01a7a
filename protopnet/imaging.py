"""From an encoded file to RGB pixels to the network's input: the only decoder of the system.

What can't be trusted is refused with `BadImage`, never guessed: training, push, scoring and serving see the
same pixels for the same file. No state is kept, and of PIL's only its limit of pixels is raised where
`max_pixels` is higher: every function may run in any number of threads (PIL lets go of the interpreter's lock
while it decodes and resizes).
"""

import io
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict

from protopnet import dicom
from protopnet import intensity as intensities
from protopnet.colour import in_srgb
from protopnet.config import IntensitySettings
from protopnet.intensity import AS_THE_FILE_SAYS

if TYPE_CHECKING:
    import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 50_000_000
BYTES_A_PIXEL = 24  # of memory that decoding and resizing takes at most, whatever the kind of file

# Loaded once and here, because PIL's lazy loading isn't made for threads. The kinds of file are named one by
# one: among the others PIL knows are some that start foreign programs (EPS) or aren't pictures of anything.
Image.init()
_KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "MPO")
_FORMATS = tuple(kind for kind in _KINDS if kind in Image.OPEN)

# How the files of those kinds begin, to tell a damaged image from a file that never was one.
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\xff\x4f\xff\x51")

_PHONES = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc")  # HEIC, for which there is an extra

_STRIP = 256  # rows

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Preprocessing(BaseModel):
    """How an image becomes a network's input: `resize`d to a square of `size`, then `normalise`d."""

    model_config = ConfigDict(frozen=True)

    size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resize: Literal["bilinear"] = "bilinear"  # antialiased, aspect ratio not kept
    intensity: IntensitySettings = AS_THE_FILE_SAYS


class BadImage(Exception):
    """A file that can't be used as an image; `reason` is a short phrase for people, `kind` says it to programs."""

    def __init__(self, reason: str, kind: Literal["unknown", "damaged", "too-large"] = "damaged") -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind = kind


def decode(
    data: bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    at_least: int | None = None,
    intensity: IntensitySettings = AS_THE_FILE_SAYS,
) -> Image.Image:
    """Decode to a PIL image of mode RGB in sRGB, turned as EXIF says, see-through parts on white, first frame.

    intensity: that of the network's `Preprocessing`, for all that a network or a person is to see.
    at_least: a JPEG may be decoded at a half, quarter or eighth of its size (several times faster) as long as
    both sides stay at least twice this many pixels.
    """
    if dicom.is_dicom(data):
        return _of_dicom(data, max_pixels, intensity)
    image = _open(data, max_pixels)
    try:
        if at_least is not None:
            image.draft(None, (2 * at_least, 2 * at_least))
        image.load()
        return _turned(_as_rgb(image, data, intensity), _orientation(image, data))
    except BadImage:
        raise
    except Exception as error:  # PIL's decoders raise whatever damaged data makes them stumble over
        raise _damaged(error) from error


def measure(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height in pixels after the EXIF turn, from the header alone."""
    if dicom.is_dicom(data):
        return _size_of_dicom(data, max_pixels)
    image = _open(data, max_pixels)
    return _turned_size(image, data)


def verify(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height, having read the file to its end: what `decode` would refuse is refused.

    Cheaper than decoding: a JPEG's data is read whole but turned into an eighth of the pixels.
    """
    size = measure(data, max_pixels)
    decode(data, max_pixels=max_pixels, at_least=1)
    return size


def resize(image: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3) uint8: bilinear over the whole area of each new pixel; the aspect ratio isn't kept."""
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR))


def load(
    data: bytes, size: int, max_pixels: int = MAX_PIXELS, intensity: IntensitySettings = AS_THE_FILE_SAYS
) -> np.ndarray:
    """(size, size, 3) uint8: what every path without augmentation feeds the network."""
    return resize(decode(data, max_pixels=max_pixels, intensity=intensity), size)


def normalise(pixels_BHWC: "torch.Tensor", preprocessing: Preprocessing) -> "torch.Tensor":
    """uint8 B×H×W×3 to float32 B×3×H×W in channels-last order, with the network's mean and deviation."""
    B, H, W, _ = pixels_BHWC.shape
    # Whole rows of W*3 numbers at a time, several times faster than three by three on a CPU.
    x_BHR = pixels_BHWC.reshape(B, H, W * 3).float()
    mean_R = (x_BHR.new_tensor(preprocessing.mean) * 255).repeat(W)
    std_R = (x_BHR.new_tensor(preprocessing.std) * 255).repeat(W)
    # Permuted, it lies in memory as channels_last wants it.
    return x_BHR.sub_(mean_R).div_(std_R).view(B, H, W, 3).permute(0, 3, 1, 2)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header; nothing is decoded before the number of pixels is known to be acceptable."""
    if not data:
        raise BadImage("the file is empty")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # PIL refuses by itself what is twice as large, whatever was asked for
    try:
        image = _heic(data) if data[4:12] in _PHONES else Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        if data.startswith(_BEGINNINGS):
            raise BadImage("damaged or cut off: its header can't be read") from error
        raise BadImage("not an image of a known kind (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, …)", "unknown") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"more pixels than data.max_pixels ({max_pixels}) allows", "too-large") from error
    except BadImage:
        raise
    except Exception as error:  # see decode
        raise _damaged(error) from error
    _check_size(*image.size, max_pixels)
    return image


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise BadImage("it has no pixels")
    if width * height > max_pixels:
        raise BadImage(f"{width} x {height} pixels are more than data.max_pixels ({max_pixels})", "too-large")


def _heic(data: bytes) -> Image.Image:
    try:
        from pillow_heif import HeifImageFile  # only where it is needed
    except ImportError:
        raise BadImage("HEIC, which needs pillow-heif: pip install 'protopnet[heic]'", "unknown") from None
    return HeifImageFile(io.BytesIO(data))  # turned already, and says so


def _size_of_dicom(data: bytes, max_pixels: int) -> tuple[int, int]:
    try:
        size = dicom.measure(data)
    except dicom.Undecodable as error:
        raise BadImage(str(error), "unknown") from error
    except Exception as error:  # see decode
        raise _damaged(error) from error
    _check_size(*size, max_pixels)
    return size


def _of_dicom(data: bytes, max_pixels: int, intensity: IntensitySettings) -> Image.Image:
    _size_of_dicom(data, max_pixels)
    try:
        return dicom.decode(data, intensity).convert("RGB")
    except dicom.Undecodable as error:
        raise BadImage(str(error), "unknown") from error
    except Exception as error:  # see decode
        raise _damaged(error) from error


def _damaged(error: Exception) -> BadImage:
    if isinstance(error, MemoryError):
        return BadImage("too little memory to decode it")
    message = " ".join(str(error).split())[:120] or type(error).__name__
    return BadImage(f"damaged or cut off: {message}")


def _orientation(image: Image.Image, data: bytes) -> int:
    """EXIF orientation that is still to be applied, 1 to 8; 1 where there is none or it can't be read."""
    if image.format == "TIFF":
        return 1  # PIL turns TIFF by itself, and reports the turned size from the start
    if image.format == "PNG" and "exif" not in image.info and b"eXIf" not in data:
        return 1  # looking for it behind the pixels would decode them
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken metadata don't make the pixels bad
        return 1
    return orientation if orientation in _TURNS else 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _turned_size(image: Image.Image, data: bytes) -> tuple[int, int]:
    width, height = image.size
    try:
        return (height, width) if _orientation(image, data) >= 5 else (width, height)
    except Exception as error:  # see decode
        raise _damaged(error) from error


def _as_rgb(image: Image.Image, data: bytes, intensity: IntensitySettings) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        try:
            return intensities.grey(image, data, intensity).convert("RGB")
        except ValueError as error:
            raise BadImage(str(error)) from error
    if image.mode in ("LAB", "HSV"):
        raise BadImage(f"colour mode {image.mode} isn't supported; save it as RGB")
    if image.mode == "CMYK":
        image = in_srgb(image)
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        image = _on_white(image)
    elif image.mode != "RGB":
        image = image.convert("RGB")  # grey, palette, CMYK (inverted as Adobe writes it in JPEG), YCbCr
    if profile:
        image.info["icc_profile"] = profile
        image = in_srgb(image)
        image.info.pop("icc_profile", None)  # whoever writes these pixels writes sRGB
    return image


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    on_white = Image.new("RGB", image.size)
    for top in range(0, image.height, _STRIP):  # each copy of a whole image would take as much memory as the image
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        on_white.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return on_white
