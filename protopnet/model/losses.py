"""The published training loss, term by term. Coefficients come from the settings.

Cluster and separation are means over images of the distance to the nearest prototype of the own
class and of any other. The authors write the masked minimum as a maximum of `max_dist - d`, which
differs only where every own-class distance exceeds D*h*w: there their gradient vanishes, ours doesn't.

For the cosine similarity both act on d = 1 - cosine: the same gradients as the coefficients -0.8
and +0.08 on the largest cosine, since min(1 - cosine) = 1 - max(cosine).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from protopnet.config import TrainSettings
from protopnet.model.network import Baseline, Output, ProtoPNet


@dataclass(frozen=True)
class Objective:
    """What a step needs beside the batch: the same for all steps of a stage, so computed once.

    l1: of the connections to other classes, which SGD leaves alone. class_weights_K: of the cross-entropy, 1 on average
    over the training images; None where all count alike.
    """

    coefficients: TrainSettings
    l1: Tensor
    class_weights_K: Tensor | None = None


def objective_of(network: ProtoPNet | Baseline, train: TrainSettings, labels_n: Tensor, num_classes: int) -> Objective:
    """The objective of a stage. labels_n: class of each training image."""
    device = next(network.parameters()).device
    weights_K = None
    if train.balance:
        count_K = torch.bincount(labels_n, minlength=num_classes).clamp(min=1)
        weights_K = (len(labels_n) / (len(count_K) * count_K)).float().to(device)
    if isinstance(network, Baseline):
        return Objective(train, torch.zeros((), device=device), weights_K)
    l1 = off_class_l1(network.last_layer.weight.detach(), network.prototype_class)
    return Objective(train, l1, weights_K)


def prototype_loss(output: Output, labels_B: Tensor, network: ProtoPNet, objective: Objective) -> dict[str, Tensor]:
    """Each term, unweighted, and their weighted sum `total`; all scalars.

    `average_separation`, the mean distance to prototypes of other classes, is only for the log and
    carries no gradient.
    """
    assert output.distances_BP is not None
    return prototype_terms(output.logits_BK, output.distances_BP, labels_B, network.prototype_class, objective)


def prototype_terms(
    logits_BK: Tensor,
    distances_BP: Tensor,
    labels_B: Tensor,
    prototype_class_P: Tensor,
    objective: Objective,
) -> dict[str, Tensor]:
    """`prototype_loss` from tensors alone."""
    own_BP = prototype_class_P[None] == labels_B[:, None]
    terms = {
        "cross_entropy": cross_entropy(logits_BK, labels_B, objective),
        "cluster": _nearest(distances_BP, own_BP),
        "separation": _nearest(distances_BP, ~own_BP),
        "l1": objective.l1,
    }
    total = torch.stack([getattr(objective.coefficients, name) * term for name, term in terms.items()]).sum()
    return terms | {"average_separation": _average(distances_BP.detach(), ~own_BP), "total": total}


def baseline_loss(output: Output, labels_B: Tensor, objective: Objective) -> dict[str, Tensor]:
    """The same for the black box: cross-entropy."""
    value = cross_entropy(output.logits_BK, labels_B, objective)
    return {"cross_entropy": value, "total": objective.coefficients.cross_entropy * value}


def cross_entropy(logits_BK: Tensor, labels_B: Tensor, objective: Objective) -> Tensor:
    """Mean over images, weighted by class. (PyTorch's own weighted mean divides by the weights in the batch: parts of
    several workers would then not average to the whole.)"""
    loss_B = F.cross_entropy(
        logits_BK.float(), labels_B, reduction="none", label_smoothing=objective.coefficients.label_smoothing
    )
    return loss_B.mean() if objective.class_weights_K is None else (objective.class_weights_K[labels_B] * loss_B).mean()


def off_class_l1(connections_KP: Tensor, prototype_class_P: Tensor) -> Tensor:
    """Sum of the absolute connections of prototypes to classes other than their own."""
    classes_K = torch.arange(len(connections_KP), device=connections_KP.device)
    own_KP = prototype_class_P[None] == classes_K[:, None]
    return connections_KP.abs().masked_fill(own_KP, 0).sum()


def _nearest(distances_BP: Tensor, among_BP: Tensor) -> Tensor:
    """Mean over images of the smallest distance among the prototypes marked."""
    smallest_B = distances_BP.masked_fill(~among_BP, torch.inf).min(dim=1).values
    # A class that pruning left without prototypes has nothing to come near to.
    return smallest_B.masked_fill(smallest_B.isinf(), 0).mean()


def _average(distances_BP: Tensor, among_BP: Tensor) -> Tensor:
    """Mean over images of the mean distance to the prototypes marked."""
    count_B = among_BP.sum(dim=1).clamp(min=1)
    return (distances_BP.masked_fill(~among_BP, 0).sum(dim=1) / count_B).mean()
