"""Import of the authors' state dicts."""

import pytest
import torch

from protopnet.config import ModelSettings
from protopnet.errors import UserError
from protopnet.model.legacy import import_authors_state
from protopnet.model.network import build_network, set_phase


def build(backbone="vgg11_bn", add_on="regular", prototypes=6):
    settings = ModelSettings(backbone=backbone, add_on=add_on, prototypes=prototypes, prototype_depth=16, image_size=64)
    network = build_network(settings, num_classes=3)
    set_phase(network, "eval")
    return network


def authors_state(network):
    """The network's tensors under the authors' names, as their code writes them."""
    theirs = {"ones": torch.ones_like(network.prototypes)}
    for name, tensor in network.state_dict().items():
        if name == "prototype_class":
            continue  # not in their state dict
        name = name.replace("backbone.features.", "features.", 1).replace("add_on.", "add_on_layers.", 1)
        theirs["prototype_vectors" if name == "prototypes" else name] = tensor
    return theirs


@pytest.mark.parametrize("add_on", ["regular", "bottleneck"])
@pytest.mark.parametrize("backbone", ["vgg11_bn", "resnet18", "densenet121"])
def test_an_imported_network_computes_what_theirs_does(backbone, add_on):
    theirs, ours = build(backbone, add_on), build(backbone, add_on)
    images = torch.rand(2, 3, 64, 64)
    assert not torch.equal(ours(images).logits_BK, theirs(images).logits_BK)
    import_authors_state(authors_state(theirs), ours)
    assert torch.equal(ours(images).logits_BK, theirs(images).logits_BK)


def test_their_names_are_understood():
    names = set(authors_state(build("vgg11_bn")))
    assert {"features.features.0.weight", "add_on_layers.2.bias", "prototype_vectors", "ones"} <= names
    assert "features.layer1.0.conv1.weight" in authors_state(build("resnet18"))


def test_names_of_data_parallel_and_missing_counters_are_understood():
    theirs, ours = build(), build()
    state = {f"module.{n}": t for n, t in authors_state(theirs).items() if "num_batches_tracked" not in n}
    import_authors_state(state, ours)
    assert torch.equal(ours.prototypes, theirs.prototypes)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"backbone": "vgg11"}, "vgg|lacks|which this network lacks"),
        ({"prototypes": 9}, r"prototypes of the authors' .* \(9, 16, 1, 1\), expected \(6, 16, 1, 1\)"),
        ({"add_on": "bottleneck"}, r"add_on\..*model\.add_on"),
    ],
)
def test_a_network_of_other_sizes_is_refused(other, expected):
    with pytest.raises(UserError, match=expected):
        import_authors_state(authors_state(build(**other)), build())


def test_an_incomplete_state_is_refused():
    state = authors_state(build())
    del state["last_layer.weight"]
    with pytest.raises(UserError, match=r"lacks last_layer\.weight"):
        import_authors_state(state, build())
