"""The figures of the authors' implementation, reproduced. See tests/golden/README.md."""

import json
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from protopnet.config import TrainSettings
from protopnet.model.backbones import BACKBONES, Backbone, build_backbone
from protopnet.model.boxes import activation_boxes, upsample
from protopnet.model.losses import Objective, off_class_l1, prototype_terms
from protopnet.model.prototypes import distance_maps, min_distances, similarity
from protopnet.model.receptive_field import receptive_field

GOLDEN = Path(__file__).parent.parent / "golden"
META = json.loads((GOLDEN / "meta.json").read_text())
FIGURES = json.loads((GOLDEN / "backbones.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the figures were made; and thousands of small layers gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_agrees(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["prototype_layer_1x1", "prototype_layer_3x3", "prototype_layer_linear"])
class TestPrototypeLayer:
    @pytest.fixture
    def figures(self, case):
        return load_file(GOLDEN / f"{case}.safetensors")

    def test_every_distance_is_theirs(self, case, figures):
        maps = distance_maps(figures["latent"], figures["prototypes"], META[case]["activation"])
        assert_agrees(maps, figures["distances"])

    def test_forward_losses_and_gradients_are_theirs(self, case, figures):
        kind, epsilon = META[case]["activation"], META[case]["epsilon"]
        latent, prototypes, last_layer = (
            figures[name].clone().requires_grad_() for name in ("latent", "prototypes", "last_layer")
        )
        distances, index = min_distances(latent, prototypes, kind)
        similarities = similarity(distances, kind, epsilon)
        logits = similarities @ last_layer.t()
        terms = prototype_terms(
            logits,
            distances,
            figures["labels"],
            figures["prototype_class"],
            Objective(TrainSettings(**META[case]["weights"]), off_class_l1(last_layer, figures["prototype_class"])),
        )
        terms["total"].backward()

        assert_agrees(distances, figures["min_distances"])
        assert torch.equal(index, figures["distances"].flatten(2).argmin(2))
        assert_agrees(similarities, figures["similarities"])
        assert_agrees(logits, figures["logits"])
        for name, term in terms.items():
            assert_agrees(term, figures[name])
        assert_agrees(latent.grad, figures["grad_latent"])
        assert_agrees(prototypes.grad, figures["grad_prototypes"])
        assert_agrees(last_layer.grad, figures["grad_last_layer"])


def formula_values(name: str, count: int) -> np.ndarray:
    """The golden figures' numbers in [-1, 1) for the tensor of this name."""
    s = np.arange(count, dtype=np.float64)
    s *= 12.9898
    s += 78.233 * (crc32(name.encode()) % 9973)
    np.sin(s, out=s)
    s *= 43758.5453
    s -= np.floor(s)
    return 2 * s - 1


def formula_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    u = torch.from_numpy(formula_values(name, tensor.numel())).view(tensor.shape)
    if name.endswith("running_var"):
        u = 1 + 0.5 * u
    elif name.endswith(("running_mean", "bias")):
        u = 0.1 * u
    elif tensor.ndim == 4:
        u = u * (6 / tensor[0].numel()) ** 0.5
    else:
        u = 0.6 + 0.2 * u
    return u.float()


def fill_with_formula(backbone: Backbone) -> int:
    state = backbone.features.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            tensor.copy_(formula_tensor(name, tensor))
    return len(state)


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_is_cut_and_computes_as_theirs(name):
    figures = FIGURES[name]
    backbone = build_backbone(name).eval()
    assert fill_with_formula(backbone) == figures["keys"]
    i = np.arange(3 * 224 * 224, dtype=np.float64)
    x = torch.from_numpy(np.sin(0.37 * i) + np.cos(0.011 * i)).float().view(1, 3, 224, 224)

    with torch.inference_mode():
        out = backbone(x)

    assert list(out.shape) == figures["shape"]
    tolerance = 1e-3 * figures["absmax"]
    sample = out.flatten()[figures["sample_index"]]
    torch.testing.assert_close(sample, torch.tensor(figures["sample"]), rtol=0, atol=tolerance)
    assert out.mean().item() == pytest.approx(figures["mean"], abs=tolerance)
    assert out.std().item() == pytest.approx(figures["std"], abs=tolerance)
    field = receptive_field(backbone, 224)
    assert [field.cells, field.jump, field.size, field.start] == figures["receptive_field"]


def test_the_golden_backbones_are_all_17():
    assert len(BACKBONES) == 17
    assert set(FIGURES) == set(BACKBONES)


def test_maps_are_enlarged_as_opencv_does():
    figures = load_file(GOLDEN / "activation_boxes.safetensors")
    enlarged = upsample(figures["activation"], 224, 224)
    # They are stored in float16: 11 bits.
    torch.testing.assert_close(enlarged.half(), figures["upsampled"], rtol=2**-10, atol=1e-4)


def test_boxes_around_high_activation_are_theirs():
    figures = load_file(GOLDEN / "activation_boxes.safetensors")
    top, left, bottom, right = activation_boxes(figures["activation"], 224).T
    assert np.stack([top, bottom, left, right], axis=1).tolist() == figures["boxes"].tolist()
