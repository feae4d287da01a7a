"""Test images for the report of a run: three that the model got right and three that it got wrong, explained."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from protopnet import imaging
from protopnet.datasets.reader import ImageReader
from protopnet.datasets.rows import Dataset
from protopnet.evidence.figures import Album, explained_image
from protopnet.evidence.records import Explanation
from protopnet.pages.pictures import Inlined
from protopnet.predictor import Predictor
from protopnet.words import readable_names

EACH = 3
LISTED = 4  # prototypes a class


def choose_examples(predictions: pa.Table, each: int = EACH) -> tuple[list[int], list[int]]:
    """image_id of images to explain: right ones and wrong ones, the surest first, each of another true class.

    predictions: columns image_id, label, prediction, probability. A wrong answer given with confidence is the one
    that most needs an explanation.
    """
    surest = predictions.sort_by([("probability", "descending"), ("image_id", "ascending")])
    right: dict[int, int] = {}
    wrong: dict[int, int] = {}
    for row in surest.select(["image_id", "label", "prediction"]).to_pylist():
        chosen = right if row["prediction"] == row["label"] else wrong
        chosen.setdefault(row["label"], row["image_id"])
    return list(right.values())[:each], list(wrong.values())[:each]


def explained_examples(
    predictor: Predictor, dataset: Dataset, predictions: pa.Table, max_pixels: int = imaging.MAX_PIXELS
) -> tuple[list[Mapping[str, Any]], dict[str, Inlined]]:
    """What the template of the report shows of each: see `figures.explained_image`; wrong ones with the true class too.

    Each has `verdict`, a line about what the image is and was taken for, and `right`. With them the images that their
    pictures are of.
    """
    right, wrong = choose_examples(predictions)
    image_ids = [*right, *wrong]
    if not image_ids:
        return [], {}
    places = np.searchsorted(dataset.table["image_id"].to_numpy(), image_ids)
    rows = dataset.table.take(places)
    photos = [
        imaging.decode(data, max_pixels=max_pixels, intensity=predictor.intensity)
        for data in ImageReader().read(rows, range(len(rows)))
    ]
    labels = rows["label"].to_pylist()
    explanations = predictor.explain(
        predictor.look_at(photos),
        [photo.size for photo in photos],
        top_classes=1,
        top_prototypes=LISTED,
        asked=[[label] for label in labels],
        contrast=True,
        maps=True,
    )
    album, names = Album(predictor.explainer), readable_names(predictor.classes)
    sheet: dict[str, Inlined] = {}
    examples: list[Mapping[str, Any]] = [
        {
            **explained_image(uri.rsplit("/", 1)[-1], photo, explanation, album, names, sheet),
            "right": image_id in right,
            "verdict": _verdict(explanation, names),
        }
        for image_id, uri, photo, explanation in zip(
            image_ids, rows["uri"].to_pylist(), photos, explanations, strict=True
        )
    ]
    return examples, sheet


def _verdict(explanation: Explanation, names: Sequence[str]) -> str:
    top, truth = explanation.top, explanation.classes[-1]
    if top is truth:
        return f"Recognised as what it is: {names[truth.class_]}."
    return (
        f"{names[truth.class_]}, taken for {names[top.class_]}, which has {top.logit - truth.logit:z.2f} points more. "
        "The last table has what tells them apart."
    )
