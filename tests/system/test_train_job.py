"""jobs/train.py from beginning to end: what it leaves, what it says, and that it never does things twice."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from running_jobs import Jobs, TrainedRun
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from protopnet import imaging
from protopnet.config import RunSettings
from protopnet.datasets.reader import ImageReader
from protopnet.datasets.rows import Dataset
from protopnet.model.bundle import load_bundle
from protopnet.model.network import Baseline, ProtoPNet

STAGES = ["00-data", "01-start", "02-joint", "03-push", "04-last-layer", "05-bundle", "06-evaluate"]
METRIC_KEYS = {"time", "stage", "epoch", "step", "name", "value"}


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class TestWhatARunLeaves:
    def test_it_ends_well_and_names_the_bundle_last(self, trained: TrainedRun) -> None:
        assert trained.job.code == 0
        assert trained.job.err == ""
        assert trained.job.out.splitlines()[-1].split() == ["bundle", str(trained.folder / "bundle")]

    def test_its_settings_as_resolved(self, trained: TrainedRun) -> None:
        settings = RunSettings.model_validate(yaml.safe_load((trained.folder / "config.yaml").read_text()))
        assert settings.name == "tiny"
        assert settings.birds.classes == 4
        assert settings.train.lr_features == 3e-3  # from the file
        assert settings.train.weight_decay == RunSettings().train.weight_decay  # by default

    def test_each_stage_is_marked_complete(self, trained: TrainedRun) -> None:
        results = sorted((trained.folder / "stages").glob("*/result.json"))
        assert [path.parent.name for path in results] == STAGES
        assert all(json.loads(path.read_text())["seconds"] >= 0 for path in results)

    def test_nothing_unfinished_and_no_checkpoint_is_left(self, trained: TrainedRun) -> None:
        names = [path.name for path in trained.folder.rglob("*")]
        assert not [name for name in names if name.endswith((".unfinished", ".pt", ".pkl"))]
        assert not list((trained.folder / "stages/02-joint").glob("train*"))

    def test_the_summary(self, trained: TrainedRun) -> None:
        summary = summary_of(trained.folder)
        evaluated = json.loads((trained.folder / "stages/06-evaluate/metrics.json").read_text())
        assert summary["test_accuracy"] == evaluated["top1"]
        assert [stage["name"] for stage in summary["stages"]] == STAGES
        accuracies = {stage["name"]: stage["test_accuracy"] for stage in summary["stages"]}
        assert accuracies["00-data"] is None
        assert all(0 <= accuracies[name] <= 1 for name in ("01-start", "02-joint", "03-push", "04-last-layer"))
        assert accuracies["06-evaluate"] == summary["test_accuracy"]
        assert sum(stage["seconds"] for stage in summary["stages"]) <= summary["seconds"] < 600
        assert summary["image_passes"] > 2 * 4 * 4 * 9
        assert set(summary["versions"]) == {"protopnet", "ray", "torch", "python"}
        assert len(summary["settings_sha256"]) == 64

    def test_the_accuracy_after_the_last_layer_is_that_of_the_bundle(self, trained: TrainedRun) -> None:
        accuracies = {stage["name"]: stage["test_accuracy"] for stage in summary_of(trained.folder)["stages"]}
        assert accuracies["04-last-layer"] == pytest.approx(accuracies["06-evaluate"])

    def test_every_number_on_a_line(self, trained: TrainedRun) -> None:
        rows = metrics_of(trained.folder)
        assert all(set(row) == METRIC_KEYS and np.isfinite(row["value"]) for row in rows)
        told = {(row["stage"], row["epoch"], row["name"]) for row in rows}
        assert len(told) == len(rows)
        for name in ("cross_entropy", "cluster", "separation", "l1", "total", "accuracy", "validation_accuracy"):
            assert {("02-joint", 0, name), ("02-joint", 1, name)} <= told
        for stage in STAGES:
            assert (stage, None, "seconds") in told

    def test_the_same_numbers_for_tensorboard(self, trained: TrainedRun) -> None:
        events = EventAccumulator(str(trained.folder / "tensorboard")).Reload()
        totals = [row["value"] for row in metrics_of(trained.folder) if row["name"] == "total"]
        assert [event.value for event in events.Scalars("total")] == pytest.approx(totals)

    def test_a_report(self, trained: TrainedRun) -> None:
        report = (trained.folder / "report.html").read_text()
        assert "tiny" in report
        assert f"report  {trained.folder / 'report.html'}" in trained.job.out

    def test_a_prediction_for_each_test_image(self, trained: TrainedRun) -> None:
        table = pq.read_table(trained.folder / "stages/06-evaluate/predictions.parquet")
        assert len(table) == 12
        right = np.mean([row["prediction"] == row["label"] for row in table.to_pylist()])
        assert right == pytest.approx(summary_of(trained.folder)["test_accuracy"])


class TestTheBundle:
    @pytest.fixture(scope="class")
    def prototypes(self, trained: TrainedRun) -> list[dict]:
        return pq.read_table(trained.folder / "bundle/prototypes.parquet").to_pylist()

    @pytest.fixture(scope="class")
    def images(self, trained: TrainedRun) -> dict[str, tuple[dict, bytes]]:
        """Manifest row and encoded file by uri."""
        dataset = Dataset.load(str(trained.folder / "stages/00-data"))
        rows = dataset.table.to_pylist()
        return {
            r["uri"]: (r, data)
            for r, data in zip(rows, ImageReader().read(dataset.table, range(len(rows))), strict=True)
        }

    def test_every_prototype_is_a_patch_of_the_training_image_it_names(
        self, trained: TrainedRun, prototypes: list[dict], images: dict[str, tuple[dict, bytes]]
    ) -> None:
        network = load_bundle(str(trained.folder / "bundle")).network
        assert isinstance(network, ProtoPNet)
        assert [row["prototype"] for row in prototypes] == list(range(8))
        for row in prototypes:
            image, data = images[row["uri"]]
            assert image["split"] == "train"
            assert image["label"] == row["class"] == network.prototype_class[row["prototype"]]
            assert image["class_name"] == row["class_name"]
            assert row["sha256"] == image["sha256"] == hashlib.sha256(data).hexdigest()
            with torch.inference_mode():
                pixels_1HWC = torch.from_numpy(imaging.load(data, 64))[None]
                latent = network.latent(imaging.normalise(pixels_1HWC, network.preprocessing))[0]
            patch = latent[:, row["row"], row["column"]]
            assert float((patch - network.prototypes[row["prototype"], :, 0, 0]).square().sum()) < 1e-5

    def test_no_patch_is_taken_twice_in_a_class(self, prototypes: list[dict]) -> None:
        assert len({(row["uri"], row["row"], row["column"]) for row in prototypes}) == len(prototypes)

    def test_boxes_lie_on_the_image(self, prototypes: list[dict]) -> None:
        for row in prototypes:
            for top, left, bottom, right in (row["box"], row["receptive_field"]):
                assert 0 <= top < bottom <= 64
                assert 0 <= left < right <= 64

    def test_the_self_similarity_is_the_highest_there_is(self, prototypes: list[dict]) -> None:
        for row in prototypes:
            activation = np.array(row["activation_map"])
            assert activation.shape == (8, 8)
            assert row["self_similarity"] == pytest.approx(activation[row["row"], row["column"]])
            assert row["self_similarity"] == pytest.approx(1 / 1.01, abs=1e-4)  # a cosine of 1
            assert row["self_similarity"] >= activation.max() - 1e-5

    def test_thumbnails_are_the_images(self, prototypes: list[dict], images: dict[str, tuple[dict, bytes]]) -> None:
        for row in prototypes:
            small = np.asarray(Image.open(io.BytesIO(row["thumbnail"])).convert("RGB"), dtype=float)
            source = np.asarray(Image.open(io.BytesIO(images[row["uri"]][1])).convert("RGB"), dtype=float)
            assert np.abs(small - source).mean() < 8

    def test_it_says_where_it_comes_from(self, trained: TrainedRun) -> None:
        info = load_bundle(str(trained.folder / "bundle")).info
        assert info.provenance["run"] == "tiny"
        assert info.provenance["settings"]["birds"]["classes"] == 4
        assert info.provenance["images"] == {"train": 36, "validation": 4, "test": 12}
        assert len(info.classes) == 4

    def test_its_network_is_that_of_the_last_stage(self, trained: TrainedRun) -> None:
        state = load_file(trained.folder / "stages/04-last-layer/network.safetensors")
        network = load_bundle(str(trained.folder / "bundle")).network
        tensors = {name: tensor for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
        assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())

    def test_jobs_evaluate_agrees(self, local_ray: None, trained: TrainedRun, jobs: Jobs, tmp_path: Path) -> None:
        shards = next((trained.folder / "stages/00-data").glob("birds-*"))
        job = jobs.run_here("evaluate", str(trained.folder / "bundle"), str(shards), "--output", str(tmp_path / "out"))
        assert job.code == 0, job
        metrics = json.loads((tmp_path / "out/metrics.json").read_text())
        assert metrics["top1"] == summary_of(trained.folder)["test_accuracy"]


class TestAgain:
    @pytest.fixture(scope="class")
    def modified(self, trained: TrainedRun) -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in trained.folder.rglob("*") if path.is_file()}

    @pytest.fixture(scope="class")
    def again(self, trained: TrainedRun, jobs: Jobs, modified: dict[str, int]) -> str:
        job = jobs.train(trained.storage, name="tiny")
        assert job.code == 0, job
        return job.out

    def test_it_says_that_all_was_done_before(self, again: str) -> None:
        lines = [line for line in again.splitlines() if line[:2].isdigit()]
        assert [line.split()[0] for line in lines] == STAGES
        assert all("done before" in line for line in lines)

    def test_it_touches_no_stage_and_no_bundle(self, trained: TrainedRun, again: str, modified: dict[str, int]) -> None:
        for path, time in modified.items():
            if "/stages/" in path or "/bundle/" in path:
                assert Path(path).stat().st_mtime_ns == time

    def test_the_summary_stays_complete(self, trained: TrainedRun, again: str) -> None:
        summary = summary_of(trained.folder)
        assert [stage["name"] for stage in summary["stages"]] == STAGES
        assert sum(stage["seconds"] for stage in summary["stages"]) <= summary["seconds"] + 0.1  # both are rounded

    def test_another_setting_under_the_same_name_is_refused(self, trained: TrainedRun, jobs: Jobs) -> None:
        error = jobs.train(trained.storage, name="tiny", train__lr_add_on=0.5).error
        assert "train.lr_add_on" in error
        assert "0.5" in error
        assert "--name" in error

    def test_where_and_on_what_it_runs_may_change(self, trained: TrainedRun, jobs: Jobs) -> None:
        assert jobs.train(trained.storage, name="tiny", compute__pass_workers=2).code == 0


@pytest.fixture(scope="module")
def baseline(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("baseline")
    job = jobs.train(storage, name="box", model__kind="baseline", compute__workers=2)
    assert job.code == 0, job
    return storage / "box"


def test_a_baseline_by_the_same_job(baseline: Path) -> None:
    summary = summary_of(baseline)
    assert [stage["name"].split("-", 1)[1] for stage in summary["stages"]] == ["data", "joint", "bundle", "evaluate"]
    assert isinstance(load_bundle(str(baseline / "bundle")).network, Baseline)
    assert not (baseline / "bundle/prototypes.parquet").exists()
    assert (baseline / "report.html").exists()
    assert 0 <= summary["test_accuracy"] <= 1
    assert summary["stages"][1]["workers"] == 2


@pytest.mark.slow
def test_own_folders_start_from_data_and_several_cycles(own_run: TrainedRun) -> None:
    from_data = own_run.folder
    kinds = [stage["name"].split("-", 1)[1] for stage in summary_of(from_data)["stages"]]
    assert kinds == ["data", "start", *["joint", "push", "last-layer"] * 2, "bundle", "evaluate"]
    assert len(pq.read_table(from_data / "bundle/prototypes.parquet")) == 30  # ten a class
    errors = pq.read_table(from_data / "stages/00-data/errors.parquet").to_pylist()
    assert [Path(row["uri"]).name for row in errors] == ["broken.png"]
    pushed = [pa.table(pq.read_table(path)) for path in sorted(from_data.glob("stages/*-push/push.parquet"))]
    assert [len(table) for table in pushed] == [30, 30]
