"""What SGD steps with: Adam and its parameter groups as published, and the learning rates over the epochs."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from protopnet.config import TrainSettings
from protopnet.model.network import Baseline, Phase, ProtoPNet

# One cycle: where the peak lies, and how far below it the rates begin and end.
PEAK_AT, FIRST_FACTOR, LAST_FACTOR = 0.3, 1 / 25, 1e-4


def build_optimiser(network: ProtoPNet | Baseline, train: TrainSettings, phase: Phase) -> torch.optim.Optimizer:
    """Adam over what the phase trains. The penalty is Adam's L2 as published, not AdamW's; none on prototypes."""
    groups: list[dict[str, Any]]
    if isinstance(network, ProtoPNet):
        groups = [
            _group("train.lr_add_on", network.add_on.parameters(), train.lr_add_on, train.weight_decay),
            _group("train.lr_prototypes", [network.prototypes], train.lr_prototypes, 0.0),
        ]
    else:
        groups = [_group("train.lr_head", network.head.parameters(), train.lr_head, train.weight_decay)]
    if phase == "joint":
        features = network.backbone.parameters()
        groups.append(_group("train.lr_features", features, train.lr_features, train.weight_decay))
    return torch.optim.Adam(groups, fused=True)


def _group(name: str, parameters: Iterable[nn.Parameter], rate: float, weight_decay: float) -> dict[str, Any]:
    """A parameter group with the setting its rate comes from."""
    return {"name": name, "params": list(parameters), "lr": rate, "base_lr": rate, "weight_decay": weight_decay}


def set_learning_rates(
    optimiser: torch.optim.Optimizer, train: TrainSettings, joint_epoch: float, joint_epochs: int
) -> None:
    """Set the rates of a step. `joint_epoch` counts joint epochs with their fraction, negative while warm."""
    factor = learning_rate_factor(train, joint_epoch, joint_epochs)
    for group in optimiser.param_groups:
        group["lr"] = group["base_lr"] * factor


def learning_rate_factor(train: TrainSettings, joint_epoch: float, joint_epochs: int) -> float:
    """Share of the base rate: 1 while warm, then the step decay, or a rise and a fall over all joint epochs."""
    if joint_epoch < 0:
        return 1.0
    if train.schedule == "step":
        return train.decay ** (int(joint_epoch) // train.decay_epochs)
    share = joint_epoch / max(1, joint_epochs)
    peak = PEAK_AT if train.schedule == "onecycle" else train.warm_up
    if share < peak:
        return _half_cosine(FIRST_FACTOR, 1.0, share / peak)
    return _half_cosine(1.0, LAST_FACTOR, min(1.0, (share - peak) / (1 - peak)))


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
