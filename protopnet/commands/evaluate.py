"""How good a bundle is on labelled images.

python jobs/evaluate.py runs/quickstart/bundle my-images
python jobs/evaluate.py s3://bucket/runs/cub/bundle s3://bucket/shards/cub --split test --output evaluation/cub
python jobs/evaluate.py runs/cub20/bundle CUB_200_2011 --classes 20 --quality

The data may be class folders, CUB-200-2011 in its official layout, or shards of jobs/prepare.py. How good the
explanations are (--quality) can be said in full where the images have key points: CUB-200-2011, generated birds, class
folders with a parts.csv. Masks or boxes tell how much of the evidence is on the object.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from protopnet import storage
from protopnet.cli import Positional, checked, parse
from protopnet.cluster import connect, plan_pass
from protopnet.config import BirdSettings, ComputeSettings, DataSettings, Section
from protopnet.datasets.open import open_dataset, recognise
from protopnet.datasets.validate import check_bad_share
from protopnet.errors import UserError, exit_with_a_sentence
from protopnet.evidence.records import MapKind
from protopnet.imaging import MAX_PIXELS
from protopnet.passes.image_pass import PassOptions
from protopnet.predictor import Predictor
from protopnet.quality.classification import AGAINST_REST
from protopnet.quality.evaluate import evaluate as measure
from protopnet.quality.evaluate import with_labels_of
from protopnet.quality.quality_pass import QualityOptions, check_explains
from protopnet.quality.table import quality_text
from protopnet.words import percent


class EvaluateSettings(Section):
    """Settings of `jobs/evaluate.py`."""

    bundle: Positional[str] = Field(description="folder of the bundle: a local path or s3://…")
    data: Positional[str] = Field(description="folder of the images or shards: a local path or s3://…")
    split: Literal["test", "validation", "train", "all"] | None = Field(
        None, description="images to evaluate on; test where the data has a test split, else all, when left out"
    )
    output: str = Field("evaluation", description="folder for metrics.json and predictions.parquet")
    classes: int | list[str] | None = Field(None, description="only the first N classes, or only the classes named")
    crop: Literal["boxes", "none"] = Field("boxes", description="for CUB: crop to bounding boxes, or full images")
    masks: str | None = Field(None, description="folder with a mask of the object an image, as data.masks of training")
    quality: bool = Field(False, description="also measure how good the explanations are")
    curve_images: int = Field(
        200, ge=0, description="images, drawn at random, that deletion, insertion and misalignment are measured on"
    )
    map: MapKind = Field("gradient", description="maps that deletion and insertion go by, as of jobs/explain.py")
    batch_size: int = Field(64, ge=1, description="images a forward pass")
    max_pixels: int = Field(MAX_PIXELS, ge=1, description="images with more pixels than this aren't decoded")
    max_bad: float = Field(0.05, ge=0, le=1, description="largest share of images that can't be read")
    seed: int = Field(
        0, ge=0, description="seed of the splits, where the data has none of its own, and of what --quality draws"
    )
    compute: ComputeSettings = ComputeSettings()


class _Source(Section):
    data: DataSettings
    birds: BirdSettings = BirdSettings()
    seed: int


def evaluate(settings: EvaluateSettings | Mapping[str, Any]) -> dict[str, Any]:
    """How good a bundle is on labelled images: the content of `metrics.json`. `UserError` for what is wrong with the
    settings, the bundle or the data."""
    return _evaluate(checked(EvaluateSettings, settings))[0]


def _evaluate(settings: EvaluateSettings) -> tuple[dict[str, Any], str]:
    """The metrics, and the split they were measured on."""
    storage.check_writable(settings.output, "output")
    predictor = Predictor.load([settings.bundle])
    quality = QualityOptions(settings.curve_images, settings.seed, settings.map) if settings.quality else None
    if quality is not None:
        check_explains(predictor)
    data = DataSettings(
        source=recognise(settings.data),
        path=settings.data,
        classes=settings.classes,
        crop=settings.crop,
        masks=settings.masks,
        max_pixels=settings.max_pixels,
        validation=0,
        test=0,
    )
    dataset = open_dataset(_Source(data=data, seed=settings.seed), settings.output)
    if quality is not None and (unusable := dataset.source.get("no_key_points")):
        raise UserError(f"--quality needs key points: {unusable}")
    check_bad_share(settings.data, dataset.table.num_rows, dataset.errors, settings.max_bad)
    split = settings.split or ("test" if len(dataset.split("test")) else "all")
    rows = with_labels_of(predictor.classes, dataset, split)
    connect(settings.compute, {"DATA": settings.data, "output": settings.output})
    options = PassOptions(
        plan=plan_pass(settings.compute), batch_size=settings.batch_size, max_pixels=settings.max_pixels
    )
    metrics = measure(predictor, rows, settings.output, options=options, quality=quality, source=dataset.source)
    if passed := dataset.source.get("passed_over"):
        print(passed)
    return metrics, split


@exit_with_a_sentence
def main() -> None:
    settings = parse(EvaluateSettings, description=__doc__)
    metrics, split = _evaluate(settings)
    absent = sum(not figures["count"] for figures in metrics["per_class"].values())
    without = f", {absent} of them without images here" if absent else ""
    print(f"{metrics['images']:,} images ({split}), {len(metrics['per_class'])} classes{without}")
    for name, key in (("top-1", "top1"), ("top-5", "top5"), ("mean per class", "mean_per_class")):
        print(f"{name:<18} {percent(metrics[key])}")
    for name in AGAINST_REST:
        print(f"{name:<18} {percent(metrics[name])}")
    before = (
        f" ({percent(metrics['calibration_error_before'])} without the temperature)"
        if metrics["temperature"] != 1
        else ""
    )
    print(f"calibration error  {percent(metrics['calibration_error'])}{before}")
    if "quality" in metrics:
        print(quality_text(metrics["quality"]))
    print(f"metrics and predictions: {storage.located(settings.output)}")
