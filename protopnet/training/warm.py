"""Start from a bundle: the network of an earlier run goes on learning, on more images or with more classes.

Backbone and add-on layers are the bundle's. Classes are matched by name: one that the bundle knows gets its prototypes and
the connections between them; prototypes of the others, and those beyond the bundle's, are k-means centres of their
class's patches in the bundle's latent space.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from protopnet.config import ModelSettings
from protopnet.errors import UserError
from protopnet.model.bundle import Bundle
from protopnet.model.network import ProtoPNet
from protopnet.training.start import PatchSample, class_centres, latent_windows

_SAME = ("backbone", "cut", "pool", "add_on", "prototype_depth", "prototype_shape", "similarity")


def check_warm_start(bundle: Bundle, model: ModelSettings, uri: str) -> ProtoPNet:
    """The bundle's network; `UserError` where the settings describe another one."""
    if not isinstance(bundle.network, ProtoPNet):
        raise UserError(f"model.weights {uri} is a baseline: model.start bundle needs one with prototypes")
    theirs = bundle.info.architecture
    for name in _SAME:
        if getattr(theirs, name) != getattr(model, name):
            raise UserError(
                f"model.start bundle: the bundle {uri} has model.{name} {getattr(theirs, name)}, "
                f"the settings have {getattr(model, name)}; set model.{name} to the bundle's"
            )
    return bundle.network


@dataclass(frozen=True)
class Warm:
    """How many prototypes go on from the bundle's, and how many images were looked at for the others."""

    prototypes: int
    images: int


def matched(
    network: ProtoPNet, classes: list[str], given: ProtoPNet, given_classes: list[str]
) -> tuple[list[int], list[int]]:
    """Prototypes of the network, and those of the given one that they go on from: of classes of the same name, in order."""
    there = {name: label for label, name in enumerate(given_classes)}
    ours, theirs = network.prototype_class.tolist(), given.prototype_class.tolist()
    to, of = [], []
    for label, name in enumerate(classes):
        own = [p for p, each in enumerate(ours) if each == label]
        known = [p for p, each in enumerate(theirs) if each == there.get(name)]
        to += own[: len(known)]
        of += known[: len(own)]
    return to, of


@torch.no_grad()
def start_from_bundle(
    network: ProtoPNet,
    classes: list[str],
    given: ProtoPNet,
    given_classes: list[str],
    patches: Callable[[], PatchSample],
    seed: int,
) -> Warm:
    """Set all of the network. patches: of the training images, asked for where there are prototypes that have nothing to go
    on from."""
    network.backbone.load_state_dict(given.backbone.state_dict())
    network.add_on.load_state_dict(given.add_on.state_dict())
    to, of = matched(network, classes, given, given_classes)
    images = 0
    if len(to) < len(network.prototypes):
        sample = patches()
        images = sample.images
        network.prototypes.copy_(class_centres(network, latent_windows(network, sample), sample.labels_N, seed))
    network.prototypes[to] = given.prototypes[of]
    label_of = {name: label for label, name in enumerate(given_classes)}
    labels = [label for label, name in enumerate(classes) if name in label_of]
    theirs = [label_of[classes[label]] for label in labels]
    network.last_layer.weight[np.ix_(labels, to)] = given.last_layer.weight[np.ix_(theirs, of)]
    return Warm(len(to), images)
