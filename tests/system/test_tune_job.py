"""jobs/tune.py: three tiny trials on generated birds, and the same command once more."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from documents import first_column, in_block, names, section
from running_jobs import TINY, Jobs, Left

SMALL = {"train.joint_epochs": 2, "augment.copies": 1, "last_layer.max_iterations": 20}
SEARCH = {
    "trials": 3,
    "grace": 1,
    "reduction": 2,
    "measure": "contrast",
    "space": {"model.similarity": ["cosine", "log"]},
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tune")
    settings: dict[str, Any] = {name: value for name, value in (TINY | SMALL).items() if name != "config"}
    settings |= {"extends": TINY["config"], "tune": SEARCH | {"output": str(folder / "out")}}
    settings["tune"]["space"] = SEARCH["space"] | {"train.lr_features": {"log": [1e-3, 1e-2]}}
    (folder / "tune.yaml").write_text(yaml.safe_dump(settings))
    return ["--config", str(folder / "tune.yaml")]


@pytest.fixture(scope="module")
def made(jobs: Jobs, arguments: list[str]) -> Left:
    job = jobs.run("tune", *arguments)
    assert job.code == 0, job
    return Left(Path(arguments[1]).parent / "out", job)


def test_its_trials_are_runs_that_saw_no_test_image(made: Left) -> None:
    figures = json.loads((made.folder / "table.json").read_text())
    assert [row["trial"] for row in figures["trials"]] == ["trial-000", "trial-001", "trial-002"]
    first = figures["trials"][0]
    assert (first["state"], first["epochs"]) == ("finished", 2)
    assert first["score"] == pytest.approx(first["accuracy"] + 0.5 * first["measured"])
    for row in figures["trials"]:
        folder = made.folder / row["trial"]
        finished = row["state"] == "finished"
        assert (folder / "summary.json").exists() == (folder / "bundle/model.json").exists() == finished
        assert (folder / "stopped.json").exists() != finished
        assert len(json.loads((folder / "stopped.json").read_text())) == 1 if not finished else True
        assert not (folder / "lease.json").exists()
    counts = json.loads((made.folder / "trial-000/stages/00-data/dataset.json").read_text())["counts"]
    assert (counts["validation"] > 0, counts["test"]) == (True, 0)
    assert json.loads((made.folder / "trial-000/summary.json").read_text())["test_accuracy"] is None


def test_its_best_settings_train(made: Left, jobs: Jobs) -> None:
    best = made.folder / "best.yaml"
    assert made.job.out.splitlines()[-1].split() == ["best", str(best)]
    settings = yaml.safe_load(best.read_text())
    assert (settings["data"]["source"], settings["data"]["hide_test"]) == ("birds", False)
    planned = jobs.run_here("train", "--config", str(best), "--plan")
    assert planned.code == 0, planned


def test_its_files_are_as_documented(made: Left) -> None:
    text = section("Search")
    left = {path.name + "/" * path.is_dir() for path in made.folder.iterdir()}
    assert {name for name in left if not name.startswith("trial-")} | {"trial-<nnn>/"} == in_block(text)
    figures = json.loads((made.folder / "table.json").read_text())
    assert set(figures) <= names(text)
    assert set(figures["trials"][0]) == first_column(text, "key of `trials`")


def test_the_same_command_keeps_them(made: Left, jobs: Jobs, arguments: list[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.folder.glob("trial-*/stages/*/result.json")}
    again = jobs.run_here("tune", *arguments)
    assert again.code == 0, again
    assert "3 of 3 trials were done before" in again.out
    assert {path: path.stat().st_mtime_ns for path in made.folder.glob("trial-*/stages/*/result.json")} == before
