"""Adam's groups as published, and the learning rates over the epochs."""

import math

import pytest
import torch

from protopnet.config import ModelSettings, TrainSettings
from protopnet.model.network import Baseline, ProtoPNet, build_network, set_phase
from protopnet.training.optimiser import build_optimiser, learning_rate_factor, set_learning_rates

TRAIN = TrainSettings(lr_features=1e-4, lr_add_on=3e-3, lr_prototypes=2e-3, lr_head=5e-3, weight_decay=1e-3)


def network(kind: str = "protopnet") -> ProtoPNet | Baseline:
    settings = {"kind": kind, "backbone": "squeezenet1_0", "image_size": 64, "prototype_depth": 8, "prototypes": 4}
    return build_network(ModelSettings.model_validate(settings), 2)


def groups(net: ProtoPNet | Baseline, phase: str) -> dict[str, tuple[float, float]]:
    """Learning rate and penalty by the name of each tensor that is stepped."""
    optimiser = build_optimiser(net, TRAIN, phase)  # type: ignore[arg-type]
    assert isinstance(optimiser, torch.optim.Adam)
    of = {id(p): (g["lr"], g["weight_decay"]) for g in optimiser.param_groups for p in g["params"]}
    return {name: of[id(p)] for name, p in net.named_parameters() if id(p) in of}


def test_joint_steps_everything_but_the_last_layer() -> None:
    net = network()
    stepped = groups(net, "joint")
    assert set(stepped) == {name for name, _ in net.named_parameters()} - {"last_layer.weight"}
    assert {stepped[name] for name in stepped if name.startswith("backbone.")} == {(1e-4, 1e-3)}
    assert {stepped[name] for name in stepped if name.startswith("add_on.")} == {(3e-3, 1e-3)}
    assert stepped["prototypes"] == (2e-3, 0.0)  # no penalty would pull prototypes to the corner of the latent space


def test_warm_leaves_the_backbone() -> None:
    stepped = groups(network(), "warm")
    assert "prototypes" in stepped
    assert not any(name.startswith(("backbone.", "last_layer")) for name in stepped)


@pytest.mark.parametrize(("phase", "backbone"), [("warm", False), ("joint", True)])
def test_a_baseline_steps_its_head(phase: str, backbone: bool) -> None:
    stepped = groups(network("baseline"), phase)
    assert stepped["head.weight"] == (5e-3, 1e-3)
    assert any(name.startswith("backbone.") for name in stepped) is backbone


@pytest.mark.parametrize("phase", ["warm", "joint"])
def test_what_is_stepped_is_what_learns(phase: str) -> None:
    net = network()
    set_phase(net, phase)  # type: ignore[arg-type]
    assert set(groups(net, phase)) == {name for name, p in net.named_parameters() if p.requires_grad}


def test_steps_decay_as_published() -> None:
    train = TrainSettings(schedule="step", decay=0.1, decay_epochs=5)
    factors = [learning_rate_factor(train, epoch, 15) for epoch in (-3, -0.5, 0, 4.9, 5, 9.99, 10, 14.5)]
    assert factors == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_one_cycle_rises_to_the_base_rate_and_falls_to_nothing() -> None:
    train = TrainSettings(schedule="onecycle")
    assert learning_rate_factor(train, -1, 10) == 1
    factors = [learning_rate_factor(train, epoch, 10) for epoch in [e / 10 for e in range(101)]]
    assert factors[0] == pytest.approx(1 / 25)
    assert factors.index(max(factors)) == 30
    assert factors[30] == pytest.approx(1)
    assert factors[:31] == sorted(factors[:31])
    assert factors[30:] == sorted(factors[30:], reverse=True)
    assert factors[-1] == pytest.approx(1e-4)


def test_rates_are_set_from_the_base_rates_however_often() -> None:
    optimiser = build_optimiser(network(), TRAIN, "joint")
    train = TRAIN.model_copy(update={"schedule": "step", "decay": 0.5, "decay_epochs": 1})
    for epoch in (0, 3, 1):
        set_learning_rates(optimiser, train, epoch, 4)
    assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([1.5e-3, 1e-3, 5e-5])


def test_base_rates_survive_a_checkpoint() -> None:
    net = network()
    optimiser = build_optimiser(net, TRAIN, "joint")
    set_learning_rates(optimiser, TRAIN, 7.0, 10)
    restored = build_optimiser(net, TRAIN, "joint")
    restored.load_state_dict(optimiser.state_dict())
    set_learning_rates(restored, TRAIN, 0.0, 10)
    assert [group["lr"] for group in restored.param_groups] == [3e-3, 2e-3, 1e-4]


def test_a_schedule_without_joint_epochs_is_defined() -> None:
    assert math.isfinite(learning_rate_factor(TrainSettings(schedule="onecycle"), 0.0, 0))
