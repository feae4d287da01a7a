"""What a user can get wrong: one line that names it, exit code 2, and quickly."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from running_jobs import Finished, Jobs, TrainedRun

QUICK = 30  # seconds on a busy machine; five on an idle one


def fill(folder: Path, images: int) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(images)
    for n in range(images):
        Image.fromarray(random.integers(0, 255, (40, 40, 3), np.uint8)).save(folder / f"{n}.png")


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    for name in ("daisy", "rose", "tulip"):
        fill(tmp_path / "flowers" / name, 4)
    return tmp_path / "flowers"


Train = Callable[..., Finished]


@pytest.fixture
def train(jobs: Jobs, tmp_path: Path) -> Train:
    def run(**changes: object) -> Finished:
        began = time.monotonic()
        storage = str(changes.pop("storage", tmp_path / "runs"))
        job = jobs.run_here("train", "--storage", storage, *jobs.options(name="bad", **changes))
        assert time.monotonic() - began < QUICK
        assert "joint" not in job.out
        return job

    return run


@pytest.fixture
def train_on(train: Train) -> Train:
    def run(folder: Path, **changes: object) -> Finished:
        return train(data__source="folder", data__path=folder, model__prototypes="null", **changes)

    return run


class TestImages:
    def test_a_missing_folder(self, train_on: Train, tmp_path: Path) -> None:
        error = train_on(tmp_path / "nowhere").error
        assert str(tmp_path / "nowhere") in error
        assert "data.path" in error

    def test_no_path_at_all(self, train: Train) -> None:
        assert "data.path" in train(data__source="folder").error

    def test_an_empty_class(self, train_on: Train, flowers: Path) -> None:
        (flowers / "violet").mkdir()
        error = train_on(flowers).error
        assert "'violet'" in error
        assert "no training image" in error

    def test_one_class_only(self, train_on: Train, tmp_path: Path) -> None:
        fill(tmp_path / "one" / "daisy", 5)
        error = train_on(tmp_path / "one").error
        assert "one class only" in error
        assert "'daisy'" in error

    def test_no_images(self, train_on: Train, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert "no images" in train_on(tmp_path / "empty").error

    def test_too_many_that_can_t_be_read(self, train_on: Train, flowers: Path) -> None:
        for n in range(4):
            (flowers / "rose" / f"bad{n}.jpg").write_bytes(b"not an image")
        error = train_on(flowers).error
        assert "bad0.jpg" in error
        assert "data.max_bad" in error


class TestModel:
    def test_an_unknown_backbone_names_the_nearest(self, train: Train) -> None:
        error = train(model__backbone="resnet17").error
        assert "model.backbone" in error
        assert "resnet18" in error

    def test_an_unknown_cut_names_the_nearest(self, train: Train) -> None:
        error = train(model__cut="layer22").error
        assert "model.cut" in error
        assert "layer2" in error

    def test_weights_of_another_architecture(self, train: Train, tmp_path: Path) -> None:
        file = tmp_path / "squeezenet.pth"
        torch.save(torchvision.models.squeezenet1_0().state_dict(), file)
        error = train(model__weights=file).error
        assert str(file) in error
        assert "resnet18" in error

    def test_weights_that_aren_t_there(self, train: Train, tmp_path: Path) -> None:
        assert "nothing.pth" in train(model__weights=tmp_path / "nothing.pth").error

    def test_a_pickled_model_is_not_loaded(self, train: Train, tmp_path: Path) -> None:
        torch.save(torchvision.models.squeezenet1_0(), tmp_path / "model.pth")
        assert "not loaded" in train(model__weights=tmp_path / "model.pth").error

    def test_prototypes_that_can_t_be_shared_among_the_classes(self, train: Train) -> None:
        error = train(model__prototypes=10).error
        assert "model.prototypes 10" in error
        assert "8 or 12" in error

    def test_that_is_found_for_folders_too(self, train: Train, flowers: Path) -> None:
        error = train(data__source="folder", data__path=flowers, model__prototypes=10).error
        assert "9 or 12" in error

    def test_prototypes_larger_than_the_map(self, train: Train) -> None:
        assert "model.prototype_shape" in train(model__prototype_shape="9,9").error

    def test_more_directions_than_there_are(self, train: Train) -> None:
        error = train(model__start="data", model__prototype_depth=300).error
        assert "model.prototype_depth" in error
        assert "256" in error


class TestStorage:
    def test_a_file_in_its_place(self, train: Train, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("no folder")
        error = train(storage=tmp_path / "file").error
        assert str(tmp_path / "file") in error
        assert "set storage" in error

    def test_a_place_that_can_t_be_written(self, train: Train) -> None:
        assert "/proc/x" in train(storage="/proc/x").error


class TestSettings:
    def test_an_unknown_setting_names_the_nearest(self, train: Train) -> None:
        error = train(train__joint_epoch=3).error
        assert "train.joint_epoch" in error
        assert "train.joint_epochs" in error

    def test_a_value_out_of_bounds(self, train: Train) -> None:
        error = train(train__batch_size=0).error
        assert "train.batch_size" in error
        assert "0" in error

    def test_a_missing_file_of_settings(self, train: Train, tmp_path: Path) -> None:
        assert "none.yaml" in train(config=tmp_path / "none.yaml").error

    def test_more_workers_than_the_machine_has(self, train: Train) -> None:
        error = train(compute__workers=999).error
        assert "compute.workers is 999" in error

    def test_a_refused_setting_can_be_put_right_under_the_same_name(self, train: Train) -> None:
        assert "model.backbone" in train(model__backbone="resnet17").error
        assert "model.prototypes" in train(model__prototypes=10).error


class TestEvaluate:
    def test_fewer_classes_than_the_bundle_s(self, trained: TrainedRun, jobs: Jobs, flowers: Path) -> None:
        job = jobs.run_here(
            "evaluate", str(trained.folder / "bundle"), str(flowers), "--output", str(flowers / "../out")
        )
        assert "class" in job.error

    def test_no_bundle(self, jobs: Jobs, flowers: Path) -> None:
        job = jobs.run_here("evaluate", str(flowers), str(flowers), "--output", str(flowers / "../out"))
        assert str(flowers) in job.error
        assert "bundle" in job.error

    def test_a_missing_folder(self, trained: TrainedRun, jobs: Jobs, tmp_path: Path) -> None:
        bundle = str(trained.folder / "bundle")
        job = jobs.run_here("evaluate", bundle, str(tmp_path / "nowhere"), "--output", str(tmp_path / "out"))
        assert "nowhere" in job.error

    def test_a_damaged_bundle(self, trained: TrainedRun, jobs: Jobs, flowers: Path, tmp_path: Path) -> None:
        damaged = tmp_path / "damaged"
        damaged.mkdir()
        for file in (trained.folder / "bundle").iterdir():
            (damaged / file.name).write_bytes(file.read_bytes()[:-1])
        job = jobs.run_here("evaluate", str(damaged), str(flowers), "--output", str(tmp_path / "out"))
        assert str(damaged) in job.error


def test_an_image_that_goes_while_the_job_runs_is_named(jobs: Jobs, flowers: Path, tmp_path: Path) -> None:
    """Found by the training workers, after Ray has wrapped the error in its own."""
    changes = {"data__source": "folder", "data__path": flowers, "model__prototypes": "null", "data__validation": 0}
    changes |= {"name": "gone", "compute__max_failures": 0}
    process = jobs.start_training(tmp_path, **changes)
    assert process.stdout
    assert process.stdout.readline().startswith("00-data")
    for file in flowers.rglob("*.png"):
        file.unlink()
    error = jobs.finish(process).error
    assert str(flowers) in error
    assert "put it back" in error
