"""A small pushed network and its images, for tests of the workbench that need no Ray."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from protopnet.auditing.draft import Draft
from protopnet.auditing.prune import Corrections, Corrector
from protopnet.auditing.rewrite import places_table
from protopnet.auditing.settling import Prototypes, patch_grid
from protopnet.budget import PassPlan
from protopnet.config import RunSettings
from protopnet.datasets.rows import Dataset
from protopnet.datasets.trained import open_training_data, trained_with
from protopnet.model.bundle import Bundle, load_bundle, save_bundle
from protopnet.model.network import ProtoPNet, build_network
from protopnet.passes.describe import describe_prototypes
from protopnet.passes.image_pass import PassOptions
from protopnet.passes.push import push

CLASSES = ["jay", "tit", "wren"]
OPTIONS = PassOptions(PassPlan(actors=1, cpus=1, gpus=0, threads=1, in_driver=True), batch_size=5)


def png(random: np.random.Generator, label: int) -> bytes:
    """Noise of a colour, different in its quarters."""
    pixels = random.integers(0, 200, (2, 2, 3), np.uint8)
    pixels[..., label] = pixels[..., label] // 2 + 120
    pixels = pixels.repeat(24, 0).repeat(24, 1) + random.integers(0, 50, (48, 48, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def made_corrector(folder: Path) -> Corrector:
    """Three prototypes a class; ten images a class, two of them for validation."""
    random = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / "birds" / name).mkdir(parents=True)
        for n in range(10):
            (folder / "birds" / name / f"{n}.png").write_bytes(png(random, label))
    run = settings(folder)
    trained = trained_with({"settings": run.model_dump(mode="json")}, "bundle")
    dataset = open_training_data(str(folder / "birds"), CLASSES, trained, str(folder / "work"))
    torch.manual_seed(0)
    network = build_network(run.model, 3)
    assert isinstance(network, ProtoPNet)
    network.eval()
    placed = push(network, dataset.split("train"), distinct=True, options=OPTIONS)
    with torch.no_grad():
        network.prototypes.copy_(torch.from_numpy(placed.vectors_Pd).view_as(network.prototypes))
    places = list(zip(*(placed.chosen[name].to_pylist() for name in ("image_id", "row", "column")), strict=True))
    known = Prototypes(sources(places, dataset, network), patch_grid(network, run.model), "here")
    return Corrector(network, Draft.of(network, places), dataset, trained, run.model, Corrections(), known)


def settings(folder: Path) -> RunSettings:
    return RunSettings.model_validate(
        {
            "data": {"source": "folder", "path": str(folder / "birds"), "validation": 0.2, "test": 0},
            "model": {
                "backbone": "resnet18",
                "cut": "layer2",
                "image_size": 48,
                "prototype_depth": 8,
                "prototypes": 9,
                "similarity": "log",
            },
            "last_layer": {"copies": 1, "l1": 1e-3, "ridge": 1e-2},
        }
    )


def made_bundle(folder: Path, corrector: Corrector) -> Bundle:
    """The bundle of that network."""
    places = places_table(corrector.start)
    prototypes = describe_prototypes(corrector.network, corrector.dataset, places, options=OPTIONS)
    provenance = {"run": "made", "settings": settings(folder).model_dump(mode="json")}
    save_bundle(str(folder / "bundle"), corrector.network, corrector.model, CLASSES, provenance, prototypes)
    return load_bundle(str(folder / "bundle"))


def sources(places: list[Any], dataset: Dataset, network: ProtoPNet) -> pa.Table:
    rows = {row["image_id"]: row for row in dataset.table.to_pylist()}
    columns = {name: [rows[image][name] for image, _, _ in places] for name in ("sha256", "uri", "class_name")}
    at = {"row": [row for _, row, _ in places], "column": [column for _, _, column in places]}
    return pa.table(columns | at | {"class": network.prototype_class.tolist()})
