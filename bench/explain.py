"""Explaining against predicting: one batch of photographs, with and without evidence, no pictures.

`predict` is `Predictor.scores`, `explain` the same forward pass and the evidence of the top classes with boxes, as
typed explanations; `rank` the same as arrays, as bulk scoring takes it. At most 1.3x the time is asked for. What maps by
gradient and `perturb` take is measured on one image: seconds, with all rows of its top classes.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from common import Ratio, arguments_of, bundle_of, conclude, photographs, resnet18_weights, seconds, table, take_turns

from protopnet import imaging
from protopnet.config import ModelSettings
from protopnet.datasets.reader import ImageReader
from protopnet.imaging import Preprocessing
from protopnet.predictor import Predictor

LIMIT = 1.3


def main() -> None:
    arguments = arguments_of(
        __doc__, batch=32, size=224, classes=20, top_classes=2, top_prototypes=5, similarity="cosine", rounds=8
    )
    rows = photographs(arguments.classes).table
    rows = rows.take(np.linspace(0, len(rows) - 1, arguments.batch).astype(int))
    photos = [imaging.decode(data) for data in ImageReader().read(rows, range(len(rows)))]
    pixels_BHWC = torch.from_numpy(np.stack([imaging.resize(photo, arguments.size) for photo in photos]))
    images_B3HW = imaging.normalise(pixels_BHWC, Preprocessing(size=arguments.size))
    sizes = [photo.size for photo in photos]
    settings = ModelSettings.model_validate(
        {
            "backbone": "resnet18",
            "weights": resnet18_weights(),
            "image_size": arguments.size,
            "similarity": arguments.similarity,
        }
    )
    predictor = Predictor([bundle_of(settings, arguments.classes)])
    image_R = np.repeat(np.arange(len(sizes)), arguments.top_classes)

    def explain() -> None:
        predictor.explain(
            images_B3HW, sizes, top_classes=arguments.top_classes, top_prototypes=arguments.top_prototypes
        )

    def rank() -> None:
        views = predictor.views(images_B3HW)
        top_BC = views[0].logits_BK.topk(arguments.top_classes).indices
        predictor.explainer.rank(
            views, np.array(sizes), image_R, top_BC.flatten().numpy(), prototypes=arguments.top_prototypes
        )

    times = take_turns(
        {
            "predict": lambda: seconds(lambda: predictor.scores(images_B3HW)),
            "explain": lambda: seconds(explain),
            "rank": lambda: seconds(rank),
        },
        arguments.rounds,
        warm_up=2,
    )
    one = {"top_classes": arguments.top_classes, "top_prototypes": arguments.top_prototypes, "maps": True}
    kinds: dict[str, dict[str, Any]] = {
        "similarity": {"map": "similarity"},
        "gradient": {},
        "perturb": {"perturb": True},
    }
    closer = take_turns(
        {
            kind: partial(seconds, partial(predictor.explain, images_B3HW[:1], sizes[:1], **one | options))
            for kind, options in kinds.items()
        },
        arguments.rounds,
        warm_up=1,
    )
    ratios = {name: Ratio.of(times[name], times["predict"]) for name in ("explain", "rank")}
    rate = {name: arguments.batch / float(np.median(values)) for name, values in times.items()}
    table(
        {
            name: {"img/s": f"{rate[name]:.1f}", "of predict's time": str(ratios[name]) if name in ratios else "1"}
            for name in times
        }
    )
    table({kind: {"s, one image": f"{float(np.median(values)):.3f}"} for kind, values in closer.items()})
    figures = {
        "images_per_second": {name: round(value, 1) for name, value in rate.items()},
        "seconds_of_one_image": {kind: round(float(np.median(values)), 3) for kind, values in closer.items()},
        "time_relative_to_predict": {name: ratio.as_figures() for name, ratio in ratios.items()},
    }
    # `conclude` asks for at least so much: the speed relative to predicting.
    conclude(
        "explain", arguments, figures, {"speed of explaining / predicting": (1 / ratios["explain"].median, 1 / LIMIT)}
    )


if __name__ == "__main__":
    main()
