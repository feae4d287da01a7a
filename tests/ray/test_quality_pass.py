"""Quality over a data set: the same numbers however the images are cut, and what may not be measured."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from protopnet.config import BirdSettings, CalibrationSettings, ModelSettings
from protopnet.datasets.rows import Dataset
from protopnet.errors import UserError
from protopnet.model.bundle import save_bundle
from protopnet.model.network import ProtoPNet, build_network
from protopnet.predictor import Predictor
from protopnet.quality.calibration import calibrate
from protopnet.quality.evaluate import evaluate
from protopnet.quality.quality_pass import QualityOptions, check_explains, with_sample

MODEL = ModelSettings(
    backbone="resnet18", cut="layer2", image_size=64, prototype_depth=16, prototypes=12, similarity="log"
)
# As the data set of these tests was drawn; its copies and images of one colour can't be drawn again.
SOURCE = {"kind": "birds"} | BirdSettings(classes=3, train_per_class=12, test_per_class=4, size=64).model_dump()
NEEDS_POINTS = [
    "consistency",
    "stability",
    "purity",
    "contrast",
    "distinctiveness",
    "pointing",
    "truth",
    "truth_exact",
    "on_bird",
]


@pytest.fixture
def predictor(birds: Dataset, network: ProtoPNet, tmp_path: Path) -> Predictor:
    save_bundle(str(tmp_path / "bundle"), network, MODEL, birds.classes, {})
    return Predictor.load([str(tmp_path / "bundle")])


def without_points(rows: pa.Table) -> pa.Table:
    at = rows.schema.get_field_index("parts")
    return rows.set_column(at, rows.schema.field(at), pa.nulls(len(rows), rows.schema.field(at).type))


def test_the_same_numbers_for_any_cut(birds: Dataset, predictor: Predictor, options: Callable, tmp_path: Path) -> None:
    quality, rows = QualityOptions(curve_images=5), birds.table

    def measure(name: str, **cut: int) -> tuple[dict[str, Any], pa.Table]:
        folder = str(tmp_path / name)
        metrics = evaluate(predictor, rows, folder, options=options(**cut), quality=quality, source=SOURCE)
        assert json.loads((tmp_path / name / "metrics.json").read_text()) == metrics
        return metrics["quality"], pq.read_table(tmp_path / name / "prototype_quality.parquet")

    one, prototypes = measure("one", blocks=1)
    other, others = measure("other", workers=2, blocks=7, batch=5)
    assert all(one[name] is not None for name in NEEDS_POINTS)
    assert one["images"] == one["images_with_key_points"] == len(rows)
    assert one["on_bird"]["places"] < one["pointing"]["places"]
    assert one["on_object"]["places"] == one["pointing"]["places"]  # the copies too have their masks
    assert one["deletion"]["images"] == one["insertion"]["images"] == 5
    assert one.pop("contrast")["value"] == pytest.approx(other.pop("contrast")["value"], abs=1e-4)
    assert one["misalignment"]["images"] == 5
    # Boxes end at whole pixels, which the last bits of a map may move.
    assert one.pop("misalignment")["value"] == pytest.approx(other.pop("misalignment")["value"], abs=0.02)
    for curve in ("deletion", "insertion"):  # sums of confidences, which differ in their last bits
        assert one.pop(curve)["curve"] == pytest.approx(other.pop(curve)["curve"], abs=1e-4)
    assert one == other
    assert prototypes.equals(others)
    assert prototypes["images"].to_pylist() == [len(rows) // 3] * 12


def test_without_key_points_there_are_curves_and_sparsity(
    birds: Dataset, predictor: Predictor, options: Callable, tmp_path: Path
) -> None:
    rows = without_points(birds.split("test"))
    metrics = evaluate(
        predictor,
        rows,
        str(tmp_path),
        options=options(in_driver=True),
        quality=QualityOptions(curve_images=2),
        source=SOURCE,
    )
    assert [metrics["quality"][name] for name in NEEDS_POINTS] == [None] * len(NEEDS_POINTS)
    assert metrics["quality"]["images_with_key_points"] == 0
    on_object = metrics["quality"]["on_object"]  # the masks say it without key points
    assert on_object["images"] == len(rows)
    assert 0 < on_object["chance"] < 0.6
    assert metrics["quality"]["deletion"]["images"] == metrics["quality"]["misalignment"]["images"] == 2
    assert metrics["quality"]["sparsity"]["value"] == pytest.approx(3 / 12)
    assert pq.read_table(tmp_path / "predictions.parquet").num_rows == len(rows)


def test_the_sample_depends_on_the_images_alone(birds: Dataset) -> None:
    rows, options = birds.table, QualityOptions(curve_images=9)
    chosen = with_sample(rows, options)
    backwards = with_sample(rows.take(list(range(len(rows)))[::-1]), options)
    assert chosen["curve"].to_pylist() == backwards["curve"].to_pylist()[::-1]
    assert sum(chosen["curve"].to_pylist()) == 9
    assert chosen["curve"] != with_sample(rows, QualityOptions(9, seed=1))["curve"]
    assert all(with_sample(rows, QualityOptions(10**6))["curve"].to_pylist())


def test_only_one_bundle_with_prototypes_can_be_measured(birds: Dataset, predictor: Predictor, tmp_path: Path) -> None:
    baseline = MODEL.model_copy(update={"kind": "baseline"})
    save_bundle(str(tmp_path / "baseline"), build_network(baseline, 3), baseline, birds.classes, {})
    with pytest.raises(UserError, match="baseline"):
        check_explains(Predictor.load([str(tmp_path / "baseline")]))
    with pytest.raises(UserError, match="one bundle at a time"):
        check_explains(Predictor(predictor.bundles * 2))


def test_calibration_is_the_same_for_any_cut(birds: Dataset, network: ProtoPNet, options: Callable) -> None:
    settings = CalibrationSettings(accuracy=0.5, unknown=0.25)
    at = birds.table.schema.get_field_index("split")
    splits = pc.replace_substring(birds.table["split"], "test", "validation")
    validated = replace(birds, table=birds.table.set_column(at, "split", splits))
    one = calibrate(network, validated, settings, options(blocks=1))
    other = calibrate(network, validated, settings, options(workers=2, blocks=5, batch=3))
    for name, value in one.model_dump(exclude={"similarity", "margin"}).items():
        assert getattr(other, name) == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), name
    for name in ("similarity", "margin"):  # an image whose last bits differ may be on the other side of an edge
        usual, same = getattr(one, name), getattr(other, name)
        assert same.edges == pytest.approx(usual.edges, rel=1e-3, abs=1e-4), name
        assert sum(same.counts) == sum(usual.counts) == 12
    assert (one.split, one.images, one.accuracy) == ("validation", 12, 0.5)
    alone = calibrate(network, birds, settings, options(in_driver=True))
    assert (alone.split, alone.images) == ("train", len(birds.split("train")))


def test_what_looks_like_nothing_known(
    birds: Dataset, network: ProtoPNet, options: Callable, pixels_of: Callable, tmp_path: Path
) -> None:
    """At most a quarter of the images that it was fitted on (some are the same), and of a baseline none."""
    fitted = calibrate(network, birds, CalibrationSettings(unknown=0.25), options(in_driver=True))
    save_bundle(str(tmp_path), network, MODEL, birds.classes, {}, calibration=fitted)
    unknown_B = Predictor.load([str(tmp_path)]).scores(pixels_of(birds.split("train"))).unknown_B
    assert unknown_B is not None
    assert 0.1 < float(unknown_B.float().mean()) <= 0.25
    baseline = build_network(MODEL.model_copy(update={"kind": "baseline"}), 3, start_weights=False)
    assert calibrate(baseline, birds, CalibrationSettings(), options(in_driver=True)).unknown_below is None
