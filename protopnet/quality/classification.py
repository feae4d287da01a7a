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
)

CALIBRATION_BINS = 15
AGAINST_REST = ("precision", "recall", "f1", "specificity", "auc")


def classification_metrics(
    logits_nK: NDArray[Any], labels_n: NDArray[Any], classes: list[str], temperature: float = 1.0
) -> dict[str, Any]:
    """Figures of merit, ready for JSON.

    top1, top5 (of min(5, K)), cross_entropy, per_class {name: {accuracy, count, precision, …}}, mean_per_class (over
    the classes that have images), confusion (`confused`), calibration_error (expected
    calibration error in 15 bins), calibration_error_before (of a temperature of 1), temperature. Probabilities are those of
    logits / temperature. Each class against the rest, and as the mean of the classes that have images:
    precision, recall, f1, specificity, auc (of its probability). The figures of a class without images are None. Ties
    go to the lower class.
    """
    plain, labels = _checked(logits_nK, labels_n, classes)
    logits = plain / temperature
    confusion = confused(labels.numpy(), logits.argmax(1).numpy())
    scores = logits.log_softmax(1).numpy()
    per_class = [
        _against_rest(counts, scores[:, k], labels.numpy() == k)
        for k, counts in enumerate(_counts(confusion, len(classes)))
    ]
    return {
        "images": len(labels),
        "top1": float(confusion[confusion[:, 0] == confusion[:, 1], 2].sum() / len(labels)),
        "top5": _top_k(logits, labels, min(5, len(classes))),
        "cross_entropy": float(cross_entropy(logits, labels)),
        "mean_per_class": _mean(per_class, "accuracy"),
        **{name: _mean(per_class, name) for name in AGAINST_REST},
        "per_class": dict(zip(classes, per_class, strict=True)),
        "confusion": confusion.tolist(),
        "calibration_error": _calibration_error(logits, labels),
        "calibration_error_before": _calibration_error(plain, labels),
        "temperature": temperature,
    }


def confused(labels_n: NDArray[Any], predicted_n: NDArray[Any]) -> NDArray[np.int64]:
    """The entries of the confusion matrix that aren't 0, in order: rows of true class, predicted class, images."""
    pairs, images = np.unique(np.column_stack([labels_n, predicted_n]), axis=0, return_counts=True)
    return np.column_stack([pairs, images]).astype(np.int64)


def _counts(confusion_C3: NDArray[np.int64], classes: int) -> list[tuple[int, int, int]]:
    """Of each class: its images, those taken for it, and those that rightly were."""
    right_C3 = confusion_C3[confusion_C3[:, 0] == confusion_C3[:, 1]]
    columns = (confusion_C3[:, 0], confusion_C3), (confusion_C3[:, 1], confusion_C3), (right_C3[:, 0], right_C3)
    images, taken, hits = (np.bincount(of, rows[:, 2], minlength=classes).astype(int).tolist() for of, rows in columns)
    return list(zip(images, taken, hits, strict=True))


def _against_rest(
    counts: tuple[int, int, int], scores_n: NDArray[Any], is_class_n: NDArray[Any]
) -> dict[str, float | None]:
    """The figures of one class."""
    count, predicted, hits = counts
    if not count:
        return {"accuracy": None, "count": 0, **dict.fromkeys(AGAINST_REST)}
    others = len(is_class_n) - count
    return {
        "accuracy": hits / count,
        "count": count,
        "precision": hits / predicted if predicted else 0.0,
        "recall": hits / count,
        "f1": 2 * hits / (count + predicted),
        "specificity": 1 - (predicted - hits) / others if others else None,
        "auc": _area_under_curve(scores_n, is_class_n) if others else None,
    }


def _area_under_curve(scores_n: NDArray[Any], is_class_n: NDArray[Any]) -> float:
    """The share of pairs (one image of the class, one of the rest) in the right order, equal ones counted half."""
    _, place_n, counts = np.unique(scores_n, return_inverse=True, return_counts=True)
    rank_n = (np.cumsum(counts) - (counts - 1) / 2)[place_n]  # equal scores share their mean rank
    count = int(is_class_n.sum())
    return float((rank_n[is_class_n].sum() - count * (count + 1) / 2) / (count * (len(scores_n) - count)))


def _mean(per_class: list[dict[str, float | None]], name: str) -> float | None:
    known = [value for figures in per_class if (value := figures[name]) is not None]
    return float(np.mean(known)) if known else None


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


def calibration_error(logits_nK: NDArray[Any], labels_n: NDArray[Any]) -> float:
    """Expected calibration error in 15 bins."""
    return _calibration_error(torch.from_numpy(logits_nK), torch.from_numpy(labels_n.astype(np.int64)))


def _calibration_error(logits: torch.Tensor, labels: torch.Tensor) -> float:
    # torchmetrics takes logits that all lie in [0, 1] for probabilities: give it probabilities
    error = multiclass_calibration_error(logits.softmax(1), labels, logits.shape[1], n_bins=CALIBRATION_BINS)
    return float(error)
