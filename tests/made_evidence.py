"""Explanations made up by hand, for tests of what is drawn and said of them."""

import numpy as np
from PIL import Image

from protopnet.evidence.figures import Album
from protopnet.evidence.records import ClassEvidence, Contrast, Difference, Evidence, Explanation, Remainder
from protopnet.evidence.sources import Source
from protopnet.evidence.sums import contrast_sums_of, sums_of
from protopnet.pages import pictures

CLASSES = ["001.Blue_Jay", "002.House_Wren", "003.<b>Crow</b>"]
PEAK = [[0.0, 0.0, 0.0, 0.9], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]  # top right


class Sources:
    """What an album asks of an explainer, without networks: a picture, half red and half blue, for each prototype."""

    classes = CLASSES

    def __init__(self, jpeg: bytes | None) -> None:
        self.jpeg = jpeg

    def thumbnail(self, member: int, prototype: int) -> bytes | None:
        return self.jpeg


def half_and_half(width: int = 200, height: int = 100) -> Image.Image:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = (220, 30, 30)
    pixels[:, width // 2 :] = (30, 30, 220)
    return Image.fromarray(pixels)


def evidence(points: float, prototype: int = 0, **changes) -> Evidence:
    source = Source(
        image_id=1,
        uri="jay/1.jpg",
        sha256="ab",
        width=400,
        height=200,
        box=(0, 0, 100, 200),
        row=0,
        column=0,
        self_similarity=1,
    )
    given = {"member": 0, "prototype": prototype, "class_": 0, "class_name": CLASSES[0], "similarity": 0.5}
    given |= {"connection": 2 * points, "points": points, "box": (0, 90, 40, 120), "row": 0, "column": 3}
    return Evidence(**(given | {"activation_map": PEAK, "source": source} | changes))


def explanation(listed: list[float], rest: float, label: int = 0) -> Explanation:
    found = [evidence(value, number) for number, value in enumerate(listed)]
    logit = sum(listed) + rest
    entry = ClassEvidence(
        class_=label,
        class_name=CLASSES[label],
        probability=0.75,
        logit=logit,
        own_points=0,
        evidence=found,
        remainder=Remainder(prototypes=7, points=rest),
        shown=sums_of([(each.similarity, each.connection) for each in found], logit, 0.75, remaining=7),
    )
    return Explanation(width=120, height=90, members=1, classes=[entry])


def contrast(rows: list[tuple[float, float]], rest: float, rival: int = 1) -> Contrast:
    """rows: connections to the answer and to the rival; similarities are 0.5."""
    found = [
        Difference(
            **dict(evidence(own / 2, number, connection=own)),
            rival_connection=other,
            rival_points=other / 2,
            difference=(own - other) / 2,
        )
        for number, (own, other) in enumerate(rows)
    ]
    difference = sum(row.difference for row in found) + rest
    return Contrast(
        class_=0,
        class_name=CLASSES[0],
        rival=rival,
        rival_name=CLASSES[rival],
        difference=difference,
        rows=found,
        remainder=Remainder(prototypes=7, points=rest),
        shown=contrast_sums_of([(0.5, own, other) for own, other in rows], difference, 0.0, remaining=7),
    )


def album(jpeg: bytes | None = None) -> Album:
    return Album(Sources(jpeg or pictures.encoded(half_and_half())))  # type: ignore[arg-type]
