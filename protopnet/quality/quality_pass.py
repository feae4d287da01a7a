"""Explanation quality over a data set: one Ray Data pass, from images to what `quality/metrics.py` adds up.

An image with key points or a mask is encoded twice, the second time with noise; a sample of the images some fifty times
more, for deletion and insertion. The logits come along, so that evaluation needs no pass of its own.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from protopnet.datasets.masks import on_mask, unpacked
from protopnet.errors import UserError
from protopnet.evidence.explanation import explaining
from protopnet.evidence.records import MapKind
from protopnet.imaging import Preprocessing
from protopnet.model.bundle import Bundle
from protopnet.model.network import ProtoPNet
from protopnet.predictor import Predictor
from protopnet.quality.generated_birds import Birds, prototypes_on_birds
from protopnet.quality.key_points import PartPoint
from protopnet.quality.metrics import (
    DEFINITIONS,
    PROTOTYPE_QUALITY_SCHEMA,
    Drawn,
    Metrics,
    Observation,
    curve_quality,
    on_object,
    part_quality,
    place_quality,
    sparsity,
)
from protopnet.quality.observer import Observer, Record
from protopnet.quality.table import METRICS

_SEED_SAMPLE = 8  # last word of the seed, so that no two purposes share random numbers

_POINTS = pa.list_(pa.float64())  # (y, x) of one place after the other
_SEEN = pa.schema(
    [
        ("logits", pa.list_(pa.float32())),
        ("prediction", pa.int32()),
        ("own", pa.list_(pa.int32())),
        ("own_places", _POINTS),
        ("own_places_noisy", _POINTS),
        ("own_contrast", pa.list_(pa.float64())),
        ("evidence_places", _POINTS),
        ("nearest", pa.list_(pa.int32())),
        ("nearest_similarity", pa.list_(pa.float64())),
        ("nearest_places", _POINTS),
        ("deletion", _POINTS),
        ("insertion", _POINTS),
        ("misalignment", pa.list_(pa.float64())),
        ("on_object", pa.list_(pa.bool_())),  # of each place of evidence, where the object is known
        ("object_share", pa.float64()),  # of the image
        (
            "drawn",
            pa.struct(
                [
                    ("under", pa.list_(pa.string())),
                    ("bird", pa.float64()),
                    ("chance", pa.float64()),
                    ("chance_box", pa.float64()),
                ]
            ),
        ),
    ]
)


@dataclass(frozen=True)
class QualityOptions:
    """curve_images: how many images, drawn at random, deletion, insertion and misalignment are measured on; 0 for none.
    map: which maps deletion and insertion go by."""

    curve_images: int = 200
    seed: int = 0
    map: MapKind = "gradient"


@dataclass
class QualityTask:
    """`ImageTask`: logits, and what is seen of the explanations of each image."""

    predictor: Predictor
    batch_size: int
    seed: int
    birds: Birds | None
    map: MapKind

    @property
    def preprocessing(self) -> Preprocessing:
        return self.predictor.preprocessing

    def to(self, device: torch.device) -> "QualityTask":
        self.observer = Observer(self.predictor.to(device), self.batch_size, self.seed, self.map)
        return self

    def __call__(self, images_B3HW: torch.Tensor, rows: pa.Table) -> pa.Table:
        images = rows.select(["image_id", "uri", "sha256", "label", "parts", "object", "curve"]).to_pylist()
        records = self.observer.observe(
            images_B3HW,
            [image["image_id"] for image in images],
            [image["label"] for image in images],
            [place for place, image in enumerate(images) if image["parts"] or image["object"]],
            [place for place, image in enumerate(images) if image["curve"]],
        )
        for image, record in zip(images, records, strict=True):
            record["drawn"] = self._drawn(image, record)
            if grid := image["object"]:
                record["on_object"] = on_mask(record["evidence_places"][:, ::-1], grid)
                record["object_share"] = float(unpacked(grid).mean())
        seen = pa.Table.from_pylist([_plain(record) for record in records], schema=_SEEN)
        for name in ("parts", "label", "uri", "image_id"):
            seen = seen.add_column(0, name, rows[name])
        return seen

    def _drawn(self, image: dict[str, Any], record: Record) -> dict[str, Any] | None:
        if self.birds is None or not image["parts"]:
            return None
        places_N2 = record["evidence_places"]
        truth = self.birds.drawn(image["uri"], image["sha256"], image["label"], _points(image), places_N2)
        return None if truth is None else asdict(truth)


@dataclass(frozen=True)
class Quality:
    """metrics: for metrics.json (see docs/data-formats.md). prototypes: `PROTOTYPE_QUALITY_SCHEMA`."""

    metrics: Metrics
    prototypes: pa.Table


def check_explains(predictor: Predictor) -> tuple[Bundle, ProtoPNet]:
    """The one bundle of a predictor and its network; `UserError` for an ensemble and for a baseline."""
    if len(predictor.bundles) > 1:
        raise UserError("the quality of explanations is measured for one bundle at a time: give one, not an ensemble")
    return predictor.bundles[0], explaining(predictor.bundles[0])


def quality_task(
    predictor: Predictor, source: Mapping[str, Any], options: QualityOptions, batch_size: int
) -> QualityTask:
    """The task of a pass over rows of `with_sample`. source: of the dataset (`Dataset.source`).

    `UserError` as `check_explains`.
    """
    check_explains(predictor)
    return QualityTask(predictor, batch_size, options.seed, Birds.of(source, predictor.classes), options.map)


def with_sample(rows: pa.Table, options: QualityOptions) -> pa.Table:
    """The rows with a column `curve`: true for the images of the sample, which depends on their ids alone."""
    ids = np.sort(rows["image_id"].to_numpy())
    random = np.random.default_rng((options.seed, _SEED_SAMPLE))
    chosen = random.permutation(ids)[: options.curve_images]
    return rows.append_column("curve", pa.array(np.isin(rows["image_id"].to_numpy(), chosen)))


def quality_of(predictor: Predictor, seen: pa.Table, source: Mapping[str, Any], options: QualityOptions) -> Quality:
    """The metrics from the outputs of `quality_task`, in any order."""
    bundle, network = check_explains(predictor)
    birds = Birds.of(source, predictor.classes)
    prototype_class = network.prototype_class.tolist()
    seen = seen.drop_columns(["logits", "uri"]).sort_by("image_id")
    rows = [row for row in seen.to_pylist() if row["parts"]]
    parts = part_quality(map(_observation, rows), len(prototype_class), birds.distinguishing_K if birds else None)
    _, height, width = network.backbone.map_shape(predictor.size)
    metrics: Metrics = dict.fromkeys(METRICS) | {
        "definitions": DEFINITIONS,
        "images": len(seen),
        "images_with_key_points": len(rows),
        "prototypes": len(prototype_class),
        "classes_without_prototypes": len(predictor.classes) - len(set(prototype_class)),
        "seed": options.seed,
        "map": options.map,
        **parts.metrics,
        "on_object": on_object(seen["on_object"].to_pylist(), seen["object_share"].to_pylist()),
        "sparsity": sparsity(network.prototypes.detach().cpu().numpy(), len(predictor.classes), height * width),
    }
    for name in ("deletion", "insertion"):
        metrics[name] = curve_quality([curve for curve in seen[name].to_pylist() if curve])
    metrics["misalignment"] = place_quality([moved for moved in seen["misalignment"].to_pylist() if moved])
    if birds is not None and bundle.prototypes is not None:
        metrics |= prototypes_on_birds(bundle.prototypes, birds, predictor.size)
    columns = {"prototype": range(len(prototype_class)), "class": prototype_class, **parts.prototypes}
    return Quality(metrics, pa.table(columns, schema=PROTOTYPE_QUALITY_SCHEMA))


def _plain(record: Record) -> dict[str, Any]:
    return {name: value.ravel() if isinstance(value, np.ndarray) else value for name, value in record.items()}


def _points(row: Mapping[str, Any]) -> list[PartPoint]:
    return [PartPoint(point["part"], point["y"], point["x"]) for point in row["parts"]]


def _observation(row: Mapping[str, Any]) -> Observation:
    return Observation(
        image_id=row["image_id"],
        label=row["label"],
        prediction=row["prediction"],
        points=_points(row),
        own=row["own"],
        own_places=_pairs(row["own_places"]),
        own_places_noisy=_pairs(row["own_places_noisy"]),
        own_contrast=row["own_contrast"],
        evidence_places=_pairs(row["evidence_places"]),
        nearest=row["nearest"],
        nearest_similarity=row["nearest_similarity"],
        nearest_places=_pairs(row["nearest_places"]),
        drawn=None if row["drawn"] is None else Drawn(**row["drawn"]),
    )


def _pairs(numbers: list[float]) -> np.ndarray:
    return np.asarray(numbers, dtype=np.float64).reshape(-1, 2)
