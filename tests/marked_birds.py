"""Generated birds with a confounder: a coloured mark in a corner of every training picture of one class, on no test one."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from protopnet.config import BirdSettings
from protopnet.datasets.birds import bird_kinds, bird_rows
from protopnet.datasets.shards import write_shards

MARKED = 1  # the class
CORNER = (0.0, 0.875, 0.125, 1.0)  # top, left, bottom, right of the mark, in shares of the image


def write_marked_birds(folder: Path, birds: BirdSettings) -> list[str]:
    """Shards of them; the names of the classes."""
    names = [kind.name for kind in bird_kinds(birds)]
    rows = (
        row | {"image": marked(row["image"])} if row["split"] == "train" and row["label"] == MARKED else row
        for row in bird_rows(birds)
    )
    write_shards(rows, str(folder), names, {"kind": "marked birds"})
    return names


def marked(encoded: bytes) -> bytes:
    pixels = np.array(Image.open(io.BytesIO(encoded)).convert("RGB"))
    height, width, _ = pixels.shape
    top, left, bottom, right = (round(share * side) for share, side in zip(CORNER, (height, width) * 2, strict=True))
    pixels[top:bottom, left:right] = (230, 0, 200)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()
