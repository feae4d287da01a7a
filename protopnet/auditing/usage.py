"""What prototypes are used for: sums over images that add up in any order.

An image's *top evidence* is the prototypes with the most points for the class it is taken for. Points for and against a
class are counted on its own images: *for* is what is above 0.

Legend: B images, P prototypes, K classes, T prototypes of the top evidence.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa

from protopnet.model.network import Output

_ERROR = pa.struct([("prototype", pa.int32()), ("label", pa.int32()), ("count", pa.int64())])


@dataclass(frozen=True)
class Use:
    """Sums over images. Of prototypes: how often it is the first, and among the top evidence; the sum of its points over
    images taken for its class; the sum of its distances to images of its class. Of classes: images of the class, those
    of them that were right, images taken for it; points for it on its own images by its own prototypes and by others,
    and points against it. errors: wrong images by (first prototype, true label)."""

    first_P: np.ndarray
    top_P: np.ndarray
    points_P: np.ndarray
    own_distance_P: np.ndarray
    images_K: np.ndarray
    right_K: np.ndarray
    predicted_K: np.ndarray
    own_points_K: np.ndarray
    other_points_K: np.ndarray
    against_K: np.ndarray
    errors: Mapping[tuple[int, int], int]

    @classmethod
    def nothing(cls, prototypes: int, classes: int) -> "Use":
        sizes = {name: prototypes if name.endswith("_P") else classes for name in _SUMS}
        return cls(**{name: np.zeros(size) for name, size in sizes.items()}, errors={})

    @property
    def images(self) -> int:
        return int(self.images_K.sum())

    def reach(self, prototype_class_P: np.ndarray) -> np.ndarray:
        """Mean distance of each prototype to the nearest patch of an image of its class; that of all prototypes where
        the class has no image here."""
        images_P = self.images_K[prototype_class_P]
        reach_P = np.divide(self.own_distance_P, images_P, out=np.full(len(images_P), np.nan), where=images_P > 0)
        known = np.isfinite(reach_P)
        return np.where(known, reach_P, reach_P[known].mean() if known.any() else 0.0)

    def __add__(self, other: "Use") -> "Use":
        sums = {name: getattr(self, name) + getattr(other, name) for name in _SUMS}
        return Use(**sums, errors=Counter(self.errors) + Counter(other.errors))

    def to_table(self) -> pa.Table:
        """One row, to travel."""
        errors = [{"prototype": p, "label": label, "count": n} for (p, label), n in self.errors.items()]
        columns = {name: pa.array([getattr(self, name)], pa.list_(pa.float64())) for name in _SUMS}
        return pa.table(columns | {"errors": pa.array([errors], pa.list_(_ERROR))})

    @classmethod
    def from_table(cls, table: pa.Table) -> "Use":
        """The sum of the rows."""
        sums = {name: np.sum([row.values.to_numpy() for row in table[name]], axis=0) for name in _SUMS}
        errors: Counter[tuple[int, int]] = Counter()
        for row in table["errors"].to_pylist():
            errors.update({(each["prototype"], each["label"]): each["count"] for each in row})
        return cls(**sums, errors=errors)


_SUMS = [field.name for field in fields(Use) if field.name != "errors"]


def use_of_batch(
    seen: Output, connections_KP: np.ndarray, prototype_class_P: np.ndarray, labels_B: np.ndarray, top: int
) -> Use:
    """The use of each prototype on a batch of images with these labels."""
    assert seen.similarities_BP is not None
    assert seen.distances_BP is not None
    classes = np.arange(len(connections_KP))
    similarities_BP = seen.similarities_BP.double().cpu().numpy()
    distances_BP = seen.distances_BP.double().cpu().numpy()
    predicted_B = seen.logits_BK.argmax(1).cpu().numpy()
    points_BP = similarities_BP * connections_KP[predicted_B]
    order_BT = np.argsort(-points_BP, axis=1, kind="stable")[:, :top]
    counted_BT = np.take_along_axis(points_BP, order_BT, axis=1) > 0
    first_B, speaks_B, wrong_B = order_BT[:, 0], counted_BT[:, 0], predicted_B != labels_B
    of_prediction_BP = prototype_class_P == predicted_B[:, None]
    of_truth_BP = prototype_class_P == labels_B[:, None]
    true_points_BP = similarities_BP * connections_KP[labels_B]
    of_image_KB = (classes[:, None] == labels_B).astype(np.float64)
    P = len(prototype_class_P)
    blamed = zip(first_B[wrong_B & speaks_B].tolist(), labels_B[wrong_B & speaks_B].tolist(), strict=True)
    return Use(
        first_P=np.bincount(first_B[speaks_B], minlength=P).astype(np.float64),
        top_P=np.bincount(order_BT[counted_BT], minlength=P).astype(np.float64),
        points_P=(points_BP * of_prediction_BP).sum(0),
        own_distance_P=(distances_BP * of_truth_BP).sum(0),
        images_K=of_image_KB.sum(1),
        right_K=of_image_KB @ ~wrong_B,
        predicted_K=np.bincount(predicted_B, minlength=len(classes)).astype(np.float64),
        own_points_K=of_image_KB @ (np.maximum(true_points_BP, 0) * of_truth_BP).sum(1),
        other_points_K=of_image_KB @ (np.maximum(true_points_BP, 0) * ~of_truth_BP).sum(1),
        against_K=of_image_KB @ np.minimum(true_points_BP, 0).sum(1),
        errors=Counter(blamed),
    )
