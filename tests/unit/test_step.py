"""One step of SGD, on one worker or dealt out to several."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from protopnet.config import ModelSettings, TrainSettings
from protopnet.datasets import order
from protopnet.model.losses import objective_of
from protopnet.model.network import ProtoPNet, build_network, set_phase
from protopnet.training.step import Stepper

# Without BatchNorm, whose statistics are each worker's own.
MODEL = ModelSettings(backbone="squeezenet1_0", image_size=64, prototype_depth=8, prototypes=6)
TRAIN = TrainSettings(precision="float32")


def gradients(network: ProtoPNet, pixels: Tensor, labels: Tensor, weight: float = 1.0) -> dict[str, Tensor]:
    """What a step of one worker averages with those of the others."""
    still = torch.optim.SGD(network.parameters(), lr=0)
    step = Stepper(network, network, still, objective_of(network, TRAIN, labels, 3), TRAIN)
    step((pixels, labels), weight)
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("world", [2, 3])
def test_a_step_is_the_same_for_any_number_of_workers(world: int) -> None:
    torch.manual_seed(0)
    network = build_network(MODEL, 3)
    assert isinstance(network, ProtoPNet)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    set_phase(network, "joint")
    pixels, labels = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8), torch.arange(8) % 3
    alone = gradients(network, pixels, labels)

    batch = np.column_stack([np.zeros(8, int), np.arange(8)])
    parts = [torch.from_numpy(order.part(batch, rank, world)[:, 1]) for rank in range(world)]
    together = [
        gradients(network, pixels[part], labels[part], order.weight(8, rank, world)) for rank, part in enumerate(parts)
    ]
    assert {len(part) for part in parts} == ({4} if world == 2 else {2, 3})
    for name, gradient in alone.items():
        mean = torch.stack([each[name] for each in together]).mean(0)
        torch.testing.assert_close(mean, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max() + 1), msg=name)
