"""The training loop of one worker, without Ray: it can be cut off anywhere, and says what went wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch

from protopnet.config import BirdSettings, RunSettings
from protopnet.datasets.birds import bird_kinds, bird_rows
from protopnet.datasets.rows import Dataset
from protopnet.datasets.shards import write_shards
from protopnet.errors import UserError
from protopnet.model.network import build_network
from protopnet.training import worker
from protopnet.training.schedule import Epochs
from protopnet.training.state import load_state, save_state
from protopnet.training.worker import Job, Place, train

BIRDS = BirdSettings(classes=3, train_per_class=8, test_per_class=2, size=64)
SMALL = {"backbone": "squeezenet1_0", "image_size": 64, "prototype_depth": 8, "prototypes": 6, "similarity": "cosine"}
Messages = list[dict[str, Any]]


class Stop(Exception):
    """The process ends here."""


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    uri = str(tmp_path_factory.mktemp("birds"))
    names = [kind.name for kind in bird_kinds(BIRDS)]
    dataset = write_shards(bird_rows(BIRDS), uri, names, {"kind": "birds"})
    split = ["validation" if i % 8 == 3 else name for i, name in enumerate(dataset.table["split"].to_pylist())]
    at = dataset.table.schema.get_field_index("split")
    return Dataset(names, dataset.table.set_column(at, dataset.table.schema.field(at), [split]), {}, dataset.errors)


def job_of(folder: Path, dataset: Dataset, **train_settings: Any) -> Job:
    options = {"batch_size": 4, "precision": "float32", "lr_features": 1e-3, **train_settings}
    settings = RunSettings.model_validate({"model": SMALL, "train": options})
    folder.mkdir()
    dataset.save(str(folder / "data"))
    torch.manual_seed(0)
    save_state(str(folder / "in"), build_network(settings.model, len(dataset.classes)).state_dict())
    paths = (str(folder / name) for name in ("data", "in", "out"))
    return Job(settings.model_dump(mode="json"), *paths, Epochs(0, 3, 1, 3), str(folder / "train"))


def run(job: Job, **place: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any], Messages]:
    messages: Messages = []
    summary = train(job, Place(torch.device("cpu"), 1, messages.append, **place))
    return load_state(job.state_out), summary, messages


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_training_goes_on_in_the_middle_of_an_epoch_as_if_nothing_had_been(
    tmp_path: Path, birds: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that is about to be taken away costs the steps since the notice."""
    monkeypatch.setattr(worker, "CHECK_STEPS", 2)
    undisturbed, _, told = run(job_of(tmp_path / "a", birds))
    job, asked = job_of(tmp_path / "b", birds), iter(range(100))

    def going() -> bool:
        if (number := next(asked)) == 4:
            raise Stop
        return number == 3  # in the second epoch

    with pytest.raises(Stop):
        run(job, going=going)
    again, summary, _ = run(job)
    assert same(again, undisturbed)
    epochs = [message for message in told if message["kind"] == "epoch"]
    assert [message["epoch"] for message in epochs] == [0, 1, 2]
    assert summary["images"] == 3 * len(birds.split("train"))


def test_dropout_differs_between_steps_and_workers() -> None:
    draws = set()
    for words in ((0, 1, 2, 0), (0, 1, 3, 0), (0, 1, 2, 1), (0, 2, 2, 0)):
        worker._seed(*words)
        draws.add(float(torch.rand(())))
    assert len(draws) == 4


@pytest.mark.parametrize("kind", ["protopnet", "baseline"])
def test_a_loss_that_is_no_number_ends_training_with_what_to_lower(tmp_path: Path, birds: Dataset, kind: str) -> None:
    job = job_of(tmp_path / "a", birds, lr_features=1e30)
    settings = job.settings | {"model": job.settings["model"] | {"kind": kind}}
    if kind == "baseline":
        save_state(job.state_in, build_network(RunSettings.model_validate(settings).model, 3).state_dict())
    job = Job(settings, job.dataset, job.state_in, job.state_out, Epochs(0, 2, 0, 2), job.folder)
    with pytest.raises(UserError, match=r"step \d+ of epoch 1 .*train\.lr_features at .*train\.clip") as caught:
        run(job)
    assert (Path(job.folder) / "error.txt").read_text() == str(caught.value)


def test_the_best_joint_epoch_is_handed_on(tmp_path: Path, birds: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, torch.Tensor]] = []
    validation = iter([0.9, 0.7, 0.5])  # the first epoch is warm

    def accuracy(self: worker.Worker, split: str) -> float:
        if split == "test":
            return 0.0
        found.append({name: tensor.clone() for name, tensor in self.network.state_dict().items()})
        return next(validation)

    monkeypatch.setattr(worker.Worker, "accuracy", accuracy)
    after, summary, _ = run(job_of(tmp_path / "a", birds, keep="best"))
    assert summary["validation_accuracy"] == 0.7
    assert same(after, found[1])
    assert not same(after, found[2])


def test_pieces_of_a_batch_add_up(tmp_path: Path, birds: Dataset) -> None:
    """Of a network without BatchNorm."""
    whole, _, _ = run(job_of(tmp_path / "a", birds, warm_epochs=0))
    pieces, _, _ = run(job_of(tmp_path / "b", birds, warm_epochs=0, accumulate=2))
    for name, tensor in whole.items():
        torch.testing.assert_close(pieces[name], tensor, rtol=1e-2, atol=2e-3, msg=name)


def test_clipping_bounds_a_step(tmp_path: Path, birds: Dataset) -> None:
    """To nearly nothing here: Adam divides by the gradient's length and 1e-8 more."""
    free, _, _ = run(job_of(tmp_path / "a", birds))
    clipped, _, _ = run(job_of(tmp_path / "b", birds, clip=1e-12))
    before = load_state(str(tmp_path / "a" / "in"))
    moved = {
        name: [float((state[name] - before[name]).norm()) for state in (free, clipped)]
        for name in ("prototypes",)  # the others have a penalty, which isn't clipped
    }
    assert all(clip < 0.1 * whole for whole, clip in moved.values()), moved
