"""jobs/prune.py as a user runs it: a bundle corrected, and a new one that explains itself."""

import json
from pathlib import Path

import pyarrow.parquet as pq
from running_jobs import Jobs, TrainedRun

from protopnet.model.bundle import load_bundle


def test_a_bundle_is_corrected_and_the_given_one_stays(trained: TrainedRun, jobs: Jobs, tmp_path: Path) -> None:
    given, output = trained.folder / "bundle", tmp_path / "pruned"
    before = {path.name: path.read_bytes() for path in given.iterdir()}
    first, *_ = pq.read_table(given / "prototypes.parquet").to_pylist()
    top, left, bottom, right = first["box"]
    barred = f"{first['image_id']}:{top},{left},{bottom},{right}"
    data = str(trained.folder / "stages/00-data")
    options = ["--remove", "7", "--forbid", barred, "--merge", "--rule", "--output", str(output)]

    job = jobs.run("prune", str(given), data, *options)

    assert job.code == 0, job
    assert job.err == ""
    steps = [line.split()[0] for line in job.out.splitlines()]
    assert steps == ["remove", "merge", "forbid", "rule", "last", "bundle", "accuracy", "validation", "test", "bundle:"]
    assert {path.name: path.read_bytes() for path in given.iterdir()} == before

    new = load_bundle(str(output))
    (entry,) = new.info.provenance["history"]
    assert entry["bundle"] == load_bundle(str(given)).hash
    assert 7 not in entry["numbers"]
    (moved,) = [each for each in entry["steps"][2]["moved"] if each["prototype"] == first["prototype"]]
    assert moved["from"]["uri"] == first["uri"]
    assert (moved["to"]["image_id"], moved["to"]["row"], moved["to"]["column"]) != (
        first["image_id"],
        first["row"],
        first["column"],
    )
    assert len(pq.read_table(output / "prototypes.parquet")) == entry["prototypes"]["after"] == len(entry["numbers"])
    summary = json.loads((trained.folder / "summary.json").read_text())
    assert entry["accuracy"]["test"]["before"] == summary["test_accuracy"]

    error = jobs.run_here("prune", str(output), data, "--merge", "--output", str(output)).error
    assert "is the bundle that is read" in error
