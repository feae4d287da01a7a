"""The joint stage on Ray Train: it repeats, it survives its workers, and its figures are those of its network."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ray_processes import named

from protopnet import storage
from protopnet.cluster import TrainPlan
from protopnet.config import RunSettings
from protopnet.datasets.rows import Dataset
from protopnet.errors import UserError
from protopnet.model.network import ProtoPNet, build_network
from protopnet.training.schedule import training_cycles
from protopnet.training.sgd import train_stage
from protopnet.training.state import load_state, save_state

SETTINGS = RunSettings.model_validate(
    {
        "model": {
            "backbone": "resnet18",
            "cut": "layer2",
            "image_size": 64,
            "prototype_depth": 16,
            "prototypes": 12,
            "similarity": "cosine",
        },
        "augment": {"copies": 3},
        "train": {"batch_size": 16, "warm_epochs": 1, "joint_epochs": 2, "precision": "float32", "lr_features": 1e-3},
        "compute": {"max_failures": 2},
    }
)
Message = dict[str, Any]


@dataclass
class Trained:
    """What a stage has left behind."""

    summary: dict[str, Any]
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    messages: list[Message] = field(default_factory=list)

    @property
    def epochs(self) -> list[Message]:
        return [message for message in self.messages if message["kind"] == "epoch"]


def train(
    folder: Path,
    dataset: Dataset,
    settings: RunSettings = SETTINGS,
    workers: int = 1,
    on_message: Callable[[Message], None] = lambda message: None,
    in_driver: bool = False,
) -> Trained:
    """Run the joint stage of these settings from fresh weights."""
    dataset.save(str(folder / "data"))
    state_in, state_out = str(folder / "in.safetensors"), str(folder / "out.safetensors")
    torch.manual_seed(0)
    save_state(state_in, build_network(settings.model, len(dataset.classes)).state_dict())
    epochs = training_cycles(settings)[0][0].epochs
    assert epochs
    messages: list[Message] = []

    def note(message: Message) -> None:
        messages.append(message)
        on_message(message)

    plan = TrainPlan(workers, 1, False, fewest=None if in_driver else 1, in_driver=in_driver)
    summary = train_stage(
        settings, str(folder / "data"), state_in, state_out, epochs, plan, str(folder / "train"), note
    )
    return Trained(summary, load_state(state_in), load_state(state_out), messages)


@pytest.fixture(scope="module")
def with_validation(birds: Dataset) -> Dataset:
    """Every fifth training image is for validation."""
    split = birds.table["split"].to_pylist()
    training = [n for n, name in enumerate(split) if name == "train"]
    for n in training[::5]:
        split[n] = "validation"
    at = birds.table.schema.get_field_index("split")
    table = birds.table.set_column(at, birds.table.schema.field(at), [split])
    return Dataset(birds.classes, table, birds.source, birds.errors)


@pytest.fixture(scope="module")
def trained(local_ray: None, tmp_path_factory: pytest.TempPathFactory, with_validation: Dataset) -> Trained:
    return train(tmp_path_factory.mktemp("trained"), with_validation, in_driver=True)


def accuracy(state: dict[str, torch.Tensor], dataset: Dataset, split: str, pixels_of: Callable) -> float:
    network = build_network(SETTINGS.model, len(dataset.classes))
    network.load_state_dict(state)
    network.eval()
    rows = dataset.split(split)
    with torch.inference_mode():
        predicted = network(pixels_of(rows)).logits_BK.argmax(1)
    return float((predicted.numpy() == rows["label"].to_numpy()).mean())


def test_everything_learns_but_the_last_layer(trained: Trained) -> None:
    moved = {name for name, tensor in trained.after.items() if not torch.equal(tensor, trained.before[name])}
    assert "last_layer.weight" not in moved
    assert {"prototypes", "add_on.0.weight", "backbone.features.conv1.weight"} <= moved
    assert all(torch.isfinite(tensor).all() for tensor in trained.after.values())


def test_each_epoch_tells_its_loss_terms(trained: Trained, with_validation: Dataset) -> None:
    assert [message["epoch"] for message in trained.epochs] == [0, 1, 2]
    assert [message["phase"] for message in trained.epochs] == ["warm", "joint", "joint"]
    terms = {"cross_entropy", "cluster", "separation", "l1", "total", "accuracy", "images_per_second"}
    assert terms <= set(trained.epochs[0]["metrics"])
    totals = [message["metrics"]["total"] for message in trained.epochs]
    assert totals[-1] < totals[0]
    assert trained.summary["images"] == 3 * 3 * len(with_validation.split("train"))


def test_accuracies_are_those_of_the_network(trained: Trained, with_validation: Dataset, pixels_of: Callable) -> None:
    assert trained.summary["test_accuracy_before"] == accuracy(trained.before, with_validation, "test", pixels_of)
    for split in ("test", "validation"):
        expected = accuracy(trained.after, with_validation, split, pixels_of)
        assert trained.summary[f"{split}_accuracy"] == pytest.approx(expected)


@pytest.mark.slow
def test_training_repeats_even_when_a_worker_is_killed_in_mid_epoch(
    trained: Trained, with_validation: Dataset, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_once(message: Message) -> None:
        if message["kind"] == "epoch" and not killed:
            killed.append(named("ray::RayTrainWorker")[0])
            os.kill(killed[0], signal.SIGKILL)

    again = train(tmp_path, with_validation, on_message=kill_once)
    assert killed
    assert {message["epoch"] for message in again.epochs} == {0, 1, 2}
    assert again.summary["images"] == trained.summary["images"]
    assert {name for name in again.after if not torch.equal(again.after[name], trained.after[name])} == set()


@pytest.mark.slow
def test_two_workers_of_an_elastic_group_train_one_network(
    with_validation: Dataset, tmp_path: Path, pixels_of: Callable
) -> None:
    result = train(tmp_path, with_validation, workers=2)
    assert result.summary["workers"] == 2
    assert [message["epoch"] for message in result.epochs] == [0, 1, 2]
    assert not torch.equal(result.after["prototypes"], result.before["prototypes"])
    assert torch.equal(result.after["last_layer.weight"], result.before["last_layer.weight"])
    expected = accuracy(result.after, with_validation, "test", pixels_of)
    assert result.summary["test_accuracy"] == pytest.approx(expected, abs=1 / 12 + 1e-6)  # BatchNorm differs by rank
    assert result.epochs[-1]["metrics"]["total"] < result.epochs[0]["metrics"]["total"]


@pytest.mark.parametrize(("split", "in_driver"), [("train", True), ("test", True), ("train", False)])
def test_an_image_that_is_gone_is_named_in_one_sentence(
    birds_on_disk: Dataset, tmp_path: Path, split: str, in_driver: bool
) -> None:
    """And trained on no further: a group is started again once, to learn that it needn't."""
    victim = birds_on_disk.split(split)["file"][0].as_py()
    storage.delete_file(victim)
    epochs: list[int] = []
    with pytest.raises(UserError, match="put it back") as error:
        train(tmp_path, birds_on_disk, on_message=lambda message: epochs.append(message["epoch"]), in_driver=in_driver)
    assert str(error.value).startswith(victim)
    assert "\n" not in str(error.value)
    assert epochs.count(0) <= 1


def test_a_network_is_what_is_trained(trained: Trained) -> None:
    network = build_network(SETTINGS.model, 3)
    assert isinstance(network, ProtoPNet)
    assert set(trained.after) == set(network.state_dict())
