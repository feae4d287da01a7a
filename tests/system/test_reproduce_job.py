"""jobs/reproduce.py: a table of two small networks and their black boxes, two seeds each, killed and gone on with."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from documents import first_column, in_block, names, section
from ray_processes import descendants, wait_for
from running_jobs import TINY, Jobs, Left

from protopnet import imaging
from protopnet.datasets.reader import ImageReader
from protopnet.datasets.rows import Dataset
from protopnet.predictor import Predictor

NETWORKS = {
    "resnet": {"model.backbone": "resnet18", "model.cut": "layer2"},
    "timm": {"model.backbone": "timm/test_efficientnet"},
}
SMALL = {"train.joint_epochs": 1, "augment.copies": 1, "last_layer.max_iterations": 20, "birds.train_per_class": 8}


def table() -> dict[str, Any]:
    rows: dict[str, Any] = {"lost": {"settings": {"model.weights": "nowhere.pth"}}}
    for name, network in NETWORKS.items():
        size = {"model.image_size": 64 if name == "resnet" else 96}
        rows[name] = {"settings": network | size, "baseline": f"{name}-box", "published": 50}
        rows[f"{name}-box"] = {"settings": network | size | {"model.kind": "baseline"}}
    settings = {name: value for name, value in (TINY | SMALL).items() if name not in ("config", "model.cut")}
    ensembles = {"both": {"members": list(NETWORKS), "published": 60}, "with-lost": {"members": ["resnet", "lost"]}}
    return {"seeds": [0, 1], "settings": settings, "rows": rows, "ensembles": ensembles}


def figures_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "table.json").read_text())


def finished(folder: Path) -> dict[Path, int]:
    """Times at which the stages of complete runs were marked."""
    runs = [path.parent for path in folder.glob("*/summary.json")]
    return {path: path.stat().st_mtime_ns for run in runs for path in run.glob("stages/*/result.json")}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("table")
    (folder / "table.yaml").write_text(yaml.safe_dump(table(), sort_keys=False))
    return [str(folder / "table.yaml"), "--output", str(folder / "out"), "--set", "train.lr_add_on=1e-3"]


@pytest.fixture(scope="module")
def killed(jobs: Jobs, arguments: list[str]) -> dict[Path, int]:
    """The job is killed once two runs are complete and another has begun; the stages that were complete then."""
    folder = Path(arguments[2])
    job = jobs.start("reproduce", *arguments)
    try:
        wait_for(lambda: len(list(folder.glob("*/summary.json"))) >= 2, 400)
        wait_for(lambda: list(folder.glob("*/lease.json")), 60)
        below = descendants(job.pid)
    finally:
        job.send_signal(signal.SIGKILL)
        job.communicate()
    assert below
    wait_for(lambda: not [pid for pid in below if alive(pid)], 60)
    return finished(folder)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def made(jobs: Jobs, arguments: list[str], killed: dict[Path, int]) -> Left:
    return Left(Path(arguments[2]), jobs.run("reproduce", *arguments))


pytestmark = pytest.mark.slow


def test_what_was_finished_is_kept(made: Left, killed: dict[Path, int]) -> None:
    assert len(killed) >= 8
    assert {path: path.stat().st_mtime_ns for path in killed} == killed
    assert f"{len({path.parents[2] for path in killed})} of 10 runs were done before" in made.job.out


def test_a_row_that_fails_costs_itself(made: Left) -> None:
    assert made.job.code == 1, made.job
    assert made.job.err.splitlines()[-1].startswith("error: lost-seed0 failed: model.weights: ")
    rows = {row["row"]: row for row in figures_of(made.folder)["rows"]}
    assert [run["failure"] is not None for run in rows["lost"]["runs"]] == [True, True]
    for name in [*NETWORKS, *(f"{name}-box" for name in NETWORKS)]:
        assert [(run["seed"], run["failure"]) for run in rows[name]["runs"]] == [(0, None), (1, None)]
        assert rows[name]["accuracy"]["count"] == 2
    assert rows["timm"]["gap"] == pytest.approx(rows["timm"]["accuracy"]["mean"] - rows["timm-box"]["accuracy"]["mean"])
    assert 0 <= rows["resnet"]["quality"]["truth"] <= 1
    assert rows["resnet-box"]["quality"] == {}


def test_its_runs_share_their_images(made: Left) -> None:
    assert len(list((made.folder / "data").iterdir())) == 1
    assert not list(made.folder.glob("*/stages/00-data/birds-*"))
    configs = [yaml.safe_load(path.read_text()) for path in made.folder.glob("*/config.yaml")]
    assert {config["data"]["path"] for config in configs} == {str(next((made.folder / "data").iterdir()))}
    assert {config["train"]["lr_add_on"] for config in configs} == {1e-3}


def test_an_ensemble_is_what_its_bundles_say_together(made: Left) -> None:
    both, with_lost = figures_of(made.folder)["ensembles"]
    right = []
    for seed in (0, 1):
        folders = [made.folder / f"{name}-seed{seed}" for name in NETWORKS]
        predictor = Predictor.load([str(folder / "bundle") for folder in folders])
        rows: pa.Table = Dataset.load(str(folders[0] / "stages/00-data")).split("test")
        photos = [imaging.decode(data) for data in ImageReader().read(rows, range(len(rows)))]
        with torch.inference_mode():
            predicted = predictor.scores(predictor.look_at(photos)).logits_BK.argmax(1).numpy()
        right.append(float(np.mean(predicted == rows["label"].to_numpy())))
    assert both["accuracy"]["mean"] == pytest.approx(np.mean(right))
    assert (with_lost["accuracy"]["count"], with_lost["failure"]) == (0, "its member lost-seed0 failed")


def test_its_files_are_as_documented(made: Left) -> None:
    text, figures = section("Table"), figures_of(made.folder)
    assert {"table.json", "table.md", "table.html", "data/", "<row>-seed<k>/"} == in_block(text)
    assert set(figures) | set(figures["rows"][0]["runs"][0]) | set(figures["rows"][0]["accuracy"]) <= names(text)
    assert set().union(*figures["rows"]) == first_column(text, "key of `rows`")
    assert set().union(*figures["ensembles"]) == first_column(text, "key of `ensembles`")


def test_for_people(made: Left) -> None:
    text = (made.folder / "table.md").read_text()
    assert text in made.job.out
    assert "| both | resnet + timm | 60.0 % |" in text
    assert "lost-seed0" in text
    assert (made.folder / "table.html").read_text().count("<table>") == 4


def test_a_process_that_is_killed_costs_its_run(jobs: Jobs, arguments: list[str], made: Left, tmp_path: Path) -> None:
    """Two at a time: one's process is killed, the other's goes on."""
    options = ["--output", str(tmp_path / "out"), "--rows", "timm-box", "--seeds", "0,1", "--parallel", "2"]
    job = jobs.start("reproduce", arguments[0], *options)
    lease = tmp_path / "out/timm-box-seed1/lease.json"
    wait_for(lease.exists, 200)
    os.kill(json.loads(lease.read_text())["pid"], signal.SIGKILL)
    done = jobs.finish(job)
    assert done.code == 1, done
    assert "timm-box-seed1 failed: its process was killed by signal 9" in done.err.splitlines()[-1]
    [row] = figures_of(tmp_path / "out")["rows"]
    assert [run["failure"] is None for run in row["runs"]] == [True, False]
