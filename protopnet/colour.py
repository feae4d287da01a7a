"""Colours of other spaces (Display P3 of phones, Adobe RGB of cameras, a printer's CMYK) -> sRGB."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_MODES = {"RGB": "RGB", "CMYK": "CMYK"}  # of images, by the space of a profile; grey profiles aren't minded
_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_UNSEEN = 2  # of 255, that a colour may differ by where a profile is sRGB under another name


def in_srgb(image: Image.Image) -> Image.Image:
    """The same colours in sRGB; the image itself where it has no profile, one that is sRGB, or a broken one."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    transform = _transform(profile, image.mode)
    return image if transform is None else transform.apply(image)


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if _MODES.get(opened.profile.xcolor_space.strip()) != mode:
            return None
        transform = ImageCms.ImageCmsTransform(opened, _SRGB, mode, "RGB")
        return None if mode == "RGB" and _changes_nothing(transform) else transform
    except (OSError, ImageCms.PyCMSError, ValueError, TypeError):
        return None


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3)
    seen = np.asarray(transform.apply(Image.fromarray(colours)))
    return int(np.abs(seen.astype(int) - colours).max()) <= _UNSEEN
