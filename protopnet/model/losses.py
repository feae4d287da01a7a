"""The published training loss, term by term. Coefficients come from the settings.

Cluster and separation are means over images of the distance to the nearest prototype of the own
class and of any other. The authors write the masked minimum as a maximum of `max_dist - d`, which
differs only where every own-class distance exceeds D*h*w: there their gradient vanishes, ours doesn't.

For the cosine similarity both act on d = 1 - cosine: the same gradients as the coefficients -0.8
and +0.08 on the largest cosine, since min(1 - cosine) = 1 - max(cosine).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from protopnet.config import TrainSettings
from protopnet.model.network import Output, ProtoPNet


def prototype_loss(
    output: Output, labels_B: Tensor, network: ProtoPNet, coefficients: TrainSettings
) -> dict[str, Tensor]:
    """Each term, unweighted, and their weighted sum `total`; all scalars.

    `average_separation`, the mean distance to prototypes of other classes, is only for the log and
    carries no gradient.
    """
    assert output.distances_BP is not None
    return prototype_terms(
        output.logits_BK,
        output.distances_BP,
        labels_B,
        network.prototype_class,
        network.last_layer.weight,
        coefficients,
    )


def prototype_terms(
    logits_BK: Tensor,
    distances_BP: Tensor,
    labels_B: Tensor,
    prototype_class_P: Tensor,
    connections_KP: Tensor,
    coefficients: TrainSettings,
) -> dict[str, Tensor]:
    """`prototype_loss` from tensors alone."""
    own_BP = prototype_class_P[None] == labels_B[:, None]
    terms = {
        "cross_entropy": F.cross_entropy(logits_BK.float(), labels_B),
        "cluster": _nearest(distances_BP, own_BP),
        "separation": _nearest(distances_BP, ~own_BP),
        "l1": off_class_l1(connections_KP, prototype_class_P),
    }
    total = torch.stack([getattr(coefficients, name) * term for name, term in terms.items()]).sum()
    return terms | {"average_separation": _average(distances_BP.detach(), ~own_BP), "total": total}


def baseline_loss(output: Output, labels_B: Tensor, coefficients: TrainSettings) -> dict[str, Tensor]:
    """The same for the black box: cross-entropy."""
    cross_entropy = F.cross_entropy(output.logits_BK.float(), labels_B)
    return {"cross_entropy": cross_entropy, "total": coefficients.cross_entropy * cross_entropy}


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
