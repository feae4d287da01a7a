"""ProtoPNet and its black-box counterpart."""

import pytest
import torch
from torch import nn

from protopnet.config import ModelSettings
from protopnet.errors import UserError
from protopnet.model.network import Baseline, ProtoPNet, add_on_layers, build_network, set_phase
from protopnet.model.prototypes import distance_maps


def small(**settings):
    """A network that is quick to run."""
    given = {"backbone": "resnet18", "cut": "layer1", "image_size": 32, "prototype_depth": 8, **settings}
    return build_network(ModelSettings(**given), num_classes=3)


@pytest.fixture(scope="module")
def images():
    return torch.rand(4, 3, 32, 32)


def widths(add_on):
    return [(layer.in_channels, layer.out_channels) for layer in add_on if isinstance(layer, nn.Conv2d)]


def test_add_on_layers_are_as_published():
    assert widths(add_on_layers("regular", 512, 128)) == [(512, 128), (128, 128)]
    assert widths(add_on_layers("bottleneck", 512, 128)) == [(512, 256), (256, 256), (256, 128), (128, 128)]
    assert widths(add_on_layers("bottleneck", 300, 128)) == [(300, 150), (150, 150), (150, 128), (128, 128)]
    assert widths(add_on_layers("bottleneck", 64, 128)) == [(64, 128), (128, 128)]
    kinds = [type(layer) for layer in add_on_layers("bottleneck", 512, 128)]
    assert kinds == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Conv2d, nn.Sigmoid]


def test_prototypes_lie_class_by_class_ten_each_unless_told():
    assert small().prototype_class.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    network = small(prototypes=6, prototype_shape=(2, 3))
    assert network.prototype_class.tolist() == [0, 0, 1, 1, 2, 2]
    assert network.prototypes.shape == (6, 8, 2, 3)


@pytest.mark.parametrize(("similarity", "scale"), [("log", 1.0), ("linear", 1.0), ("cosine", 10.0)])
def test_class_connections_start_at_scale_and_minus_half_of_it(similarity, scale):
    weight = small(prototypes=3, similarity=similarity).last_layer.weight
    expected = scale * (1.5 * torch.eye(3) - 0.5)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("similarity", ["log", "linear", "cosine"])
def test_points_add_up_to_the_logit(images, similarity):
    network = small(similarity=similarity)
    set_phase(network, "eval")
    out = network(images)
    for label in range(3):
        points = network.points(out.similarities_BP, torch.full((4,), label))
        torch.testing.assert_close(points.sum(1), out.logits_BK[:, label], rtol=1e-5, atol=1e-4)


def test_the_index_is_the_cell_of_the_smallest_distance(images):
    network = small(prototype_shape=(2, 2))
    set_phase(network, "eval")
    out = network(images)
    maps = distance_maps(network.latent(images), network.prototypes, network.kind)
    assert torch.equal(out.index_BP, maps.flatten(2).argmin(2))
    torch.testing.assert_close(out.distances_BP, maps.flatten(2).amin(2))


def test_under_autocast_everything_from_the_sigmoid_on_is_float32(images):
    network = small()
    with torch.autocast("cpu", torch.bfloat16):
        z = network.latent(images)
        out = network(images)
    assert z.dtype == out.logits_BK.dtype == out.distances_BP.dtype == torch.float32
    # bfloat16 would leave a few hundred different values.
    assert z.unique().numel() > z.numel() / 2


def test_a_prototype_taken_from_a_map_is_found_there_again(images):
    network = small(similarity="log")
    set_phase(network, "eval")
    with torch.no_grad():
        network.prototypes[7] = network.latent(images)[2, :, 4, 1][:, None, None]
    out = network(images)
    assert out.distances_BP[2, 7] < 1e-5
    assert out.index_BP[2, 7] == 4 * 8 + 1


class TestPhases:
    def learning(self, network):
        return {name.split(".")[0] for name, parameter in network.named_parameters() if parameter.requires_grad}

    def test_what_learns_in_each_phase(self):
        network = small()
        set_phase(network, "warm")
        assert self.learning(network) == {"add_on", "prototypes"}
        set_phase(network, "joint")
        assert self.learning(network) == {"backbone", "add_on", "prototypes"}
        set_phase(network, "eval")
        assert self.learning(network) == set()
        set_phase(network, "joint")
        assert self.learning(network) == {"backbone", "add_on", "prototypes"}

    def test_the_baseline_warms_up_its_head(self):
        network = small(kind="baseline")
        set_phase(network, "warm")
        assert self.learning(network) == {"head"}
        set_phase(network, "joint")
        assert self.learning(network) == {"backbone", "head"}

    @pytest.mark.parametrize(("phase", "moves"), [("warm", False), ("eval", False), ("joint", True)])
    def test_batch_statistics_move_only_with_what_learns(self, images, phase, moves):
        network = small()
        set_phase(network, phase)
        before = network.backbone.features.get_submodule("bn1").running_mean.clone()
        network(images)
        assert torch.equal(network.backbone.features.get_submodule("bn1").running_mean, before) != moves

    def test_in_joint_training_every_gradient_arrives(self, images):
        network = small()
        set_phase(network, "joint")
        network(images).logits_BK.square().sum().backward()
        for name, parameter in network.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        assert network.prototypes.grad.abs().sum() > 0


def test_the_baseline_has_logits_only(images):
    network = small(kind="baseline")
    assert isinstance(network, Baseline)
    out = network(images)
    assert out.logits_BK.shape == (4, 3)
    assert out[1:] == (None, None, None)
    assert network.head.bias is not None


def test_classes_of_prototypes_may_be_given():
    settings = ModelSettings(backbone="resnet18", cut="layer1", prototypes=3, prototype_depth=8, similarity="log")
    network = ProtoPNet(small().backbone, settings, 2, torch.tensor([1, 0, 1, 1]))
    assert network.prototypes.shape[0] == 4
    assert network.last_layer.weight[1].tolist() == [1, -0.5, 1, 1]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"prototypes": 10}, r"model\.prototypes 10 can't be shared equally among 3 classes: take 9 or 12"),
        ({"prototypes": 2}, r"model\.prototypes 2 .* take 3$"),
        ({"prototype_shape": (9, 9)}, r"9 x 9 cells don't fit on the 8 x 8 map .* model\.prototype_shape"),
        ({"prototype_shape": (0, 1)}, r"model\.prototype_shape"),
        ({"backbone": "resnet19"}, r"model\.backbone"),
        ({"weights": "/nowhere.pth"}, r"model\.weights"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(settings, expected):
    with pytest.raises(UserError, match=expected) as error:
        small(**settings)
    assert "\n" not in str(error.value)


def test_weights_are_not_read_when_not_wanted():
    settings = ModelSettings(backbone="resnet18", cut="layer1", image_size=32, weights="/nowhere.pth")
    assert build_network(settings, 3, start_weights=False)
