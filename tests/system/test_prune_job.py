"""jobs/prune.py as a user runs it: a bundle corrected, and a new one that explains itself."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import torch
from running_jobs import Jobs, TrainedRun

from protopnet.auditing.decisions import corrections_yaml, parse_decision
from protopnet.auditing.rewrite import source_network
from protopnet.auditing.settling import Prototypes, patch_grid
from protopnet.model.bundle import load_bundle
from protopnet.tables import read_table


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


def test_the_same_decisions_make_the_same_bundle(trained: TrainedRun, jobs: Jobs, tmp_path: Path) -> None:
    """From a file, with other batches, and on a bundle that has been corrected before, by patch."""
    given, data = str(trained.folder / "bundle"), str(trained.folder / "stages/00-data")
    bundle = load_bundle(given)
    assert bundle.prototypes is not None
    network, _ = source_network(bundle, given)
    known = Prototypes(bundle.prototypes, patch_grid(network, bundle.info.architecture), bundle.hash)
    about = {"who": "anna", "when": "2026-11-25T22:00:00Z", "why": "a mark"}
    decisions = [
        {"decide": "drop", "prototype": known.ref(7).model_dump(by_alias=True)},
        {"decide": "not-this-patch", "prototype": known.ref(2).model_dump(by_alias=True)},
        {"decide": "name", "prototype": known.ref(4).model_dump(by_alias=True), "name": "red bill"},
    ]
    file = tmp_path / "corrections.yaml"
    file.write_text(corrections_yaml([parse_decision(about | each) for each in decisions], bundle.hash))

    made = []
    for name, options in (("one", []), ("two", ["--batch_size", "3"])):
        output = str(tmp_path / name)
        job = jobs.run_here("prune", given, data, "--config", str(file), "--output", output, *options)
        assert job.code == 0, job
        made.append(load_bundle(output))
    one, two = (each.prototypes.select(["uri", "row", "column", "name"]).to_pylist() for each in made)
    assert one == two
    weights = [each.network.last_layer.weight for each in made]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-5)
    assert [row["name"] for row in one if row["name"]] == ["red bill"]
    record = read_table(str(tmp_path / "one/decisions.parquet"))
    assert record["decide"].to_pylist() == ["drop", "not-this-patch", "name"]

    again = jobs.run_here(
        "prune", str(tmp_path / "one"), data, "--config", str(file), "--output", str(tmp_path / "three")
    )
    assert again.code == 0, again
    said = [line for line in again.out.splitlines() if "doesn't apply" in line]
    assert [line.split()[1] for line in said] == ["1", "2"]
