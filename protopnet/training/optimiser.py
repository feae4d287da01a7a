"""What SGD steps with: Adam and its parameter groups as published, and the learning rates over the epochs."""

import math
from typing import Any

import torch

from protopnet.config import TrainSettings
from protopnet.model.network import Baseline, Phase, ProtoPNet

# The one-cycle policy: where the peak lies, and how far below it the rates begin and end.
PEAK_AT, FIRST_FACTOR, LAST_FACTOR = 0.3, 1 / 25, 1e-4


def build_optimiser(network: ProtoPNet | Baseline, train: TrainSettings, phase: Phase) -> torch.optim.Optimizer:
    """Adam over what the phase trains. The penalty is Adam's L2 as published, not AdamW's; none on prototypes."""
    groups: list[dict[str, Any]]
    if isinstance(network, ProtoPNet):
        groups = [
            {"params": list(network.add_on.parameters()), "lr": train.lr_add_on, "weight_decay": train.weight_decay},
            {"params": [network.prototypes], "lr": train.lr_prototypes, "weight_decay": 0.0},
        ]
    else:
        groups = [{"params": list(network.head.parameters()), "lr": train.lr_head, "weight_decay": train.weight_decay}]
    if phase == "joint":
        features = list(network.backbone.parameters())
        groups.append({"params": features, "lr": train.lr_features, "weight_decay": train.weight_decay})
    for group in groups:
        group["base_lr"] = group["lr"]
    return torch.optim.Adam(groups, fused=True)


def set_learning_rates(
    optimiser: torch.optim.Optimizer, train: TrainSettings, joint_epoch: float, joint_epochs: int
) -> None:
    """Set the rates of a step. `joint_epoch` counts joint epochs with their fraction, negative while warm."""
    factor = learning_rate_factor(train, joint_epoch, joint_epochs)
    for group in optimiser.param_groups:
        group["lr"] = group["base_lr"] * factor


def learning_rate_factor(train: TrainSettings, joint_epoch: float, joint_epochs: int) -> float:
    """Share of the base rate: 1 while warm, then the step decay or the one cycle over all joint epochs."""
    if joint_epoch < 0:
        return 1.0
    if train.schedule == "step":
        return train.decay ** (int(joint_epoch) // train.decay_epochs)
    share = joint_epoch / max(1, joint_epochs)
    if share < PEAK_AT:
        return _half_cosine(FIRST_FACTOR, 1.0, share / PEAK_AT)
    return _half_cosine(1.0, LAST_FACTOR, min(1.0, (share - PEAK_AT) / (1 - PEAK_AT)))


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
