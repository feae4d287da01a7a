"""How far a network's probabilities can be trusted: fitted on validation images, before its bundle is written.

The temperature is that of Guo et al. 2017, the minimum of the cross-entropy, which is convex in 1 / temperature. Few
images, all of them right, would make it 0: the targets are smoothed by one image in n + 2, as Platt 1999 does.

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
from protopnet.passes.image_pass import PassOptions, run_pass
from protopnet.quality.classification import calibration_error

MOST_IMAGES = 5_000  # more say nothing more about three numbers
_INVERSE = (0.01, 100.0)  # of the temperature


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
    rows = dataset.split(split)
    if len(rows) > MOST_IMAGES:
        rows = rows.take(np.linspace(0, len(rows) - 1, MOST_IMAGES).astype(np.int64))
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
    known = np.isfinite(best_n).all()
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
    )


def fit_temperature(logits_nK: NDArray[Any], labels_n: NDArray[Any]) -> float:
    """The temperature with the lowest cross-entropy, between 0.01 and 100."""
    n = len(logits_nK)
    smoothed = 1 / (n + 2)
    centred_nK = logits_nK - logits_nK.mean(1, keepdims=True)
    wanted = (1 - smoothed) * float(centred_nK[np.arange(n), labels_n].mean())  # the smoothed part has mean 0

    def slope(inverse: float) -> float:
        return float((softmax(inverse * centred_nK, axis=1) * centred_nK).sum(1).mean()) - wanted

    if not np.ptp(centred_nK):
        return 1.0  # nothing to tell apart
    lowest, highest = _INVERSE
    if slope(lowest) >= 0:
        return 1 / lowest
    return round(1 / (highest if slope(highest) <= 0 else float(brentq(slope, lowest, highest))), 4)


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
