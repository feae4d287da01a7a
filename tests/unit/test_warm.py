"""Start from a bundle: what goes on, what is new, and which bundles don't fit."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from protopnet.config import ModelSettings
from protopnet.errors import UserError
from protopnet.model.bundle import Bundle, load_bundle, save_bundle
from protopnet.model.network import ProtoPNet, build_network
from protopnet.training.start import PatchSample
from protopnet.training.warm import check_warm_start, start_from_bundle

MODEL = {"backbone": "resnet18", "cut": "layer1", "image_size": 32, "prototype_depth": 8}


def network(classes: int, seed: int, **changes: object) -> ProtoPNet:
    torch.manual_seed(seed)
    built = build_network(ModelSettings.model_validate(MODEL | changes), classes)
    assert isinstance(built, ProtoPNet)
    with torch.no_grad():
        built.last_layer.weight.add_(0.1 * torch.randn_like(built.last_layer.weight))
    return built


def no_patches() -> PatchSample:
    raise AssertionError("nothing is new: no image has to be looked at")


def test_the_same_classes_go_on_as_they_were() -> None:
    given, fresh = network(2, 0, prototypes=4), network(2, 1, prototypes=4)
    warm = start_from_bundle(fresh, ["jay", "tit"], given, ["jay", "tit"], no_patches, 0)
    assert (warm.prototypes, warm.images) == (4, 0)
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(fresh.eval()(images).logits_BK, given.eval()(images).logits_BK)


def test_classes_are_matched_by_name_and_new_ones_start_from_their_patches() -> None:
    given, fresh = network(2, 0, prototypes=4), network(3, 1, prototypes=9)
    labels = np.repeat([0, 1, 2], 20)
    features = (torch.rand(60, 64, 1, 1) + 3 * torch.eye(64)[labels][:, :, None, None]).half()
    start_KP = fresh.last_layer.weight.detach().clone()
    warm = start_from_bundle(
        fresh, ["auk", "jay", "tit"], given, ["tit", "jay"], lambda: PatchSample(features, labels, 60), 0
    )
    assert (warm.prototypes, warm.images) == (4, 60)
    at, of = [3, 4, 6, 7], [2, 3, 0, 1]  # jay, jay, tit, tit
    assert torch.equal(fresh.prototypes[at], given.prototypes[of])
    assert torch.equal(fresh.last_layer.weight[1:][:, at], given.last_layer.weight[[1, 0]][:, of])
    assert torch.equal(fresh.last_layer.weight[0], start_KP[0])
    latent = fresh.add_on(features.float()).flatten(1)
    centre = latent[labels == 0].mean(0)
    ours = fresh.prototypes[:3].flatten(1)
    assert (ours - centre).norm(dim=1).max() < (latent[labels == 0] - centre).norm(dim=1).max()


@pytest.fixture
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = str(tmp_path_factory.mktemp("bundle"))
    settings = ModelSettings.model_validate(MODEL | {"prototypes": 4})
    save_bundle(folder, network(2, 0, prototypes=4), settings, ["jay", "tit"], {})
    return load_bundle(folder)


def test_another_network_is_refused(bundle: Bundle) -> None:
    same = ModelSettings.model_validate(MODEL | {"start": "bundle", "weights": "old"})
    assert check_warm_start(bundle, same, "old") is bundle.network
    with pytest.raises(UserError, match=r"the bundle old has model.prototype_depth 8, the settings have 16; set"):
        check_warm_start(bundle, same.model_copy(update={"prototype_depth": 16}), "old")


@pytest.mark.parametrize("changes", [{"weights": None}, {"weights": "old", "kind": "baseline"}])
def test_it_needs_a_bundle(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=r"model.start bundle needs model.weights"):
        ModelSettings.model_validate(MODEL | {"start": "bundle"} | changes)
