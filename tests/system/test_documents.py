"""docs/ and README.md against the program: files and columns are those written, and every command is one that works."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from documents import ROOT, Command, commands, first_column, in_block, names, rows, section
from running_jobs import Jobs, Left, Scored, TrainedRun


def columns(path: Path) -> set[str]:
    return set(pq.read_schema(path).names)


def keys(path: Path) -> set[str]:
    return set(json.loads(path.read_text()))


def listed(folder: Path) -> set[str]:
    return {path.name + "/" * path.is_dir() for path in folder.iterdir()}


class TestFormats:
    def test_shards(self, trained: TrainedRun) -> None:
        text = section("Dataset (shards)")
        documented = first_column(text, "column")
        patterns = {name for name in names(text.split("\n\n")[0]) if name.endswith((".parquet", ".json"))}
        assert patterns == {"shard-*.parquet", "_index-*.parquet", "_errors-*.parquet", "dataset.json"}
        files = {pattern: list(trained.shards.glob(pattern)) for pattern in patterns}
        assert all(files.values())
        assert sum(map(len, files.values())) == len(listed(trained.shards))
        assert columns(files["shard-*.parquet"][0]) == documented
        index = columns(files["_index-*.parquet"][0])
        assert index >= documented - {"image"}
        assert columns(files["_errors-*.parquet"][0]) == {"uri", "reason", "class_name"} <= names(text)

    def test_a_run(self, trained: TrainedRun) -> None:
        text = section("Run")
        documented = {name.replace("<nn>-<kind>/", "") for name in in_block(text)}
        assert listed(trained.folder) == documented
        for stage in (trained.folder / "stages").iterdir():
            assert re.fullmatch(r"\d\d-[a-z-]+", stage.name)
            assert (stage / "result.json").exists()
        line = json.loads((trained.folder / "metrics.jsonl").read_text().splitlines()[0])
        assert f"one JSON object a line: {', '.join(line)}" in text
        manifest = columns(trained.data / "manifest.parquet")
        assert manifest == first_column(section("Dataset (shards)"), "column") - {"image"} | {
            "file",
            "row_group",
            "row",
        }

    def test_a_bundle(self, trained: TrainedRun) -> None:
        text = section("Bundle")
        files = {
            name for name in names(text.split("\n\n")[0]) if name.endswith((".safetensors", ".parquet", ".json", ".md"))
        }
        assert listed(trained.bundle) == files
        assert columns(trained.bundle / "prototypes.parquet") == first_column(text, "column of `prototypes.parquet`")
        assert keys(trained.bundle / "model.json") <= names(text)

    def test_an_evaluation(self, evaluated: Left) -> None:
        assert evaluated.job.code == 0, evaluated.job
        text, quality = section("Evaluation"), section("Explanation quality")
        assert keys(evaluated.folder / "metrics.json") <= names(text)
        assert columns(evaluated.folder / "predictions.parquet") <= names(text)
        assert columns(evaluated.folder / "prototype_quality.parquet") <= names(quality)
        assert listed(evaluated.folder) <= names(text)
        measured = json.loads((evaluated.folder / "metrics.json").read_text())["quality"]
        about = {
            "definitions",
            "images",
            "images_with_key_points",
            "prototypes",
            "classes_without_prototypes",
            "seed",
            "map",
        }
        assert set(measured) == first_column(quality, "metric") | about
        assert about <= names(quality)

    def test_an_audit(self, audited: Left) -> None:
        assert audited.job.code == 0, audited.job
        text = section("Audit")
        tables = {cell.strip("`"): rest for cell, rest in rows(text, "table").items()}
        assert listed(audited.folder) == {f"{name}.parquet" for name in tables} | {
            "index.html",
            "classes/",
            "audit.json",
        }
        for name, rest in tables.items():
            written = columns(audited.folder / f"{name}.parquet")
            assert written <= names(rest), name
            assert names(rest) <= written, name
        assert keys(audited.folder / "audit.json") <= names(text)

    def test_scores(self, scored: Scored) -> None:
        text = section("Scores")
        files = in_block(text)
        part = next((scored.output / "parts").iterdir())
        assert columns(part) == first_column(text, "column")
        assert listed(scored.output) == {"scores.json", "parts/", "job/"}
        assert files >= {"scores.json", "parts/part-00012.parquet", "job/"}
        assert re.fullmatch(r"part-\d{5}\.parquet", part.name)
        assert listed(scored.output / "job") >= {"job.json", "done/"}
        assert json.loads(pq.read_schema(part).metadata[b"protopnet"])["version"] == 2


COMMANDS = list(commands())


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, own_run: TrainedRun) -> Path:
    """A folder where the documents' relative paths lead to something."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "runs").mkdir()
    targets = {
        "runs/my-run": own_run.folder,
        "my-images": own_run.storage / "images",
        "more-images": own_run.storage / "images",
        "bird.jpg": next((own_run.storage / "images").rglob("0*.png")),
        "configs": ROOT / "configs",
        "photos": own_run.storage / "images",
    }
    for name, target in targets.items():
        os.symlink(target, folder / name)
    return folder


def marked(command: Command) -> Any:
    marks = [pytest.mark.skip(reason=command.not_run)] if command.not_run else []
    return pytest.param(command, id=command.text[:60], marks=marks)


@pytest.mark.parametrize("command", map(marked, COMMANDS))
def test_a_documented_command(
    command: Command, local_ray: None, jobs: Jobs, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the documents: later ones read what earlier ones wrote. Training is planned; the rest is run."""
    monkeypatch.chdir(workspace)
    program, *arguments = shlex.split(command.text)
    if program == "make":
        subprocess.run(["make", "--dry-run", "-C", str(ROOT), *arguments], check=True, capture_output=True)
    elif program == "python" and arguments[0].startswith("jobs/"):
        job = Path(arguments.pop(0)).stem
        more = ["--plan"] if job == "train" else []
        done = jobs.run_here(job, *arguments, *more)
        assert done.code == 0, done
    else:
        code = f"import duckdb; print(duckdb.sql({arguments[1]!r}))" if program == "duckdb" else arguments[1]
        assert (program, arguments[0]) in {("duckdb", "-c"), ("python", "-c")}, command
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_there_are_commands_of_every_kind() -> None:
    assert len(COMMANDS) > 30
    assert {command.program for command in COMMANDS} >= {"python", "make", "duckdb", "ray", "serve"}
    assert len([command for command in COMMANDS if not command.not_run]) > 12
    assert all(command.not_run is None or len(command.not_run) > 10 for command in COMMANDS)
