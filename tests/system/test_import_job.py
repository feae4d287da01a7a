"""jobs/import_checkpoint.py: a network of the authors' code becomes a bundle that says where its prototypes are from."""

import json
from pathlib import Path

import pytest
import torch
from running_jobs import Jobs, TrainedRun

from protopnet.model.bundle import load_bundle


@pytest.fixture
def checkpoint(trained: TrainedRun, tmp_path: Path) -> Path:
    """The trained network as the authors' code would have saved it, after DataParallel."""
    state = load_bundle(str(trained.folder / "bundle")).network.state_dict()
    state = {name: tensor for name, tensor in state.items() if name != "prototype_class"}
    names = (("backbone.features.", "features."), ("add_on.", "add_on_layers."), ("prototypes", "prototype_vectors"))
    for ours, theirs in names:
        state = {theirs + n.removeprefix(ours) if n.startswith(ours) else n: tensor for n, tensor in state.items()}
    state["ones"] = torch.ones_like(state["prototype_vectors"])
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "theirs.pth")
    return tmp_path / "theirs.pth"


def test_the_same_network_with_the_same_patches_comes_out(
    trained: TrainedRun, checkpoint: Path, jobs: Jobs, tmp_path: Path
) -> None:
    options = jobs.options(model__weights=checkpoint, model__prototypes=None, model__prototype_depth=None)
    job = jobs.run_here("import_checkpoint", "--storage", str(tmp_path), "--name", "theirs", *options)

    assert job.code == 0, job
    assert "note:" not in job.out
    given, imported = (load_bundle(str(folder / "bundle")) for folder in (trained.folder, tmp_path / "theirs"))
    for name, tensor in given.network.state_dict().items():
        torch.testing.assert_close(imported.network.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    places = ["image_id", "row", "column", "sha256"]
    assert given.prototypes is not None
    assert imported.prototypes is not None
    assert imported.prototypes.select(places).equals(given.prototypes.select(places))
    results = [json.loads((f / "summary.json").read_text()) for f in (trained.folder, tmp_path / "theirs")]
    assert results[0]["test_accuracy"] == results[1]["test_accuracy"]
    assert [stage["name"] for stage in results[1]["stages"]] == [
        "00-data",
        "01-import",
        "03-push",
        "05-bundle",
        "06-evaluate",
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model__weights": None}, "model.weights is missing"),
        ({"model__add_on": "bottleneck"}, "check model.backbone"),
        ({"model__backbone": "resnet34"}, "not weights of model.backbone resnet34"),
    ],
)
def test_what_does_not_fit_is_said(
    checkpoint: Path, jobs: Jobs, tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    options = jobs.options(**{"model__weights": checkpoint, "model__cut": None, **changes})
    job = jobs.run_here("import_checkpoint", "--storage", str(tmp_path), *options)
    assert expected in job.error
