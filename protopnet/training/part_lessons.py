"""What a start from parts learns on cached maps, without the backbone: first the prototypes, then the add-on layer.

The loss: cross-entropy of the classes, and of the place of each of an image's own prototypes among the cells, for the
plain view and for the noisy one. The target is where the part was seen at the start. So a prototype can become what
tells its class from others, but not another part, and must find its place under noise.

1. The prototypes learn, the maps stay. Moved onto patches after that they would lose some of it (docs/results.md). So
2. each goes onto its nearest patch at once and is tied to it while the add-on layer learns: a change of the layer
   changes map and prototype alike. The push then finds every prototype where it is.

Legend: N images, B of a batch, D latent channels, L = H*W cells, G prototypes a class, P of all, K classes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protopnet.model.network import ProtoPNet
from protopnet.model.prototypes import min_distances, similarity

BATCH = 100  # images a step
TEMPERATURE = 0.1  # of the cosines over the cells
PROTOTYPE_EPOCHS, ADD_ON_EPOCHS, LEARNING_RATE = 60, 15, 3e-3  # the add-on layer overfits in twice as many


@dataclass(frozen=True)
class Lesson:
    """Latent maps of images, plain and noisy; their classes, and the cell where each own prototype should be."""

    views_NLD: tuple[Tensor, Tensor]
    labels_N: Tensor
    places_NG: Tensor
    shape: tuple[int, int]


def learn(network: ProtoPNet, lesson: Lesson, seed: int) -> None:
    """Prototypes and add-on layer of the network (`model.add_on` linear) from the lesson. Prototypes end on patches."""
    network.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    plain_NLD, D = lesson.views_NLD[0], network.prototypes.shape[1]
    prototypes_PD = F.normalize(network.prototypes.flatten(1), dim=1).requires_grad_()

    def with_prototypes(batch: Tensor) -> Tensor:
        return loss(network, lesson, batch, prototypes_PD, [view_NLD[batch] for view_NLD in lesson.views_NLD])

    descend(prototypes_PD, with_prototypes, len(plain_NLD), PROTOTYPE_EPOCHS, generator)
    patches_PD = nearest_own(network, lesson, prototypes_PD.detach())
    turn_DD = torch.eye(D).requires_grad_()

    def with_add_on(batch: Tensor) -> Tensor:
        turned = [view_NLD[batch] @ turn_DD for view_NLD in lesson.views_NLD]
        return loss(network, lesson, batch, patches_PD @ turn_DD, turned)

    descend(turn_DD, with_add_on, len(plain_NLD), ADD_ON_EPOCHS, generator)
    convolution = network.add_on[0]
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.bias is not None
    with torch.no_grad():
        convolution.weight.copy_((turn_DD.T @ convolution.weight.flatten(1)).view_as(convolution.weight))
        convolution.bias.copy_(convolution.bias @ turn_DD)
        network.prototypes.copy_((patches_PD @ turn_DD).view_as(network.prototypes))


def loss(network: ProtoPNet, lesson: Lesson, batch: Tensor, prototypes_PD: Tensor, views: Sequence[Tensor]) -> Tensor:
    """Cross-entropy of classes and of places, summed over the views of a batch of images, each `z_BLD`."""
    labels_B, target_BG = lesson.labels_N[batch], lesson.places_NG[batch]
    own_KG = prototypes_of(network)
    total = torch.zeros(())
    for z_BLD in views:
        z_BDHW = z_BLD.transpose(1, 2).unflatten(2, lesson.shape)
        distances_BP, _ = min_distances(z_BDHW, prototypes_PD[:, :, None, None], network.kind)
        logits_BK = network.last_layer(similarity(distances_BP, network.kind, network.epsilon))
        own_BGD = F.normalize(prototypes_PD, dim=1)[own_KG[labels_B]]
        maps_BGL = own_BGD @ F.normalize(z_BLD, dim=2).transpose(1, 2)
        places = F.cross_entropy((maps_BGL / TEMPERATURE).flatten(0, 1), target_BG.flatten())
        total = total + F.cross_entropy(logits_BK, labels_B) + places
    return total


def descend(
    parameter: Tensor, loss_of: Callable[[Tensor], Tensor], images: int, epochs: int, generator: torch.Generator
) -> None:
    """Adam in one cycle over batches in random order."""
    optimiser = torch.optim.Adam([parameter], lr=LEARNING_RATE)
    steps = -(-images // BATCH)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=epochs * steps)
    for batch in _batches(images, epochs, generator):
        optimiser.zero_grad()
        loss_of(batch).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        cycle.step()


def nearest_own(network: ProtoPNet, lesson: Lesson, prototypes_PD: Tensor) -> Tensor:
    """The patch of its class nearest to each prototype, as it is on the plain maps; of a class without images the
    prototype itself: `patches_PD`."""
    patches_PD = prototypes_PD.clone()
    for label, own_G in enumerate(prototypes_of(network)):
        cells_nD = lesson.views_NLD[0][lesson.labels_N == label].flatten(0, 1)
        if len(cells_nD):
            nearest_G = (F.normalize(cells_nD, dim=1) @ F.normalize(prototypes_PD[own_G], dim=1).T).argmax(0)
            patches_PD[own_G] = cells_nD[nearest_G]
    return patches_PD


def prototypes_of(network: ProtoPNet) -> Tensor:
    """The prototypes of each class, equally many: `_KG`."""
    classes = network.last_layer.out_features
    return torch.stack([(network.prototype_class == label).nonzero()[:, 0] for label in range(classes)])


def _batches(images: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(epochs):
        yield from torch.randperm(images, generator=generator).split(BATCH)
