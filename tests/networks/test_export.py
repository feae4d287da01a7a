"""`protopnet export`: the graph says what the predictor says, in another program, and its JSON says what that means."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from documents import first_column, section
from PIL import Image
from serving import make_bundle

import protopnet
from protopnet import imaging
from protopnet.config import BirdSettings, ModelSettings
from protopnet.datasets.birds import bird_rows
from protopnet.errors import UserError
from protopnet.model.bundle import Bundle, load_bundle, save_bundle
from protopnet.model.network import ProtoPNet, build_network, set_phase
from protopnet.model.prototypes import true_float32
from protopnet.predictor import Predictor

CLASSES = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def birds() -> list[Image.Image]:
    rows = bird_rows(BirdSettings(classes=4, train_per_class=2, test_per_class=1, size=96))
    return [Image.open(io.BytesIO(row["image"])) for row in rows]


def trained(folder: Path, birds: list[Image.Image], **settings: Any) -> Bundle:
    """A bundle whose prototypes are patches of some of the birds, so that there are distances of 0."""
    torch.manual_seed(0)
    model = ModelSettings(**({"image_size": 64, "prototype_depth": 12, "prototypes": 8} | settings))
    network = build_network(model, len(CLASSES), start_weights=False)
    assert isinstance(network, ProtoPNet)
    wanted = network.preprocessing
    x_B3HW = imaging.normalise(torch.from_numpy(np.stack([imaging.resize(b, wanted.size) for b in birds])), wanted)
    network.train()
    with torch.no_grad():
        for _ in range(3):  # BatchNorm's statistics
            network(x_B3HW)
        set_phase(network, "eval")
        h, w = model.prototype_shape
        network.prototypes.copy_(network.latent(x_B3HW[:8])[:, :, 1 : 1 + h, 1 : 1 + w])
    save_bundle(str(folder), network, model, CLASSES, {})
    return load_bundle(str(folder))


def run(file: Path, images: torch.Tensor) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(file.read_bytes()).run(None, {"images": images.numpy()})


NETWORKS = {
    "log similarity": {"backbone": "resnet18", "cut": "layer2", "similarity": "log"},
    "cosine": {"backbone": "resnet18", "cut": "layer2", "similarity": "cosine", "add_on": "linear", "start": "parts"},
    "linear, larger prototypes, averaged cells": {
        "backbone": "resnet18",
        "cut": "layer2",
        "similarity": "linear",
        "prototype_shape": (2, 1),
        "pool": 3,
    },
    "timm's": {"backbone": "timm/tf_efficientnet_lite0", "image_size": 96},
}


@pytest.mark.parametrize("network", NETWORKS)
def test_the_graph_says_what_the_predictor_says(network: str, birds: list[Image.Image], tmp_path: Path) -> None:
    bundle = trained(tmp_path / "bundle", birds, **NETWORKS[network])
    predictor, file = Predictor([bundle]), tmp_path / "bird.onnx"
    protopnet.export({"bundle": str(tmp_path / "bundle"), "output": str(file)})
    (images,) = predictor.look_at(birds)
    (view,) = predictor.views(images)
    for count in (1, len(birds)):
        logits, similarities, places = run(file, images[:count].contiguous())
        assert logits == pytest.approx(view.logits_BK[:count].numpy(), abs=1e-4)
        assert similarities == pytest.approx(view.similarities_BP[:count].numpy(), abs=1e-4)
        assert np.array_equal(places, view.index_BP[:count].numpy())
    if network == "log similarity":
        assert view.similarities_BP.max() > 9  # at a distance of 0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With pictures of where its prototypes come from."""
    return make_bundle(tmp_path_factory.mktemp("export") / "bundle", 0)


def test_its_json_explains_what_comes_out(bundle: str, birds: list[Image.Image], tmp_path: Path) -> None:
    file = tmp_path / "bird.onnx"
    assert protopnet.export({"bundle": bundle, "output": str(file)}) == f"{file}.json"
    about, model = json.loads(Path(f"{file}.json").read_text()), protopnet.load(bundle, device="cpu")
    wanted = about["preprocessing"]
    pixels = np.asarray(birds[0].resize((wanted["size"], wanted["size"]), Image.Resampling.BILINEAR), np.float32)
    x = ((pixels / 255 - np.array(wanted["mean"])) / np.array(wanted["std"])).transpose(2, 0, 1)[None]
    logits, similarities, places = run(file, torch.from_numpy(x).float().contiguous())
    points_KP = np.array(about["connections"]) * similarities[0]
    assert points_KP.sum(1) == pytest.approx(logits[0], abs=1e-4)
    why = model.explain(birds[0], top_prototypes=3).classes[0]
    assert about["classes"][int(logits[0].argmax())] == why.class_name
    for evidence in why.evidence:
        number = evidence.prototype
        assert points_KP[why.class_, number] == pytest.approx(evidence.points, abs=1e-3)
        assert divmod(int(places[0, number]), about["patches"]["columns"]) == (evidence.row, evidence.column)
        assert about["prototypes"][number]["class_name"] == evidence.class_name
        assert about["prototypes"][number]["source"]["uri"] == evidence.source.uri
    assert about["bundle"] == load_bundle(bundle).hash
    assert set(about) == first_column(section("Export"), "key")


def test_in_8_bits(bundle: str, birds: list[Image.Image], tmp_path: Path) -> None:
    whole, small = tmp_path / "whole.onnx", tmp_path / "small.onnx"
    protopnet.export({"bundle": bundle, "output": str(whole)})
    protopnet.export({"bundle": bundle, "output": str(small), "int8": True})
    assert small.stat().st_size < 0.5 * whole.stat().st_size
    (images,) = protopnet.load(bundle, device="cpu").predictor.look_at(birds)
    exact, rounded = run(whole, images), run(small, images)
    assert not np.array_equal(exact[1], rounded[1])
    assert np.corrcoef(exact[1].ravel(), rounded[1].ravel())[0, 1] > 0.95
    assert json.loads(Path(f"{small}.json").read_text())["precision"] == "int8"


def test_for_torch(bundle: str, birds: list[Image.Image], tmp_path: Path) -> None:
    """Also in a program that has chosen float32, as one that serves has."""
    file = tmp_path / "bird.pt2"
    with true_float32():
        protopnet.export({"bundle": bundle, "output": str(file), "format": "torch"})
    predictor = Predictor.load([bundle])
    (images,) = predictor.look_at(birds)
    (view,) = predictor.views(images)
    graph = torch.export.load(file).module()
    for count in (1, 5):
        logits, similarities, places = graph(images[:count])
        assert logits.numpy() == pytest.approx(view.logits_BK[:count].numpy(), abs=1e-4)
        assert similarities.numpy() == pytest.approx(view.similarities_BP[:count].numpy(), abs=1e-4)
        assert torch.equal(places, view.index_BP[:count])


class TestRefusals:
    def test_a_baseline(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="a black-box baseline can't explain"):
            protopnet.export({"bundle": make_bundle(tmp_path, 0, "baseline"), "output": str(tmp_path / "x.onnx")})

    def test_8_bits_for_torch(self, bundle: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="--int8 is for --format onnx"):
            protopnet.export({"bundle": bundle, "output": str(tmp_path / "x"), "format": "torch", "int8": True})

    def test_8_bits_of_a_bundle_without_pictures(self, birds: list[Image.Image], tmp_path: Path) -> None:
        trained(tmp_path / "bundle", birds, **NETWORKS["log similarity"])
        with pytest.raises(UserError, match="measured on the pictures of prototypes"):
            protopnet.export({"bundle": str(tmp_path / "bundle"), "output": str(tmp_path / "x.onnx"), "int8": True})
        assert not (tmp_path / "x.onnx").exists()

    def test_without_onnx(self, bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(UserError, match=r"needs onnxscript: pip install 'protopnet\[export\]'$"):
            protopnet.export({"bundle": bundle, "output": str(tmp_path / "x.onnx")})
