"""Four prototypes of two classes, as an audit is given them."""

import io

import numpy as np
import pyarrow as pa
from PIL import Image

from protopnet.model.bundle import PROTOTYPE_SCHEMA

CLASSES = ["001.Black_Gull", "002.White_Gull"]
CLASS_P = np.array([0, 0, 1, 1])


def jpeg(colour: str) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (60, 40), colour).save(sink, "JPEG")
    return sink.getvalue()


def prototypes() -> pa.Table:
    peak = np.eye(4).tolist()
    rows = [
        {
            "prototype": p,
            "class": label,
            "class_name": CLASSES[label],
            "image_id": p,
            "uri": f"s3://bucket/{p}.jpg",
            "sha256": f"sha {p}",
            "width": 120,
            "height": 80,
            "row": 1,
            "column": 2,
            "box": [10, 20, 30, 60],
            "receptive_field": [0, 0, 80, 120],
            "self_similarity": 9.0,
            "activation_map": peak,
            "thumbnail": jpeg("seagreen"),
        }
        for p, label in enumerate(CLASS_P.tolist())
    ]
    return pa.Table.from_pylist(rows, PROTOTYPE_SCHEMA)


def points(*places: tuple[float, float]) -> list[dict]:
    return [{"part": f"part {n}", "x": x, "y": y} for n, (x, y) in enumerate(places)]
