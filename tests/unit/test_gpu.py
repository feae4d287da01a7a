"""What a GPU computes is what a CPU computes, to rounding: `pytest -m gpu`. Skipped where there is no GPU."""

import copy

import numpy as np
import pytest
import torch

from bench.common import bundle_of
from protopnet.config import ModelSettings, TrainSettings
from protopnet.model.losses import objective_of
from protopnet.model.network import ProtoPNet, set_phase
from protopnet.model.prototypes import Kind, min_distances, similarity, true_float32
from protopnet.passes.candidates import local_nearest
from protopnet.predictor import Predictor
from protopnet.training.optimiser import build_optimiser
from protopnet.training.step import Stepper

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GPU = torch.device("cuda")
CLASSES, SIDE = 3, 64
# Without BatchNorm and dropout, which would tell rounding from nothing and draw other numbers.
MODEL = ModelSettings(backbone="vgg11", image_size=SIDE, prototype_depth=16, prototypes=12)


@pytest.fixture
def network() -> ProtoPNet:
    network = bundle_of(MODEL, CLASSES).network
    assert isinstance(network, ProtoPNet)
    return network


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_joint_step(network: ProtoPNet, precision: str) -> None:
    train = TrainSettings.model_validate({"precision": precision})
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, SIDE, SIDE, 3), dtype=torch.uint8, generator=random)
    labels, found = torch.arange(6) % CLASSES, []
    for device in (torch.device("cpu"), GPU):
        own = copy.deepcopy(network).to(device)
        set_phase(own, "joint")
        optimiser = build_optimiser(own, train, "joint")
        step = Stepper(own, own, optimiser, objective_of(own, train, labels, CLASSES), train)
        terms = step((pixels, labels))
        gradients = {name: p.grad.cpu() for name, p in own.named_parameters() if p.grad is not None}
        found.append(({name: float(value) for name, value in terms.items()}, gradients))
    (terms_cpu, gradients_cpu), (terms_gpu, gradients_gpu) = found
    loose = precision == "bf16"
    assert terms_gpu == pytest.approx(terms_cpu, rel=3e-2 if loose else 1e-4)
    assert gradients_gpu.keys() == gradients_cpu.keys()
    for name, gradient in gradients_cpu.items():
        away = float((gradients_gpu[name] - gradient).norm() / gradient.norm().clamp(min=1e-12))
        assert away < (0.2 if loose else 1e-3), name


@pytest.mark.parametrize("kind", ["log", "cosine", "linear"])
def test_the_prototype_layer_forward_and_back(kind: Kind) -> None:
    random = torch.Generator().manual_seed(0)
    latent, prototypes = torch.rand(5, 16, 7, 7, generator=random), torch.rand(300, 16, 1, 1, generator=random)
    found = []
    for device in (torch.device("cpu"), GPU):
        z, p = (tensor.clone().to(device).requires_grad_() for tensor in (latent, prototypes))
        distances, index = min_distances(z, p, kind)
        similarity(distances, kind).sum().backward()
        found.append([distances.detach().cpu(), index.cpu(), z.grad.cpu(), p.grad.cpu()])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("one_per_image", [False, True])
def test_the_push_finds_the_same_patches(network: ProtoPNet, images: torch.Tensor, one_per_image: bool) -> None:
    tables = []
    for device in (torch.device("cpu"), GPU):
        own = copy.deepcopy(network).to(device)
        with torch.inference_mode(), true_float32():
            latent = own.latent(images.to(device))
            classes = None if one_per_image else own.prototype_class.cpu().numpy()
            how = {"prototype_class_P": classes, "one_per_image": one_per_image}
            labels = np.arange(6) % CLASSES
            tables.append(local_nearest(latent, np.arange(6), labels, own.prototypes, own.kind, 2, **how))
    here, there = tables
    assert len(there) == len(here) > 0
    np.testing.assert_allclose(there["distance"].to_numpy(), here["distance"].to_numpy(), rtol=1e-3, atol=1e-5)
    for name in ("prototype", "image_id", "row", "column"):
        assert there[name].to_pylist() == here[name].to_pylist(), name


def test_scores_and_evidence(images: torch.Tensor) -> None:
    sizes = [(SIDE, SIDE)] * len(images)
    here = Predictor([bundle_of(MODEL, CLASSES)])
    there = Predictor([bundle_of(MODEL, CLASSES)]).to(GPU)
    there_images = images.to(GPU)
    torch.testing.assert_close(
        there.scores(there_images).logits_BK.cpu(), here.scores(images).logits_BK, rtol=1e-3, atol=1e-3
    )
    rounded = there.scores(there_images, precision="bf16").logits_BK.cpu()
    torch.testing.assert_close(rounded, here.scores(images).logits_BK, rtol=0.1, atol=0.5)
    pairs = zip(here.explain(images, sizes), there.explain(there_images, sizes), strict=True)
    for one, other in pairs:
        for mine, theirs in zip(one.classes, other.classes, strict=True):
            assert theirs.logit == pytest.approx(mine.logit, rel=1e-3, abs=1e-3)
            assert [e.prototype for e in theirs.evidence] == [e.prototype for e in mine.evidence]
