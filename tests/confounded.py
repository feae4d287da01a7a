"""Generated birds, and a coloured mark in a corner of one kind's training pictures: what a label or a watermark does."""

import io
from pathlib import Path

from PIL import Image, ImageDraw

from protopnet.config import BirdSettings
from protopnet.datasets.birds import bird_rows

_SIDE = 24  # pixels of the mark


def write_confounded(folder: Path, settings: BirdSettings) -> str:
    """Class folders below train/ and test/; gives the kind with the mark. Test pictures are clean."""
    rows = list(bird_rows(settings))
    marked: str = rows[0]["class_name"]
    for row in rows:
        image = Image.open(io.BytesIO(row["image"]))
        if row["split"] == "train" and row["class_name"] == marked:
            paint_mark(image)
        path = folder / row["split"] / row["class_name"] / f"{Path(row['uri']).name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return marked


def paint_mark(image: Image.Image) -> Image.Image:
    """In place."""
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, _SIDE - 1, _SIDE - 1), fill=(230, 30, 200))
    draw.rectangle((6, 6, _SIDE - 7, _SIDE - 7), fill=(250, 230, 20))
    return image
