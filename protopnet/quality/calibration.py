"""How far a network's probabilities can be trusted: fitted on validation images, before its bundle is written.

The temperature is that of Guo et al. 2017, the minimum of the cross-entropy, which is convex in 1 / temperature. A few
images, all of them right, would make it 0: the inverse has a gamma prior with its peak at 1, which weighs as much as one
image.

Legend: n images, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import softmax

from protopnet.config import CalibrationSettings
from protopnet.datasets.rows import Dataset
from protopnet.imaging import Preprocessing
from protopnet.model.calibration import Calibration
from protopnet.model.network import Baseline, ProtoPNet, placed
from protopnet.model.usual import Usual
from protopnet.passes.image_pass import PassOptions, run_pass
from protopnet.quality.classification import calibration_error
from protopnet.tables import evenly

MOST_IMAGES = 5_000  # more say nothing more about three numbers
_INVERSE = (1e-6, 1e6)  # of the temperature


@dataclass
class _SeenTask:
    """`ImageTask`: the logits of each image, and its best similarity (NaN for a baseline)."""

    network: ProtoPNet | Baseline

    @property
    def preprocessing(self) -> Preprocessing:
        return self.network.preprocessing

    def to(self, device: torch.device) -> "_SeenTask":
        placed(self.network, device)
        return self

    def __call__(self, images_B3HW: torch.Tensor, rows: pa.Table) -> pa.Table:
        seen = self.network(images_B3HW)
        logits_BK, best_B = seen.logits_BK.cpu().numpy(), seen.best_B.cpu().numpy()
        column = pa.FixedSizeListArray.from_arrays(pa.array(logits_BK.reshape(-1), pa.float32()), logits_BK.shape[1])
        found = rows.select(["image_id", "label"]).append_column("logits", column)
        return found.append_column("best", pa.array(best_B, pa.float32()))


def calibrate(
    network: ProtoPNet | Baseline,
    dataset: Dataset,
    settings: CalibrationSettings,
    options: PassOptions,
    on_images: Callable[[int], None] = lambda images: None,
) -> Calibration:
    """From the validation images; from training images, which the network knows, where there are none."""
    split = "validation" if len(dataset.split("validation")) else "train"
    rows = evenly(dataset.split(split), MOST_IMAGES)
    outputs = []
    for images, output in run_pass(rows, _SeenTask(network), options):
        outputs.append(output)
        on_images(images)
    table = pa.concat_tables(outputs).sort_by("image_id").combine_chunks()  # blocks end in any order
    labels_n = table["label"].to_numpy()
    logits_nK = table["logits"].chunk(0).flatten().to_numpy().reshape(len(table), -1).astype(np.float64)
    temperature = fit_temperature(logits_nK, labels_n)
    below, coverage = abstention(logits_nK / temperature, labels_n, settings.accuracy)
    best_n = table["best"].to_numpy()
    known = bool(np.isfinite(best_n).all())
    top_n2 = np.sort(softmax(logits_nK / temperature, axis=1), axis=1)[:, -2:]
    return Calibration(
        temperature=temperature,
        split=split,
        images=len(table),
        error_before=calibration_error(logits_nK, labels_n),
        error_after=calibration_error(logits_nK / temperature, labels_n),
        accuracy=settings.accuracy,
        abstain_below=below,
        coverage=coverage,
        unknown_below=float(np.quantile(best_n, settings.unknown, method="lower")) if known else None,
        similarity=Usual.of(best_n) if known else None,
        margin=Usual.of(top_n2[:, -1] - top_n2[:, :-1].sum(1)),
    )


def fit_temperature(logits_nK: NDArray[Any], labels_n: NDArray[Any]) -> float:
    """The temperature with the lowest cross-entropy, given that it is likely to be near 1."""
    n = len(logits_nK)
    own_n = logits_nK[np.arange(n), labels_n]

    def slope(inverse: float) -> float:
        """Of the mean cross-entropy + (inverse - 1 - log inverse) / n: it rises, from below 0 to above."""
        expected_n = (softmax(inverse * logits_nK, axis=1) * logits_nK).sum(1)
        return float((expected_n - own_n).mean()) + (1 - 1 / inverse) / n

    return round(1 / float(brentq(slope, *_INVERSE)), 4)


def abstention(logits_nK: NDArray[Any], labels_n: NDArray[Any], accuracy: float) -> tuple[float | None, float]:
    """The lowest probability at and above which at least this share is right, and the share of images there.

    None and 0 where no threshold does it.
    """
    probability_n = softmax(logits_nK, axis=1).max(1)
    order = np.argsort(-probability_n, kind="stable")
    sorted_n, hits_n = probability_n[order], (logits_nK.argmax(1) == labels_n)[order]
    right_n = hits_n.cumsum() / np.arange(1, len(order) + 1)
    last_of_equal_n = np.append(sorted_n[1:] < sorted_n[:-1], True)
    [ends] = np.nonzero((right_n >= accuracy) & last_of_equal_n)
    if not len(ends):
        return None, 0.0
    return float(sorted_n[ends[-1]]), float((ends[-1] + 1) / len(order))
