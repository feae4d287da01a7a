"""The model card: figures are the run's own, and it is no part of the bundle's hash."""

from typing import Any

import numpy as np
import pytest
import torch
import yaml

from protopnet import storage
from protopnet.config import ModelSettings
from protopnet.model.bundle import load_bundle, read_info, save_bundle
from protopnet.model.network import build_network
from protopnet.quality.card import model_card, write_card
from protopnet.quality.classification import classification_metrics

PROVENANCE = {
    "run": "jays",
    "protopnet": "0.1.0",
    "torch": "2.13",
    "data": {"kind": "folder", "path": "s3://bucket/birds", "crop": "none"},
    "images": {"train": 40, "validation": 4, "test": 20},
}
CORRECTED = {
    "steps": [{"step": "remove"}, {"step": "rule"}],
    "prototypes": {"before": 4, "after": 3},
    "accuracy": {"test": {"before": 0.5, "corrected": 0.45, "after": 0.625}},
}


def saved(folder: str, classes: list[str], kind: str = "protopnet", **provenance: Any) -> str:
    settings = ModelSettings(
        kind=kind, backbone="resnet18", cut="layer1", image_size=32, prototype_depth=8, prototypes=2 * len(classes)
    )
    network = build_network(settings, len(classes), start_weights=False)
    save_bundle(folder, network, settings, classes, PROVENANCE | provenance)
    return folder


def measured(classes: list[str], right: list[int], of: int) -> dict[str, Any]:
    """As the evaluation writes it: of each class so many images, of which so many are taken for what they are."""
    labels = np.repeat(np.arange(len(classes)), of)
    taken = labels.copy()
    for label, hits in enumerate(right):
        taken[label * of + hits : (label + 1) * of] = (label + 1) % len(classes)
    logits = np.eye(len(classes))[taken] * 5
    quality = {"purity": {"value": 0.625, "prototypes": 4}, "pointing": {"value": 0.8, "chance": 0.25, "images": 9}}
    return classification_metrics(logits, labels, classes) | {"quality": quality}


def card_of(folder: str, metrics: dict[str, Any] | None) -> tuple[dict[str, Any], str]:
    write_card(folder, metrics)
    _, front, body = storage.read_bytes(f"{folder}/README.md").decode().split("---\n", 2)
    return yaml.safe_load(front), body


@pytest.fixture
def folder(tmp_path) -> str:
    return saved(str(tmp_path / "bundle"), ["001.Blue_Jay", "wren|<b>"])


def test_its_figures_are_those_of_the_evaluation(folder: str) -> None:
    front, body = card_of(folder, measured(["001.Blue_Jay", "wren|<b>"], [9, 6], 10))
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"] == {"name": "s3://bucket/birds", "type": "folder", "split": "test"}
    values = {figure["type"]: figure["value"] for figure in result["metrics"]}
    assert values["accuracy"] == 0.75
    assert 0 < values["expected_calibration_error"] < 1
    assert front["pipeline_tag"] == "image-classification"
    assert "| Blue Jay | 10 | 90.0 % |" in body
    assert "| wren\\|&lt;b> | 10 | 60.0 % |" in body
    assert "On 20 test images: 75.0 % right" in body
    assert "| purity | 62.5 % |" in body
    assert "| pointing game | 80.0 % | 25.0 % |" in body
    assert "- train: 40 images" in body
    assert "began from scratch" in body
    assert "rough guess" not in body
    assert "## Corrections\n\nNone." in body


def test_the_hash_is_that_of_the_bundle_and_is_not_changed_by_the_card(folder: str) -> None:
    before = load_bundle(folder).hash
    _, body = card_of(folder, None)
    assert f"`{before}`" in body
    assert load_bundle(folder).hash == before


def test_nothing_is_said_that_was_not_measured(folder: str) -> None:
    front, body = card_of(folder, None)
    assert "model-index" not in front
    assert "Not measured: there were no test images." in body
    assert "Not measured. `jobs/evaluate.py --quality` does." in body


def test_a_corrected_bundle_says_what_was_done_and_what_came_of_it(tmp_path) -> None:
    folder = saved(str(tmp_path / "bundle"), ["jay", "wren"], history=[CORRECTED])
    front, body = card_of(folder, None)
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.625
    assert "- remove, rule: 4 → 3 prototypes, test accuracy 50.0 % → 62.5 %" in body
    assert "62.5 % of the test images right, after the last correction" in body


def test_many_classes_are_cut_to_the_worst(tmp_path) -> None:
    classes = [f"kind {n:03}" for n in range(60)]
    folder = saved(str(tmp_path / "bundle"), classes)
    _, body = card_of(folder, measured(classes, [0, 1, *[4] * 58], 4))
    assert "The 25 classes of 60 that are recognised worst:" in body
    assert body.index("| kind 000 | 4 | 0.0 % |") < body.index("| kind 001 | 4 | 25.0 % |")
    assert body.count("| kind ") == 25
    assert "- Of 60 classes there were fewer than 10 test images" in body


def test_a_baseline_is_called_one(tmp_path) -> None:
    folder = saved(str(tmp_path / "bundle"), ["jay", "wren"], "baseline")
    _, body = card_of(folder, measured(["jay", "wren"], [9, 6], 10))
    assert "A black-box baseline (resnet18)" in body
    assert "model.predict" in body
    assert "prototype" not in body.split("## How good it is")[1].split("## What it is for")[0]


def test_a_bundle_saved_over_another_has_not_its_card(folder: str) -> None:
    card_of(folder, None)
    saved(folder, ["jay", "wren"])
    assert not storage.exists(f"{folder}/README.md")


def test_what_somebody_wrote_into_it_stays(folder: str) -> None:
    card_of(folder, None)
    storage.write_bytes(f"{folder}/README.md", b"---\n{}\n---\nours\n")
    assert card_of(folder, None) == ({}, "ours\n")


def test_a_bundle_that_records_nothing_has_a_card(tmp_path) -> None:
    torch.manual_seed(0)
    folder = saved(str(tmp_path / "bundle"), ["jay", "wren"], run=None, data={}, images={})
    info, _ = read_info(folder)
    assert "# A bundle" in model_card(info, "ab", {})
    assert "images that aren't recorded" in model_card(info, "ab", measured(["jay", "wren"], [9, 6], 10))
