"""How good a classifier is, from its logits: what evaluation writes to JSON.

The figures are torchmetrics'; here they are put together per class and by name.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)

CALIBRATION_BINS = 15


def classification_metrics(logits_nK: NDArray[Any], labels_n: NDArray[Any], classes: list[str]) -> dict[str, Any]:
    """Figures of merit, ready for JSON.

    top1, top5 (of min(5, K)), cross_entropy, per_class {name: {accuracy, count}}, mean_per_class (over the
    classes that have images), confusion (K×K counts, a row a true class), calibration_error (expected
    calibration error in 15 bins). The accuracy of a class without images is None. Ties go to the lower class.
    """
    logits, labels = _checked(logits_nK, labels_n, classes)
    confusion = multiclass_confusion_matrix(logits.argmax(1), labels, len(classes)).numpy()
    counts, hits = confusion.sum(1), confusion.diagonal()
    accuracies = [float(hit / count) if count else None for hit, count in zip(hits, counts, strict=True)]
    return {
        "images": len(labels),
        "top1": float(hits.sum() / counts.sum()),
        "top5": _top_k(logits, labels, min(5, len(classes))),
        "cross_entropy": float(cross_entropy(logits, labels)),
        "mean_per_class": float(np.mean([value for value in accuracies if value is not None])),
        "per_class": {
            name: {"accuracy": accuracy, "count": int(count)}
            for name, accuracy, count in zip(classes, accuracies, counts, strict=True)
        },
        "confusion": confusion.tolist(),
        "calibration_error": _calibration_error(logits, labels),
    }


def _checked(logits_nK: NDArray[Any], labels_n: NDArray[Any], classes: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.from_numpy(np.array(logits_nK, dtype=np.float64))
    labels = torch.from_numpy(np.array(labels_n, dtype=np.int64))
    if logits.shape != (len(labels), len(classes)) or not len(labels):
        raise ValueError(f"logits {tuple(logits.shape)} for {len(labels)} labels of {len(classes)} classes")
    if not torch.isfinite(logits).all():
        raise ValueError("logits that are not finite")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"labels outside 0 … {len(classes) - 1}")
    return logits, labels


def _top_k(logits: torch.Tensor, labels: torch.Tensor, k: int) -> float:
    accuracy = multiclass_accuracy(logits, labels, logits.shape[1], average="micro", top_k=k)
    return float(accuracy)


def _calibration_error(logits: torch.Tensor, labels: torch.Tensor) -> float:
    # torchmetrics takes logits that all lie in [0, 1] for probabilities: give it probabilities
    error = multiclass_calibration_error(logits.softmax(1), labels, logits.shape[1], n_bins=CALIBRATION_BINS)
    return float(error)
