"""The model card: what a bundle was trained on, how good it is and what it isn't for, as Markdown in the form of Hugging
Face's hub, from the bundle's own record and the figures of its run.

It is a file beside the bundle's others (`README.md`), no part of what its hash covers.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from protopnet import storage
from protopnet.model.bundle import CARD, BundleInfo, read_info
from protopnet.quality.table import quality_table
from protopnet.words import counted, percent, readable_names

MOST_CLASSES = 50  # more than these aren't listed one by one
FEW_IMAGES = 10  # test images of a class whose accuracy is a rough guess
Metrics = Mapping[str, Any]


def write_card(bundle_uri: str, metrics: Metrics | None) -> None:
    """Write the card of a bundle, unless it has one: people write into theirs.

    metrics: those of the evaluation of this very bundle (`metrics.json`), if any.
    """
    if storage.exists(storage.join(bundle_uri, CARD)):
        return
    info, written = read_info(bundle_uri)
    card = model_card(info, hashlib.sha256(written).hexdigest(), metrics or {})
    storage.write_bytes(storage.join(bundle_uri, CARD), card.encode())


def model_card(info: BundleInfo, bundle_hash: str, metrics: Metrics) -> str:
    """The card as Markdown with YAML above it."""
    name = _name(info)
    sections = {
        "What it was trained on": _training(info),
        "How good it is": _accuracy(info, metrics),
        "How good its explanations are": _explanations(info, metrics),
        "What it is for": _use(info),
        "Limits": _limits(info, metrics),
        "Corrections": _corrections(info),
        "How to use it": _how(info, bundle_hash),
    }
    body = "\n\n".join(f"## {title}\n\n" + "\n".join(lines) for title, lines in sections.items())
    front = yaml.safe_dump(_front_matter(info, metrics), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n# {name}\n\n{_what(info)}\n\n{body}\n"


def _name(info: BundleInfo) -> str:
    return _cell(str(info.provenance.get("run") or "A bundle"))


def _front_matter(info: BundleInfo, metrics: Metrics) -> dict[str, Any]:
    front: dict[str, Any] = {
        "library_name": "protopnet",
        "pipeline_tag": "image-classification",
        "tags": ["protopnet", "image-classification", "interpretability", "prototypes"],
    }
    accuracy = _test_accuracy(info, metrics)
    if accuracy is None:
        return front
    figures = [{"type": "accuracy", "name": "test accuracy", "value": round(accuracy, 4)}]
    if metrics:
        error = round(metrics["calibration_error"], 4)
        figures.append({"type": "expected_calibration_error", "name": "calibration error", "value": error})
    source = info.provenance.get("data", {})
    data = {"name": str(source.get("path") or source.get("kind")), "type": str(source.get("kind")), "split": "test"}
    result = {"task": {"type": "image-classification"}, "dataset": data, "metrics": figures}
    return front | {"metrics": ["accuracy"], "model-index": [{"name": _name(info), "results": [result]}]}


def _what(info: BundleInfo) -> str:
    model, classes = info.architecture, f"{len(info.classes)} classes"
    if info.prototype_class is None:
        return (
            f"A black-box baseline ({model.backbone}) for {classes} of images. It has no prototypes and can't explain."
        )
    return (
        f"A ProtoPNet ({model.backbone}, {counted(len(info.prototype_class), 'prototype')}) for {classes} of images. It "
        "compares patches of an image with prototypes, each of which is a patch of a training image, and adds up points: "
        "similarity × class connection."
    )


def _training(info: BundleInfo) -> Iterator[str]:
    source, images = info.provenance.get("data", {}), info.provenance.get("images", {})
    place = {"birds": "generated birds"}.get(source.get("kind"), source.get("path") or "images that aren't recorded")
    yield f"- Images: {place}" + (f", cropped to {source['crop']}" if source.get("crop", "none") != "none" else "")
    yield from (f"- {split}: {counted(count, 'image')}" for split, count in images.items())
    weights = info.architecture.weights
    yield f"- Backbone: {info.architecture.backbone}, " + (f"begun with {weights}" if weights else "from scratch")
    yield f"- Input: {info.preprocessing.size} x {info.preprocessing.size} pixels"
    if "protopnet" in info.provenance:
        yield f"- Made with protopnet {info.provenance['protopnet']}, PyTorch {info.provenance.get('torch')}"
    yield "- Every setting is in `model.json`, under `provenance`"


def _test_accuracy(info: BundleInfo, metrics: Metrics) -> float | None:
    """Measured by the evaluation, or by the last correction."""
    if metrics:
        return float(metrics["top1"])
    history = info.provenance.get("history") or [{}]
    return history[-1].get("accuracy", {}).get("test", {}).get("after")


def _accuracy(info: BundleInfo, metrics: Metrics) -> Iterator[str]:
    accuracy = _test_accuracy(info, metrics)
    if accuracy is None:
        yield "Not measured: there were no test images."
        return
    if not metrics:
        yield (
            f"{percent(accuracy)} of the test images right, after the last correction. By class, and calibration: not "
            "measured since; `jobs/evaluate.py` does."
        )
        yield from _calibration(info)
        return
    yield (
        f"On {counted(metrics['images'], 'test image')}: {percent(accuracy)} right, {percent(metrics['top5'])} among the "
        f"first five, {percent(metrics['mean_per_class'])} in the mean of the classes. Calibration error: "
        f"{percent(metrics['calibration_error'])} (how far probabilities are from the share that is right, in 15 bins; "
        f"{percent(metrics['calibration_error_before'])} before the temperature)."
    )
    yield from _calibration(info)
    yield ""
    yield from _by_class(metrics["per_class"])


def _calibration(info: BundleInfo) -> Iterator[str]:
    """What was fitted, on which images."""
    fitted = info.calibration
    if fitted is None:
        return
    images = counted(fitted.images, f"{'validation' if fitted.split == 'validation' else 'training'} image")
    yield ""
    yield (
        f"Probabilities have a temperature of {fitted.temperature:.2f}, fitted on {images}: calibration error there "
        f"{percent(fitted.error_before)} before, {percent(fitted.error_after)} after."
    )
    if fitted.split == "train":
        yield "There were no validation images; the model knows its training images, so it is surer than it should be."
    if fitted.abstain_below is None:
        yield f"No probability was found from which on {percent(fitted.accuracy)} of the answers are right."
    else:
        yield (
            f"From a probability of {fitted.abstain_below:.3f} on, {percent(fitted.accuracy)} of the answers or more were "
            f"right there; {percent(fitted.coverage)} of the images reach it."
        )
    if fitted.unknown_below is not None:
        yield f"Images whose best similarity is below {fitted.unknown_below:.3f} are flagged as looking like nothing known."


def _by_class(per_class: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    names = dict(zip(per_class, readable_names(list(per_class)), strict=True))
    measured = {name: found for name, found in per_class.items() if found["count"]}
    listed = measured
    if len(measured) > MOST_CLASSES:
        worst = sorted(measured, key=lambda name: (measured[name]["accuracy"], name))[: MOST_CLASSES // 2]
        listed = {name: measured[name] for name in worst}
        yield f"The {len(listed)} classes of {len(measured)} that are recognised worst:"
        yield ""
    yield "| class | test images | right |"
    yield "|---|---:|---:|"
    for name, found in listed.items():
        yield f"| {_cell(names[name])} | {found['count']} | {percent(found['accuracy'])} |"
    if len(measured) < len(per_class):
        yield ""
        yield f"Without test images: {len(per_class) - len(measured)} of {len(per_class)} classes."


def _explanations(info: BundleInfo, metrics: Metrics) -> Iterator[str]:
    rows = quality_table(metrics.get("quality", {}))
    if info.prototype_class is None:
        yield "It has none: a black box."
    elif not rows:
        yield "Not measured. `jobs/evaluate.py --quality` does."
    else:
        yield "| | value | by chance | better | meaning |"
        yield "|---|---:|---:|---|---|"
        for row in rows:
            yield f"| {row.label} | {row.value} | {row.chance or ''} | {row.better} | {_cell(row.meaning)} |"


def _use(info: BundleInfo) -> Iterator[str]:
    yield (
        "To sort images like those it was trained on into its classes, with a person who can look at the reasons. It "
        "isn't meant to decide by itself about people's health, safety or rights, nor on images of another kind (cameras, "
        "places, preparations) before its accuracy on them was measured."
    )


def _limits(info: BundleInfo, metrics: Metrics) -> Iterator[str]:
    size, images = info.preprocessing.size, info.provenance.get("images", {})
    yield f"- It knows {len(info.classes)} classes and takes every image for one of them, whatever it shows."
    yield f"- Images are resized to {size} x {size} pixels whatever their shape: what can't be seen then isn't used."
    if info.architecture.weights is None and images.get("train"):
        yield f"- All it knows it learned from {counted(images['train'], 'image')}: its backbone began from scratch."
    few = [name for name, found in metrics.get("per_class", {}).items() if found["count"] < FEW_IMAGES]
    if few:
        yield f"- Of {len(few)} classes there were fewer than {FEW_IMAGES} test images: their accuracy is a rough guess."
    if info.prototype_class is not None:
        yield (
            "- An explanation says what the model computed with, not what is true of the thing in the image. A box is "
            "around the most similar place; what a patch sees reaches further."
        )


def _corrections(info: BundleInfo) -> Iterator[str]:
    history: Sequence[Mapping[str, Any]] = info.provenance.get("history", [])
    if not history:
        yield "None."
    for entry in history:
        steps = ", ".join(step["step"] for step in entry.get("steps", [])) or "last layer"
        counts = entry.get("prototypes", {})
        line = f"- {steps}: {counts.get('before')} → {counts.get('after')} prototypes"
        for split, accuracy in entry.get("accuracy", {}).items():
            line += f", {split} accuracy {percent(accuracy['before'])} → {percent(accuracy['after'])}"
        yield line


def _how(info: BundleInfo, bundle_hash: str) -> Iterator[str]:
    explained = 'model.explain("image.jpg")' if info.prototype_class is not None else 'model.predict("image.jpg")'
    yield from ("```python", "import protopnet", "", 'model = protopnet.load("this-folder")', explained, "```", "")
    yield f"sha256 of `model.json`, which has those of the other files: `{bundle_hash}`"


def _cell(text: str) -> str:
    """Text that can't end a cell, a line or its own meaning."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
