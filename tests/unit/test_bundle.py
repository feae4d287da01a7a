"""Bundles: what is saved is what is loaded, and nothing damaged is loaded."""

import json
import pickle

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from protopnet import storage
from protopnet.config import ModelSettings
from protopnet.errors import UserError
from protopnet.model.bundle import FORMAT_VERSION, PROTOTYPE_SCHEMA, load_bundle, save_bundle
from protopnet.model.network import ProtoPNet, build_network, set_phase

SETTINGS = ModelSettings(
    backbone="resnet18",
    cut="layer1",
    weights="/weights/that/are/long/gone.pth",
    image_size=32,
    prototype_depth=8,
    prototypes=4,
    similarity="cosine",
)
CLASSES = ["jay", "wren"]


def trained(settings=SETTINGS):
    network = build_network(settings, len(CLASSES), start_weights=False)
    network.train()
    network(torch.rand(4, 3, 32, 32))  # moves the BatchNorm statistics
    set_phase(network, "eval")
    return network


def prototype_rows(count=4):
    row = {
        "class": 0,
        "class_name": "jay",
        "image_id": 7,
        "uri": "a.jpg",
        "sha256": "ab",
        "width": 40,
        "height": 30,
        "row": 1,
        "column": 2,
        "box": [0, 1, 20, 30],
        "receptive_field": [0, 0, 32, 32],
        "self_similarity": 0.99,
        "activation_map": [[0.5, 0.25], [0.0, 1.0]],
        "thumbnail": b"\xff\xd8",
    }
    return pa.Table.from_pylist([{"prototype": j, **row} for j in range(count)], PROTOTYPE_SCHEMA)


@pytest.fixture
def saved(tmp_path):
    network = trained()
    folder = str(tmp_path / "bundle")
    save_bundle(folder, network, SETTINGS, CLASSES, {"seed": 3}, prototype_rows())
    return folder, network


def test_a_loaded_bundle_computes_the_same_bit_for_bit(saved):
    folder, network = saved
    bundle = load_bundle(folder)
    images = torch.rand(3, 3, 32, 32)
    assert not bundle.network.training
    assert all(torch.equal(a, b) for a, b in zip(bundle.network(images), network(images), strict=True))


def test_a_bundle_says_what_it_is(saved):
    folder, _ = saved
    bundle = load_bundle(folder)
    assert bundle.classes == CLASSES
    assert bundle.info.format_version == FORMAT_VERSION
    assert bundle.info.architecture == SETTINGS
    assert bundle.info.similarity == "cosine"
    assert bundle.info.provenance == {"seed": 3}
    assert bundle.info.preprocessing.size == 32
    assert bundle.info.preprocessing.mean == (0.485, 0.456, 0.406)
    assert bundle.prototypes.equals(prototype_rows())


def test_the_hash_follows_the_content(saved, tmp_path):
    folder, network = saved
    again = str(tmp_path / "again")
    returned = save_bundle(again, network, SETTINGS, CLASSES, {"seed": 3}, prototype_rows())
    assert returned == load_bundle(again).hash == load_bundle(folder).hash
    with torch.no_grad():
        network.prototypes[0] += 1e-6
    assert save_bundle(again, network, SETTINGS, CLASSES, {"seed": 3}, prototype_rows()) != returned


def test_all_tensors_are_float32_and_complete(saved):
    folder, _ = saved
    tensors = load_file(f"{folder}/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert {"prototypes", "last_layer.weight", "backbone.features.bn1.running_mean"} <= tensors.keys()


def test_a_baseline_is_a_bundle_without_prototypes(tmp_path):
    settings = SETTINGS.model_copy(update={"kind": "baseline"})
    network = trained(settings)
    save_bundle(str(tmp_path), network, settings, CLASSES, {})
    bundle = load_bundle(str(tmp_path))
    assert bundle.prototypes is None
    assert bundle.info.prototype_class is None
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(bundle.network(images).logits_BK, network(images).logits_BK)


def test_pruned_prototypes_of_any_class_are_kept(tmp_path):
    network = ProtoPNet(trained().backbone, SETTINGS, 2, torch.tensor([1, 1, 0]))
    set_phase(network, "eval")
    save_bundle(str(tmp_path), network, SETTINGS, CLASSES, {}, prototype_rows(3))
    bundle = load_bundle(str(tmp_path))
    assert bundle.network.prototype_class.tolist() == [1, 1, 0]
    assert bundle.info.architecture.prototypes == 3
    assert torch.equal(bundle.network.last_layer.weight, network.last_layer.weight)


@pytest.mark.parametrize("name", ["model.safetensors", "prototypes.parquet", "model.json"])
def test_an_interrupted_save_is_no_bundle(saved, monkeypatch, name):
    """Killed before any of its files, over an older bundle: the old one isn't shown with new tensors."""
    folder, network = saved
    write = storage.write_bytes

    def killed(uri, data):
        if uri.endswith(name):
            raise KeyboardInterrupt
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        save_bundle(folder, network, SETTINGS, CLASSES, {}, prototype_rows())
    with pytest.raises(UserError, match="no complete bundle"):
        load_bundle(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "prototypes.parquet"])
def test_a_changed_byte_is_noticed(saved, name):
    folder, _ = saved
    path = f"{folder}/{name}"
    data = bytearray(storage.read_bytes(path))
    data[-1] ^= 1
    storage.write_bytes(path, bytes(data))
    with pytest.raises(UserError, match=f"damaged: {name}"):
        load_bundle(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "prototypes.parquet"])
def test_a_missing_file_is_named(saved, name):
    folder, _ = saved
    storage.delete_file(f"{folder}/{name}")
    with pytest.raises(UserError, match=f"incomplete: {name}"):
        load_bundle(folder)


def rewrite_info(folder, **changes):
    info = json.loads(storage.read_bytes(f"{folder}/model.json")) | changes
    storage.write_bytes(f"{folder}/model.json", json.dumps(info).encode())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format_version": 2}, "format version 2; this program reads version 1"),
        ({"format_version": None}, "format version None"),
        ({"classes": 5}, "damaged: classes"),
        ({"classes": ["jay", "wren", "owl"]}, "not those of the architecture"),
        ({"classes": ["jay"]}, "not those of the architecture"),
        ({"prototype_class": None}, "not those of the architecture"),
    ],
)
def test_information_that_does_not_fit_is_refused(saved, changes, expected):
    folder, _ = saved
    rewrite_info(folder, **changes)
    with pytest.raises(UserError, match=expected) as error:
        load_bundle(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]"])
def test_a_damaged_model_json_is_refused(saved, content):
    folder, _ = saved
    storage.write_bytes(f"{folder}/model.json", content)
    with pytest.raises(UserError, match=r"model\.json of bundle .* is damaged"):
        load_bundle(folder)


def test_a_folder_without_a_bundle_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no complete bundle at .*nothing"):
        load_bundle(str(tmp_path / "nothing"))


def test_nothing_is_unpickled_and_nothing_downloaded(saved, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("must not be called")

    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load"), (torch.hub, "load_state_dict_from_url")):
        monkeypatch.setattr(module, name, forbidden)
    assert load_bundle(saved[0]).network
