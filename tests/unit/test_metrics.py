"""Classification metrics against answers worked out by hand."""

import json
import math
import tracemalloc

import numpy as np
import pytest

from protopnet.quality.classification import AGAINST_REST, classification_metrics

CLASSES = ["ant", "bee", "cat"]


def logits_of(probabilities: list[list[float]]) -> np.ndarray:
    return np.log(np.array(probabilities))


@pytest.fixture
def metrics() -> dict:
    """Predictions ant, bee, ant, ant for ant, bee, cat, bee."""
    probabilities = [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1], [0.5, 0.25, 0.25]]
    return classification_metrics(logits_of(probabilities), np.array([0, 1, 2, 1]), CLASSES)


def test_accuracies(metrics: dict) -> None:
    assert metrics["images"] == 4
    assert metrics["top1"] == pytest.approx(2 / 4)
    assert metrics["top5"] == 1
    found = {
        name: {key: figures[key] for key in ("accuracy", "count")} for name, figures in metrics["per_class"].items()
    }
    assert found == {
        "ant": {"accuracy": 1.0, "count": 1},
        "bee": {"accuracy": 0.5, "count": 2},
        "cat": {"accuracy": 0.0, "count": 1},
    }
    assert metrics["mean_per_class"] == pytest.approx((1 + 0.5 + 0) / 3)


def test_rows_of_the_confusion_are_true_classes(metrics: dict) -> None:
    assert metrics["confusion"] == [[0, 0, 1], [1, 0, 1], [1, 1, 1], [2, 0, 1]]  # true, predicted, images


def test_of_many_classes_no_number_is_kept_for_each_pair() -> None:
    classes = [str(label) for label in range(2000)]
    tracemalloc.start()
    metrics = classification_metrics(np.eye(20, 2000), np.arange(20), classes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert metrics["confusion"] == [[label, label, 1] for label in range(20)]
    assert peak < 2000 * 2000


def test_logits_are_looked_at_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(500, 300)).astype(np.float32), random.integers(0, 300, 500)
    classes = [str(label) for label in range(300)]
    whole = classification_metrics(logits, labels, classes, 1.7)
    monkeypatch.setattr("protopnet.quality.classification._NUMBERS", 7 * 300)
    tracemalloc.start()
    found = classification_metrics(logits, labels, classes, 1.7)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == whole
    assert peak < logits.nbytes


def test_cross_entropy(metrics: dict) -> None:
    expected = -(math.log(0.7) + math.log(0.8) + math.log(0.1) + math.log(0.25)) / 4
    assert metrics["cross_entropy"] == pytest.approx(expected)


def test_calibration_error(metrics: dict) -> None:
    # four bins of one image each: |1 - .7|, |1 - .8|, |0 - .6|, |0 - .5|, each of weight 1/4
    assert metrics["calibration_error"] == pytest.approx((0.3 + 0.2 + 0.6 + 0.5) / 4)


def test_calibration_error_of_one_bin() -> None:
    # three images of confidence 0.8, two of them right
    metrics = classification_metrics(logits_of([[0.8, 0.2]] * 3), np.array([0, 0, 1]), CLASSES[:2])
    assert metrics["calibration_error"] == pytest.approx(0.8 - 2 / 3)


def test_logits_between_0_and_1_are_still_logits() -> None:
    metrics = classification_metrics(np.array([[1.0, 0.0]]), np.array([0]), CLASSES[:2])
    assert metrics["calibration_error"] == pytest.approx(1 - 1 / (1 + math.exp(-1)))


def test_top5_of_many_classes() -> None:
    logits = np.tile(np.arange(7.0)[::-1], (7, 1))  # the order is 0, 1, … 6 for each image
    metrics = classification_metrics(logits, np.arange(7), [str(name) for name in range(7)])
    assert metrics["top1"] == pytest.approx(1 / 7)
    assert metrics["top5"] == pytest.approx(5 / 7)


def test_a_class_without_images_counts_nowhere() -> None:
    metrics = classification_metrics(logits_of([[0.7, 0.2, 0.1]] * 2), np.array([0, 1]), CLASSES)
    assert metrics["per_class"]["cat"] == {"accuracy": None, "count": 0, **dict.fromkeys(AGAINST_REST)}
    assert metrics["mean_per_class"] == metrics["recall"] == 0.5
    assert metrics["precision"] == 0.25


def test_one_class_only_has_no_rest() -> None:
    metrics = classification_metrics(logits_of([[0.7, 0.2, 0.1]] * 2), np.array([0, 0]), CLASSES)
    assert (metrics["auc"], metrics["specificity"], metrics["f1"]) == (None, None, 1.0)


def test_each_class_against_the_rest_is_what_counting_gives() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 60)
    logits = np.round(random.normal(size=(60, 5)), 1)  # many equal scores, and a class without images
    logits[np.arange(60), labels] += 0.5
    metrics = classification_metrics(logits, labels, list("abcde"))
    taken = logits.argmax(1)
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected: dict[str, list[float]] = {name: [] for name in AGAINST_REST}
    for k in range(4):
        right = sum(p == k and t == k for p, t in zip(taken, labels, strict=True))
        wrong = sum(p == k and t != k for p, t in zip(taken, labels, strict=True))
        missed = sum(p != k and t == k for p, t in zip(taken, labels, strict=True))
        other = 60 - right - wrong - missed
        own, rest = probability[labels == k, k], probability[labels != k, k]
        pairs = [1.0 if a - b > 1e-12 else 0.5 if abs(a - b) <= 1e-12 else 0.0 for a in own for b in rest]
        values = {
            "precision": right / (right + wrong),
            "recall": right / (right + missed),
            "f1": 2 * right / (2 * right + wrong + missed),
            "specificity": other / (other + wrong),
            "auc": np.mean(pairs),
        }
        for name, value in values.items():
            assert metrics["per_class"]["abcd"[k]][name] == pytest.approx(value)
            expected[name].append(value)
    for name, each in expected.items():
        assert metrics[name] == pytest.approx(np.mean(each))


def test_huge_logits() -> None:
    metrics = classification_metrics(np.array([[1e4, -1e4], [1e4, -1e4]]), np.array([0, 1]), CLASSES[:2])
    assert metrics["cross_entropy"] == pytest.approx(1e4)


def test_is_json(metrics: dict) -> None:
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (np.zeros((2, 2)), np.array([0, 1])),
        (np.zeros((2, 3)), np.array([0])),
        (np.zeros((0, 3)), np.array([], dtype=int)),
        (np.zeros((1, 3)), np.array([3])),
        (np.zeros((1, 3)), np.array([-1])),
        (np.full((1, 3), np.nan), np.array([0])),
    ],
)
def test_nonsense_is_refused(logits: np.ndarray, labels: np.ndarray) -> None:
    with pytest.raises(ValueError):
        classification_metrics(logits, labels, CLASSES)
