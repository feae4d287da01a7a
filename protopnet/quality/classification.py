"""How good a classifier is, from its logits: what evaluation writes to JSON.

Put together per class and by name.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

CALIBRATION_BINS = 15
_NUMBERS = 1 << 22  # logits that are looked at in float64 at a time
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
    labels_n = _checked(logits_nK, labels_n, classes)
    seen = Seen.of(logits_nK, labels_n, temperature)
    confusion = confused(labels_n, seen.predicted_n)
    per_class = [
        _against_rest(counts, logits_nK[:, k].astype(np.float64) / temperature - seen.logsumexp_n, labels_n == k)
        for k, counts in enumerate(_counts(confusion, len(classes)))
    ]
    return {
        "images": len(labels_n),
        "top1": float((seen.predicted_n == labels_n).mean()),
        "top5": float(seen.among_five_n.mean()),
        "cross_entropy": float(seen.loss_n.mean()),
        "mean_per_class": _mean(per_class, "accuracy"),
        **{name: _mean(per_class, name) for name in AGAINST_REST},
        "per_class": dict(zip(classes, per_class, strict=True)),
        "confusion": confusion.tolist(),
        "calibration_error": seen.calibration_error(labels_n),
        "calibration_error_before": calibration_error(logits_nK, labels_n),
        "temperature": temperature,
    }


@dataclass(frozen=True)
class Seen:
    """What of the logits of each image counts, in float64. confidence_n: the largest probability. among_five_n: whether its
    class is among the five with the largest logits."""

    predicted_n: NDArray[np.int64]
    logsumexp_n: NDArray[np.float64]
    confidence_n: NDArray[np.float64]
    loss_n: NDArray[np.float64]
    among_five_n: NDArray[np.bool_]

    @classmethod
    def of(cls, logits_nK: NDArray[Any], labels_n: NDArray[np.int64], temperature: float) -> "Seen":
        """From some rows at a time: all of them in float64 would be several times what evaluation holds."""
        size = max(1, _NUMBERS // logits_nK.shape[1])
        pieces = [slice(first, first + size) for first in range(0, len(labels_n), size)]
        parts = zip(
            *(_seen(logits_nK[rows].astype(np.float64) / temperature, labels_n[rows]) for rows in pieces), strict=True
        )
        return cls(*map(np.concatenate, parts))

    def calibration_error(self, labels_n: NDArray[np.int64]) -> float:
        """Expected calibration error (Guo et al. 2017): over bins of confidence, how far it is from the share right."""
        bin_n = np.minimum((self.confidence_n * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
        surplus_b = np.bincount(bin_n, self.confidence_n - (self.predicted_n == labels_n))
        return float(np.abs(surplus_b).sum() / len(labels_n))


def _seen(logits_mK: NDArray[Any], labels_m: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
    logits = torch.from_numpy(logits_mK)
    labels_m1 = torch.from_numpy(labels_m)[:, None]
    logsumexp = logits.logsumexp(1)
    confidence = (logits.max(1).values - logsumexp).exp().clamp(max=1)
    loss = logsumexp - logits.gather(1, labels_m1)[:, 0]
    among = (logits.topk(min(5, logits.shape[1])).indices == labels_m1).any(1)
    return tuple(each.numpy() for each in (logits.argmax(1), logsumexp, confidence, loss, among))


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


def _checked(logits_nK: NDArray[Any], labels_n: NDArray[Any], classes: list[str]) -> NDArray[np.int64]:
    labels = np.array(labels_n, dtype=np.int64)
    if logits_nK.shape != (len(labels), len(classes)) or not len(labels):
        raise ValueError(f"logits {logits_nK.shape} for {len(labels)} labels of {len(classes)} classes")
    if not all(np.isfinite(logits_K).all() for logits_K in logits_nK):
        raise ValueError("logits that are not finite")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"labels outside 0 … {len(classes) - 1}")
    return labels


def calibration_error(logits_nK: NDArray[Any], labels_n: NDArray[Any]) -> float:
    """Expected calibration error in 15 bins."""
    labels = np.array(labels_n, dtype=np.int64)
    return Seen.of(logits_nK, labels, 1.0).calibration_error(labels)
